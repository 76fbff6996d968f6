import inspect

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ema_seg.attention import EMA, attention_names, build_attention
from ema_seg.errors import ConfigError, ModelError

SHAPES = [(2, 32, 6, 9), (1, 64, 1, 7), (3, 8, 5, 1), (1, 16, 1, 1)]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def ema_by_hand(x, state, factor):
    """The paper's equations for one image (C, H, W), group by group and pixel by pixel, in float64."""
    channels, height, width = x.shape
    cg = channels // factor
    w1, b1 = state["conv1x1.weight"][:, :, 0, 0], state["conv1x1.bias"]
    w3, b3 = state["conv3x3.weight"], state["conv3x3.bias"]
    gamma, beta = state["gn.weight"], state["gn.bias"]
    out = np.empty_like(x)
    for g in range(factor):
        part = x[g * cg : (g + 1) * cg]
        row_gate = sigmoid(w1 @ part.mean(axis=2) + b1[:, None])
        column_gate = sigmoid(w1 @ part.mean(axis=1) + b1[:, None])
        gated = part * row_gate[:, :, None] * column_gate[:, None, :]
        mean, var = gated.mean(axis=(1, 2), keepdims=True), gated.var(axis=(1, 2), keepdims=True)
        x1 = (gated - mean) / np.sqrt(var + 1e-5) * gamma[:, None, None] + beta[:, None, None]
        padded = np.pad(part, ((0, 0), (1, 1), (1, 1)))
        x2 = np.empty_like(part)
        for i in range(height):
            for j in range(width):
                x2[:, i, j] = np.einsum("ocij,cij->o", w3, padded[:, i : i + 3, j : j + 3]) + b3
        a1, a2 = softmax(x1.mean(axis=(1, 2))), softmax(x2.mean(axis=(1, 2)))
        weights = np.einsum("c,chw->hw", a1, x2) + np.einsum("c,chw->hw", a2, x1)
        out[g * cg : (g + 1) * cg] = part * sigmoid(weights)
    return out


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return module


@pytest.mark.parametrize("factor", [1, 2, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_ema_follows_the_papers_equations(shape, factor):
    ema = randomised(EMA(shape[1], factor=factor).double())
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    state = {name: value.numpy() for name, value in ema.state_dict().items()}

    expected = np.stack([ema_by_hand(image.numpy(), state, factor) for image in x])

    assert_close(ema(x), torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


def test_ema_has_the_published_state_dict():
    shapes = {name: tuple(value.shape) for name, value in EMA(64, factor=8).state_dict().items()}

    assert shapes == {
        "gn.weight": (8,),
        "gn.bias": (8,),
        "conv1x1.weight": (8, 8, 1, 1),
        "conv1x1.bias": (8,),
        "conv3x3.weight": (8, 8, 3, 3),
        "conv3x3.bias": (8,),
    }


def test_ema_has_the_published_signature():
    assert list(inspect.signature(EMA).parameters)[:3] == ["channels", "c2", "factor"]
    assert EMA(64).groups == 32
    assert EMA(64, 128, 4).groups == 4


@pytest.mark.parametrize(("channels", "factor"), [(16, 16), (64, 32), (24, 24), (40, 20), (37, 1), (96, 32)])
def test_ema_auto_factor_is_the_largest_divisor_up_to_32(channels, factor):
    assert EMA(channels, factor="auto").groups == factor


@pytest.mark.parametrize("factor", [32, 5, 0, -1, 8.0, "many"])
def test_ema_names_the_valid_factors(factor):
    with pytest.raises(ModelError, match="valid factors are 1, 2, 4, 8, 16, or 'auto'"):
        EMA(16, factor=factor)


@pytest.mark.parametrize("shape", [(16, 8, 8), (1, 8, 8, 8), (2, 16, 8)])
def test_ema_names_the_shape_that_it_expects(shape):
    with pytest.raises(ModelError, match=r"\(B, 16, H, W\)"):
        EMA(16, factor=4)(torch.zeros(shape))


def test_ema_weight_map_is_what_forward_multiplies_by():
    ema = randomised(EMA(12, factor=3))
    x = torch.randn(2, 12, 5, 7)

    weights = ema.weight_map(x)

    assert weights.shape == (2, 3, 5, 7)
    assert ((weights > 0) & (weights < 1)).all()
    assert_close(ema(x), x * weights.repeat_interleave(4, dim=1))


def test_ema_does_not_depend_on_the_memory_layout():
    ema = randomised(EMA(32, factor=4))
    x = torch.randn(2, 32, 6, 10)
    strided = torch.randn(2, 64, 6, 20)[:, ::2, :, ::2].copy_(x)

    assert_close(ema(x.contiguous(memory_format=torch.channels_last)), ema(x))
    assert_close(ema(strided), ema(x))


def test_ema_gradients_are_those_of_its_output():
    ema = randomised(EMA(4, factor=2).double())
    x = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(ema, (x,))


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
