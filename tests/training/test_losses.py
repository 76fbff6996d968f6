import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ema_seg.models import build_segmenter
from ema_seg.models.head import RowLogits, row_logits
from ema_seg.runtime.errors import ConfigError
from ema_seg.training.losses import build_loss, loss_names
from tests.models.test_head import head_like
from tests.training.synchronisations import Synchronisations

CLASSES = 5


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, CLASSES, 6, 7, generator=generator)
    target = torch.randint(0, CLASSES, (2, 6, 7), generator=generator)
    target[:, :2] = 255
    return logits, target


def test_cross_entropy_is_the_mean_over_labelled_pixels(batch):
    logits, target = batch
    loss = build_loss({"cross_entropy": {"label_smoothing": 0.1}}, CLASSES)

    assert_close(loss(logits, target), F.cross_entropy(logits, target, ignore_index=255, label_smoothing=0.1))


def test_class_weights_weigh_the_mean(batch):
    logits, target = batch
    weights = [1.0, 2.0, 0.0, 4.0, 0.5]
    loss = build_loss({"cross_entropy": {"class_weights": weights}}, CLASSES)

    assert_close(loss(logits, target), F.cross_entropy(logits, target, torch.tensor(weights), ignore_index=255))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_batch_of_classes_that_weigh_nothing_counts_0_and_teaches_nothing(batch, smoothing):
    logits, target = batch
    logits.requires_grad_()
    terms = {"cross_entropy": {"class_weights": [1.0, 2.0, 0.0, 4.0, 0.5], "label_smoothing": smoothing}}

    loss = build_loss(terms, CLASSES)(logits, target.where(target == 255, 2))
    loss.backward()

    assert loss.item() == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize(("threshold", "min_kept"), [(0.7, 0), (0.01, 3), (0.2, 10), (1.0, 0)])
def test_ohem_averages_the_hard_pixels(batch, threshold, min_kept):
    logits, target = batch
    probabilities = logits.softmax(1).permute(0, 2, 3, 1)[target != 255].numpy()
    of_truth = probabilities[np.arange(len(probabilities)), target[target != 255].numpy()]
    hard = np.sort(of_truth)[: max(min_kept * 2, (of_truth < threshold).sum(), 1)]
    loss = build_loss({"ohem": {"threshold": threshold, "min_kept": min_kept}}, CLASSES)

    assert loss(logits, target).item() == pytest.approx(-np.log(hard).mean(), rel=1e-5)


def test_focal_with_gamma_zero_is_a_mean_of_binary_cross_entropies(batch):
    logits, target = batch
    one_hot = F.one_hot(target[target != 255], CLASSES).float()
    expected = F.binary_cross_entropy_with_logits(logits.permute(0, 2, 3, 1)[target != 255], one_hot)

    loss = build_loss({"focal": {"gamma": 0.0}}, CLASSES)

    assert_close(loss(logits, target), expected)


@pytest.mark.parametrize("name", ["dice", "lovasz", "cross_entropy", "focal", "ohem"])
def test_a_sure_and_right_prediction_costs_almost_nothing(batch, name):
    _, target = batch
    one_hot = F.one_hot(target.where(target != 255, 0), CLASSES).permute(0, 3, 1, 2).float()
    logits = 60.0 * (2 * one_hot - 1)

    assert build_loss({name: {}}, CLASSES)(logits, target).item() == pytest.approx(0.0, abs=1e-3)
    assert build_loss({name: {}}, CLASSES)(logits.roll(1, 1), target).item() > 0.5


@pytest.mark.parametrize("name", loss_names())
def test_ignored_pixels_have_no_influence(batch, name):
    logits, target = batch
    changed = logits.where((target != 255)[:, None], torch.tensor(9.0))
    logits.requires_grad_()
    loss = build_loss({name: {}}, CLASSES)

    loss(logits, target).backward()

    assert_close(loss(logits, target), loss(changed, target))
    assert (logits.grad.permute(0, 2, 3, 1)[target == 255] == 0).all()


@pytest.mark.parametrize("name", loss_names())
def test_a_batch_without_labels_gives_a_finite_loss_and_no_gradient(batch, name):
    logits, target = batch
    logits.requires_grad_()
    loss = build_loss({name: {}}, CLASSES)(logits, torch.full_like(target, 255))

    loss.backward()

    assert math.isfinite(loss.item())
    assert (logits.grad == 0).all()


