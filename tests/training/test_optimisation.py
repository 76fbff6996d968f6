import math

import pytest
import timm.optim
import torch
import yaml
from torch import nn

from ema_seg.models import build_segmenter
from ema_seg.models.placement import parameter_stages
from ema_seg.runtime.errors import ConfigError
from ema_seg.training.optimisation import build_optimizer, build_schedule
from tests.conftest import ROOT

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


def test_the_rate_falls_with_each_stage_from_the_decoder_to_the_image():
    model = build_segmenter("fpn", classes=2, encoder="resnet18", attention="se", placements=["encoder"])
    model.encoder.encoder.conv1.requires_grad_(False)

    optimizer = build_optimizer(model, **ADAMW, layer_decay=0.5, later={"encoder.encoder.conv1.weight"})

    assert not model.encoder.encoder.conv1.weight.requires_grad
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[parameter]: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    for name, expected in {
        "encoder.encoder.conv1.weight": 1e-3 / 32,
        "encoder.encoder.layer1.0.conv1.weight": 1e-3 / 16,
        "encoder.encoder.layer4.1.bn2.bias": 1e-3 / 2,
        "decoder.p5.weight": 1e-2,
    }.items():
        assert found[name] == pytest.approx(expected), name
    assert {rate for name, rate in found.items() if name.startswith("encoder.attention.")} == {1e-2}


TRANSFORMER_BLOCKS = 6  # of timm's test_vit


@pytest.mark.parametrize(
    ("decoder", "encoder", "count"),
    [
        ("fpn", "tu-test_efficientnet", 5),
        # A transformer's blocks are its stages, however many maps the decoder reads.
        ("dpt", "tu-test_vit", 1 + TRANSFORMER_BLOCKS),
        ("linear", "tu-test_vit", 1 + TRANSFORMER_BLOCKS),
        ("unet", "tu-test_vit", 1 + TRANSFORMER_BLOCKS),
    ],
)
def test_every_parameter_of_an_encoder_has_a_stage_and_those_of_a_stage_follow_each_other(decoder, encoder, count):
    model = build_segmenter(decoder, classes=2, encoder=encoder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    stages = parameter_stages(model)

    assert list(stages) == [name for name, _ in model.named_parameters() if name.startswith("encoder.")]
    assert set(stages.values()) == set(range(count))
    assert list(stages.values()) == sorted(stages.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["lion", "nadamw", "lamb", "rmsproptf", "muon"])
def test_optimisers_of_timm_train_with_the_groups(name):
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))
    before = model[0].weight.detach().clone()
    optimizer = build_optimizer(model, **(ADAMW | {"name": name}))

    model(torch.ones(1, 2)).square().sum().backward()
    optimizer.step()

    assert type(optimizer) is timm.optim.get_optimizer_class(name, bind_defaults=False)
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.05]
    assert not torch.equal(model[0].weight, before)


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


@pytest.mark.parametrize("steps", [1, 2, 37, 400])
def test_poly_and_the_warm_up_are_bit_for_bit_those_of_the_formulas(steps):
    """Runs of earlier versions resume and repeat with the same bits."""
    warmup = round(0.1 * steps)
    length = max(1, steps - warmup)
    expected = [
        (step + 1) / (warmup + 1) if step < warmup else (1.0 - (step - warmup) / length) ** 0.9 for step in range(steps)
    ]

    assert rates(steps, name="poly", power=0.9, warmup_steps=0.1) == [2.0 * factor for factor in expected]


def test_schedules_of_timm_count_steps_or_shares_of_them():
    assert rates(10, name="step", decay_t=0.5, decay_rate=0.1) == pytest.approx([2.0] * 5 + [0.2] * 5)
    assert rates(10, name="step", decay_t=5, decay_rate=0.1) == rates(10, name="step", decay_t=0.5, decay_rate=0.1)
    # timm's milestone m is the step m - 1.
    assert rates(10, name="multistep", decay_t=[0.4, 8], decay_rate=0.5) == [2.0] * 3 + [1.0] * 4 + [0.5] * 3
    assert rates(8, name="wsd", decay_t=4, decay_fn="linear") == [2.0] * 5 + [1.5, 1.0, 0.5]
    two = rates(8, name="cosine", cycle_limit=2)
    assert two[:4] == pytest.approx(two[4:])
    assert two[2] == pytest.approx(1 + math.cos(math.pi / 2))


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "schedule").iterdir()), ids=lambda path: path.stem)
def test_every_schedule_of_the_configurations_rises_to_its_peak_and_never_above(path):
    values = rates(20, **yaml.safe_load(path.read_text()))

    assert max(values) == values[2] == pytest.approx(2.0, rel=1e-5)
    assert values[0] < values[1] < values[2]
    assert path.stem == "constant" or values[-1] < 1.0
    assert values[2:] == sorted(values[2:], reverse=True)


def test_groups_keep_their_own_peaks():
    model = nn.Linear(1, 1)
    groups = [{"params": [model.weight], "lr": 1.0}, {"params": [model.bias], "lr": 0.1}]
    optimizer = torch.optim.SGD(groups)
    schedule = build_schedule(optimizer, 10, name="cosine", final_factor=0.5, warmup_steps=1)
    for _ in range(10):
        optimizer.step()
        schedule.step()

    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 0.05])


@pytest.mark.parametrize("warmup", [4, 0.4])
def test_warm_up_rises_linearly_then_the_schedule_starts(warmup):
    values = rates(10, name="poly", power=1.0, warmup_steps=warmup)

    assert values[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert values[5:] == pytest.approx([2 * (1 - k / 6) for k in range(1, 6)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "polly"}, "unknown schedule 'polly'; choose among constant, cosine, .* Did you mean 'poly'"),
        ({"name": "plateau"}, "unknown schedule 'plateau'"),
        (
            {"name": "cosine", "power": 1.0},
            r"schedule\.power: cosine has no such option; it has .*final_factor; choose a schedule .* schedule=<name>",
        ),
        ({"name": "constant", "power": 1.0}, r"schedule\.power: constant has no such option"),
        ({"name": "wsd"}, r"schedule: timm refuses these settings of wsd \(.*decay_t"),
        ({"name": "step", "decay_t": "long"}, r"schedule\.decay_t='long': timm refuses these settings of step"),
        ({"name": "cosine", "final_factor": -1.0}, r"schedule\.final_factor=-1\.0: timm refuses"),
        ({"name": "poly", "warmup_steps": 11}, r"warmup_steps must be from 0 to 10, .* got 11"),
    ],
)
def test_mistakes_in_a_schedule_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        rates(10, **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "adamv"}, r"optimizer\.name='adamv': timm has no such optimiser; .* Did you mean 'adam"),
        ({"name": "adahessian"}, r"optimizer\.name=adahessian: needs second derivatives"),
        ({"momentum": 0.9}, r"optimizer\.momentum: adamw has no such option; it has betas"),
        ({"fallback_list": ["x"]}, r"optimizer\.fallback_list: adamw has no such option"),
        ({"lr": -1.0}, "torch refuses these settings of adamw"),
    ],
)
def test_mistakes_in_an_optimiser_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(nn.Linear(1, 1), **(ADAMW | change))
