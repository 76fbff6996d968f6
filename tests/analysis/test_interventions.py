"""Tests of interventions on models whose answer is known by construction."""

import numpy as np
import pytest
import torch
from torch import nn

from ema_seg.analysis.interventions import (
    Sample,
    count_masks,
    reused_outputs,
    run_interventions,
)
from ema_seg.analysis.maps import MapStudy
from ema_seg.analysis.schema import ALL_BLOCKS, INTERVENTIONS
from ema_seg.analysis.signals import apply_signal, hooked, read_signal
from ema_seg.attention import attention_names, build_attention
from ema_seg.data.normalise import Normalise
from ema_seg.evaluation import ConfusionMatrix
from ema_seg.inference.prediction import segment
from ema_seg.models import build_segmenter, model_stride
from ema_seg.models.build import decoder_names
from ema_seg.models.placement import PLACEMENTS, attention_blocks, inner_encoder, modules_before_attention
from tests.attention.test_attention import options_of

PLAIN = Normalise((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


class Block(nn.Module):
    """Block whose weights are a function of its input (B, 3, H, W)."""

    def __init__(self, weights):
        super().__init__()
        self.weight_map = weights

    def forward(self, x):
        return x * self.weight_map(x)


def identity(x):
    return torch.ones(len(x), 1, 1, 1)


def static(x):
    """Weigh the left half of every image by a quarter, the right half fully; channels alike."""
    return torch.where(torch.arange(x.shape[3]) < x.shape[3] // 2, 0.25, 1.0).expand(len(x), 1, *x.shape[2:])


def carrier(x):
    """Weigh pixels with red by 1, others by 0."""
    return (x[:, :1] > 0.5).float()


class Model(nn.Module):
    """Two blocks, the second of which may be any; a pixel is of class 1 where the weighted green exceeds a half."""

    def __init__(self, weights):
        super().__init__()
        self.first, self.second = Block(identity), Block(weights)

    def forward(self, images):
        green = self.second(self.first(images))[:, 1:2]
        return torch.cat([torch.full_like(green, 0.5), green], dim=1)


def samples(count=6, size=(8, 12)):
    """Make images whose green is full; red marks class 1: a block of columns of every image, and another in each."""
    made = []
    for index in range(count):
        image = torch.zeros(3, *size, dtype=torch.uint8)
        image[1] = 255
        image[0, :, :2] = 255
        image[0, :, 3 + index : 6 + index] = 255
        made.append(Sample(f"{index}", image, (image[0] > 0).numpy().astype(np.uint8)))
    return made


def study(model, blocks, images, stride=1, normalise=PLAIN, classes=2):
    model.eval()

    def predict(image):
        return segment(model, [image], stride, normalise)[0].numpy()

    maps = MapStudy(classes)
    with hooked(blocks, maps.record):
        for sample in images:
            predict(sample.image)
            maps.finish_image(sample.mask, stride)
    own, outcomes = run_interventions(model, blocks, images, predict, maps.means(), classes, images[-1])
    return {None: own, **outcomes}, maps.results(100, 0), predict


def accuracy(outcome):
    """Return the share of right pixels of each image."""
    sizes = outcome.counts[:, :3].sum(axis=1)
    return sizes[:, 0].sum(axis=1) / (sizes[:, 0] + (sizes[:, 1] - sizes[:, 0]) / 2).sum(axis=1)


def test_no_intervention_on_an_identity_changes_a_pixel():
    model = Model(carrier)

    outcomes, results, _ = study(model, {"first": model.first}, samples())

    assert set(outcomes) == {None, *(("first", name) for name in INTERVENTIONS)}
    for key, outcome in outcomes.items():
        assert not outcome.changed.any(), key
        assert outcome.example is None
        np.testing.assert_array_equal(outcome.counts, outcomes[None].counts)
    (block,) = results["blocks"]
    assert (block["mean"], block["min"], block["max"]) == (1, 1, 1)
    assert block["spread"] == {"positions": 0, "images": 0, "groups": 0}
    assert block["classes"] == []  # the same weight everywhere


def test_a_static_block_needs_no_input_but_its_positions():
    model = Model(static)

    outcomes, results, _ = study(model, {"second": model.second}, samples())

    assert not outcomes["second", "static"].changed.any()
    assert not outcomes["second", "swapped"].changed.any()
    # 0.625 everywhere: the left half becomes class 1, as without the block.
    for name in ("off", "uniform"):
        np.testing.assert_allclose(outcomes["second", name].changed, 0.5)
    (block,) = results["blocks"]
    assert block["spread"] == {"positions": pytest.approx(0.375), "images": 0, "groups": 0}
    assert block["mean"] == pytest.approx(0.625)


def test_a_block_that_carries_a_class_loses_it_in_every_intervention():
    model = Model(carrier)
    images = samples()

    outcomes, results, _ = study(model, {"first": model.first, "second": model.second}, images)

    np.testing.assert_array_equal(accuracy(outcomes[None]), 1)
    truth = np.stack([sample.mask for sample in images])
    # Off: all pixels become class 1. Uniform: the mean weight, 5 of 12 columns, is below a half, so none is.
    np.testing.assert_allclose(outcomes["second", "off"].changed, 1 - truth.mean(axis=(1, 2)))
    np.testing.assert_allclose(outcomes["second", "uniform"].changed, truth.mean(axis=(1, 2)))
    # Static: class 1 where more than half of the images have it.
    majority = truth.mean(axis=0) > 0.5
    np.testing.assert_allclose(outcomes["second", "static"].changed, (truth != majority).mean(axis=(1, 2)))
    # Swapped: the mask of the image before, and of the last one for the first.
    np.testing.assert_allclose(
        outcomes["second", "swapped"].changed, (truth != np.roll(truth, 1, axis=0)).mean(axis=(1, 2))
    )
    for name in INTERVENTIONS:
        np.testing.assert_array_equal(outcomes[ALL_BLOCKS, name].counts, outcomes["second", name].counts)
        assert not outcomes["first", name].changed.any()
    place, changed, own = outcomes["second", "off"].example
    assert place == 0
    np.testing.assert_array_equal(own, truth[0])
    assert (changed == 1).all()

    weights = results["blocks"][1]["classes"]
    assert (weights[0]["mean"], weights[1]["mean"]) == (0, 1)
    assert weights[1]["difference"] == pytest.approx(1 - truth.mean())
    assert weights[1]["low"] <= weights[1]["difference"] <= weights[1]["high"]
    assert results["agreement"] == [[1, None], [None, 1]]


def test_counts_are_those_of_the_confusion_matrix():
    generator = np.random.default_rng(0)
    prediction, truth = generator.integers(3, size=(2, 40, 50))
    truth[:5] = 255
    confusion = ConfusionMatrix(3)
    confusion.update(prediction, truth)

    counts = count_masks(prediction, truth, 3)

    np.testing.assert_array_equal(counts[:3].sum(axis=0), [confusion.intersection, confusion.union])


def small_images(count=2, size=(32, 64)):
    generator = torch.Generator().manual_seed(0)
    return [
        Sample(
            str(index),
            torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator),
            torch.randint(2, size, generator=generator).numpy().astype(np.uint8),
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("name", [name for name in attention_names() if name != "none"])
def test_every_block_can_be_analysed_at_every_placement(name):
    model = build_segmenter(
        "linknet",
        classes=2,
        encoder="tu-test_efficientnet",
        attention=name,
        attention_options=options_of(name),
        placements=PLACEMENTS,
    )
    for module in model.modules():  # GC starts as the identity
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.1)
    images, stride = small_images(), model_stride(model)
    found = attention_blocks(model)
    # One of each placement, because each block takes as long as the next.
    blocks = dict({name.split(".")[0]: (name, block) for name, block in found.items()}.values())

    outcomes, results, predict = study(model, blocks, images, stride)

    assert {name.split(".")[0] for name in blocks} == {"encoder", "decoder", "segmentation_head"}
    assert len(outcomes) == 1 + len(INTERVENTIONS) * (len(blocks) + 1)
    for sample, counts in zip(images, outcomes[None].counts, strict=True):
        np.testing.assert_array_equal(counts, count_masks(predict(sample.image), sample.mask, 2))
    assert [block["name"] for block in results["blocks"]] == list(blocks)
    assert all(block["min"] <= block["mean"] <= block["max"] for block in results["blocks"])


@pytest.mark.parametrize("name", [name for name in attention_names() if name != "none"])
def test_a_block_with_its_own_signal_is_the_block(name):
    block = build_attention(name, 16, **options_of(name)).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(1, 16, 6, 9)
    with torch.no_grad():
        y = block(x)
        torch.testing.assert_close(apply_signal(block, x, read_signal(block, x, y)), y)


@pytest.mark.parametrize("decoder", [name for name in decoder_names() if name != "dpt"])
def test_reused_outputs_give_the_same_logits(decoder):
    model = build_segmenter(decoder, classes=2, encoder="resnet18", attention="se", placements=PLACEMENTS).eval()
    first, second = torch.randn(2, 1, 3, 128, 128)
    calls = []
    inner_encoder(model).conv1.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        expected = [model(images) for images in (first, first, second)]
        with reused_outputs(modules_before_attention(model)):
            del calls[:]
            for images, logits in zip((first, first, second), expected, strict=True):
                torch.testing.assert_close(model(images), logits, rtol=0, atol=0)
    assert len(calls) == 2
    assert not any("forward" in vars(module) for module in model.modules())
