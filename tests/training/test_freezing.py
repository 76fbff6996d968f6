"""Frozen parts: what they are, what they cost, and when they train again."""

import pytest
import torch
from torch import nn

from ema_seg.models import build_segmenter
from ema_seg.runtime.errors import ConfigError
from ema_seg.training.freezing import find_parts, freeze, freeze_parts, unfreeze
from ema_seg.training.optimisation import build_optimizer

ADAMW = {"name": "adamw", "lr": 1e-2, "encoder_lr_factor": 1.0, "weight_decay": 0.0}


def segmenter(**arguments):
    return build_segmenter("linknet", classes=2, encoder="tu-test_efficientnet", **arguments)


def everywhere(attention="se"):
    return segmenter(attention=attention, placements=["encoder", "decoder", "head"])


@pytest.mark.parametrize("parts", [["encoder"], ["decoder"], ["head"], ["segmentation_head"], ["encoder", "decoder"]])
def test_a_part_is_the_same_layers_with_any_block(parts):
    plain, model = segmenter(), everywhere()
    count = sum(plain.get_parameter(name).numel() for name in find_parts(plain, parts))

    found = find_parts(model, parts)

    assert sum(model.get_parameter(name).numel() for name in found) == count > 0
    assert not [name for name in found if ".attention." in name]


def test_attention_is_a_part_and_patterns_name_modules_and_parameters():
    model = everywhere()
    blocks = {name for name, _ in model.named_parameters() if ".attention." in name}

    assert find_parts(model, ["attention"]) == blocks
    assert find_parts(model, ["segmentation_head.attention"]) == {
        name for name in blocks if name.startswith("segmentation_head.")
    }
    assert find_parts(model, ["encoder.model.blocks.[01]"]) == {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("encoder.encoder.model.blocks.0.", "encoder.encoder.model.blocks.1."))
    }
    biases = find_parts(model, ["decoder.*.bias"])
    assert biases
    assert all(name.endswith(".bias") for name in biases)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["encodr"], r"freeze\.parts: 'encodr' matches nothing .* are encoder, decoder, .* Did you mean 'encoder'"),
        (["attention"], r"freeze\.parts: 'attention' matches nothing in the model"),
        (["encoder", "decoder", "head"], r"freeze\.parts=\[.*\]: nothing would be left to train"),
    ],
)
def test_what_cannot_be_frozen_is_named(parts, message):
    with pytest.raises(ConfigError, match=message):
        find_parts(segmenter(), parts)


def count_gradients(model):
    """Count the gradients that a step computes for parameters of the encoder, by hooks on the autograd graph."""
    counted = []
    tensors = [parameter for parameter in model.encoder.parameters() if parameter.requires_grad]
    handles = [tensor.register_hook(lambda gradient: counted.append(1)) for tensor in tensors]
    backward = []

    def watch(_, __, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: backward.append(1))

    convolutions = [module for module in model.encoder.modules() if isinstance(module, nn.Conv2d)]
    handles += [module.register_forward_hook(watch) for module in convolutions]
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    for handle in handles:
        handle.remove()
    return len(counted), len(backward)


@pytest.mark.parametrize("attention", ["none", "se"])
def test_a_frozen_encoder_has_no_backward_no_state_and_no_moving_statistics(attention):
    model = segmenter() if attention == "none" else everywhere()
    names = find_parts(model, ["encoder"])
    # Their gradients are needed with a trained encoder.
    parameters, layers = count_gradients(model)
    assert parameters >= len(names)
    assert layers > 0
    model.zero_grad()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    freeze(model, names)
    optimizer = build_optimizer(model, **ADAMW, later=names)
    parameters, layers = count_gradients(model)
    optimizer.step()

    blocks = [name for name, _ in model.encoder.named_parameters() if name.startswith("attention.")]
    convolutions = [
        module
        for name, module in model.encoder.named_modules()
        if name.startswith("attention.") and isinstance(module, nn.Conv2d)
    ]
    assert (parameters, layers) == (len(blocks), len(convolutions))
    assert len(optimizer.state) == sum(1 for _ in model.parameters()) - len(names)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    encoder = "encoder.encoder." if attention == "se" else "encoder."
    assert changed
    assert not [name for name in changed if name.startswith(encoder) and ".attention." not in name]


def test_parts_unfreeze_with_a_fresh_state_in_the_same_groups():
    model = segmenter()
    modes = [module.training for module in model.modules()]
    unfreezing = freeze_parts(model, {"parts": ["encoder"], "until": 3}, epoch=2)
    optimizer = build_optimizer(model, **ADAMW, later=unfreezing.names)
    groups = [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]

    unfreeze(model, unfreezing.names)

    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad for parameter in model.parameters())
    again = build_optimizer(model, **ADAMW)
    assert [[id(parameter) for parameter in group["params"]] for group in again.param_groups] == groups


def test_nothing_is_frozen_from_the_epoch_on():
    model = segmenter()

    assert freeze_parts(model, {"parts": ["encoder"], "until": 3}, epoch=3) is None
    assert freeze_parts(model, {"parts": None, "until": None}, epoch=0) is None
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert freeze_parts(model, {"parts": ["encoder"], "until": None}, epoch=9) is None
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())


def test_dropout_of_a_frozen_decoder_is_off_with_a_block_inside_of_it():
    model = build_segmenter(
        "fpn", classes=2, encoder="tu-test_efficientnet", attention="se", placements=["decoder"]
    ).train()
    names = find_parts(model, ["encoder", "decoder", "head"])

    freeze(model, names)
    dropouts = [module for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
    assert dropouts and not any(module.training for module in dropouts)
    assert any(module.training for name, module in model.named_modules() if name.endswith(".attention"))

    unfreeze(model, names)
    assert all(module.training for module in dropouts)
