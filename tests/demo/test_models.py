"""Tests of the page's models."""

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np

from ema_seg.demo.models import Model, model_names


class CountingSegmenter:
    """Segmenter that counts how many threads are in it at once."""

    def __init__(self):
        self.inside = self.most = 0

    def read(self, picture):
        return picture

    def __call__(self, image, weight_maps=False):
        self.inside += 1
        self.most = max(self.most, self.inside)
        time.sleep(0.01)
        self.inside -= 1
        return SimpleNamespace(weight_maps={})


def test_one_thread_at_a_time_uses_a_model():
    segmenter = CountingSegmenter()
    models = [Model("first", segmenter), Model("second", segmenter)]
    image = np.zeros((1, 1, 3), np.uint8)

    with ThreadPoolExecutor(4) as pool:
        for function in [method for model in models for method in (model.segment, model.weight_maps)]:
            pool.submit(function, image)

    assert segmenter.most == 1


def test_models_are_named_by_their_runs_unless_two_are_alike(tmp_path):
    for name in ("a/run", "b/run", "b/other"):
        (tmp_path / name).mkdir(parents=True)
    run, same, other = (str(tmp_path / name) for name in ("a/run", "b/run", "b/other"))

    assert model_names([run]) == ["run"]
    assert model_names([run, other]) == ["run", "other"]
    assert model_names([run, same]) == [run, same]
    assert model_names([run, f"{run}/checkpoints/last.ckpt"]) == ["run", "run/last.ckpt"]
    assert model_names([run, "best.ckpt"]) == ["run", "best.ckpt"]
