"""Tests of the page's example pictures."""

import numpy as np
import pytest

from ema_seg.demo.examples import examples_in, examples_of_run
from ema_seg.runtime.errors import DataError
from tests.conftest import write_camvid


def test_a_folder_gives_some_of_its_images_evenly_spread(tmp_path):
    for index in range(20):
        (tmp_path / f"{index:02}.png").touch()
    (tmp_path / "clip.mp4").touch()

    examples = examples_in(str(tmp_path))

    assert [example.name for example in examples] == [f"{index:02}.png" for index in (0, 2, 5, 7, 10, 12, 15, 17)]
    assert examples[1].read() == tmp_path / "02.png"


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(DataError, match="examples=nowhere: there is no such folder"):
        examples_in("nowhere")
    (tmp_path / "clip.mp4").touch()
    with pytest.raises(DataError, match="the folder has no images; give another"):
        examples_in(str(tmp_path))


def test_a_run_gives_images_of_its_evaluation_split(tmp_path):
    root = write_camvid(tmp_path / "data")

    examples = examples_of_run({"name": "camvid", "root": str(root), "evaluation_split": "val", "workers": 0})

    assert len(examples) == 3
    assert all(example.read().shape == (64, 96, 3) and example.read().dtype == np.uint8 for example in examples)


@pytest.mark.parametrize(
    "data", [{}, {"name": "camvid", "root": "nowhere"}, {"name": "gone", "root": "."}, {"name": "camvid", "root": None}]
)
def test_a_run_without_its_data_gives_none(data):
    assert examples_of_run(data) == []
