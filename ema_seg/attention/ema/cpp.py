"""Fused CPU kernels of EMA's short form, compiled at their first use.

The system's C++ compiler compiles ``kernels/kernels.cpp`` for exactly this processor. The library is cached in a folder
of the user, under a hash of the sources, the command and the compiler's macros. The kernels use the OpenMP runtime that
PyTorch has loaded, with as many threads as PyTorch.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import struct
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ema_seg.attention.ema.reference import Parameters
from ema_seg.runtime.errors import ModelError, one_line

__all__ = ["CACHE_VARIABLE", "backward", "forward", "unavailable"]

CACHE_VARIABLE = "EMA_SEG_CACHE"

_SOURCE = Path(__file__).parent / "kernels" / "kernels.cpp"
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = (
    "-std=c++17",
    "-O3",
    # Clang's flag for the native processor depends on the architecture.
    "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native",
    "-fopenmp",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
)
# As in run_in of kernels.cpp and in struct Call of layout.h.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_CALL = struct.Struct("=9qd17Q")


def unavailable(x: Tensor) -> str | None:
    """Return why these kernels cannot compute ``x``, as a clause, or None if they can; compile them if needed."""
    if x.device.type != "cpu":
        return f"the tensor is on {x.device}, and these kernels are for CPUs"
    if x.dtype not in _DTYPES:
        return f"the kernels do not support {x.dtype}"
    return _load_library().problem


def forward(x: Tensor, parameters: Parameters, groups: int, eps: float, dynamic: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Re-weight ``x``; see ``operator.Kernels``."""
    batch, channels, height, width = x.shape
    count, y = batch * groups, torch.empty_like(x)
    means = parameters.w1.new_empty((count, channels // groups, height + width))
    moments = parameters.w1.new_empty((2, count, channels // groups))
    _call_kernel("ema_forward", (x, None, y, means, moments, *parameters), groups, eps, dynamic)
    return y, means, moments


def backward(
    dy: Tensor,
    x: Tensor,
    means: Tensor,
    moments: Tensor,
    parameters: Parameters,
    groups: int,
    eps: float,
    dynamic: bool,
) -> tuple[Tensor, Parameters]:
    """Compute the gradients of ``x`` and of the parameters; see ``operator.Kernels``."""
    dx, gradients = torch.empty_like(x), Parameters(*map(torch.empty_like, parameters))
    _call_kernel("ema_backward", (x, dy, dx, means, moments, *parameters, *gradients), groups, eps, dynamic)
    return dx, gradients


def _call_kernel(function: str, tensors: tuple[Tensor | None, ...], groups: int, eps: float, dynamic: bool) -> None:
    x = tensors[0]
    assert x is not None
    library = _load_library()
    if library.loaded is None or x.dtype not in _DTYPES:
        raise ModelError(f"EMA's C++ kernels cannot be used: {unavailable(x)}.")
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    missing = (tensor for tensor, address in zip(tensors, addresses, strict=True) if tensor is not None and not address)
    if any(tensor.numel() for tensor in missing):
        raise ModelError("EMA's C++ kernels cannot compute tensors without storage, such as those of a FakeTensorMode.")
    addresses += [0] * (17 - len(addresses))
    numbers = (groups, _DTYPES[x.dtype], not x.is_contiguous(), dynamic, torch.get_num_threads())
    if getattr(library.loaded, function)(_CALL.pack(*x.shape, *numbers, eps, *addresses)):
        raise ModelError(
            f"EMA's C++ kernels: out of memory for an input of shape {tuple(x.shape)}; use a smaller batch."
        )


class _Library(NamedTuple):
    loaded: ctypes.CDLL | None
    problem: str | None = None  # why it could not be loaded


@cache
def _load_library() -> _Library:
    """Load the kernels, compiling them unless cached; a failure is cached too."""
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        problem = f"the environment variable CXX cannot be parsed as a command ({one_line(error)}); correct or unset it"
        return _Library(None, problem)
    command = named or next(([name] for name in _COMPILERS if shutil.which(name)), [])
    if not command:
        return _Library(None, f"there is no C++ compiler (none of {', '.join(_COMPILERS)} is installed)")
    command += _FLAGS
    try:
        source = b"".join(file.read_bytes() for file in sorted([_SOURCE, *_SOURCE.parent.glob("*.h")]))
        # The macros identify the compiler, its version and the features of the native processor.
        macros = _run_command([*command, "-dM", "-E", "-x", "c++", os.devnull])
        build_hash = hashlib.sha256(b"\0".join([source, shlex.join(command).encode(), macros])).hexdigest()
        path = _cache_folder() / f"ema-{build_hash[:32]}.so"
        if path.exists():
            try:
                return _Library(_load(path))
            except OSError:  # a file truncated by a crash, for example
                pass
        _compile([*command, "-shared", "-fPIC", str(_SOURCE)], path)
        return _Library(_load(path))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {error.returncode}"]
        said = next((line for line in lines if "error" in line), lines[0])
        return _Library(None, f"the C++ compiler failed ({command[0]}: {said.strip()})")
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:  # RuntimeError: there is no home folder
        return _Library(None, f"the kernels could not be compiled ({one_line(error)})")


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


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for function in (library.ema_forward, library.ema_backward):
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
    return library
