"""The device of a model."""

import torch

from ema_seg.runtime.distributed.ranks import rank_info
from ema_seg.runtime.errors import ConfigError

__all__ = ["find_device"]


def find_device(name: str, key: str = "evaluation.device") -> torch.device:
    """Return the device for a value of the setting ``key``.

    Raises:
        ConfigError: this machine does not have the device, or several ranks would share it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu")
    try:
        device = torch.device("cuda" if name == "gpu" else name)
        if device.type != "cpu" and device.index is not None and rank_info().size > 1:
            raise ConfigError(
                f"{key}: must have no device number for {rank_info().size} processes, got {name}; set "
                f"{key}={device.type}, and each process uses its own."
            )
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"{key}={name}: cannot be used here ({reason}); use cpu or auto.") from error
    return device
