"""Optional dependencies: the command that installs them."""

from pathlib import Path

__all__ = ["install_command"]

_ROOT = Path(__file__).resolve().parents[2]


def install_command(extra: str) -> str:
    """Return the command that installs an extra of this project, in a clone or beside an installed wheel."""
    clone = (_ROOT / "pyproject.toml").is_file() and (_ROOT / "ema_seg").is_dir()
    return f"pip install -e '{_ROOT}[{extra}]'" if clone else f"pip install 'ema-seg[{extra}]'"
