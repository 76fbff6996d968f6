import numpy as np
import pytest
import torch

from ema_seg.data.normalise import Normalise
from ema_seg.runtime.errors import ConfigError, ModelError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def batch():
    return torch.randint(256, (2, 5, 7, 3), dtype=torch.uint8).permute(0, 3, 1, 2)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_mean_becomes_zero_and_the_deviation_one(memory_format):
    images = batch()

    normalised = Normalise(MEAN, STD)(images, torch.float32, memory_format)

    expected = (images.permute(0, 2, 3, 1).numpy() / 255 - np.array(MEAN)) / np.array(STD)
    torch.testing.assert_close(normalised.permute(0, 2, 3, 1).double(), torch.from_numpy(expected), rtol=0, atol=1e-5)
    assert normalised.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_precision_is_rounded_once(dtype):
    images, normalise = batch(), Normalise(MEAN, STD)

    normalised = normalise(images, dtype)

    assert normalised.dtype == dtype
    torch.testing.assert_close(
        normalised, normalise(images).to(dtype), rtol=1e-6 if dtype == torch.float64 else 0, atol=0
    )


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.5,)), ((0, 0, 0), (1, 0, 1))])
def test_mean_and_std_must_be_three_numbers(mean, std):
    with pytest.raises(ConfigError, match=r"mean=.* and std=.* must be three numbers each"):
        Normalise(mean, std)


def test_normalised_images_are_refused():
    with pytest.raises(ModelError, match=r"images: must be uint8 RGB from 0 to 255, got torch.float32"):
        Normalise(MEAN, STD)(torch.zeros(1, 3, 2, 2))
