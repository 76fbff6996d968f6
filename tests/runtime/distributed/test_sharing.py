"""Results of 2 and 3 ranks on parts of a batch or data set, compared with those of one process on the whole."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from tests.conftest import made_once, write_camvid


@pytest.fixture(scope="module")
def results(tmp_path_factory, entry):
    """Return the results of all ranks by world size (1, 2 and 3), and the folder with a folder for each world size."""

    def make(folder):
        root = write_camvid(folder / "data", sizes=((64, 96), (32, 64), (50, 70)), val=7)
        status, err = entry.run(root, folder, script="tests/runtime/distributed/share")
        assert status == 0, err

    folder = made_once(tmp_path_factory, "sharing", make)
    found = {
        count: [json.loads((folder / str(count) / f"{rank}.json").read_text()) for rank in range(count)]
        for count in (1, 2, 3)
    }
    return found, folder


@pytest.mark.parametrize("count", [2, 3])
def test_an_evaluation_counts_every_image_once(results, count):
    found, folder = results
    alone, everyone = found[1][0]["score"], [part["score"] for part in found[count]]

    def masks(folder):
        return {file.name: np.asarray(Image.open(file)).tolist() for file in (folder / "report/predictions").iterdir()}

    assert len(alone["images"]) == len(masks(folder / "1")) == 7
    for one in everyone:
        assert one["matrix"] == alone["matrix"]
        assert one["images"] == alone["images"]
    assert masks(folder / str(count)) == masks(folder / "1")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_cannot_be_read_is_counted_over_all_processes(results, count):
    for part in results[0][count]:
        known, one_allowed = part["skip"]
        assert known == [str(rank) for rank in range(count)]
        if count == 1:
            assert one_allowed == known
        else:
            assert one_allowed.startswith(f"data.max_skipped=1: {count} samples cannot be read; repair the files, or")
            assert one_allowed.endswith(".png: cannot be read.")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_costs_say_on_how_many_devices_they_were_measured(results, count):
    costs = [part["score"]["cost"] for part in results[0][count]]

    assert costs == costs[:1] * count
    assert [entry["devices"] for entry in costs[0]["throughput"]["forward"]] == [1, 1]
    assert costs[0]["throughput"]["end_to_end"]["devices"] == count


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", ["cross_entropy", "dice", "focal"])
def test_losses_of_parts_have_the_mean_and_the_gradient_of_the_whole(results, name, count):
    value, gradient = results[0][1][0]["lose"][name]
    parts = [part["lose"][name] for part in results[0][count]]

    assert np.mean([part[0] for part in parts]) == pytest.approx(value, rel=1e-5)
    # DDP averages the weights' gradients over the ranks, so each rank's gradient counts with 1 / world size.
    own = torch.cat([torch.tensor(part[1]) for part in parts]) / count
    assert_close(own, torch.tensor(gradient))


@pytest.mark.parametrize("count", [2, 3])
def test_normalisation_over_processes_is_that_of_the_whole_batch(results, count):
    parts = [part["normalise"] for part in results[0][count]]

    for name, (y, gradient, weights, mean, variance, evaluated) in results[0][1][0]["normalise"].items():
        assert_close(torch.tensor([row for part in parts for row in part[name][0]]), torch.tensor(y), atol=1e-4, rtol=0)
        own = torch.tensor([row for part in parts for row in part[name][1]])
        assert_close(own, torch.tensor(gradient), atol=1e-3, rtol=1e-3)
        for part in parts:
            for one, expected in zip(part[name][2:], (weights, mean, variance, evaluated), strict=True):
                assert_close(torch.tensor(one), torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_three_processes_add_up_gradients_in_an_order_that_a_break_does_not_change(results):
    """By default DDP reorders its gradient buckets after the first step, so a resumed run would sum differently."""
    assert [part["repeats"] for part in results[0][3]] == [True] * 3


@pytest.mark.parametrize("name", ["ohem", "lovasz"])
def test_a_process_without_labels_adds_nothing_to_the_losses_that_sort(results, name):
    *others, last = [part["lose"][name] for part in results[0][3]]

    assert all(value > 0 for value, _ in others)
    assert last[0] == 0
    assert not torch.tensor(last[1]).any()