def test_terms_add_up_by_weight_in_float32(batch):
    logits, target = batch
    parts = {"cross_entropy": {"weight": 0.5}, "dice": {"weight": 2.0}, "lovasz": None}
    loss = build_loss(parts, CLASSES)
    expected = 0.5 * build_loss({"cross_entropy": {}}, CLASSES)(logits, target)
    expected = expected + 2 * build_loss({"dice": {}}, CLASSES)(logits, target)

    assert_close(loss(logits, target), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(logits.bfloat16(), target).dtype == torch.float32


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"lovas": {}}, r"loss\.lovas: there is no such loss.*Did you mean 'lovasz'"),
        ({"dice": {"gamma": 1}}, r"loss\.dice\.gamma: there is no such option; choose from weight, smooth"),
        ({"dice": None}, r"loss: must have at least one term, got none"),
        ({"cross_entropy": {"class_weights": [1.0]}}, r"1 weights for 5 classes"),
        ({"ohem": {"threshold": 70}}, r"loss\.ohem\.threshold must be a probability .* got 70"),
        (
            {"cross_entropy": {"class_weights": [1, -1, 1, 1, 1]}},
            r"class_weights=.*a weight must be .* or more, got -1",
        ),
        ({"cross_entropy": {"class_weights": [1, math.nan, 1, 1, 1]}}, r"class_weights=.* 0 or more, got nan"),
        ({"cross_entropy": {"class_weights": [1, "2", 1, 1, 1]}}, r"class_weights=.* 0 or more, got '2'"),
        ({"cross_entropy": {"class_weights": 3}}, r"class_weights=3 must be a list of one weight per class"),
        ({"cross_entropy": {"class_weights": [0, 0.0, 0, 0, 0]}}, r"class_weights=.*all weights are 0, so nothing"),
        ({"dice": {"weight": -1}}, r"loss\.dice\.weight must be a number of 0 or more, got -1"),
        ({"dice": {"weight": "1"}}, r"loss\.dice\.weight must be a number of 0 or more, got '1'"),
        ({"dice": {"weight": 0}, "ohem": {"weight": 0.0}}, r"loss: the weight of each term \(dice, ohem\) is 0"),
        ({"dice": {"smooth": -1}}, r"loss\.dice\.smooth must be a number of 0 or more, got -1"),
        ({"focal": {"gamma": -2}}, r"loss\.focal\.gamma must be a number of 0 or more, got -2"),
        ({"focal": {"alpha": 2}}, r"loss\.focal\.alpha must be a number from 0 to 1, got 2"),
    ],
)
def test_mistakes_are_named(terms, message):
    with pytest.raises(ConfigError, match=message):
        build_loss(terms, CLASSES)


ALL_TERMS = [
    {"cross_entropy": {"label_smoothing": 0.1, "class_weights": [1.0, 2.0, 0.0, 4.0, 0.5]}},
    {"dice": {"smooth": 0.0}},
    {"focal": {"gamma": 1.5, "alpha": 0.25}},
    {"ohem": {"threshold": 0.3, "min_kept": 4}},
    {"cross_entropy": {}, "dice": {"weight": 0.5}, "lovasz": {"weight": 0.25}},
]


@pytest.mark.parametrize("terms", ALL_TERMS)
@pytest.mark.parametrize("rows", [1, 4, 5])
@pytest.mark.parametrize(("dtype", "layout"), [
    (torch.float32, torch.contiguous_format), (torch.bfloat16, torch.channels_last)
])  # fmt: skip
def test_strips_of_any_height_give_the_same_loss_and_gradient(terms, rows, dtype, layout):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, CLASSES, 11, 7, generator=generator).to(dtype).contiguous(memory_format=layout)
    target = torch.randint(0, CLASSES, (2, 11, 7), generator=generator)
    target[0, 3:8] = 255  # strips without labels, and without labels in one image
    target[1, 4] = 255
    results = []
    for strip in (11, rows):
        loss, own = build_loss(terms, CLASSES, strips=strip), logits.clone().requires_grad_()
        value = loss(own, target)
        (3 * value).backward()
        with torch.no_grad():
            assert_close(loss(logits, target), value.detach())
        results.append((value.detach(), own.grad))
        assert own.grad.stride() == logits.stride()

    tolerance = {"rtol": 1e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-4}
    assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-7)
    assert_close(results[1][1], results[0][1], **tolerance)


