"""Data sets in the layouts and sizes of Cityscapes and ADE20K, generated without a download.

    python benchmarks/full_size.py <folder>

Writes three roots for ``data.root``:

* ``<folder>/cityscapes``: drawn street scenes of 2048 x 1024 pixels as PNG files of 2 to 3 MB, with label ids;
* ``<folder>/cityscapes_zip``: the same files in the two official archives;
* ``<folder>/ADEChallengeData2016``: JPEG images of about 683 x 512 pixels with regions of 150 classes.

File formats, sizes, numbers of classes and region sizes are those of the real data sets, so that time and memory are,
too. The scenes are drawn: scores on them say nothing about the real data sets.
"""

import argparse
import os
import shutil
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import cv2
import numpy as np
from measuring import positive_int
from numpy.typing import NDArray
from rich.progress import track

from ema_seg.data import ADE20KDataset
from ema_seg.data.street_scene import render_scene

# Folders of the data sets by their names in configurations.
DATA_SETS = {"cityscapes": "cityscapes", "ade20k": "ADEChallengeData2016"}
# Cityscapes' splits come from different cities; ADE20K calls its splits otherwise.
_CITIES = {"train": "aachen", "val": "frankfurt"}
_ADE_FOLDERS = {"train": "training", "val": "validation"}


def write_street_scene(root: Path, split: str, index: int) -> None:
    """Draw one scene in Cityscapes' size, format and names."""
    image, labels = render_scene(np.random.default_rng((list(_CITIES).index(split), index)), 1024, 2048)
    city = _CITIES[split]
    name = f"{city}_{index:06d}_000019"
    _write(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", image[..., ::-1])
    _write(root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", labels)


def write_regions(root: Path, split: str, index: int) -> None:
    """Draw one image of coherent regions in ADE20K's size, format and names."""
    rng = np.random.default_rng((2 + list(_ADE_FOLDERS).index(split), index))
    labels, image = draw_regions(rng, *_draw_size(rng))
    name = f"ADE_{split}_{index + 1:08d}"
    folder = _ADE_FOLDERS[split]
    _write(root / "images" / folder / f"{name}.jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
    _write(root / "annotations" / folder / f"{name}.png", labels)


def _draw_size(rng: np.random.Generator) -> tuple[int, int]:
    """Draw height and width: the shorter side has 512 pixels, as in most of ADE20K's images."""
    longer = int(rng.integers(600, 768))
    return (512, longer) if rng.random() < 0.75 else (longer, 512)


def draw_regions(rng: np.random.Generator, height: int, width: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw regions of about ten classes in their colours, with texture, uneven light and noise.

    Returns:
        Mask values (0: no class, 1 to 150), H x W, and the RGB image, H x W x 3; both uint8.
    """
    colors = np.array([(128, 128, 128), *ADE20KDataset.palette], np.float32)
    occurring = rng.choice(len(colors), size=int(rng.integers(6, 15)), replace=False)
    # Each pixel belongs to the class whose smooth random field is the highest there.
    fields = rng.standard_normal((len(occurring), 9, 12)).astype(np.float32)
    fields += rng.standard_normal((len(occurring), 1, 1)).astype(np.float32)
    highest = np.argmax([cv2.resize(field, (width, height), interpolation=cv2.INTER_CUBIC) for field in fields], axis=0)
    labels = occurring.astype(np.uint8)[highest]
    light = cv2.resize(rng.uniform(0.6, 1.2, (3, 4)).astype(np.float32), (width, height))
    texture = cv2.GaussianBlur(rng.normal(0, 40, (height, width)).astype(np.float32), (0, 0), 1.5)
    image = colors[labels] * light[..., None] + texture[..., None] + rng.normal(0, 4, (height, width, 3))
    return labels, np.clip(image, 0, 255).astype(np.uint8)


def _write(path: Path, picture: NDArray[np.uint8], options: Sequence[int] = ()) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _, data = cv2.imencode(path.suffix, picture, list(options))
    path.write_bytes(data.tobytes())


def write_archives(source: Path, target: Path) -> None:
    """Pack ``leftImg8bit`` and ``gtFine`` into archives with the official names; PNG files are stored as they are."""
    target.mkdir()
    for kind in ("leftImg8bit", "gtFine"):
        with zipfile.ZipFile(target / f"{kind}_trainvaltest.zip", "w") as archive:
            for file in sorted((source / kind).rglob("*.png")):
                archive.write(file, file.relative_to(source))


def write_data_sets(folder: Path, counts: dict[str, int]) -> None:
    """Write all data sets, each completely or not at all; leave those that exist.

    Args:
        folder: parent of the three roots.
        counts: number of images by split, "train" and "val".
    """
    writers: dict[str, Callable[[Path, str, int], None]] = {
        "cityscapes": write_street_scene,
        "ADEChallengeData2016": write_regions,
    }
    for name, write in writers.items():
        if not (folder / name).exists():
            unfinished = folder / f".{name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            images = [(split, index) for split, count in counts.items() for index in range(count)]
            with Pool(os.cpu_count()) as pool:
                work = pool.imap_unordered(partial(_call, write, unfinished), images)
                for _ in track(work, f"Writing {name}", total=len(images)):
                    pass
            unfinished.rename(folder / name)
    if not (folder / "cityscapes_zip").exists():
        unfinished = folder / ".cityscapes_zip.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        write_archives(folder / "cityscapes", unfinished)
        unfinished.rename(folder / "cityscapes_zip")


def _call(write: Callable[[Path, str, int], None], root: Path, image: tuple[str, int]) -> None:
    write(root, *image)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Generate data sets of the size of Cityscapes and ADE20K.")
    parser.add_argument("folder", type=Path)
    # ADE20K's default batch has 16 crops of different images.
    parser.add_argument("--train", type=positive_int, default=16, help="training images (default: %(default)s)")
    parser.add_argument("--val", type=positive_int, default=12, help="validation images (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    cv2.setNumThreads(0)  # its threads do not survive a fork
    write_data_sets(options.folder, {"train": options.train, "val": options.val})
    for name in ("cityscapes", "cityscapes_zip", "ADEChallengeData2016"):
        files = [file for file in (options.folder / name).rglob("*") if file.is_file()]
        print(f"{options.folder / name}: {len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
