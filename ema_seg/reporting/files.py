"""How reports are written: whole files or none, under names that every file system takes."""

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ema_seg.errors import DataError

__all__ = ["file_names", "write_file"]

_LONGEST_NAME = 100


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all; its folder is made if missing.

    Raises:
        DataError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # another process may write the same
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)  # which may be what has filled the disk
        raise DataError(f"{path}: cannot be written ({error.strerror}); make room or give permission.") from error


def file_names(names: Iterable[str]) -> list[str]:
    """A file name, without suffix, for each of some free texts such as the names of images or of configurations.

    Letters of ASCII, digits, ``-``, ``.`` and ``_`` stay; what else there is becomes ``_``, folders' slashes too. Names
    that would be the same, also to a file system that ignores case, are numbered: ``a``, ``a~2``.
    """
    taken: set[str] = set()
    safe = []
    for name in names:
        stem = re.sub(r"[^A-Za-z0-9.-]+", "_", name)[:_LONGEST_NAME].lstrip(".") or "_"
        candidate, number = stem, 1
        while candidate.lower() in taken:
            number += 1
            candidate = f"{stem}~{number}"
        taken.add(candidate.lower())
        safe.append(candidate)
    return safe
