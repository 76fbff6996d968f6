"""Predicted masks on disk, whatever the images are called."""

import numpy as np
import pytest
from PIL import Image

from ema_seg.reporting.files import file_names
from ema_seg.reporting.predictions import PredictionWriter

PALETTE = [[128, 64, 128], [0, 0, 142], [250, 170, 30]]


def test_masks_come_back_as_they_were_and_are_shown_in_colour(tmp_path):
    masks = [np.arange(12, dtype=np.uint8).reshape(3, 4) % 3, np.full((5, 2), 255, np.uint8)]
    with PredictionWriter(tmp_path, ["ride/001", "ride_001"], PALETTE) as write:
        for name, mask in zip(["ride/001", "ride_001"], masks, strict=True):
            write(name, mask)
    paths = list(write.paths.values())
    assert paths == ["predictions/ride_001.png", "predictions/ride_001~2.png"]
    for path, mask in zip(paths, masks, strict=True):
        with Image.open(tmp_path / path) as image:
            assert np.array_equal(np.array(image), mask)
    with Image.open(tmp_path / paths[0]) as image:
        assert np.array_equal(np.array(image.convert("RGB")), np.array(PALETTE, np.uint8)[masks[0]])


def test_an_evaluation_cut_short_leaves_the_masks_of_the_one_before(tmp_path):
    with PredictionWriter(tmp_path, ["old"], PALETTE) as write:
        write("old", np.zeros((2, 2), np.uint8))
    with pytest.raises(KeyboardInterrupt), PredictionWriter(tmp_path, ["new", "other"], PALETTE) as write:
        write("new", np.zeros((2, 2), np.uint8))
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["old.png", "predictions", "written_files.json"]
    with PredictionWriter(tmp_path, ["new"], PALETTE) as write:
        write("new", np.zeros((2, 2), np.uint8))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new.png", "predictions", "written_files.json"]


def test_names_of_files_stay_inside_the_folder_and_apart():
    names = ["../../etc/passwd", "A", "a", "a~2", "", "..", "é" * 300, "x" * 300, "x" * 299, "CON?*<>|\n"]
    safe = file_names(names)
    assert len({name.lower() for name in safe}) == len(names)
    assert all(0 < len(name) < 120 and "/" not in name and not name.startswith(".") for name in safe)
    assert file_names(names) == safe
