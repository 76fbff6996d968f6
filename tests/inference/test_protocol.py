"""Windows, scales and flips against renderings that predict and average whole arrays."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ema_seg.inference.classes import most_likely_classes
from ema_seg.inference.prediction import predict
from ema_seg.inference.protocol import PredictionProtocol, check_protocol
from ema_seg.models import build_segmenter, model_stride
from ema_seg.runtime.errors import ConfigError
from tests.inference.conftest import NORMALISE

DECODERS = ("unet", "fpn")  # a convolution as the last layer, and an upsampling


@pytest.fixture(scope="module", params=DECODERS)
def model(request):
    torch.manual_seed(0)
    built = build_segmenter(request.param, classes=5, encoder="tu-test_efficientnet", attention="none").eval()
    return built.requires_grad_(False)


def picture(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)


def run(protocol, model, image):
    """Return the class ids and all strips of logits of an image."""
    (logits,) = protocol.predict(model, [image], model_stride(model), NORMALISE)
    assert logits.shape == (1, 5, *image.shape[1:])
    with torch.inference_mode():
        strips = list(logits.strips())
    assert [first for first, _, _ in strips] == [0, *(last for _, last, _ in strips[:-1])]
    return torch.cat([rows for _, _, rows in strips], dim=1)


def whole(model, image):
    return predict(model, [image], model_stride(model), NORMALISE)[0].whole()[0]


def slide(model, image, window, stride):
    """Average the logits of windows as mmsegmentation's slide mode lays them out."""
    height, width = image.shape[1:]
    total, count = torch.zeros(5, height, width), torch.zeros(height, width)
    steps = [
        max(length - size + step - 1, 0) // step + 1
        for length, size, step in zip((height, width), window, stride, strict=True)
    ]
    for row, column in itertools.product(*map(range, steps)):
        bottom = min(row * stride[0] + window[0], height)
        right = min(column * stride[1] + window[1], width)
        place = np.s_[:, max(bottom - window[0], 0) : bottom, max(right - window[1], 0) : right]
        total[place] += whole(model, image[place])
        count[place[1:]] += 1
    return total / count


@pytest.mark.parametrize(
    ("size", "window", "stride"),
    [
        ((70, 100), (40, 48), (30, 32)),
        ((70, 100), (40, 48), (12, 17)),  # three and more windows cover a pixel
        ((64, 96), (32, 32), (32, 32)),  # none overlaps
        ((40, 100), (64, 48), (64, 20)),  # a window higher than the image
        ((33, 49), (32, 48), (32, 48)),  # one row and one column more than a window
    ],
)
def test_windows_average_the_logits_that_cover_a_pixel(model, size, window, stride):
    image = picture(*size)
    found = run(PredictionProtocol(window, stride), model, image)
    torch.testing.assert_close(found, slide(model, image, window, stride), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [(50, 70), (64, 70), (500, 500)])
def test_a_window_as_large_as_the_image_is_the_plain_path(model, window):
    image = picture(50, 70)
    plain = PredictionProtocol().predict(model, [image], model_stride(model), NORMALISE)
    windows = PredictionProtocol(window, window).predict(model, [image], model_stride(model), NORMALISE)
    ids = [most_likely_classes(logits) for logits in (*plain, *windows)]
    assert torch.equal(*ids)


def average(model, image, scales, flips, predict_one=whole):
    """Average the probabilities, each computed as a whole array."""
    height, width = image.shape[1:]
    total = torch.zeros(5, height, width)
    for scale, flip in itertools.product(scales, flips):
        size = (int(height * scale + 0.5), int(width * scale + 0.5))
        scaled = F.interpolate(image[None].float(), size=size, mode="bilinear", align_corners=False)[0]
        scaled = scaled.round().to(torch.uint8)
        logits = predict_one(model, scaled.flip(2) if flip else scaled)
        resized = F.interpolate(logits[None], size=(height, width), mode="bilinear", align_corners=False)[0]
        probabilities = resized.softmax(0)
        total += probabilities.flip(2) if flip else probabilities
    return total / len(scales) / len(flips)


@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0, 1.75), (0.3,), (2.0,)])
@pytest.mark.parametrize("flip", [False, True])
def test_scales_and_flips_average_probabilities(model, scales, flip):
    image = picture(45, 64)
    found = run(PredictionProtocol(scales=scales, flip=flip), model, image).softmax(0)
    expected = average(model, image, scales, (False, True) if flip else (False,))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-3)


def test_windows_slide_at_each_scale(model):
    image, window, stride = picture(45, 64), (32, 40), (20, 24)
    found = run(PredictionProtocol(window, stride, (0.5, 1.5), True), model, image).softmax(0)

    def slide_all(model, image):
        return slide(model, image, window, stride)

    expected = average(model, image, (0.5, 1.5), (False, True), slide_all)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-3)


def test_strips_of_many_sizes_are_resized_alike(model, monkeypatch):
    image, protocol = picture(60, 80), PredictionProtocol(scales=(0.7, 1.6, 2.5, 4.0))
    expected = average(model, image, protocol.scales, (False,)).log()
    monkeypatch.setattr("ema_seg.models.head._BYTES_AT_ONCE", {"cpu": 1})  # a row at a time
    torch.testing.assert_close(run(protocol, model, image), expected, atol=1e-3, rtol=1e-3)


def test_each_image_of_a_batch_is_predicted_at_its_own_size(model):
    images = [picture(50, 60, 1), picture(40, 90, 2), picture(50, 60, 3)]
    protocol = PredictionProtocol((32, 32), (21, 21))
    together = protocol.predict(model, images, model_stride(model), NORMALISE)
    ids = [most_likely_classes(logits) for logits in together]
    for image, own in zip(images, ids, strict=True):
        assert torch.equal(own, run(protocol, model, image).argmax(0).byte())


def test_memory_holds_a_row_of_windows(model):
    """The logits of the rows that are done can be freed before the next ones are computed."""
    image = picture(400, 40)
    (logits,) = PredictionProtocol((40, 40), (40, 40)).predict(model, [image], model_stride(model), NORMALISE)
    sizes = [rows.untyped_storage().nbytes() for _, _, rows in logits.strips()]
    assert len(sizes) == 10 and max(sizes) == 5 * 40 * 40 * 4


def test_settings_make_a_protocol():
    assert PredictionProtocol.from_settings({}).plain
    assert PredictionProtocol.from_settings({"scales": [1], "flip": False, "window_stride": None}).plain
    made = PredictionProtocol.from_settings({"window": [512, 768], "scales": [0.5, 1]})
    assert made == PredictionProtocol((512, 768), (341, 512), (0.5, 1.0), False)
    assert PredictionProtocol.from_settings(made.settings()) == made


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": None, "window_stride": [2, 2]}, "must come with a window; set evaluation.window"),
        ({"window": [4, 4], "window_stride": [5, 4]}, "must be at most the window, 4 x 4 pixels"),
        ({"compile": True, "scales": [0.5, 1]}, "evaluation.compile: must be false with evaluation.scales"),
    ],
)
def test_contradictions_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        check_protocol(settings)
