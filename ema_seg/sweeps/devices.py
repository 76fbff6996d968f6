"""One GPU to each process of a sweep on one machine."""

import itertools
import os
import re
from pathlib import Path
from socket import gethostname

from filelock import FileLock, Timeout

__all__ = ["count_devices", "deal_device"]

_held: list[FileLock] = []  # for as long as this process lives


def count_devices() -> int:
    """The CUDA devices that this process may use."""
    import torch

    return torch.cuda.device_count()


def deal_device(folder: Path) -> str | None:
    """Take the CUDA device that the fewest other processes of the sweep have, and keep it until this process ends.

    To be called before anything is computed on a device: a process cannot change its device later.

    Args:
        folder: of the sweep, where a lock for each device is.

    Returns:
        The device's name in ``CUDA_VISIBLE_DEVICES``; None on a machine without CUDA.
    """
    if _held:
        return os.environ["CUDA_VISIBLE_DEVICES"]
    count = count_devices()
    if not count:
        return None
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = listed.split(",") if listed else map(str, range(count))
    # CUDA takes names up to the first that is no device.
    names = [device.strip() for device in devices][:count]
    # A second process on a device only where each device has one, and so on: as many processes as the user asked for.
    for turn in itertools.count():
        for name in names:
            file = re.sub(r"[^\w-]", "-", f"device-{gethostname()}-{name}-{turn}")
            lock = FileLock(folder / f"{file}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            _held.append(lock)
            os.environ["CUDA_VISIBLE_DEVICES"] = name
            return name
    raise AssertionError("there is always one more turn")
