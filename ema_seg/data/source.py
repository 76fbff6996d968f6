"""Files of a data set, read from a folder or, without unpacking, from a zip archive.

A :class:`Source` lists and reads members by their relative POSIX name (``leftImg8bit/train/aachen/….png``),
so that a data set's code is the same for both. Sources are safe in ``DataLoader`` workers under every start
method: they pickle without open handles, and an archive is opened once per process.
"""

import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ema_seg.runtime.errors import DataError

__all__ = ["IMAGE_FORMATS", "File", "FolderSource", "Source", "ZipSource"]

IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Allowlist of image formats, by Pillow's names. For others Pillow may start programs (Ghostscript for EPS), whatever
the file's suffix."""

# Files and folders that operating systems and network disks add, in lower case; never part of a data set.
_SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini"}
_SYSTEM_FOLDERS = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"}

# Limit in bytes for an unpacked archive member, far beyond any image.
_LARGEST_MEMBER = 2**29


class Source(ABC):
    """Read-only tree of files at ``path``.

    Hidden files (a leading dot) and system files (``Thumbs.db``, ``__MACOSX/``) are not listed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @abstractmethod
    def files(self, folder: str) -> list[str]:
        """List the names of all files under ``folder``, at any depth, sorted; empty if the folder does not exist.

        Raises:
            DataError: A folder, or the archive, cannot be listed, or a name is not UTF-8.
        """

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Read the content of one file.

        Raises:
            DataError: The file is missing or cannot be read.
        """

    @abstractmethod
    def stamp(self, name: str) -> tuple[int, int]:
        """Return two numbers that change with the file's content: size and time, or size and checksum.

        A missing file has the stamp (-1, -1).
        """

    def locate(self, name: str) -> str:
        """Return the path of ``name``, for messages; a member's name follows its archive's path."""
        return str(self.path / name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"


class FolderSource(Source):
    """Files under a folder."""

    def files(self, folder: str) -> list[str]:
        """List files, following symbolic links; see :meth:`Source.files`."""
        top = self.path / folder

        def refuse(error: OSError) -> None:
            if not (isinstance(error, FileNotFoundError | NotADirectoryError) and Path(error.filename) == top):
                raise DataError(f"{error.filename}: cannot be listed ({error.strerror}).") from error

        walk = os.walk(top, onerror=refuse, followlinks=True)
        found = [(Path(parent) / name).relative_to(self.path) for parent, _, names in walk for name in names]
        for name in found:
            if not _is_text(str(name)):
                raise DataError(f"{str(self.path / name)!r}: the name is not valid UTF-8; rename it.")
        return sorted(name.as_posix() for name in found if _is_listed(name))

    def read(self, name: str) -> bytes:
        """Read a file; see :meth:`Source.read`."""
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise DataError(f"{self.locate(name)}: cannot be read ({error.strerror or error}).") from error

    def stamp(self, name: str) -> tuple[int, int]:
        """Return size in bytes and modification time in nanoseconds; see :meth:`Source.stamp`."""
        try:
            status = (self.path / name).stat()
        except OSError:
            return -1, -1
        return status.st_size, status.st_mtime_ns


class ZipSource(Source):
    """Members of a zip archive, read in place.

    An archive with a member path outside it is refused, because names of members become names of written files. A
    member is refused if it unpacks to 512 MiB or more, or if its decompression cannot be bounded (neither stored nor
    deflated).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._archive: zipfile.ZipFile | None = None
        self._opened_by = 0

    def files(self, folder: str) -> list[str]:
        """List members; see :meth:`Source.files`."""
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        names = (info.filename for info in self._open().infolist() if not info.is_dir())
        return sorted(name for name in names if name.startswith(prefix) and _is_listed(PurePosixPath(name)))

    def read(self, name: str) -> bytes:
        """Read a member and verify its checksum; see :meth:`Source.read`."""
        try:
            member = self._open().getinfo(name)
            if member.file_size >= _LARGEST_MEMBER:
                raise DataError(
                    f"{self.locate(name)}: unpacks to {member.file_size >> 20} MiB, expected an image of less than "
                    f"{_LARGEST_MEMBER >> 20} MiB; remove it from the archive."
                )
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # Other decompressors have no size limit: a small member could fill the memory.
                raise DataError(
                    f"{self.locate(name)}: unsupported zip compression; expected stored or deflated; pack the "
                    "archive again."
                )
            with self._open().open(member) as file:
                # A bounded read: the compressed data may unpack to more than the header states.
                return file.read(member.file_size + 1)
        except KeyError as error:
            raise DataError(f"{self.locate(name)}: the archive has no such member.") from error
        # RuntimeError: the member is encrypted, or (NotImplementedError) uses a zip feature Python lacks.
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
            raise DataError(f"{self.locate(name)}: cannot be read from the archive ({error}).") from error

    def stamp(self, name: str) -> tuple[int, int]:
        """Return size in bytes and checksum of a member; see :meth:`Source.stamp`."""
        try:
            member = self._open().getinfo(name)
        except KeyError:
            return -1, -1
        return member.file_size, member.CRC

    def _open(self) -> zipfile.ZipFile:
        # Each process opens the archive itself: a handle inherited by fork shares its file position, so that
        # two processes would read each other's bytes.
        if self._archive is None or self._opened_by != os.getpid():
            try:
                archive = zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, OSError) as error:
                raise DataError(f"{self.path}: cannot be opened as a zip archive ({error}).") from error
            for name in archive.namelist():
                if _leads_out(name):
                    raise DataError(
                        f"{self.locate(name)}: the member's path points outside the archive; do not use this archive."
                    )
            self._archive, self._opened_by = archive, os.getpid()
        return self._archive

    def __reduce__(self) -> tuple[type["ZipSource"], tuple[Path]]:
        return ZipSource, (self.path,)  # without the open archive


class File(NamedTuple):
    """One file of a source."""

    source: Source
    name: str

    def read(self) -> bytes:
        """Read the content; raise DataError like :meth:`Source.read`."""
        return self.source.read(self.name)

    def __str__(self) -> str:
        return self.source.locate(self.name)


def _leads_out(name: str) -> bool:
    # By the path rules of all operating systems: the archive may come from another one.
    return name.startswith(("/", "\\")) or name[1:2] == ":" or ".." in name.replace("\\", "/").split("/")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # surrogates stand for the undecodable bytes of such names
        return False
    return True


def _is_listed(name: Path | PurePosixPath) -> bool:
    hidden = any(part.startswith(".") or part.lower() in _SYSTEM_FOLDERS for part in name.parts)
    return not hidden and name.name.lower() not in _SYSTEM_FILES
