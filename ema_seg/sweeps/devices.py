"""Assignment of GPUs to the processes of a sweep on one machine."""

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from socket import gethostname

from filelock import FileLock, Timeout

from ema_seg.runtime.errors import ConfigError

__all__ = ["claim_devices", "count_devices"]

_held: list[FileLock] = []  # until this process ends


def count_devices() -> int:
    """Count the CUDA devices that this process may use."""
    import torch

    return torch.cuda.device_count()


def claim_devices(folder: Path, number: int | Sequence[int] = 1) -> str | None:
    """Lock the CUDA devices that the fewest processes of the sweep use, and set ``CUDA_VISIBLE_DEVICES`` to them.

    The devices stay locked until this process ends. Call this before anything is computed on a device: a process cannot
    change its devices later.

    Args:
        folder: the sweep's folder, which holds the locks of the devices.
        number: number of devices; a list of devices is an error.

    Returns:
        The value of ``CUDA_VISIBLE_DEVICES``; None on a machine without CUDA.

    Raises:
        ConfigError: the machine has fewer devices, this process holds another number already, or ``number`` is a list.
    """
    if isinstance(number, Sequence):
        if not count_devices():
            return None
        raise ConfigError(
            f"trainer.devices: must be a number of GPUs per job for launcher=joblib, got the list {list(number)}; set "
            f"trainer.devices={len(number)} and list all GPUs in CUDA_VISIBLE_DEVICES, or use launcher=serial."
        )
    if _held:
        if len(_held) != number:
            raise ConfigError(
                f"trainer.devices: must be the same for all jobs that one launcher process runs, got {number} after "
                f"{len(_held)}; run a sweep for each number, or use launcher=serial."
            )
        return os.environ["CUDA_VISIBLE_DEVICES"]
    count = count_devices()
    if not count:
        return None
    if number > count:
        raise ConfigError(f"trainer.devices: must be at most the {count} GPUs of this machine, got {number}.")
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = listed.split(",") if listed else map(str, range(count))
    # CUDA ignores all names from the first invalid one on.
    names = [device.strip() for device in devices][:count]
    taken: list[str] = []
    # A device gets a second process only when each device has one, and so on.
    for turn in itertools.count():
        for name in names:
            if name in taken or len(taken) == number:
                continue
            file = re.sub(r"[^\w-]", "-", f"device-{gethostname()}-{name}-{turn}")
            lock = FileLock(folder / f"{file}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            _held.append(lock)
            taken.append(name)
        if len(taken) == number:
            break
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(taken)
    return os.environ["CUDA_VISIBLE_DEVICES"]
