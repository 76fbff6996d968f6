"""One GPU to each process of a sweep on one machine."""

import os
import time
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["count_devices", "deal_device"]

_held: list[FileLock] = []  # for as long as this process lives


def count_devices() -> int:
    """The CUDA devices that this process may use."""
    import torch

    return torch.cuda.device_count()


def deal_device(folder: Path) -> str | None:
    """Take a CUDA device that no other process of the sweep has, and keep it until this process ends.

    To be called before anything is computed on a device: a process cannot change its device later. Where there are
    more processes than devices, one waits for another to end.

    Args:
        folder: of the sweep, where a lock for each device is.

    Returns:
        The device's name in ``CUDA_VISIBLE_DEVICES``; None on a machine without CUDA.
    """
    if _held:
        return os.environ["CUDA_VISIBLE_DEVICES"]
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = listed.split(",") if listed else [str(index) for index in range(count_devices())]
    while devices:
        for device in devices:
            lock = FileLock(folder / f"device-{device.strip()}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            _held.append(lock)
            os.environ["CUDA_VISIBLE_DEVICES"] = device
            return device
        time.sleep(1)
    return None
