import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from ema_seg.data.decoding import decode_image, decode_mask, read_traits
from ema_seg.data.source import File, FolderSource
from ema_seg.runtime.errors import DataError, Preempted
from tests.data.builders import random_image, truncate


def as_file(path: Path) -> File:
    return File(FolderSource(path.parent), path.name)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(path: Path, bits: int, row: bytes, width: int, color_type: int = 0, extra: bytes = b"") -> None:
    """Write a one-row PNG of a kind that Pillow can read but not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, color_type, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + extra + data)


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


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_orientation_tags_are_applied_alike_in_all_formats(tmp_path: Path, suffix: str) -> None:
    stored = np.zeros((16, 24, 3), np.uint8)
    stored[:8, :8], stored[8:, 16:] = (250, 0, 0), (0, 0, 250)
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    for orientation in range(10):  # 0 and 9 are not valid tags
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        path = tmp_path / f"{orientation}.{suffix}"
        Image.fromarray(stored).save(path, exif=exif, **options)
        expected = np.array(ImageOps.exif_transpose(Image.open(path)))
        for upright, pixels in ((True, expected), (False, stored)):
            image = decode_image(as_file(path), upright=upright)
            assert image.shape == pixels.shape and image.flags.c_contiguous
            assert np.abs(image.astype(int) - pixels).max() <= 4, (orientation, upright)
            if suffix != "jpg":
                mask = decode_mask(as_file(path), upright=upright)
                np.testing.assert_array_equal(mask, pixels)
        assert read_traits(as_file(path)).orientation == (orientation if 1 <= orientation <= 8 else 1)


def test_damaged_metadata_do_not_spoil_an_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(random_image(0)).save(tmp_path / "a.jpg", exif=exif)
    path = tmp_path / "a.jpg"
    path.write_bytes(path.read_bytes().replace(b"II*\0", b"\xff\xff\xff\xff").replace(b"MM\0*", b"\xff\xff\xff\xff"))
    assert decode_image(as_file(path), upright=True).shape == (12, 16, 3)


@pytest.mark.parametrize(
    ("name", "channels"), [("grey.png", 0), ("rgb.png", 3), ("rgba.png", 4), ("rgb.tif", 3), ("rgb.ppm", 3)]
)
def test_more_than_8_bits_a_channel_are_refused(tmp_path: Path, name: str, channels: int) -> None:
    shape = (4, 4, channels) if channels else (4, 4)
    cv2.imwrite(str(tmp_path / name), np.full(shape, 3000, np.uint16))
    with pytest.raises(DataError, match=rf"{name}: the image has .*; expected 8 bits a channel"):
        decode_image(as_file(tmp_path / name))
    if channels:
        with pytest.raises(DataError, match=rf"{name}: the mask( has 16 bits| has .* transparent|'s header has)"):
            decode_mask(as_file(tmp_path / name))


def test_16_bit_grey_with_alpha_and_floats_are_refused(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", bits=16, color_type=4, row=struct.pack(">4H", 3000, 65535, 10, 65535), width=2)
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "a.tif")
    cv2.imwrite(str(tmp_path / "rgb.tif"), np.zeros((4, 4, 3), np.float32))
    for name in ("a.png", "a.tif", "rgb.tif"):
        with pytest.raises(DataError, match=rf"{name}: (the image has|cannot be decoded)"):
            decode_image(as_file(tmp_path / name))


def test_a_bitmap_of_16_bits_a_pixel_is_no_deep_image(tmp_path: Path) -> None:
    header = struct.pack("<IiiHHIIiiII3I", 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0, 0xF800, 0x07E0, 0x001F)
    pixels = struct.pack("<2H", 0xF800, 0x001F)
    (tmp_path / "a.bmp").write_bytes(struct.pack("<2sIHHI", b"BM", 14 + len(header) + 4, 0, 0, 66) + header + pixels)
    assert decode_image(as_file(tmp_path / "a.bmp")).tolist() == [[[255, 0, 0], [0, 0, 255]]]


def damage(data: bytes, kind: str) -> bytes:
    middle = len(data) // 2
    return {
        "zeroed": data[:middle] + bytes(300) + data[middle + 300 :],
        "altered": data[:middle] + random_image(1).tobytes()[:300] + data[middle + 300 :],
        "cut off, with an end marker": data[:middle] + b"\xff\xd9",
    }[kind]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("kind", ["zeroed", "altered", "cut off, with an end marker"])
def test_a_damaged_jpeg_that_still_decodes_is_refused(tmp_path: Path, mode: str, kind: str) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(random_image(0, 64, 64)).convert(mode).save(path)
    assert decode_image(as_file(path)).shape == (64, 64, 3)
    path.write_bytes(damage(path.read_bytes(), kind))
    with pytest.raises(DataError, match=r"a\.jpg: cannot be decoded as an image \(.*(C|c)orrupt|premature"):
        decode_image(as_file(path))


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
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")  # a file of 50 kB
    for decode in (decode_image, decode_mask):
        with pytest.raises(DataError, match=r"huge\.png: cannot be decoded .*400000000 pixels"):
            decode(as_file(tmp_path / "huge.png"))


def test_what_starts_programs_is_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*arguments: object, **keywords: object) -> None:
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", start)
    Image.fromarray(random_image(0)).save(tmp_path / "a.jpg", format="EPS")
    for decode in (decode_image, decode_mask):
        with pytest.raises(DataError, match=r"a\.jpg: cannot be decoded .*not an image of a known format"):
            decode(as_file(tmp_path / "a.jpg"))


def test_a_signal_while_a_file_is_decoded_is_no_defect_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(*arguments: object, **keywords: object) -> None:
        raise Preempted("stopped by SIGTERM.")

    monkeypatch.setattr(Image, "open", leave)
    (tmp_path / "a.jpg").touch()
    for decode in (decode_image, decode_mask):
        with pytest.raises(Preempted):
            decode(as_file(tmp_path / "a.jpg"))


@pytest.mark.parametrize("suffix", ["png", "gif", "bmp", "tif"])
@pytest.mark.parametrize("transparency", [None, 2])
def test_palette_masks_give_indices_or_colours(tmp_path: Path, suffix: str, transparency: int | None) -> None:
    mask = np.array([[0, 1, 2], [2, 255, 7]], dtype=np.uint8)
    stored = Image.fromarray(mask).convert("P")
    stored.putpalette([value for index in range(256) for value in (255 - index, index, 77)])
    path = tmp_path / f"a.{suffix}"
    options = {"optimize": False} if suffix == "gif" else {}  # otherwise Pillow renumbers the palette
    stored.save(path, **options | ({} if transparency is None else {"transparency": transparency}))
    np.testing.assert_array_equal(decode_mask(as_file(path)), mask)
    if transparency is not None and suffix in {"png", "gif"}:
        with pytest.raises(DataError, match=rf"a\.{suffix}: the mask has 2 transparent pixels"):
            decode_mask(as_file(path), palette_colors=True)
    else:
        colors = np.stack([255 - mask, mask, np.full_like(mask, 77)], axis=-1)
        np.testing.assert_array_equal(decode_mask(as_file(path), palette_colors=True), colors)


def test_an_index_without_a_colour_in_the_palette_is_refused(tmp_path: Path) -> None:
    palette = chunk(b"PLTE", bytes([255, 0, 0, 0, 255, 0]))
    write_png(tmp_path / "a.png", bits=8, color_type=3, row=bytes([0, 1, 2]), width=3, extra=palette)
    assert decode_mask(as_file(tmp_path / "a.png")).tolist() == [[0, 1, 2]]
    with pytest.raises(DataError, match=r"a\.png: the mask has the palette index 2, but its palette has 2 colours"):
        decode_mask(as_file(tmp_path / "a.png"), palette_colors=True)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_masks_with_erased_pixels_are_refused(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.png"
    mask = Image.fromarray(random_image(0)).convert(mode)
    mask.save(path)
    expected = np.array(mask.convert(mode.removesuffix("A")))
    np.testing.assert_array_equal(decode_mask(as_file(path)), expected)
    mask.putpixel((3, 2), (7,) * (len(mode) - 1) + (254,))
    mask.save(path)
    with pytest.raises(DataError, match=r"a\.png: the mask has 1 transparent pixels, whose hidden colour"):
        decode_mask(as_file(path))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("a.jpg", {"quality": 100}, "a JPEG"),
        ("a.webp", {"quality": 100}, "a lossy WebP"),
        ("a.tif", {"compression": "jpeg"}, "a TIFF with JPEG compression"),
    ],
)
def test_masks_with_lossy_compression_are_refused(
    tmp_path: Path, name: str, options: dict[str, object], said: str
) -> None:
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / name, **options)
    with pytest.raises(DataError, match=rf"{name}: the mask is {said}, a lossy compression"):
        decode_mask(as_file(tmp_path / name))
    (tmp_path / "mask.png").write_bytes((tmp_path / name).read_bytes())  # the content decides, not the suffix
    with pytest.raises(DataError, match=said):
        decode_mask(as_file(tmp_path / "mask.png"))


def test_lossless_webp_masks_are_exact_with_alpha_and_animation(tmp_path: Path) -> None:
    colors = random_image(0)
    opaque = Image.fromarray(np.dstack([colors, np.full(colors.shape[:2], 255, np.uint8)]))
    opaque.save(tmp_path / "a.webp", lossless=True, exact=True, exif=Image.Exif())
    frames = [Image.fromarray(colors), Image.fromarray(255 - colors)]
    frames[0].save(tmp_path / "b.webp", save_all=True, append_images=frames[1:], lossless=True)
    for name in ("a.webp", "b.webp"):
        np.testing.assert_array_equal(decode_mask(as_file(tmp_path / name)), colors)


def test_a_pgm_mask_that_would_be_rescaled_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 255\n\0\1")
    assert decode_mask(as_file(tmp_path / "a.pgm")).tolist() == [[0, 1]]
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 20\n\0\1")  # Pillow rescales to 0 and 13
    with pytest.raises(DataError, match=r"a\.pgm: the mask's header has the maximum value 20, .* expected 255"):
        decode_mask(as_file(tmp_path / "a.pgm"))


@pytest.mark.parametrize(
    ("bits", "row", "values"),
    [(1, b"\x50", [0, 1, 0, 1]), (2, b"\x1b", [0, 1, 2, 3]), (4, b"\x01\x2f", [0, 1, 2, 15])],
)
def test_grey_masks_of_few_bits_give_their_stored_values(
    tmp_path: Path, bits: int, row: bytes, values: list[int]
) -> None:
    write_png(tmp_path / "a.png", bits, row, width=4)
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


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_a_damaged_png_is_named_once(tmp_path: Path, mode: str, capfd: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(random_image(0, 64, 64)).convert(mode).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[len(data) // 2] ^= 8
    (tmp_path / "a.png").write_bytes(data)
    for decode in (decode_image, decode_mask):
        with pytest.raises(DataError, match=r"a\.png: cannot be decoded as"):
            decode(as_file(tmp_path / "a.png"))
    assert capfd.readouterr().err == ""


def test_a_mask_of_another_mode_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif: the mask has mode F, expected grey, palette or RGB"):
        decode_mask(as_file(tmp_path / "a.tif"))
