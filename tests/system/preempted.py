"""Training of two ranks; rank 0 receives SIGTERM: python tests/system/preempted.py <config> <run> <folder>."""

import json
import sys
from pathlib import Path

from ema_seg.cli.command_line import reports_errors
from ema_seg.runtime.distributed.spawn import run_together
from tests.runtime.distributed import workers

if __name__ == "__main__":
    config, run, folder = map(Path, sys.argv[1:])
    reports_errors(run_together)(workers.train, 2, json.loads(config.read_text()), run, folder)