@pytest.mark.parametrize("terms", [*ALL_TERMS[:4], {"focal": {"gamma": 0.0}}])
def test_gradients_are_those_of_the_loss(terms):
    """Compare with differences of the loss in float64."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(1, CLASSES, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, CLASSES, (1, 3, 4), generator=generator)
    target[0, 0, :2] = 255
    loss = build_loss(terms, CLASSES, strips=2)

    loss(logits, target).backward()

    step = 1e-6
    for position in range(logits.numel()):
        shift = torch.zeros(logits.numel(), dtype=torch.float64)
        shift[position] = step
        with torch.no_grad():
            above, below = (loss(logits + sign * shift.view_as(logits), target) for sign in (1, -1))
        assert logits.grad.flatten()[position].item() == pytest.approx((above - below).item() / (2 * step), abs=1e-8)


def test_small_gradients_survive_float16_with_a_loss_scale():
    logits = torch.randn(1, CLASSES, 512, 512, generator=torch.Generator().manual_seed(3)).half()
    target = torch.zeros(1, 512, 512, dtype=torch.uint8)
    expected, actual = logits.float().requires_grad_(), logits.requires_grad_()

    (2**16 * F.cross_entropy(expected, target.long())).backward()
    (2**16 * build_loss({"cross_entropy": {}}, CLASSES)(actual, target)).backward()

    assert actual.grad.dtype == torch.float16
    assert_close(actual.grad.float(), expected.grad, rtol=1e-3, atol=1e-6)


def test_a_second_backward_is_refused(batch):
    logits, target = batch
    loss = build_loss({"dice": {}}, CLASSES)(logits.requires_grad_(), target)
    loss.backward(retain_graph=True)

    with pytest.raises(RuntimeError, match="gradient is gone after its first backward; compute the loss again"):
        loss.backward()


@pytest.mark.parametrize("name", ["cross_entropy", "ohem"])
def test_a_loss_that_is_not_a_number_shows(batch, name):
    logits, target = batch
    logits[0, 0, 4, 3] = math.nan
    assert math.isnan(build_loss({name: {}}, CLASSES)(logits, target).item())


@pytest.mark.parametrize("terms", [*ALL_TERMS[:4], {"cross_entropy": {}, "dice": {}}])
@pytest.mark.parametrize("head", [None, (1, 3), (4, 0)])
def test_no_loss_but_lovasz_waits_for_the_device(batch, terms, head):
    logits, target = batch
    if head:
        shape = head_like(*head)
        logits = RowLogits(shape.features.requires_grad_(), shape.weights, shape.scale)
        target = torch.randint(CLASSES, (2, *logits.shape[2:]))
    else:
        logits.requires_grad_()
    loss = build_loss(terms, CLASSES, strips=2)

    with Synchronisations() as seen:
        loss(logits, target.byte()).backward()

    assert seen.found == []


def plain_loss(logits, target):
    """Compute cross-entropy with class weights and smoothing, and Dice, in PyTorch's operations on all logits."""
    loss = F.cross_entropy(logits, target, torch.tensor(WEIGHTS).to(logits), ignore_index=255, label_smoothing=0.1)
    labelled = target != 255
    truth = F.one_hot(target.where(labelled, 0), CLASSES).permute(0, 3, 1, 2) * labelled[:, None]
    probabilities = logits.softmax(dim=1) * labelled[:, None]
    both, predicted, true = ((part).sum(dim=(0, 2, 3)) for part in (probabilities * truth, probabilities, truth))
    return loss + 0.5 * ((1 - (2 * both + 1) / (predicted + true + 1)) * (true > 0)).mean()


WEIGHTS = [1.0, 2.0, 0.0, 4.0, 0.5]
PLAIN = {
    "cross_entropy": {"label_smoothing": 0.1, "class_weights": WEIGHTS},
    "dice": {"weight": 0.5, "smooth": 1.0},
}


