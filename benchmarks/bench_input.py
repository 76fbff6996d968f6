"""Benchmark of the training input: from files to batches of augmented crops, per core.

    python benchmarks/full_size.py <folder>
    python benchmarks/bench_input.py <folder>

Each pipeline makes batches of 8 crops with the augmentation of ``data=cityscapes`` and ``data=ade20k``: scale from 0.5
to 2, crop, flip, colour jitter. They take turns in one process, with one thread.

* ``cached`` and ``files``: this project, with and without ``data.cache``;
* ``whole image``: this project's steps as they were before ``ScaledCrop``: decode with Pillow, resample the whole
  image, crop, normalise to float32 on the CPU;
* ``albumentations`` and ``torchvision``: the same augmentation in the two libraries as their documentation shows it,
  without the rule that no class fills a crop.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import yaml
from full_size import DATA_SETS
from measuring import (
    Spread,
    describe_run,
    markdown_table,
    number,
    positive_float,
    ratio,
    run_as_markdown,
    time_in_turns,
    write_result,
)
from PIL import Image
from torchvision import tv_tensors
from torchvision.io import decode_image
from torchvision.transforms import v2

from ema_seg.data import SegmentationDataModule, SegmentationDataset, build_dataset
from ema_seg.data.loading import collate_crops
from ema_seg.data.transforms import TensorSample, build_train_transform
from ema_seg.runtime.host_memory import keep_freed_memory

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as A

SCHEMA = 1
NAME = "bench_input"
ROOT = Path(__file__).resolve().parents[1]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 8

Read = Callable[[int], Mapping[str, Any]]


def pipelines(name: str, root: Path, cache: Path) -> dict[str, Read]:
    """Return the pipelines by name: functions from an index to a sample of tensors."""
    augmentation = yaml.safe_load((ROOT / "configs" / "data" / f"{name}.yaml").read_text())["data"]["augmentation"]
    data: dict[str, Any] = {
        "name": name,
        "root": root,
        "batch_size": 1,
        "evaluation_batch_size": 1,
        "workers": 0,
        "augmentation": augmentation,
        "mean": MEAN,
        "std": STD,
    }
    cached, files = SegmentationDataModule(**data, cache=cache), SegmentationDataModule(**data)
    cached.setup("fit")
    raw = build_dataset(name, root)
    crop, jitter = augmentation["crop"], augmentation["photometric"]
    return {
        "cached": cached.train_dataset.__getitem__,
        "files": files.train_dataset.__getitem__,
        "whole image": whole_image(raw, crop, jitter),
        "albumentations": plain_albumentations(raw, crop, jitter),
        "torchvision": plain_torchvision(raw, crop, jitter),
    }


def whole_image(dataset: SegmentationDataset, crop: Mapping[str, Any], jitter: Mapping[str, Any]) -> Read:
    """Decode with Pillow, resample the whole image, crop, and normalise on the CPU."""
    low, high = crop["scale"]
    transform = build_train_transform(
        {
            "scale": {"transform": "RandomScale", "scale_limit": [low - 1, high - 1], "p": 1.0},
            "crop": {
                "transform": "CategoryLimitedCrop",
                **{key: crop[key] for key in ("height", "width", "max_share")},
            },
            "flip": {"transform": "HorizontalFlip", "p": 0.5},
            "photometric": jitter,
        },
        MEAN,
    )
    mean, std = (torch.tensor(values).mul(255)[:, None, None] for values in (MEAN, STD))

    def read(index: int) -> TensorSample:
        with Image.open(_path(dataset, index, "image")) as picture:
            picture.getexif()  # for the orientation tag
            pixels = np.array(picture.convert("RGB"))
        sample = transform({"image": pixels, "mask": dataset.read_mask(index), "name": ""})
        normalised = sample["image"].to(torch.float32, memory_format=torch.contiguous_format).sub_(mean).div_(std)
        return {"image": normalised, "mask": sample["mask"].long(), "name": ""}

    return read


def plain_albumentations(dataset: SegmentationDataset, crop: Mapping[str, Any], jitter: Mapping[str, Any]) -> Read:
    """Decode with OpenCV, and augment with albumentations alone."""
    low, high = crop["scale"]
    compose = A.Compose(
        [
            A.RandomScale(scale_limit=(low - 1, high - 1), p=1.0),
            A.RandomCrop(crop["height"], crop["width"], pad_if_needed=True, fill_mask=255),
            A.HorizontalFlip(p=0.5),
            A.ColorJitter(**_range_of(jitter), p=jitter["p"]),
            A.Normalize(MEAN, STD),
            A.ToTensorV2(),
        ]
    )

    def read(index: int) -> Mapping[str, Any]:
        image = cv2.imread(_path(dataset, index, "image"), cv2.IMREAD_COLOR_RGB)
        mask = cv2.imread(_path(dataset, index, "mask"), cv2.IMREAD_UNCHANGED)
        return compose(image=image, mask=cv2.LUT(mask, dataset.train_ids))

    return read


def plain_torchvision(dataset: SegmentationDataset, crop: Mapping[str, Any], jitter: Mapping[str, Any]) -> Read:
    """Decode and augment with torchvision alone."""
    low, high = crop["scale"]
    size = (crop["height"], crop["width"])
    compose = v2.Compose(
        [
            v2.RandomHorizontalFlip(0.5),
            v2.RandomApply([v2.ColorJitter(**_range_of(jitter))], p=jitter["p"]),
            v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    place = v2.RandomCrop(size, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: 255})
    table = torch.from_numpy(dataset.train_ids)

    def read(index: int) -> Mapping[str, Any]:
        image = tv_tensors.Image(decode_image(_path(dataset, index, "image")))
        mask = tv_tensors.Mask(table[decode_image(_path(dataset, index, "mask")).int()])
        scale = low + (high - low) * torch.rand(()).item()
        scaled = v2.Resize([int(length * scale) for length in image.shape[-2:]])(image, mask)
        image, mask = compose(*place(*scaled))
        return {"image": image, "mask": mask}

    return read


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack images and masks."""
    return {key: torch.stack([sample[key] for sample in samples]) for key in ("image", "mask")}


