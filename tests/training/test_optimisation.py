import pytest
import torch
from torch import nn

from ema_seg.models import build_segmenter
from ema_seg.runtime.errors import ConfigError
from ema_seg.training.optimisation import build_optimizer, build_schedule

ADAMW = {"name": "adamw", "lr": 1e-2, "encoder_lr_factor": 0.1, "weight_decay": 0.05}


def test_encoder_rate_and_decay_are_set_per_parameter():
    model = build_segmenter("fpn", classes=2, encoder="resnet18", attention="ema", placements=["encoder", "head"])
    optimizer = build_optimizer(model, **ADAMW)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {names[parameter]: group for group in optimizer.param_groups for parameter in group["params"]}

    assert set(groups) == set(names.values())
    for name, expected in {
        "encoder.encoder.conv1.weight": (1e-3, 0.05),
        "encoder.encoder.bn1.weight": (1e-3, 0.0),
        "encoder.attention.3.conv3x3.weight": (1e-2, 0.05),
        "encoder.attention.3.gn.bias": (1e-2, 0.0),
        "decoder.p5.weight": (1e-2, 0.05),
        "decoder.p5.bias": (1e-2, 0.0),
        "segmentation_head.attention.conv1x1.weight": (1e-2, 0.05),
    }.items():
        assert (groups[name]["lr"], groups[name]["weight_decay"]) == pytest.approx(expected), name


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)

    assert sum(len(group["params"]) for group in build_optimizer(model, **ADAMW).param_groups) == 2


def rates(steps, **settings):
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=2.0)
    schedule = build_schedule(optimizer, steps, **settings)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return values


def test_schedules_follow_their_formulas():
    assert rates(4, name="constant") == [2.0] * 4
    assert rates(4, name="poly", power=2.0) == pytest.approx([2.0, 2 * 0.75**2, 2 * 0.5**2, 2 * 0.25**2])
    assert rates(4, name="cosine") == pytest.approx([2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5])
    assert rates(4, name="cosine", final_factor=0.5)[2] == pytest.approx(1.5)


@pytest.mark.parametrize("warmup", [4, 0.4])
def test_warm_up_rises_linearly_then_the_schedule_starts(warmup):
    values = rates(10, name="poly", power=1.0, warmup_steps=warmup)

    assert values[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert values[5:] == pytest.approx([2 * (1 - k / 6) for k in range(1, 6)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "polly"}, "unknown schedule 'polly'; choose among poly, cosine, constant"),
        (
            {"name": "cosine", "power": 1.0},
            r"schedule\.power: cosine has no such option; it has final_factor",
        ),
        ({"name": "poly", "warmup_steps": 11}, r"warmup_steps must be from 0 to 10, .* got 11"),
    ],
)
def test_mistakes_in_a_schedule_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        rates(10, **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "adam"}, "unknown optimiser 'adam'"),
        ({"momentum": 0.9}, "torch refuses these settings of adamw"),
        ({"lr": -1.0}, "torch refuses these settings of adamw"),
    ],
)
def test_mistakes_in_an_optimiser_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(nn.Linear(1, 1), **(ADAMW | change))
