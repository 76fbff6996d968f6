"""Tests of the segmentation of many files."""

import csv
import shutil

import numpy as np
import pytest
from PIL import Image

from ema_seg.inference.files import find_files, segment_files
from ema_seg.inference.results import Results
from ema_seg.runtime.errors import DataError
from tests.inference.conftest import CLASSES


@pytest.fixture
def source(tmp_path):
    """Write images of two sizes, two of which differ in their suffix alone, and a file that is none."""
    folder = tmp_path / "source"
    (folder / "deep").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, size in {"a.png": (64, 96), "b.png": (64, 96), "b.bmp": (64, 96), "deep/c.png": (96, 64)}.items():
        Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def predict(segmenter, source, out, *, batch_size=4, overwrite=False, **details):
    results = Results(out, segmenter, **details)
    results.claim("mine", overwrite=overwrite)
    return segment_files(find_files(str(source)), results, batch_size=batch_size, overwrite=overwrite)


def areas_in(out):
    with (out / "areas.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["image", *CLASSES]
    return {row[0]: [float(value) for value in row[1:]] for row in rows}


def test_each_image_has_a_mask_an_overlay_and_areas(segmenter, source, tmp_path):
    assert predict(segmenter, source, tmp_path / "out", batch_size=2) == []

    names = {"a": "a.png", "b.png": "b.png", "b.bmp": "b.bmp", "deep/c": "deep/c.png"}
    areas = areas_in(tmp_path / "out")
    assert sorted(areas) == sorted(names)
    for name, file in names.items():
        expected = segmenter(source / file)
        assert np.array_equal(np.array(Image.open(tmp_path / "out" / "masks" / f"{name}.png")), expected.mask)
        assert Image.open(tmp_path / "out" / "overlays" / f"{name}.jpg").size == expected.mask.shape[::-1]
        assert areas[name] == pytest.approx(list(expected.areas().values()), abs=1e-6)


def test_probabilities_and_weight_maps_are_written_on_request(segmenter, source, tmp_path):
    predict(segmenter, source / "a.png", tmp_path / "out", probabilities=True, weight_maps=True)

    expected = segmenter(source / "a.png", probabilities=True, weight_maps=True)
    found = np.load(tmp_path / "out" / "probabilities" / "a.npz")["probabilities"]
    assert np.array_equal(found, expected.probabilities)
    maps = np.load(tmp_path / "out" / "weight_maps" / "a.npz")
    assert sorted(maps) == sorted(expected.weight_maps)


def test_the_same_call_goes_on_where_it_was_left(segmenter, source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    predict(segmenter, source, out)
    before = areas_in(out)
    (out / "masks" / "a.png").unlink()
    predicted = []
    batch = segmenter.segment_batch
    monkeypatch.setattr(segmenter, "segment_batch", lambda images: predicted.extend(images) or batch(images))

    predict(segmenter, source, out)
    assert len(predicted) == 1
    assert areas_in(out) == before
    assert (out / "masks" / "a.png").is_file()

    predict(segmenter, source, out, overwrite=True)
    assert len(predicted) == 5
    assert areas_in(out) == before


def test_an_image_that_cannot_be_read_is_named_and_the_others_are_predicted(segmenter, source, tmp_path):
    (source / "a.png").write_bytes(b"no image")

    (problem,) = predict(segmenter, source, tmp_path / "out")

    assert problem.startswith(f"{source / 'a.png'}: cannot be decoded as an image")
    assert sorted(areas_in(tmp_path / "out")) == ["b.bmp", "b.png", "deep/c"]


def test_results_of_another_model_are_not_mixed_in(segmenter, source, tmp_path):
    predict(segmenter, source, tmp_path / "out")

    theirs = Results(tmp_path / "out", segmenter)
    with pytest.raises(DataError, match="has results of another model"):
        theirs.claim("theirs")
    theirs.claim("theirs", overwrite=True)
    assert not theirs.has("a")


def test_a_source_is_a_file_a_folder_or_a_pattern(source, tmp_path):
    (source / "b.mp4").touch()
    assert find_files(str(source / "a.png")) == {source / "a.png": "a"}
    assert list(find_files(str(source)).values()) == ["a", "b.bmp", "b.mp4", "b.png", "deep/c"]
    assert list(find_files(str(source / "**" / "*.png")).values()) == ["a", "b", "deep/c"]
    assert find_files(str(source / "*.b*")) == {source / "b.bmp": "b"}
    for missing in ("nothing", "*.gif"):
        with pytest.raises(DataError, match="there is no such file or folder, and no file matches"):
            find_files(str(source / missing))
    shutil.rmtree(source / "deep")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the folder has no images"):
        find_files(str(tmp_path / "empty"))