def _range_of(jitter: Mapping[str, Any]) -> dict[str, float]:
    return {key: jitter[key] for key in ("brightness", "contrast", "saturation", "hue")}


def _path(dataset: SegmentationDataset, index: int, kind: str) -> str:
    return str(getattr(dataset.pairs[index], kind))


def measure(name: str, root: Path, budget: float) -> dict[str, Any]:
    """Time all pipelines on a data set; return seconds per sample, ratios to ``whole image``, and bytes per pixel."""
    with tempfile.TemporaryDirectory() as cache:
        reads = pipelines(name, root, Path(cache))
        images = len(build_dataset(name, root))

        def call(way: str, read: Read, number: int) -> None:
            samples = [read((number * BATCH + index) % images) for index in range(BATCH)]
            collate_crops(samples) if way in ("cached", "files") else collate(samples)

        calls = {way: (lambda number, way=way, read=read: call(way, read, number)) for way, read in reads.items()}
        for warm_up in calls.values():
            warm_up(0)
        samples = time_in_turns(calls, torch.device("cpu"), budget=budget, min_rounds=5)
        rows = {}
        for way, read in reads.items():
            sample = read(0)
            tensors = [sample[key] for key in ("image", "mask")]
            rows[way] = {
                "seconds": Spread.of([seconds / BATCH for seconds in samples[way]]).as_json(),
                "speedup": ratio(samples["whole image"], samples[way]).as_json(),
                "bytes_per_pixel": sum(tensor.nbytes for tensor in tensors) / sample["mask"].numel(),
            }
    return {"crop": list(sample["mask"].shape[-2:]), "images": images, "rows": rows}


def as_markdown(record: Mapping[str, Any]) -> str:
    """Format the tables of a result."""
    parts = [f"# From files to batches of crops\n\n{run_as_markdown(record['run'])}"]
    for name, result in record["results"].items():
        table = markdown_table(
            ["", "ms per crop", "crops/s per core", "times as fast as whole image", "quartiles", "bytes per pixel"],
            [
                [
                    way,
                    number(1e3 * row["seconds"]["median"]),
                    number(1 / row["seconds"]["median"]),
                    number(row["speedup"]["median"]),
                    f"{number(row['speedup']['lower_quartile'])} – {number(row['speedup']['upper_quartile'])}",
                    number(row["bytes_per_pixel"]),
                ]
                for way, row in result["rows"].items()
            ],
            text_columns=1,
        )
        height, width = result["crop"]
        parts.append(f"## {name}: crops of {height} x {width} from {result['images']} images\n\n{table}")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="From files to batches of augmented crops, per core.")
    parser.add_argument("folder", type=Path, help="the folder that full_size.py wrote")
    parser.add_argument("--names", nargs="+", choices=DATA_SETS, default=list(DATA_SETS), help="default: all")
    parser.add_argument("--budget", type=positive_float, default=20, help="seconds per pipeline (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs", NAME), help="default: %(default)s")
    options = parser.parse_args(arguments)
    roots = {name: options.folder / DATA_SETS[name] for name in options.names}
    for root in roots.values():
        if not root.is_dir():
            parser.error(f"{root}: no such folder; write it with python benchmarks/full_size.py {options.folder}")
    options.output.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()  # as train.py does
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    torch.manual_seed(0)
    results = {name: measure(name, root, options.budget) for name, root in roots.items()}
    record = {"schema": SCHEMA, "run": describe_run(torch.device("cpu")), "results": results}
    write_result(options.output, NAME, record, as_markdown(record))
    print(as_markdown(record))
    print(f"Written to {options.output}.")


if __name__ == "__main__":
    main()
