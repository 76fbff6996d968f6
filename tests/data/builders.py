"""Builders of small data sets on disk, in the formats of the real ones."""

import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

HEIGHT, WIDTH = 12, 16


def random_image(seed: int, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def random_mask(values: list[int], seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    """Draw a mask in which each of ``values`` occurs."""
    mask = np.random.default_rng(seed).choice(np.array(values, dtype=np.uint8), (height, width))
    mask.ravel()[: len(values)] = values
    return mask


def save(path: Path, array: NDArray[np.uint8]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def write_split_folder(root: Path, split: str, names: list[str], values: list[int], suffix: str = ".jpg") -> Path:
    """Write ``<split>/images/<name>.jpg``, or with another suffix, and ``<split>/masks/<name>.png``."""
    for seed, name in enumerate(names):
        save(root / split / "images" / f"{name}{suffix}", random_image(seed))
        save(root / split / "masks" / f"{name}.png", random_mask(values, seed))
    return root


def write_cityscapes(
    root: Path,
    split: str,
    names: list[str],
    values: list[int],
    *,
    labels: str = "gtFine",
    kind: str = "labelIds",
) -> Path:
    """Write ``leftImg8bit/<split>/<city>/<name>_leftImg8bit.png`` and its labels."""
    for seed, name in enumerate(names):
        city = name.split("_")[0]
        save(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", random_image(seed))
        save(root / labels / split / city / f"{name}_{labels}_{kind}.png", random_mask(values, seed))
    return root


def write_ade20k(root: Path, folder: str, names: list[str], values: list[int]) -> Path:
    for seed, name in enumerate(names):
        save(root / "images" / folder / f"{name}.jpg", random_image(seed))
        save(root / "annotations" / folder / f"{name}.png", random_mask(values, seed))
    return root


def pack(folder: Path, archive: Path, *, below: str = "") -> Path:
    """Zip the files of ``folder/below`` under their names relative to ``folder``."""
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted((folder / below).rglob("*")):
            packed.write(path, path.relative_to(folder).as_posix())
    return archive


def truncate(path: Path) -> Path:
    """Cut a file in half."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path
