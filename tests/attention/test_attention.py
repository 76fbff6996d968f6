import pytest
import torch
from torch.testing import assert_close

from ema_seg.attention import attention_names, build_attention
from ema_seg.errors import ConfigError, ModelError


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return module


@pytest.mark.parametrize("name", attention_names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_block_keeps_shape_and_dtype_and_trains(name, dtype):
    block = build_attention(name, 64).to(dtype)
    x = torch.randn(2, 64, 6, 9, dtype=dtype, requires_grad=True)

    y = block(x)
    y.square().mean().backward()

    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert all(parameter.grad is not None for parameter in block.parameters())


def test_none_is_the_identity():
    x = torch.randn(1, 3, 4, 5)

    assert build_attention("none", 3)(x) is x


def test_se_gates_channels_by_the_papers_equation():
    block = randomised(build_attention("se", 8, reduction=4))
    x = torch.randn(2, 8, 3, 5)
    w1, b1, w2, b2 = (parameter.detach().squeeze() for parameter in block.parameters())

    hidden = torch.relu(x.mean(dim=(2, 3)) @ w1.T + b1)
    gate = torch.sigmoid(hidden @ w2.T + b2)

    assert_close(block(x), x * gate[:, :, None, None])


def test_scse_adds_a_channel_gated_and_a_pixel_gated_copy():
    block = randomised(build_attention("scse", 4))
    x = torch.randn(1, 4, 3, 5)
    w1, b1, w2, b2, ws, bs = (parameter.detach().squeeze() for parameter in block.parameters())

    channel_gate = torch.sigmoid(torch.relu(x.mean(dim=(2, 3)) @ w1.T + b1) @ w2.T + b2)
    pixel_gate = torch.sigmoid(torch.einsum("c,bchw->bhw", ws, x) + bs)

    assert_close(block(x), x * channel_gate[:, :, None, None] + x * pixel_gate[:, None])


def test_unknown_names_and_options_are_named_with_what_there_is():
    with pytest.raises(ConfigError, match=r"'emma'.*Did you mean 'ema'"):
        build_attention("emma", 8)
    with pytest.raises(ConfigError, match=r"attention\.factr: .*it has factor"):
        build_attention("ema", 8, factr=2)
    with pytest.raises(ConfigError, match=r"attention\.factor: .*'none' has no such option; it has none"):
        build_attention("none", 8, factor=2)
    with pytest.raises(ModelError, match="choose a reduction from 1 to 4"):
        build_attention("scse", 4, reduction=8)
