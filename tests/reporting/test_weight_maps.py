import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from ema_seg.models import build_segmenter
from ema_seg.reporting import weight_maps
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
            "trainer": {},
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


def test_the_figure_leaves_out_what_the_image_was_padded_with(checkpoint, image, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(weight_maps, "draw_weight_maps", lambda pixels, maps: drawn.update(maps) or Figure())

    assert main([str(tmp_path / "maps.png"), str(checkpoint("ema")), str(image)]) == 0

    # The image is padded to 64 × 96 pixels; the stride of the finest map is 4, that of the coarsest 32.
    sizes = [groups.shape for groups in drawn.values()]
    assert (4, 13, 18) in sizes
    assert all(rows <= 13 and columns <= 18 for _, rows, columns in sizes)


def test_the_figure_shows_the_mean_and_the_most_varied_groups():
    flat, slope = np.full((3, 4), 0.5), np.linspace(0, 1, 12).reshape(3, 4)
    groups = np.stack([flat, slope, flat, slope / 2, slope / 3, slope / 4])

    figure = draw_weight_maps(np.zeros((6, 8, 3), np.uint8), {"block": groups})

    shown = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    assert np.allclose(shown[1], groups.mean(axis=0))
    assert all(np.array_equal(drawn, groups[index]) for drawn, index in zip(shown[2:], [1, 3, 4, 5], strict=True))
    assert figure.axes[2].get_title() == "group 1\n0.00 to 1.00"


@pytest.mark.slow
def test_the_command_writes_the_figure(checkpoint, image, tmp_path):
    assert main([str(tmp_path / "maps.png"), str(checkpoint("ema")), str(image)]) == 0
    assert Image.open(tmp_path / "maps.png").width > 1000


@pytest.mark.slow
def test_mistakes_are_one_sentence(checkpoint, image, tmp_path, capsys):
    figure = str(tmp_path / "maps.png")
    missing = str(tmp_path / "missing")

    assert main([figure, missing, str(image)]) == 1
    assert main([figure, str(checkpoint("ema")), missing]) == 1
    assert main([figure, str(checkpoint("se")), str(image)]) == 1
    assert main([str(tmp_path / "no" / "maps.png"), str(checkpoint("ema")), str(image)]) == 1
    assert main([str(tmp_path / "maps.doc"), str(checkpoint("ema")), str(image)]) == 1

    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 5
    assert all(error.startswith("error: ") for error in errors)
    assert "no attention block of the model has weights for positions" in errors[2]
    assert "maps.png: the figure cannot be written" in errors[3]
    assert "maps.doc: the figure cannot be written" in errors[4]
