import pytest
import torch
from torch.testing import assert_close

from ema_seg.models import build_segmenter
from ema_seg.models.head import RowLogits, row_logits

ENCODER = "tu-test_resnet"


def head_like(scale, kernel, dtype=torch.float32, layout=torch.contiguous_format, autocast=None):
    """Build ``RowLogits`` as a head gives them: an upsampling, or a convolution at full resolution."""
    generator = torch.Generator().manual_seed(0)
    channels = 4 if kernel else 5
    features = torch.randn(2, channels, 8, 10, generator=generator, dtype=dtype).contiguous(memory_format=layout)
    weights = ()
    if kernel:
        weight = torch.randn(5, channels, kernel, kernel, generator=generator, dtype=dtype)
        weights = (weight, torch.randn(5, generator=generator, dtype=dtype))
    return RowLogits(features, weights, scale, dtype=autocast)


def rows_of(logits, first, last):
    """Compute some rows of the whole batch, image by image."""
    return torch.cat([image.compute(image.inputs_of(first, last), first, last) for image in logits.images()])


@pytest.mark.parametrize(("scale", "kernel"), [(1, 1), (1, 3), (1, 5), (1, 0), (2, 0), (4, 0), (8, 0), (3.5, 0)])
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_rows_are_those_of_the_whole(scale, kernel, rows):
    logits = head_like(scale, kernel, torch.float64)
    height = int(8 * scale)

    parts = [rows_of(logits, first, min(height, first + rows)) for first in range(0, height, rows)]

    assert logits.shape == logits.whole().shape == (2, 5, height, int(10 * scale))
    # PyTorch places the rows with float32 arithmetic, even for float64.
    assert_close(torch.cat(parts, dim=2), logits.whole(), rtol=1e-6, atol=1e-6)


def test_cropped_logits_are_those_of_the_crop():
    logits = head_like(4, 0)
    cropped = RowLogits(logits.features, scale=4, size=(26, 33))

    assert cropped.shape == (2, 5, 26, 33)
    assert torch.equal(cropped.whole(), logits.whole()[..., :26, :33])
    assert_close(rows_of(cropped, 20, 26), cropped.whole()[:, :, 20:])


def test_a_single_row_of_features_is_repeated():
    logits = RowLogits(torch.randn(1, 2, 1, 3), scale=4)
    assert_close(rows_of(logits, 1, 4), logits.whole()[:, :, 1:])


@pytest.mark.parametrize(
    "decoder", ["unet", "unetplusplus", "manet", "linknet", "fpn", "pspnet", "pan", "deeplabv3", "deeplabv3plus",
                "upernet", "segformer"]
)  # fmt: skip
@pytest.mark.parametrize("placement", [(), ("head",)])
def test_every_head_stops_before_its_last_layer(decoder, placement):
    attention = {"attention": "se", "placements": placement} if placement else {}
    model = build_segmenter(decoder, classes=3, encoder=ENCODER, **attention).eval()
    images = torch.randn(1, 3, 128, 128)

    with torch.inference_mode():
        logits = row_logits(model, images)

        assert (logits.scale > 1) != bool(logits.weights)
        assert logits.features.numel() < logits.shape.numel() or logits.weights
        assert torch.equal(logits.whole(), model(images))


def test_dpt_stops_before_its_upsampling():
    model = build_segmenter("dpt", classes=3, encoder="tu-test_vit").eval()
    images = torch.randn(1, 3, 64, 96)

    with torch.inference_mode():
        logits = row_logits(model, images)

        assert logits.scale == 2
        assert torch.equal(logits.whole(), model(images))


def test_a_model_without_such_a_head_is_run_to_its_end():
    model = torch.nn.Conv2d(3, 2, 1)
    images = torch.randn(1, 3, 4, 5)
    assert torch.equal(row_logits(model, images).whole(), model(images))


def test_a_failed_forward_leaves_the_head_as_it_was():
    model = build_segmenter("fpn", classes=3, encoder=ENCODER).eval()

    with pytest.raises(RuntimeError):
        row_logits(model, torch.randn(1, 4, 64, 64))

    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3, 64, 64)
