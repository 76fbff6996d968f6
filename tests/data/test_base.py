import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ema_seg.data.base import decode_image, decode_mask
from ema_seg.data.source import File, FolderSource
from ema_seg.errors import DataError, Preempted
from tests.data.builders import random_image, truncate


def as_file(path: Path) -> File:
    return File(FolderSource(path.parent), path.name)


def write_grey_png(path: Path, bits: int, row: bytes, width: int) -> None:
    """A one-row greyscale PNG of fewer than 8 bits a pixel, which Pillow reads but does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "bmp"])
def test_images_of_lossless_formats_are_decoded_exactly(tmp_path: Path, suffix: str) -> None:
    image = random_image(0)
    Image.fromarray(image).save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(decode_image(as_file(tmp_path / f"a.{suffix}")), image)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_of_every_colour_mode_become_rgb(tmp_path: Path, mode: str) -> None:
    smooth = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
    stored = Image.fromarray(smooth).convert(mode)
    stored.save(tmp_path / "a.jpg", quality=100)
    image = decode_image(as_file(tmp_path / "a.jpg"))
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    difference = image.astype(int) - np.array(stored.convert("RGB")).astype(int)
    assert np.abs(difference).mean() < 3


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_pngs_of_every_colour_mode_become_rgb(tmp_path: Path, mode: str) -> None:
    Image.fromarray(random_image(0)).convert(mode).save(tmp_path / "a.png")
    assert decode_image(as_file(tmp_path / "a.png")).shape == (12, 16, 3)


def test_an_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(random_image(0)).save(tmp_path / "a.jpg", exif=exif)
    assert decode_image(as_file(tmp_path / "a.jpg")).shape == (12, 16, 3)


def test_a_16_bit_image_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 1000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png: the image has mode I;16, expected 8 bits a channel"):
        decode_image(as_file(tmp_path / "deep.png"))


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_a_truncated_image_is_named(tmp_path: Path, name: str) -> None:
    Image.fromarray(random_image(0, 64, 64)).save(tmp_path / name)
    with pytest.raises(DataError, match=rf"{name}: cannot be decoded as an image"):
        decode_image(as_file(truncate(tmp_path / name)))


@pytest.mark.parametrize("content", [b"", b"plain text", b"\xff\xd8\xff\xd9"])
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jpg: cannot be decoded as an image"):
        decode_image(as_file(tmp_path / "a.jpg"))


def test_an_image_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")  # 50 kB
    for decode in (decode_image, decode_mask):
        with pytest.raises(DataError, match=r"huge\.png: cannot be decoded .*400000000 pixels"):
            decode(as_file(tmp_path / "huge.png"))


def test_what_starts_programs_is_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*arguments: object, **keywords: object) -> None:
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", start)
    Image.fromarray(random_image(0)).save(tmp_path / "a.jpg", format="EPS")
    for decode in (decode_image, decode_mask):
        with pytest.raises(DataError, match=r"a\.jpg: cannot be decoded .*cannot identify image file"):
            decode(as_file(tmp_path / "a.jpg"))


def test_a_signal_while_a_file_is_decoded_is_no_defect_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(*arguments: object, **keywords: object) -> None:
        raise Preempted("stopped by SIGTERM.")

    monkeypatch.setattr(Image, "open", leave)
    (tmp_path / "a.jpg").touch()
    for decode in (decode_image, decode_mask):
        with pytest.raises(Preempted):
            decode(as_file(tmp_path / "a.jpg"))


def test_palette_masks_give_their_indices(tmp_path: Path) -> None:
    mask = np.array([[0, 1, 2], [2, 255, 7]], dtype=np.uint8)
    stored = Image.fromarray(mask).convert("P")
    stored.putpalette([value for index in range(256) for value in (255 - index, index, 77)])
    stored.save(tmp_path / "a.png")
    np.testing.assert_array_equal(decode_mask(as_file(tmp_path / "a.png")), mask)


@pytest.mark.parametrize(
    ("bits", "row", "values"),
    [(1, b"\x50", [0, 1, 0, 1]), (2, b"\x1b", [0, 1, 2, 3]), (4, b"\x01\x2f", [0, 1, 2, 15])],
)
def test_grey_masks_of_few_bits_give_their_stored_values(
    tmp_path: Path, bits: int, row: bytes, values: list[int]
) -> None:
    write_grey_png(tmp_path / "a.png", bits, row, width=4)
    assert decode_mask(as_file(tmp_path / "a.png")).tolist() == [values]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_masks_give_their_values(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.array([[0, 255]], dtype=np.uint16)).save(path)
    assert decode_mask(as_file(path)).tolist() == [[0, 255]]
    Image.fromarray(np.array([[0, 26001]], dtype=np.uint16)).save(path)
    with pytest.raises(DataError, match=rf"a\.{suffix}: mask value 26001 .* from 0 to 255"):
        decode_mask(as_file(path))


def test_a_truncated_mask_is_named(tmp_path: Path) -> None:
    Image.fromarray(random_image(0, 64, 64)[..., 0]).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: cannot be decoded as a mask"):
        decode_mask(as_file(truncate(tmp_path / "a.png")))


def test_a_mask_of_another_mode_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif: the mask has mode F, expected grey, palette or RGB"):
        decode_mask(as_file(tmp_path / "a.tif"))
