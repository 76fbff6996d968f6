import errno
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from ema_seg.data.source import File, FolderSource, Source, ZipSource
from ema_seg.runtime.errors import DataError

FILES = {"a/x.txt": b"one", "a/b/y.txt": b"two", "c/z.txt": b"three"}
UNLISTED = ["a/.hidden", "a/Thumbs.db", "a/thumbs.DB", "@eaDir/a/x.txt", "__MACOSX/a/x.txt", ".git/config"]


@pytest.fixture
def folder(tmp_path: Path) -> FolderSource:
    for name in [*FILES, *UNLISTED]:
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(FILES.get(name, b""))
    return FolderSource(tmp_path / "folder")


@pytest.fixture
def archive(tmp_path: Path) -> ZipSource:
    with zipfile.ZipFile(tmp_path / "files.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.mkdir("a")
        for name in [*FILES, *UNLISTED]:
            packed.writestr(name, FILES.get(name, b""))
    return ZipSource(tmp_path / "files.zip")


@pytest.fixture(params=["folder", "archive"])
def source(request: pytest.FixtureRequest) -> Source:
    return request.getfixturevalue(request.param)


def test_lists_and_reads_the_same_names_from_folder_and_archive(source: Source) -> None:
    assert source.files("") == ["a/b/y.txt", "a/x.txt", "c/z.txt"]
    assert source.files("a") == ["a/b/y.txt", "a/x.txt"]
    assert source.files("nowhere") == []
    assert [source.read(name) for name in FILES] == list(FILES.values())


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(folder: FolderSource, monkeypatch) -> None:
    def scandir(path):
        if Path(path).name == "b":
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return listed(path)

    listed = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError) as raised:
        folder.files("a")
    assert str(raised.value) == f"{folder.path / 'a/b'}: cannot be listed (Input/output error)."


def test_a_name_that_is_not_text_is_named(folder: FolderSource) -> None:
    os.close(os.open(bytes(folder.path / "a") + b"/\xff.png", os.O_CREAT | os.O_WRONLY))
    with pytest.raises(DataError, match=r"a/\\udcff\.png'\)?: the name is not valid UTF-8; rename it"):
        folder.files("a")


def test_a_missing_file_is_named(source: Source) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        source.read("a/nowhere.txt")


def test_files_survive_pickling(source: Source) -> None:
    file = File(source, "a/x.txt")
    file.read()  # opens the source if it is an archive
    again = pickle.loads(pickle.dumps(file))
    assert again.read() == b"one"
    assert str(again) == str(file) == str(source.path / "a/x.txt")


def test_an_archive_is_opened_once_per_process(archive: ZipSource) -> None:
    archive.read("a/x.txt")
    opened = archive._open()
    assert archive._open() is opened
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # the child reports whether it opened its own handle, and the bytes it read
        os.write(writer, b"%d" % (archive._open() is not opened) + archive.read("c/z.txt"))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 100) == b"1three"
    assert archive.read("a/b/y.txt") == b"two"


def test_a_damaged_member_is_named(archive: ZipSource) -> None:
    content = bytearray(archive.path.read_bytes())
    with zipfile.ZipFile(archive.path) as packed:
        info = packed.getinfo("c/z.txt")
    content[info.header_offset + 30 + len(info.filename)] ^= 0xFF
    archive.path.write_bytes(content)
    with pytest.raises(DataError, match=r"files\.zip.c.z\.txt: cannot be read from the archive"):
        archive.read("c/z.txt")


def test_a_file_that_is_no_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.zip").write_bytes(b"not a zip")
    with pytest.raises(DataError, match=r"broken\.zip: cannot be opened as a zip archive"):
        ZipSource(tmp_path / "broken.zip").files("")


@pytest.mark.parametrize("name", ["../out.png", "a/../../out.png", "/etc/out.png", "C:out.png", "a\\..\\out.png"])
def test_an_archive_with_a_name_that_leads_out_of_it_is_refused(name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "files.zip", "w") as packed:
        packed.writestr("a/x.txt", b"one")
        packed.writestr(name, b"two")
    source = ZipSource(tmp_path / "files.zip")
    for ask in (lambda: source.files("a"), lambda: source.read("a/x.txt")):
        with pytest.raises(DataError, match=r"out\.png: the member's path points outside the archive"):
            ask()


@pytest.fixture(scope="module")
def bomb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small zip archive that unpacks to half a gibibyte of zeros."""
    path = tmp_path_factory.mktemp("bomb") / "bomb.zip"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed,
        packed.open("zeros.png", "w") as member,
    ):
        for _ in range(2**9):
            member.write(bytes(2**20))
    return path


def test_a_bomb_is_not_unpacked(bomb: Path) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"zeros\.png: unpacks to 512 MiB, expected .* less than 512 MiB"):
            ZipSource(bomb).read("zeros.png")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_what_unpacks_without_a_limit_is_not_read(compression: int, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "files.zip", "w", compression) as packed:
        packed.writestr("zeros.png", bytes(2**20))
    with pytest.raises(DataError, match=r"zeros\.png: unsupported zip compression; .*pack the archive again"):
        ZipSource(tmp_path / "files.zip").read("zeros.png")


def test_a_bomb_that_says_that_it_is_small_is_not_unpacked(bomb: Path, tmp_path: Path) -> None:
    content = bytearray(bomb.read_bytes())
    (directory,) = struct.unpack_from("<I", content, content.rindex(b"PK\x05\x06") + 16)
    struct.pack_into("<I", content, directory + 24, 1000)
    (tmp_path / "bomb.zip").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"zeros\.png: cannot be read from the archive"):
            ZipSource(tmp_path / "bomb.zip").read("zeros.png")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
