"""Run of ``workers.share`` in 1, 2 and 3 processes: python tests/runtime/distributed/share.py <data> <folder>."""

import sys
from pathlib import Path

import torch

from ema_seg.runtime.distributed.spawn import run_together
from tests.runtime.distributed import workers

if __name__ == "__main__":
    root, folder = map(Path, sys.argv[1:])
    values = 100 + torch.randn(6, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    for count in (1, 2, 3):
        own = folder / str(count)
        own.mkdir()
        if count == 1:
            workers.share(root, own, values)
        else:
            run_together(workers.share, count, root, own, values)
