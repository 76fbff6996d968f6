import pytest
import torch

from ema_seg.inference import classes as classes_module
from ema_seg.inference.classes import most_likely_classes
from ema_seg.models.head import RowLogits
from ema_seg.runtime.cpp import Library

LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(params=["kernels", "torch"])
def kernels(request, monkeypatch):
    """Run with the C++ kernels, and in PyTorch's operations, as where there is no compiler."""
    if request.param == "torch":
        monkeypatch.setattr(classes_module, "_kernels", lambda: Library(None, "no compiler"))
    else:
        assert classes_module._kernels().problem is None
    return request.param


def random_features(channels, height, width, layout=torch.contiguous_format, dtype=torch.float32):
    generator = torch.Generator().manual_seed(channels + height)
    features = torch.randn(1, channels, height, width, generator=generator)
    return features.to(dtype).contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [2, 4, 8, 3.5])
@pytest.mark.parametrize("classes", [1, 3, 19, 150])
def test_upsampled_classes_are_those_of_all_logits_to_the_last_pixel(kernels, layout, scale, classes):
    size = (int(22 * scale) - 3, int(32 * scale) - 1)
    logits = RowLogits(random_features(classes, 22, 32, layout), scale=scale, size=size)

    found = most_likely_classes(logits)

    assert found.dtype == torch.uint8
    assert torch.equal(found, logits.whole()[0].argmax(dim=0).byte())


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_share_the_rows(threads):
    logits = RowLogits(random_features(5, 7, 300), scale=4)  # more columns than a block
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(most_likely_classes(logits), logits.whole()[0].argmax(dim=0).byte())
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [0, 1, 3])
def test_classes_at_full_resolution_are_those_of_all_logits(kernels, layout, kernel, monkeypatch):
    monkeypatch.setattr("ema_seg.models.head._BYTES_AT_ONCE", {"cpu": 5 * 29 * 4 * 3})  # three rows
    generator = torch.Generator().manual_seed(0)
    weights = ()
    if kernel:
        weights = (torch.randn(5, 8, kernel, kernel, generator=generator), torch.randn(5, generator=generator))
    logits = RowLogits(random_features(8 if kernel else 5, 20, 32, layout), weights, size=(19, 29))

    assert torch.equal(most_likely_classes(logits), logits.whole()[0].argmax(dim=0).byte())


@pytest.mark.parametrize("scale", [1, 4])
def test_equal_logits_give_the_first_class_and_nan_wins(kernels, scale):
    features = torch.zeros(1, 4, 6, 6)
    features[0, 2, :3] = 1
    features[0, 3, :3] = 1
    features[0, 1, 0, 0] = torch.nan
    features[0, :, 5, 5] = -torch.inf
    logits = RowLogits(features, scale=scale)

    assert torch.equal(most_likely_classes(logits), logits.whole()[0].argmax(dim=0).byte())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1, 4])
def test_other_dtypes_give_the_classes_of_all_logits(dtype, scale):
    logits = RowLogits(random_features(19, 12, 10, torch.channels_last, dtype), scale=scale)
    assert torch.equal(most_likely_classes(logits), logits.whole()[0].argmax(dim=0).byte())


@pytest.mark.parametrize("scale", [1, 2])
def test_more_classes_than_a_byte_holds(scale):
    logits = RowLogits(random_features(300, 6, 5), scale=scale)
    found = most_likely_classes(logits)
    assert found.dtype == torch.int64
    assert torch.equal(found, logits.whole()[0].argmax(dim=0))
