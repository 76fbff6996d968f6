"""Tests of inference on images of any size."""

from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from ema_seg.config import Evaluation
from ema_seg.data.normalise import Normalise
from ema_seg.inference.prediction import (
    PRECISIONS,
    autocast,
    memory_format_of,
    pad_to_stride,
    predict,
    segment,
)
from ema_seg.runtime.errors import ConfigError, ModelError
from ema_seg.runtime.execution import evaluation_mode

NORMALISE = Normalise((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def random_image(*size: int) -> Tensor:
    return torch.randint(256, (3, *size), dtype=torch.uint8)


class Recorder(nn.Module):
    """Pointwise model that records its inputs and the dtypes of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.inputs: list[Tensor] = []
        self.dtypes: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x)
        output = self.conv(x)
        self.dtypes.append(output.dtype)
        return output


def test_padding_is_zero_at_the_bottom_and_right() -> None:
    images = torch.ones(2, 3, 33, 64)
    padded = pad_to_stride(images, 32)
    assert padded.shape == (2, 3, 64, 64)
    assert torch.equal(padded[..., :33, :], images)
    assert padded[..., 33:, :].abs().max() == 0
    assert pad_to_stride(padded, 32) is padded


def test_each_image_gets_its_own_logits_at_its_own_size() -> None:
    model = Recorder()
    images = [random_image(*size) for size in ((5, 7), (8, 4), (5, 7), (1, 1))]
    logits = predict(model, images, 4, NORMALISE)
    assert [tuple(batch.shape) for batch in model.inputs] == [(2, 3, 8, 8), (1, 3, 8, 4), (1, 3, 4, 4)]
    for image, output in zip(images, logits, strict=True):
        torch.testing.assert_close(output.whole(), model.conv(NORMALISE(image)[None]).detach())
        assert not output.features.requires_grad


def test_segment_takes_the_most_likely_class() -> None:
    model = nn.Conv2d(3, 3, 1, bias=False)
    nn.init.eye_(model.weight.data.flatten(1))
    images = [random_image(6, 5)]
    (mask,) = segment(model, images, 8, NORMALISE)
    assert torch.equal(mask, NORMALISE(images[0]).argmax(0))
    assert mask.dtype == torch.uint8


def test_no_images_give_no_logits() -> None:
    assert predict(Recorder(), [], 4, NORMALISE) == []


def test_a_model_that_does_not_restore_the_size_is_named() -> None:
    with pytest.raises(ModelError, match=r"logits must have the input's size \(8, 8\), got \(4, 4\)"):
        predict(nn.AvgPool2d(2), [random_image(8, 8)], 8, NORMALISE)


def test_memory_layout_follows_the_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3, padding=1))
    assert memory_format_of(model) == torch.contiguous_format
    recorder = Recorder()
    recorder.body = model.to(memory_format=torch.channels_last)
    assert memory_format_of(recorder) == torch.channels_last
    predict(recorder, [random_image(4, 4)] * 2, 4, NORMALISE)
    assert recorder.inputs[0].is_contiguous(memory_format=torch.channels_last)
    assert not recorder.inputs[0].is_contiguous()


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_precision_is_computed_in(precision: str, dtype: torch.dtype) -> None:
    model = Recorder()
    with autocast("cpu", precision):
        predict(model, [random_image(4, 4)], 4, NORMALISE)
    assert model.dtypes == [dtype]
    assert model.inputs[0].dtype == dtype  # half of float32's bytes, where the model computes in half precision


def test_unknown_precision_is_named() -> None:
    with pytest.raises(ConfigError, match=r"precision='64'.*32-true"):
        autocast("cpu", "64")


def test_every_module_gets_its_own_mode_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(3)).train()
    model[1].eval()
    with pytest.raises(RuntimeError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [model.training, model[0].training, model[1].training] == [True, True, False]


def test_the_schema_takes_the_precisions_that_there_are():
    choices = get_args(Evaluation.model_fields["precision"].annotation)
    assert {str(choice) for choice in choices} == set(PRECISIONS)
