"""Tests of the cost of models whose MACs and memory are known in closed form."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from ema_seg.data.normalise import Normalise
from ema_seg.evaluation import ConfusionMatrix, measure_cost
from ema_seg.evaluation.cost import cost_batch_size, count_macs, count_parameters, measure_peak_memory, time_end_to_end
from ema_seg.evaluation.evaluator import image_counter
from ema_seg.runtime.errors import ConfigError, DataError, ModelError

FLOAT = 4
NORMALISE = Normalise((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def two_convolutions() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()


class Files(Dataset):
    """Data set of image files that are read from disk, as in an evaluation."""

    def __init__(self, folder: Path, count: int) -> None:
        self.paths = [folder / f"{index}.png" for index in range(count)]
        for index, path in enumerate(self.paths):
            Image.fromarray(np.full((6 + index % 2, 7, 3), index, np.uint8)).save(path)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = np.array(Image.open(self.paths[index]))
        mask = torch.full(pixels.shape[:2], index % 4, dtype=torch.uint8)
        return {"image": torch.from_numpy(pixels).permute(2, 0, 1), "mask": mask, "name": str(index)}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: [sample[key] for sample in samples] for key in ("image", "mask", "name")}


def test_parameters_count_once_and_by_whether_they_train() -> None:
    model = two_convolutions()
    model[0].weight.requires_grad = False
    model.register_module("again", model[2])
    weights = 8 * 3 * 9 + 8 + 4 * 8 + 4
    assert count_parameters(model) == {"total": weights, "trainable": weights - 8 * 3 * 9}


def test_macs_of_convolutions() -> None:
    images = torch.randn(2, 3, 10, 12)
    assert count_macs(two_convolutions(), images) == 2 * 10 * 12 * (8 * 3 * 9 + 4 * 8)
    grouped = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4)
    assert count_macs(grouped, torch.randn(1, 8, 10, 12)) == 5 * 6 * 8 * 2 * 9


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(x, x, x)


def test_macs_of_fused_attention_are_not_missed() -> None:
    assert count_macs(Attention(), torch.randn(1, 2, 16, 8)) == 2 * (2 * 16 * 16 * 8)
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True).eval()
    projections, attention, feed_forward = 5 * 4 * 8 * 8, 2 * 5 * 5 * 8, 5 * 2 * 8 * 16
    assert count_macs(layer, torch.randn(1, 5, 8)) == projections + attention + feed_forward
    assert torch.backends.mha.get_fastpath_enabled()


def test_peak_memory_is_the_weights_and_the_live_tensors() -> None:
    model, images = two_convolutions(), torch.randn(2, 3, 64, 64)
    weights = count_parameters(model)["total"]
    # The peak is in the ReLU: the image of 3 channels, and the input and output of 8 channels each.
    assert measure_peak_memory(model, images) == FLOAT * (weights + 2 * 64 * 64 * (3 + 8 + 8))


def test_peak_memory_counts_what_stays_alive_and_no_view_twice() -> None:
    class Skip(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            early = x + 1
            late = early.flatten().view_as(x)
            for _ in range(5):
                late = late * 2
            return late + early

    # At the peak: x, early, one intermediate and its successor.
    images = torch.randn(1, 3, 32, 32)
    assert measure_peak_memory(Skip(), images) == 4 * FLOAT * images.numel()


def test_peak_memory_includes_buffers_and_halves_with_the_precision() -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.zeros(1000))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.bfloat16()

    images = torch.randn(1, 3, 32, 32)
    assert measure_peak_memory(Buffered(), images) == FLOAT * 1000 + (FLOAT + 2) * images.numel()


def test_measures_the_model_it_is_given(tmp_path: Path) -> None:
    model = two_convolutions().train()
    loader = DataLoader(Files(tmp_path, 5), batch_size=2, collate_fn=collate)
    cost = measure_cost(
        model,
        size=(10, 12),
        stride=8,
        batch_size=4,
        device="cpu",
        loader=loader,
        normalise=NORMALISE,
        counter=image_counter(ConfusionMatrix(4)),
        warmup=1,
        min_repeats=3,
        budget=0.02,
    )
    assert model.training
    assert cost["parameters"] == count_parameters(model)
    assert cost["gmacs"] == pytest.approx(16 * 16 * (8 * 3 * 9 + 4 * 8) / 1e9)

    throughput = cost["throughput"]
    assert throughput["size"] == [10, 12]
    assert throughput["padded_size"] == [16, 16]
    assert throughput["precision"] == "32-true"
    assert throughput["memory_format"] == "contiguous"
    assert "live tensors" in throughput["memory_method"]
    assert [entry["batch_size"] for entry in throughput["forward"]] == [1, 4]
    for entry in throughput["forward"]:
        latency = entry["latency"]
        assert 0 < latency["median"] <= latency["p95"]
        assert entry["images_per_second"] == pytest.approx(entry["batch_size"] / latency["median"])
        assert entry["repeats"] >= 3
        assert 0 < entry["reference"] < 10
        weights = cost["parameters"]["total"]
        assert entry["peak_memory"] == FLOAT * (weights + entry["batch_size"] * 16 * 16 * (3 + 8 + 8))


@pytest.mark.parametrize(
    ("count", "workers", "warmup", "timed"),
    [(5, 0, 1, 3), (2, 0, 0, 2), (8, 1, 2, 4)],
    ids=["first batch warms up", "a single batch is timed", "fetched ahead"],
)
def test_end_to_end_covers_the_data_set(tmp_path: Path, count: int, workers: int, warmup: int, timed: int) -> None:
    loader = DataLoader(Files(tmp_path, count), batch_size=2, collate_fn=collate, num_workers=workers)
    scored: list[str] = []
    counter = image_counter(ConfusionMatrix(4), lambda name, mask: scored.append(name))
    result = time_end_to_end(two_convolutions(), loader, NORMALISE, counter, stride=8, budget=60)
    assert scored == [str(index) for index in range(count)]
    assert result["images_per_second"] > 0
    assert result["images"] == timed
    assert result["batch_size"] == 2
    assert result["workers"] == workers
    assert result["warmup_batches"] == warmup


def test_end_to_end_stops_when_the_budget_is_spent(tmp_path: Path) -> None:
    loader = DataLoader(Files(tmp_path, 9), batch_size=1, collate_fn=collate)
    counter = image_counter(ConfusionMatrix(4))
    assert time_end_to_end(two_convolutions(), loader, NORMALISE, counter, stride=8, budget=0)["images"] == 1


def test_without_a_loader_there_is_no_end_to_end() -> None:
    cost = measure_cost(two_convolutions(), size=(8, 8), stride=8, batch_size=1, device="cpu", budget=0.01)
    assert cost["throughput"]["end_to_end"] is None
    assert [entry["batch_size"] for entry in cost["throughput"]["forward"]] == [1]


def test_layout_and_precision_are_those_of_the_run() -> None:
    model = two_convolutions().to(memory_format=torch.channels_last)
    cost = measure_cost(model, size=(8, 8), stride=8, batch_size=1, device="cpu", precision="bf16-mixed", budget=0.01)
    assert cost["throughput"]["memory_format"] == "channels_last"
    assert cost["throughput"]["precision"] == "bf16-mixed"


def test_the_global_seed_is_left_alone() -> None:
    model = two_convolutions()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    measure_cost(model, size=(8, 8), stride=8, batch_size=2, device="cpu", budget=0.01)
    assert torch.equal(torch.rand(1), expected)


def test_too_little_memory_is_named() -> None:
    class Greedy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return x

    with pytest.raises(ModelError, match="out of memory for 64 images of 8 x 16 pixels"):
        measure_cost(Greedy(), size=(8, 9), stride=8, batch_size=64, device="cpu", budget=0.01)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size=0"):
        measure_cost(two_convolutions(), size=(8, 8), stride=8, batch_size=0, device="cpu")
    empty: DataLoader = DataLoader(Files(tmp_path, 0), batch_size=1, collate_fn=collate)
    with pytest.raises(DataError, match="no image"):
        measure_cost(
            two_convolutions(),
            size=(8, 8),
            stride=8,
            batch_size=1,
            device="cpu",
            loader=empty,
            normalise=NORMALISE,
            counter=image_counter(ConfusionMatrix(4)),
            budget=0.01,
        )


def test_a_budget_that_is_spent_leaves_one_pass_for_warm_up_and_three_that_are_timed() -> None:
    calls = []
    model = two_convolutions()
    model.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    (entry,) = measure_cost(model, size=(8, 8), stride=8, batch_size=1, device="cpu", budget=1e-9)["throughput"][
        "forward"
    ]
    assert (entry["warmup"], entry["repeats"]) == (1, 3)
    assert len(calls) == 1 + 1 + 3 + 1  # MACs, warm-up, timed, memory


@pytest.mark.parametrize(("asked", "evaluated", "expected"), [(1000, 1000, 3), (2, 2, 2), (64, 1000, 64), (3, 3, 3)])
def test_no_batch_is_measured_that_the_split_does_not_have(asked: int, evaluated: int, expected: int) -> None:
    assert cost_batch_size(asked, evaluated, 3) == expected
