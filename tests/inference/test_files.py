"""Tests of the segmentation of many files."""

import csv
import os
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
    results.claim({"model": "mine"}, overwrite=overwrite)
    return segment_files(find_files(str(source), out), results, batch_size=batch_size, overwrite=overwrite)


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


def test_another_image_of_the_same_name_takes_its_place(segmenter, source, tmp_path):
    out = tmp_path / "out"
    predict(segmenter, source / "a.png", out)
    other = shutil.copy(source / "b.png", tmp_path / "a.png")

    for image in (other, source / "a.png"):
        predict(segmenter, image, out)
        assert np.array_equal(np.array(Image.open(out / "masks/a.png")), segmenter(image).mask)

    Image.open(other).save(source / "a.png")  # now with other content
    predict(segmenter, source / "a.png", out)
    assert np.array_equal(np.array(Image.open(out / "masks/a.png")), segmenter(other).mask)


def test_overwriting_one_image_keeps_the_areas_of_the_others(segmenter, source, tmp_path):
    predict(segmenter, source, tmp_path / "out")
    before = areas_in(tmp_path / "out")

    predict(segmenter, source / "a.png", tmp_path / "out", overwrite=True)

    assert areas_in(tmp_path / "out") == before


def test_rows_that_a_kill_has_cut_are_predicted_again(segmenter, source, tmp_path):
    predict(segmenter, source, tmp_path / "out")
    before = areas_in(tmp_path / "out")
    for name in ("areas.csv", "sources.csv"):
        content = (tmp_path / "out" / name).read_bytes()
        (tmp_path / "out" / name).write_bytes(content[:-8])

    predict(segmenter, source, tmp_path / "out")

    assert areas_in(tmp_path / "out") == before


def test_names_may_have_bytes_that_are_not_utf8(segmenter, source, tmp_path):
    odd = source / os.fsdecode(b"a\xff.png")
    shutil.copy(source / "a.png", odd)

    for _ in range(2):
        predict(segmenter, odd, tmp_path / "out")

    assert (tmp_path / "out" / "masks" / odd.name).is_file()
    assert b"a\xff," in (tmp_path / "out" / "areas.csv").read_bytes()


def test_an_interrupted_change_of_the_model_leaves_no_results_of_the_old_one(segmenter, source, tmp_path):
    predict(segmenter, source, tmp_path / "out")

    theirs = Results(tmp_path / "out", segmenter)
    theirs.claim({"model": "theirs"}, overwrite=True)  # and a kill before the first image

    again = Results(tmp_path / "out", segmenter)
    again.claim({"model": "theirs"})
    assert not any(again.has(name, file) for file, name in find_files(str(source)).items())


def test_an_image_too_large_for_its_overlay_is_named(segmenter, source, tmp_path, monkeypatch):
    monkeypatch.setattr("ema_seg.inference.results._LONGEST_SIDE", 95)

    problems = predict(segmenter, source, tmp_path / "out")

    assert len(problems) == 4
    assert "a.png: has 96 x 64 pixels, and its overlay, a JPEG, at most 95 a side; cut the image." in problems[0]


def test_an_image_that_cannot_be_read_is_named_and_the_others_are_predicted(segmenter, source, tmp_path):
    (source / "a.png").write_bytes(b"no image")

    (problem,) = predict(segmenter, source, tmp_path / "out")

    assert problem.startswith(f"{source / 'a.png'}: cannot be decoded as an image")
    assert sorted(areas_in(tmp_path / "out")) == ["b.bmp", "b.png", "deep/c"]


def test_results_of_another_model_are_not_mixed_in(segmenter, source, tmp_path):
    predict(segmenter, source, tmp_path / "out")

    theirs = Results(tmp_path / "out", segmenter)
    with pytest.raises(DataError, match="has results of another model"):
        theirs.claim({"model": "theirs"})
    theirs.claim({"model": "theirs"}, overwrite=True)
    assert not theirs.has("a", source / "a.png")
    assert areas_in(tmp_path / "out") == {}


@pytest.mark.parametrize(
    "names",
    [
        {"drive.mp4": "drive.mp4", "drive/000000.png": "drive/000000"},
        {"drive.mp4": "drive.mp4", "drive/deep/0.png": "drive/deep/0"},
        {"a.jpg": "a.jpg", "a.png": "a.png", "a.png.bmp": "a.png.bmp"},
    ],
)
def test_no_two_results_share_a_name(names, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    assert find_files(str(tmp_path)) == {tmp_path / file: name for file, name in names.items()}


def test_a_source_is_a_file_a_folder_or_a_pattern(source, tmp_path):
    (source / "b.mp4").touch()
    assert find_files(str(source / "a.png")) == {source / "a.png": "a"}
    assert list(find_files(str(source)).values()) == ["a", "b.bmp", "b.mp4", "b.png", "deep/c"]
    assert list(find_files(str(source / "**" / "*.png")).values()) == ["a", "b", "deep/c"]
    assert find_files(str(source / "*.b*")) == {source / "b.bmp": "b"}
    assert list(find_files(str(source), tmp_path).values()) == ["a", "b.bmp", "b.mp4", "b.png", "deep/c"]
    (source / ".hidden").mkdir()
    for name in ("._a.png", ".hidden/d.png", "masks/a.png", "overlays/a.jpg"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).touch()
    assert list(find_files(str(source), source).values()) == ["a", "b.bmp", "b.mp4", "b.png", "deep/c"]
    assert list(find_files(str(source / "*" / "*.png"), source).values()) == ["deep/c"]
    assert list(find_files(str(source / "masks"), source).values()) == ["a"]
    for missing in ("nothing", "*.gif"):
        with pytest.raises(DataError, match="there is no such file or folder, and no file matches"):
            find_files(str(source / missing))
    shutil.rmtree(source / "deep")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the folder has no images"):
        find_files(str(tmp_path / "empty"))