@pytest.mark.parametrize(("scale", "kernel"), [(1, 3), (1, 1), (4, 0)])
@pytest.mark.parametrize("rows", ["auto", 1, 3, "off"])
@pytest.mark.parametrize(
    ("dtype", "autocast", "layout", "tolerance"),
    [
        (torch.float64, None, torch.contiguous_format, 1e-6),
        (torch.float32, None, torch.channels_last, 1e-4),
        (torch.float32, torch.bfloat16, torch.channels_last, 2e-2),
        (torch.float16, torch.float16, torch.contiguous_format, 5e-3),
    ],
)
def test_from_the_features_on_the_gradients_are_those_of_plain_operations(
    scale, kernel, rows, dtype, autocast, layout, tolerance
):
    logits = head_like(scale, kernel, dtype, layout, autocast)
    # Weights stay in float32 under autocast.
    weights = tuple(weight.float() if autocast else weight for weight in logits.weights)
    generator = torch.Generator().manual_seed(4)
    target = torch.randint(0, CLASSES, logits.shape[0:1] + logits.shape[2:], generator=generator)
    target[0, 2:5] = 255
    inputs = [tensor.clone().requires_grad_() for tensor in (logits.features, *weights)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]

    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        loss = build_loss(PLAIN, CLASSES, strips=rows)(
            RowLogits(inputs[0], tuple(inputs[1:]), scale, dtype=autocast), target
        )
    (64 * loss / 2).backward()
    expected = plain_loss(RowLogits(exact[0], tuple(exact[1:]), scale).whole(), target)
    (32 * expected).backward()

    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    for own, right in zip(inputs, exact, strict=True):
        assert own.grad.dtype == own.dtype
        # Strides along dimensions of size 1 depend on the CPU's convolutions.
        if own.dim() == 4:
            formats = torch.contiguous_format, torch.channels_last
            assert [own.grad.is_contiguous(memory_format=known) for known in formats] == [
                own.is_contiguous(memory_format=known) for known in formats
            ]
        assert (own.grad.double() - right.grad).abs().max() <= tolerance * right.grad.abs().max()


@pytest.mark.parametrize("name", loss_names())
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient_and_a_crop_counts_alone(name, frozen):
    logits = head_like(1, 3)
    inputs = [tensor.clone().requires_grad_(index != frozen) for index, tensor in enumerate(logits.inputs)]
    target = torch.randint(0, CLASSES, (2, 5, 6), generator=torch.Generator().manual_seed(5))

    loss = build_loss({name: {}}, CLASSES, strips=2)(RowLogits(inputs[0], tuple(inputs[1:]), size=(5, 6)), target)
    loss.backward()

    whole = build_loss({name: {}}, CLASSES)(logits.whole()[..., :5, :6], target)
    assert_close(loss.detach(), whole)
    assert [tensor.grad is None for tensor in inputs] == [index == frozen for index in range(3)]


@pytest.mark.parametrize(
    ("decoder", "compiled"), [("unet", False), ("fpn", False), pytest.param("unet", True, marks=pytest.mark.slow)]
)
def test_a_model_learns_the_same_in_strips(decoder, compiled):
    gradients = []
    for strips in ("off", 3):
        torch.manual_seed(0)
        model = build_segmenter(decoder, classes=CLASSES, encoder="tu-test_resnet")
        if compiled:
            model.compile(dynamic=False)
        loss = build_loss({"cross_entropy": {}, "dice": {}}, CLASSES, strips=strips)
        torch.manual_seed(1)
        for _ in range(2):  # gradients accumulate
            images, target = torch.randn(2, 3, 64, 64), torch.randint(0, CLASSES, (2, 64, 64))
            torch.manual_seed(2)  # dropout
            loss(row_logits(model, images), target).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})

    assert gradients[0]["segmentation_head.0.weight"].abs().sum() > 0
    for name, gradient in gradients[0].items():
        if gradient is not None:
            assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def test_a_target_of_another_size_is_refused(batch):
    logits, target = batch
    with pytest.raises(ValueError, match=r"the target must have the logits' size \(2, 6, 7\), got \(2, 5, 7\)"):
        build_loss({"dice": {}}, CLASSES)(logits, target[:, :5])
