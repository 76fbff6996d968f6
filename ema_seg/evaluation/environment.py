"""What a result was obtained with: versions, device, code and command line."""

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import ema_seg
from ema_seg.distributed.start import place

__all__ = ["describe_device", "describe_environment"]

_PACKAGES = (
    "torch",
    "torchvision",
    "segmentation-models-pytorch",
    "timm",
    "lightning",
    "albumentations",
    "numpy",
)


def describe_environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Collect what someone needs to know to repeat a result or to compare with it.

    Args:
        device: where the model runs.

    Returns:
        A dict of plain values, ready for JSON: ``python``, ``os``, ``packages`` (version by name, None if not
        installed), ``device`` (type and name), ``processes`` that work together, ``threads`` of each, ``cuda`` and
        ``cudnn`` (None without), ``git`` (``commit`` of the running code and whether it is ``dirty``; None outside a
        git checkout) and ``command``.
    """
    return {
        "python": platform.python_version(),
        "os": platform.platform(),
        "packages": {"ema-seg": ema_seg.__version__} | {name: _version(name) for name in _PACKAGES},
        "device": describe_device(device),
        "processes": place().size,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "git": _git_state(),
        "command": list(sys.argv),
    }


def describe_device(device: torch.device | str) -> dict[str, str]:
    """Type ("cpu", "cuda", ...) and product name of a device."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"type": device.type, "name": name}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The CPU's product name; ``platform.processor`` does not know it on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git_state() -> dict[str, Any] | None:
    """Commit of the code that runs, and whether tracked files differ from it."""
    # A copy installed into somebody else's checkout is not tracked there, and that commit would tell nothing.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return None if commit is None else {"commit": commit, "dirty": bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
