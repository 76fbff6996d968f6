"""Tests of the weight maps of attention blocks while a model segments an image."""

import torch
from torch import nn

from ema_seg.data.normalise import Normalise
from ema_seg.inference.attention import attention_weights
from ema_seg.models import build_segmenter

NORMALISE = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


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
    image = torch.randint(256, (3, 50, 70), dtype=torch.uint8)

    maps = attention_weights(model, image, 32, NORMALISE)

    assert list(maps) == list(products)
    assert len(maps) == 4
    for name, (features, output) in products.items():
        expected = features.unflatten(1, (4, -1)) * maps[name][None, :, None]
        torch.testing.assert_close(output, expected.flatten(1, 2))


def test_a_model_without_weight_maps_is_not_run():
    model = nn.Conv2d(3, 2, 1)
    model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(AssertionError("run")))

    assert attention_weights(model, torch.zeros(3, 8, 8, dtype=torch.uint8), 1, NORMALISE) == {}
