"""Tests of predicted masks on disk: file names, manifest and lock."""

import json
import threading

import numpy as np
import pytest
from PIL import Image

from ema_seg.reporting import predictions
from ema_seg.reporting.predictions import PredictionWriter, _acquire, lock_report
from ema_seg.runtime.errors import DataError
from ema_seg.runtime.files import Manifest, file_names, write_file

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


def test_files_that_no_evaluation_has_written_stay(tmp_path):
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "mine.png").write_text("mine")
    for name in ("old", "new"):
        with PredictionWriter(tmp_path, [name], PALETTE) as write:
            write(name, np.zeros((2, 2), np.uint8))
    assert sorted(path.name for path in (tmp_path / "predictions").iterdir()) == ["mine.png", "new.png"]
    with (
        pytest.raises(DataError, match=r"predictions/mine\.png: exists, was not written by ema-seg"),
        PredictionWriter(tmp_path, ["mine"], PALETTE),
    ):
        pass
    assert (tmp_path / "predictions" / "mine.png").read_text() == "mine"


def test_masks_of_a_killed_evaluation_are_replaced(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Manifest, "remove", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with PredictionWriter(tmp_path, ["a", "b"], PALETTE) as write:
            for name in "ab":
                write(name, np.zeros((2, 2), np.uint8))
    with PredictionWriter(tmp_path, ["b", "c"], PALETTE) as write:
        for name in "bc":
            write(name, np.zeros((2, 2), np.uint8))
    assert sorted(path.name for path in (tmp_path / "predictions").iterdir()) == ["b.png", "c.png"]


def test_a_manifest_reaches_no_file_outside_its_folder(tmp_path):
    (tmp_path / "mine").write_text("mine")
    folder = tmp_path / "report"
    outside = ["../mine", str(tmp_path / "mine"), "."]
    write_file(folder / "written_files.json", json.dumps({"schema": "ema-seg.files/1", "files": outside}).encode())
    manifest = Manifest(folder)
    manifest.remove(outside)
    assert (manifest.files, (tmp_path / "mine").read_text()) == (set(), "mine")


@pytest.mark.parametrize("content", ["", "[]", '{"schema": "mine"}', "[" * 3000])
def test_a_manifest_of_another_program_is_named(content, tmp_path):
    (tmp_path / "written_files.json").write_text(content)
    with pytest.raises(DataError, match=r"written_files\.json: is not a list of files that ema-seg wrote"):
        Manifest(tmp_path)


def test_a_second_evaluation_waits_for_the_first(tmp_path, monkeypatch, capsys):
    refused, done = threading.Event(), []

    def acquire(*arguments):
        acquired = _acquire(*arguments)
        if not acquired:
            refused.set()
        return acquired

    def evaluate():
        with lock_report(tmp_path):
            done.append("second")

    monkeypatch.setattr(predictions, "_acquire", acquire)
    other = threading.Thread(target=evaluate)
    with lock_report(tmp_path):
        other.start()
        assert refused.wait(20)
        done.append("first")
    other.join()
    assert done == ["first", "second"]
    assert f"waiting for another evaluation that writes to {tmp_path}" in capsys.readouterr().err
