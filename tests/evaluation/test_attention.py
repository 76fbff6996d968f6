"""Tests of the weight maps of attention blocks while a model segments an image."""

import torch
from torch import nn

from ema_seg.evaluation import attention_weights
from ema_seg.models import build_segmenter


def test_the_weights_are_those_that_each_block_multiplies_by():
    model = build_segmenter(
        "fpn", classes=2, encoder="resnet18", attention="ema", attention_options={"factor": 4}
    ).eval()
    products = {}
    for name, block in model.named_modules():
        if hasattr(block, "weight_map"):
            block.register_forward_hook(
                lambda _, inputs, output, name=name: products.update({name: (inputs[0], output)})
            )
    image = torch.randn(3, 50, 70)

    maps = attention_weights(model, image, stride=32)

    assert list(maps) == list(products)
    assert len(maps) == 4
    for name, (features, output) in products.items():
        expected = features.unflatten(1, (4, -1)) * maps[name][None, :, None]
        torch.testing.assert_close(output, expected.flatten(1, 2))


def test_a_model_without_weight_maps_is_not_run():
    model = nn.Conv2d(3, 2, 1)
    model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(AssertionError("run")))

    assert attention_weights(model, torch.zeros(3, 8, 8), stride=1) == {}
