"""Environment of a result: versions, device, code and command line."""

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import ema_seg
from ema_seg.runtime.distributed.ranks import rank_info

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
    """Collect the facts needed to repeat a result or to compare with it.

    Args:
        device: device that the model runs on.

    Returns:
        A dict of plain values, ready for JSON: ``python``, ``os``, ``packages`` (version by name, None if not
        installed), ``device`` (type and name), ``processes`` (the world size), ``threads`` per process, ``cuda`` and
        ``cudnn`` (None without CUDA), ``git`` (``commit`` of the running code and whether it is ``dirty``; None
        outside a git checkout) and ``command``.
    """
    return {
        "python": platform.python_version(),
        "os": platform.platform(),
        "packages": {"ema-seg": ema_seg.__version__} | {name: _version(name) for name in _PACKAGES},
        "device": describe_device(device),
        "processes": rank_info().size,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "git": _git_state(),
        "command": list(sys.argv),
    }


def describe_device(device: torch.device | str) -> dict[str, str]:
    """Return the type ("cpu", "cuda", ...) and the product name of a device."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"type": device.type, "name": name}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Return the CPU's product name, which ``platform.processor`` lacks on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git_state() -> dict[str, Any] | None:
    """Return the commit of the running code and whether tracked files differ from it; None if untracked."""
    # A copy installed inside another project's checkout is untracked there; that project's commit is irrelevant.
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
