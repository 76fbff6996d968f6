"""Tests of compiling C++ kernels: a failure is reported as a clause and leaves no partial file."""

import re
import stat

import pytest
import torch

from ema_seg.attention import EMA
from ema_seg.attention.ema import choice
from ema_seg.attention.ema import cpp as cpp_kernels
from ema_seg.runtime import cpp
from ema_seg.runtime.errors import ModelError

SOURCE = """
extern "C" int ema_forward(const char*) { return 0; }
extern "C" int ema_backward(const char*) { return 0; }
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Use a tiny source and a cache folder that does not exist yet; return the folder."""
    source = tmp_path / "kernels.cpp"
    source.write_text(SOURCE)
    monkeypatch.setattr(cpp_kernels, "_SOURCE", source)
    monkeypatch.setenv(cpp.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def library():
    """Load the library without functools.cache, as at the first call in a process."""
    return cpp.load_library.__wrapped__(cpp_kernels._SOURCE)


def compiler(folder, name, script):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_kernels_are_compiled_once_and_then_found(cache, monkeypatch):
    assert library().problem is None
    (made,) = cache.iterdir()
    written = made.stat().st_mtime_ns

    monkeypatch.setattr(cpp, "_compile", None)  # a call would fail

    assert library().problem is None
    assert made.stat().st_mtime_ns == written


def test_another_source_is_compiled_anew(cache):
    library()
    cpp_kernels._SOURCE.write_text(SOURCE + "// changed\n")

    assert library().problem is None
    assert len(list(cache.iterdir())) == 2


def test_a_damaged_library_is_made_again(cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpp.ctypes, "CDLL", lambda path: None)  # a loaded library would be found without reading the file
        library()
    (made,) = cache.iterdir()
    made.write_bytes(b"half a file")

    found = library()

    assert found.problem is None
    assert made.stat().st_size > 1000


def test_an_interrupted_compilation_leaves_nothing_that_could_be_loaded(cache, tmp_path, monkeypatch):
    script = (
        'for last; do :; done; case "$*" in *-shared*) echo half > "$last"; echo "error: no space" >&2; exit 1; esac'
    )
    monkeypatch.setenv("CXX", str(compiler(tmp_path, "interrupted", script)))

    assert "error: no space" in library().problem
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("cxx", "problem"),
    [
        ("no-such-compiler", r"could not be compiled \(.*no-such-compiler"),
        ("false", r"the C\+\+ compiler failed \(false: exit status 1\)"),
        ("c++ -fno-such-option", r"the C\+\+ compiler failed \(c\+\+: .*error.*no-such-option"),
        ("c++ 'unfinished", r"CXX cannot be parsed as a command \(No closing quotation\); correct"),
    ],
)
def test_a_compiler_that_cannot_be_used_is_named(cache, monkeypatch, cxx, problem):
    monkeypatch.setenv("CXX", cxx)

    found = library()

    assert found.loaded is None
    assert re.search(problem, found.problem)


def test_a_machine_without_a_compiler_is_told_which_would_do(cache, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))

    assert library().problem == "there is no C++ compiler (none of c++, g++, clang++ is installed)"


def test_errors_in_the_source_are_quoted(cache):
    cpp_kernels._SOURCE.write_text("int wrong(")

    assert "kernels.cpp:1" in library().problem
    assert "error" in library().problem


def test_a_cache_that_is_a_file_is_named(cache):
    cache.write_text("not a folder")

    assert str(cache) in library().problem


def test_the_cache_is_the_users_unless_a_variable_says_otherwise(monkeypatch, tmp_path):
    monkeypatch.delenv(cpp.CACHE_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cpp._cache_folder() == tmp_path / ".cache" / "ema_seg"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cached"))
    assert cpp._cache_folder() == tmp_path / "cached" / "ema_seg"

    monkeypatch.setenv(cpp.CACHE_VARIABLE, "~/own")
    assert cpp._cache_folder() == tmp_path / "own"


def test_without_the_kernels_auto_computes_with_pytorch_and_a_request_for_them_says_why(cache, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setattr(cpp_kernels, "load_library", cpp.load_library.__wrapped__)
    monkeypatch.setattr(cpp_kernels, "_load_kernels", cpp_kernels._load_kernels.__wrapped__)
    monkeypatch.setattr(choice, "_reason_unavailable", choice._reason_unavailable.__wrapped__)
    monkeypatch.setattr(choice, "KERNELS", {"cpp": "cpp", "factorised": "factorised"})
    x = torch.zeros(1, 8, 3, 3)

    assert EMA(8, factor=2).implementation_for(x) == "factorised"
    with pytest.raises(ModelError, match=r"'cpp' cannot be used: the C\+\+ compiler failed .*implementation=auto"):
        EMA(8, factor=2, implementation="cpp")(x)
