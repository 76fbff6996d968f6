import numpy as np
import pytest
import torch
from PIL import Image

from ema_seg.evaluation import attention_weights
from ema_seg.models import build_segmenter, load_segmenter
from ema_seg.reporting.weight_maps import draw_weight_maps, main


@pytest.fixture
def checkpoint(tmp_path):
    def write(attention):
        options = {"factor": 4} if attention == "ema" else {}
        model = build_segmenter("fpn", classes=2, encoder="resnet18", attention=attention, attention_options=options)
        config = {
            "model": {"decoder": "fpn", "encoder": "resnet18", "encoder_weights": None},
            "attention": {"name": attention, **options},
            "placement": {"encoder": False, "decoder": True, "head": False, "encoder_stages": None},
            "data": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
        }
        state = {f"model.{name}": value for name, value in model.state_dict().items()}
        torch.save({"state_dict": state, "config": config, "classes": ["a", "b"]}, tmp_path / "model.ckpt")
        return tmp_path / "model.ckpt"

    return write


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def test_the_weights_are_those_that_each_block_multiplies_by(checkpoint):
    model, _ = load_segmenter(checkpoint("ema"))
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


def test_the_figure_shows_the_mean_and_the_most_varied_groups():
    flat, slope = np.full((3, 4), 0.5), np.linspace(0, 1, 12).reshape(3, 4)
    groups = np.stack([flat, slope, flat, slope / 2, slope / 3, slope / 4])

    figure = draw_weight_maps(np.zeros((6, 8, 3), np.uint8), {"block": groups})

    shown = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    assert np.allclose(shown[1], groups.mean(axis=0))
    assert all(np.array_equal(drawn, groups[index]) for drawn, index in zip(shown[2:], [1, 3, 4, 5], strict=True))
    assert figure.axes[2].get_title() == "group 1\n0.00 to 1.00"


def test_the_command_writes_the_figure(checkpoint, image, tmp_path):
    assert main([str(tmp_path / "maps.png"), str(checkpoint("ema")), str(image)]) == 0
    assert Image.open(tmp_path / "maps.png").width > 1000


def test_mistakes_are_one_sentence(checkpoint, image, tmp_path, capsys):
    figure = str(tmp_path / "maps.png")
    missing = str(tmp_path / "missing")

    assert main([figure, missing, str(image)]) == 1
    assert main([figure, str(checkpoint("ema")), missing]) == 1
    assert main([figure, str(checkpoint("se")), str(image)]) == 1

    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert all(error.startswith("error: ") for error in errors)
    assert "no attention block of this model has weight maps" in errors[2]
