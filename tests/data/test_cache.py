"""Tests of the cache of decoded samples."""

import os
import pickle
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from ema_seg.data import SegmentationDataModule, build_dataset
from ema_seg.data.cache import open_cache
from ema_seg.runtime.errors import DataError
from tests.conftest import ROOT, write_camvid

SIZES = ((64, 96), (40, 52))


@pytest.fixture
def root(tmp_path):
    return write_camvid(tmp_path / "data", SIZES)


def open_split(root, folder, split="train", workers=0):
    return open_cache(folder, build_dataset("camvid", root, split), "camvid", {}, workers=workers, timeout=60)


def module(root, **options):
    settings = {
        "name": "camvid",
        "batch_size": 2,
        "evaluation_batch_size": 1,
        "workers": 0,
        "augmentation": {"crop": {"transform": "ScaledCrop", "height": 32, "width": 32}},
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
    }
    return SegmentationDataModule(root=root, **settings | options)


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_samples_are_those_of_the_files(root, tmp_path, workers, capsys):
    dataset = build_dataset("camvid", root)
    cache = pickle.loads(pickle.dumps(open_split(root, tmp_path / "cache", workers=workers)))

    for index in range(len(dataset)):
        np.testing.assert_array_equal(cache.image(index), dataset.read_image(index))
        np.testing.assert_array_equal(cache.mask(index), dataset.read_mask(index))
    size = 2 * 4 * sum(height * width for height, width in SIZES)
    assert (cache.folder / "pixels.bin").stat().st_size == size
    err = capsys.readouterr().err
    assert err == f"data.cache={tmp_path / 'cache'}: decoding the 4 samples of {root}, split 'train': 0.00 GB\n"


def test_a_cache_is_built_once(root, tmp_path, capsys):
    first = open_split(root, tmp_path)
    written = (first.folder / "pixels.bin").stat().st_mtime_ns
    capsys.readouterr()

    assert (open_split(root, tmp_path).folder / "pixels.bin").stat().st_mtime_ns == written
    assert capsys.readouterr().err == ""
    assert open_split(root, tmp_path, "val").folder != first.folder


def test_a_module_reads_the_cache_and_makes_the_same_batches(root, tmp_path, monkeypatch):
    def batches(data):
        data.setup("fit")
        torch.manual_seed(0)
        return [*data.train_dataloader(), *data.val_dataloader()]

    expected = batches(module(root))
    cached = batches(module(root, cache=tmp_path / "cache"))

    for batch, other in zip(expected, cached, strict=True):
        assert batch["name"] == other["name"]
        for key in ("image", "mask"):
            assert all(torch.equal(one, two) for one, two in zip(batch[key], other[key], strict=True))
    monkeypatch.setattr("ema_seg.data.base.decode_image", lambda *_, **__: pytest.fail("decoded"))
    batches(module(root, cache=tmp_path / "cache"))


@pytest.mark.parametrize("change", ["content", "time", "added", "removed"])
def test_changed_files_are_decoded_again(root, tmp_path, change):
    before = open_split(root, tmp_path)
    image, mask = (
        root / "train" / kind / f"train_0.{suffix}" for kind, suffix in (("images", "jpg"), ("masks", "png"))
    )
    if change == "content":
        Image.fromarray(np.zeros((64, 96), np.uint8)).save(mask)
    elif change == "time":
        os.utime(image, ns=(0, 0))
    elif change == "added":
        shutil.copy(image, image.with_stem("train_00"))
        shutil.copy(mask, mask.with_stem("train_00"))
    else:
        image.unlink()
        mask.unlink()

    after = open_split(root, tmp_path)

    assert after.folder == before.folder
    assert after.fingerprint != before.fingerprint
    assert len(after.entries) == len(build_dataset("camvid", root))
    if change == "content":
        assert not after.mask(0).any()
    assert {path.name for path in tmp_path.iterdir()} == {"data", after.folder.name, f"{after.folder.name}.lock"}


def test_an_unreadable_sample_is_named_each_time_it_is_read(root, tmp_path):
    (root / "train/images/train_1.jpg").write_bytes(b"broken")
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(root / "train/masks/train_2.png")

    for _ in range(2):
        cache = open_split(root, tmp_path)
        with pytest.raises(DataError, match=r"train_1\.jpg: cannot be decoded as an image"):
            cache.image(1)
        with pytest.raises(DataError, match=r"train_2\.png: the mask is 3 x 3 pixels"):
            cache.mask(2)
    assert cache.image(3).shape == (40, 52, 3)


def test_a_disk_with_too_little_space_is_refused_before_anything_is_written(root, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(100, 90, 10))

    with pytest.raises(DataError, match=r"data\.cache=.*: the 4 samples of .* need 0\.0 GB, but the disk has 0\.0 GB"):
        open_split(root, tmp_path / "cache")

    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_written_is_named(root, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data\.cache=.*/file/cache: the cache cannot be written \(Not a directory\)"):
        open_split(root, tmp_path / "file" / "cache")


def test_what_a_killed_process_left_is_built_anew(root, tmp_path):
    cache = open_split(root, tmp_path)
    cache.folder.rename(tmp_path / f".{cache.folder.name}.unfinished")

    assert open_split(root, tmp_path).image(0).shape == (64, 96, 3)
    assert not list(tmp_path.glob(".*"))


BUILD = """
import sys
from pathlib import Path
from ema_seg.data import build_dataset
from ema_seg.data.cache import open_cache
root, folder = map(Path, sys.argv[1:])
print("ready", flush=True)
sys.stdin.readline()
cache = open_cache(folder, build_dataset("camvid", root), "camvid", {}, workers=0, timeout=60)
print(int(cache.image(0).sum()))
"""


def test_two_processes_that_build_a_cache_share_one(root, tmp_path):
    command = [sys.executable, "-c", BUILD, str(root), str(tmp_path / "cache")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, cwd=ROOT, text=True, **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate() for process in processes]

    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert sum(err.count("decoding the 4 samples") for _, err in outputs) == 1


def test_a_crop_reads_only_the_region_that_it_needs(tmp_path, monkeypatch):
    root = write_camvid(tmp_path / "data", ((512, 256),), train=2, val=1)
    crop = {"transform": "ScaledCrop", "height": 64, "width": 48, "scale": [2, 2]}
    data = module(root, cache=tmp_path / "cache", augmentation={"crop": crop})
    data.setup("fit")
    read, resize = set(), cv2.resize

    def record(array, *arguments, **options):
        read.add((array.shape[:2], np.shares_memory(array, data.train_dataset.cache._pixels())))
        return resize(array, *arguments, **options)

    monkeypatch.setattr("cv2.resize", record)

    assert data.train_dataset[0]["image"].shape == (3, 64, 48)
    assert read == {((32, 24), True)}  # of image and mask: no copy of the whole was made before
