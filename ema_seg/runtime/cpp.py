"""C++ kernels that are compiled at their first use.

The system's C++ compiler compiles a source for exactly this processor. The library is cached in a folder of the user,
under a hash of the sources, the command and the compiler's macros. Kernels use the OpenMP runtime that PyTorch has
loaded.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ema_seg.runtime.errors import one_line

__all__ = ["CACHE_VARIABLE", "Library", "load_library"]

CACHE_VARIABLE = "EMA_SEG_CACHE"

_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = (
    "-std=c++17",
    "-O3",
    # Clang's flag for the native processor depends on the architecture.
    "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
)


class Library(NamedTuple):
    """A loaded library, or why there is none, as a clause."""

    loaded: ctypes.CDLL | None
    problem: str | None = None


@cache
def load_library(source: Path, *flags: str) -> Library:
    """Load the kernels of a source, compiling them unless cached; a failure is cached too.

    Args:
        source: a C++ file; headers lie beside it.
        flags: further flags of the compiler.
    """
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        problem = f"the environment variable CXX cannot be parsed as a command ({one_line(error)}); correct or unset it"
        return Library(None, problem)
    command = named or next(([name] for name in _COMPILERS if shutil.which(name)), [])
    if not command:
        return Library(None, f"there is no C++ compiler (none of {', '.join(_COMPILERS)} is installed)")
    command += [*_FLAGS, *flags]
    try:
        text = b"".join(file.read_bytes() for file in sorted([source, *source.parent.glob("*.h")]))
        # The macros identify the compiler, its version and the features of the native processor.
        macros = _run_command([*command, "-dM", "-E", "-x", "c++", os.devnull])
        build_hash = hashlib.sha256(b"\0".join([text, shlex.join(command).encode(), macros])).hexdigest()
        path = _cache_folder() / f"{source.stem}-{build_hash[:32]}.so"
        if path.exists():
            try:
                return Library(ctypes.CDLL(str(path)))
            except OSError:  # a file truncated by a crash, for example
                pass
        _compile([*command, "-shared", "-fPIC", str(source)], path)
        return Library(ctypes.CDLL(str(path)))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {error.returncode}"]
        said = next((line for line in lines if "error" in line), lines[0])
        return Library(None, f"the C++ compiler failed ({command[0]}: {said.strip()})")
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:  # RuntimeError: there is no home folder
        return Library(None, f"the kernels could not be compiled ({one_line(error)})")


def _cache_folder() -> Path:
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ema_seg"


def _compile(command: list[str], path: Path) -> None:
    """Compile the library to ``path`` atomically, so that concurrent processes do not conflict."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="compiling-") as folder:
        made = Path(folder) / path.name
        _run_command([*command, "-o", str(made)])
        made.replace(path)


def _run_command(command: list[str]) -> bytes:
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(command, check=True, capture_output=True, timeout=600, env=environment).stdout
