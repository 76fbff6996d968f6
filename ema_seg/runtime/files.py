"""Report files: written atomically, under portable names, and never over foreign files."""

import json
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath

from ema_seg.runtime.errors import DataError, one_line
from ema_seg.runtime.texts import read_json

__all__ = ["Manifest", "file_names", "write_file"]

_LONGEST_NAME = 100
_SCHEMA = "ema-seg.files/1"


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically; create its folder if missing.

    Raises:
        DataError: the file cannot be written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # another process may write the same file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)  # the partial file may have filled the disk
        raise DataError(f"{path}: cannot be written ({error.strerror}); free disk space or give permission.") from error


class Manifest:
    """List of the files that this project has written into a folder: it replaces and removes no others there.

    The list is kept in ``written_files.json``. A file is listed before it is written, so that a kill leaves no file
    that is not listed.

    Args:
        directory: the folder, which need not exist.
        earlier: returns the files that an earlier version has written into a folder without a manifest.

    Attributes:
        files: paths relative to the folder.

    Raises:
        DataError: the manifest cannot be read or is not one of this project.
    """

    def __init__(self, directory: Path, earlier: Callable[[Path], Iterable[str]] = lambda directory: ()) -> None:
        self.directory = directory
        self._path = directory / "written_files.json"
        try:
            content = read_json(self._path)
            if content["schema"] != _SCHEMA:
                raise ValueError(f"its schema is not {_SCHEMA!r}")
            files = [str(file) for file in content["files"]]
        except (FileNotFoundError, NotADirectoryError):
            files = list(earlier(directory))
        except (OSError, KeyError, TypeError, ValueError, DataError) as error:
            raise DataError(
                f"{self._path}: is not a list of files that ema-seg wrote ({one_line(error).rstrip('.')}); choose "
                "another folder."
            ) from error
        self.files = {file for file in files if _is_inside(file)}

    def check(self, files: Iterable[str]) -> None:
        """Raise a DataError if one of the files exists and was not written by this project."""
        for file in files:
            if file not in self.files and os.path.lexists(self.directory / file):
                raise DataError(
                    f"{self.directory / file}: exists, was not written by ema-seg and would be overwritten; move it, "
                    "or choose another folder."
                )

    def claim(self, files: Iterable[str]) -> None:
        """Add files that are about to be written.

        Raises:
            DataError: one of the files exists and was not written by this project, or the manifest cannot be written.
        """
        new = set(files) - self.files
        self.check(sorted(new))
        if new:
            self.files |= new
            self._save()

    def remove(self, files: Iterable[str]) -> None:
        """Remove the files, except those that this project has not written."""
        own = set(files) & self.files
        for file in own:
            (self.directory / file).unlink(missing_ok=True)
        if own:
            self.files -= own
            self._save()

    def _save(self) -> None:
        content = {"schema": _SCHEMA, "files": sorted(self.files)}
        write_file(self._path, f"{json.dumps(content, indent=1)}\n".encode())


def _is_inside(file: str) -> bool:
    path = PurePosixPath(file)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def file_names(names: Iterable[str]) -> list[str]:
    """Return a unique file name, without suffix, for each text, such as the name of an image.

    ASCII letters, digits, ``-`` and ``.`` stay; any other characters in a row, slashes included, become one ``_``. A
    name is cut at 100 characters and loses leading dots. Names that are the same but for case are numbered: ``a``,
    ``a~2``.
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
