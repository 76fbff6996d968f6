"""Tests of EMA: every implementation against the published form, and that form against the paper's equations."""

import copy
import dataclasses
import inspect
import itertools
import warnings
from functools import cache

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ema_seg.attention import EMA, AblatedEMA, DynamicEMA, build_attention
from ema_seg.attention.ema import choice, factorised, module, triton_launch
from ema_seg.attention.ema.triton_plan import plan_work
from ema_seg.runtime.errors import ConfigError, ModelError

SHAPES = [(2, 32, 6, 9), (1, 64, 1, 7), (3, 8, 5, 1), (1, 16, 1, 1)]
FAST = ("factorised", "cpp", "triton")
BLOCKS = (EMA, DynamicEMA)


def device_for(implementation):
    """Return "cuda" if available, except for C++ kernels; else "cpu", where Triton's kernels run in its interpreter."""
    return "cuda" if torch.cuda.is_available() and implementation != "cpp" else "cpu"


def randomised(module, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale).to(parameter)
    return module


def random(shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def laid_out(x, layout):
    """Return the values in another layout: ``channels_last``, or ``strided`` with gaps between the elements."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        batch, channels, height, width = x.shape
        return torch.zeros(batch, 2 * channels, height, 2 * width, dtype=x.dtype)[:, ::2, :, ::2].copy_(x)
    return x.contiguous()


def run(block, implementation, x, dy, *, device="cpu", dtype=None):
    """Run a copy of the block forward and backward; return the output and the gradients of x and of the parameters."""
    block = copy.deepcopy(block).to(device=device, dtype=dtype or x.dtype)
    block.implementation = implementation
    # detach() keeps the strides; a conversion to another dtype would not.
    x = (x if dtype in (None, x.dtype) else x.to(dtype)).to(device).detach().requires_grad_()
    y = block(x)
    y.backward(dy.to(y))
    tensors = {"y": y, "x": x.grad, **{name: parameter.grad for name, parameter in block.named_parameters()}}
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def distance(tensor, truth):
    return (tensor.double() - truth).norm().item()


# The published form


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def ema_by_hand(x, state, factor, dynamic):
    """Compute the paper's equations for one image (C, H, W), group by group and pixel by pixel, in float64."""
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
        a1 = softmax((gated if dynamic else x1).mean(axis=(1, 2)))
        a2 = softmax(x2.mean(axis=(1, 2)))
        weights = np.einsum("c,chw->hw", a1, x2) + np.einsum("c,chw->hw", a2, x1)
        out[g * cg : (g + 1) * cg] = part * sigmoid(weights)
    return out


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("factor", [1, 2, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_follows_the_papers_equations(block, shape, factor):
    ema = randomised(block(shape[1], factor=factor, implementation="reference").double())
    x = random(shape)
    state = {name: value.numpy() for name, value in ema.state_dict().items()}

    expected = np.stack([ema_by_hand(image.numpy(), state, factor, block.dynamic) for image in x])

    assert_close(ema(x), torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


def test_the_descriptor_of_the_published_1x1_branch_is_a_constant():
    """The mean over the map of a channel that is normalised over the map is the bias of the normalisation."""
    ema = randomised(EMA(12, factor=3, implementation="reference").double())
    descriptors = []
    softmax_of = torch.Tensor.softmax

    def recording(tensor, *args, **kwargs):
        descriptors.append(tensor)
        return softmax_of(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "softmax", recording)
        ema(random((2, 12, 5, 7)))
        ema(100 * random((2, 12, 6, 4), seed=2))

    first, other, second, _ = descriptors  # of the 1×1 and the 3×3 branch, for each input
    assert_close(first, ema.gn.bias.expand(6, 4))
    assert_close(second, ema.gn.bias.expand(6, 4))
    assert other.std(dim=0).min() > 1e-3


def test_the_descriptor_of_the_dynamic_block_depends_on_the_input():
    x = random((1, 8, 5, 6))
    static, dynamic = (randomised(block(8, factor=1).double()) for block in BLOCKS)

    assert (static(x) - dynamic(x)).abs().max() > 1e-3
    assert static.state_dict().keys() == dynamic.state_dict().keys()


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
    assert list(inspect.signature(EMA).parameters) == ["channels", "c2", "factor", "implementation"]
    assert EMA(64).groups == 32
    assert EMA(64, 128, 4).groups == 4


@pytest.mark.parametrize(
    ("channels", "factor"),
    [(1, 1), (8, 1), (15, 1), (16, 2), (32, 4), (64, 8), (24, 3), (40, 5), (37, 1), (96, 12), (256, 32), (320, 32)],
)
def test_auto_takes_the_largest_factor_up_to_32_that_leaves_8_channels_per_group(channels, factor):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for block in (*BLOCKS, AblatedEMA):
            assert block(channels, factor="auto").groups == factor


def test_a_softmax_over_one_channel_is_dead_and_the_choice_of_it_gives_one_warning(monkeypatch):
    monkeypatch.setattr(module, "_warn_of_single_channels", cache(module._warn_of_single_channels.__wrapped__))
    with pytest.warns(UserWarning, match="one channel per group: .* ema_dynamic computes the same as ema") as caught:
        blocks = [randomised(block(16, factor=16)) for block in (*BLOCKS, EMA)]
    x = random((2, 16, 5, 7), dtype=torch.float32)

    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert torch.equal(blocks[0](x), blocks[1](x))


# Every implementation against the reference


@st.composite
def problems(draw):
    """Draw a block and an input, small enough for the reference in float64."""
    batch = draw(st.integers(1, 4))
    factor = draw(st.sampled_from([1, 2, 3, 4, 8, 16]))
    width = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 10, 16, 31, 64]))
    height, breadth = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    while batch * factor * width * height * breadth > 10_000:  # shrink the map, then batch and groups, then the width
        if height * breadth > 256:
            height, breadth = (height + 1) // 2, breadth - breadth // 3
        elif batch * factor > 2:
            batch, factor = (batch + 1) // 2, (factor + 1) // 2
        else:
            width = width // 2
    block = draw(st.sampled_from(BLOCKS))(factor * width, factor=factor).double()
    randomised(block, seed=draw(st.integers(0, 99)), scale=draw(st.sampled_from([0.1, 1.0])))
    x = random((batch, factor * width, height, breadth), seed=draw(st.integers(0, 99)))
    x = x + draw(st.sampled_from([0.0, 1.0, 1000.0]))
    if draw(st.booleans()):
        x[:, 0] = draw(st.sampled_from([0.0, 2.0]))  # a channel without variance
    return block, laid_out(x, draw(st.sampled_from(["contiguous", "channels_last", "strided"])))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", FAST)
def test_every_implementation_computes_what_the_reference_does(implementation):
    device = device_for(implementation)
    examples = 5 if (implementation, device) == ("triton", "cpu") else 30  # Triton's interpreter is slow

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(problem=problems())
    def compare(problem):
        block, x = problem
        dy = random(x.shape, seed=100)

        expected = run(block, "reference", x, dy)
        actual = run(block, implementation, x, dy, device=device)

        for name, truth in expected.items():
            # A gradient whose summands cancel is exact only up to the rounding of the summands.
            scale = truth.norm().item() + x.abs().max().item() * dy.norm().item()
            assert distance(actual[name], truth) <= 1e-9 * scale, name

    compare()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("size", [1, 2**13, 2**15])
def test_pytorch_operations_compute_the_same_in_parts_of_any_size(block, layout, size, monkeypatch):
    """A chunk is one group of an image, some groups of an image, or several images."""
    monkeypatch.setattr(factorised, "_CHUNK_BYTES_CPU", size)
    block = randomised(block(12, factor=3).double(), scale=0.5)
    x, dy = laid_out(random((5, 12, 9, 11)), layout), random((5, 12, 9, 11), seed=2)

    expected = run(block, "reference", x, dy)
    actual = run(block, "factorised", x, dy)

    for name, truth in expected.items():
        assert distance(actual[name], truth) <= 1e-9 * truth.norm().item(), name


class LargeResults(TorchDispatchMode):
    """Dispatch mode that records the operators that allocate a result of at least ``size`` elements."""

    def __init__(self, size):
        super().__init__()
        self.size, self.operators = size, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else [results]:
            known = [tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)]
            if result.numel() >= self.size and result.untyped_storage().data_ptr() not in known:
                self.operators.append(function.overloadpacket._qualified_op_name)
        return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_on_a_cpu_only_the_results_of_pytorch_operations_have_the_size_of_the_input(layout, dtype, monkeypatch):
    monkeypatch.setattr(factorised, "_CHUNK_BYTES_CPU", 2**14)
    parameters = EMA(16, factor=2)._parameters_of_block()[0]
    x, dy = (laid_out(random((4, 16, 24, 20), dtype=dtype), layout) for _ in range(2))

    with LargeResults(x.numel()) as forward:
        _, *statistics = factorised.forward(x, parameters, 2, 1e-5, False)
    with LargeResults(x.numel()) as backward:
        factorised.backward(dy, x, *statistics, parameters, 2, 1e-5, False)

    assert forward.operators == backward.operators == ["aten::empty_like"]


DIVISIONS = [
    {"fused": False},
    {"fused": False, "parts": 3, "spans": 1, "position_parts": 2, "wave": 1},
    {"fused": False, "parts": 2, "spans": 2, "tile_columns": 4, "tile_rows": 4},
    {"fused": False, "parts": 2, "spans": 3, "tile_channels": 1, "tile_columns": 4, "position_parts": 3},
    {"fused": True, "tile_groups": 2, "tile_columns": 16, "tile_rows": 8},
    {"fused": True, "tile_channels": 2, "tile_columns": 8, "stores_weights": False},
]
# Both blocks divide the work alike, so two cases are enough for DynamicEMA.
DIVIDED = [
    *itertools.product([EMA], ["contiguous", "channels_last"], DIVISIONS),
    (DynamicEMA, "channels_last", DIVISIONS[3]),
    (DynamicEMA, "contiguous", DIVISIONS[4]),
]


@pytest.fixture
def divide_work(monkeypatch):
    """Return a function that forces a division of the work of Triton's kernels: fields of a Plan and of a Work.

    Scratch memory is not a number before a kernel writes it.
    """
    allocate = triton_launch._Areas.allocate
    monkeypatch.setattr(triton_launch._Areas, "allocate", lambda areas, like: allocate(areas, like).fill_(float("nan")))

    def divide(**division):
        of_work = {
            name: division.pop(name) for name in ("wave", "parts", "spans", "position_parts") if name in division
        }

        def divided(shape, *arguments, **options):
            work = plan_work(shape, *arguments, **options)
            columns = division.get("tile_columns", 16)
            partial = of_work.get("parts", 1) * of_work.get("spans", 1) > 1
            plan = {"tile_columns": columns, "tiled": shape[3] > columns, "fold": 1, "partial": partial, **division}
            if plan.get("tile_channels", work.plan.width) < work.plan.width:
                plan["tile_groups"] = 1
            of_plan = dataclasses.replace(work.plan, **plan)
            blocks = shape[0] * -(-of_plan.groups // of_plan.tile_groups)
            return dataclasses.replace(work, plan=of_plan, blocks=blocks, **{"wave": blocks, **of_work})

        monkeypatch.setattr(triton_launch, "plan_work", divided)
        for cached in (triton_launch._forward_kernel, triton_launch._backward_kernels):
            monkeypatch.setattr(triton_launch, cached.__name__, cached.__wrapped__)

    return divide


@pytest.mark.slow
@pytest.mark.parametrize(("block", "layout", "division"), DIVIDED)
def test_triton_kernels_compute_the_same_however_the_work_is_divided(block, layout, division, divide_work):
    """The test forces plans on a small map: regions and waves with a launch per phase, or tiles in a fused launch."""
    divide_work(**division)
    block = randomised(block(6, factor=2).double(), scale=0.5)
    if layout == "channels_last":
        block.to(memory_format=torch.channels_last)
    x, dy = random((1, 6, 5, 9)), random((1, 6, 5, 9), seed=2)

    expected = run(block, "reference", x, dy)
    actual = run(block, "triton", laid_out(x, layout), dy, device=device_for("triton"))

    for name, truth in expected.items():
        assert distance(actual[name], truth) <= 1e-9 * truth.norm().item(), name


CASES = [
    *itertools.product([(2, 16, 17, 23), (1, 12, 40, 33), (2, 32, 8, 8)], [4], ["contiguous", "channels_last"]),
    ((1, 64, 9, 12), 1, "contiguous"),
    ((2, 4, 30, 31), 4, "channels_last"),
    ((2, 20, 13, 9), 2, "channels_last"),
]
# The blocks differ in one vector per group, whatever the shape, so two cases are enough for DynamicEMA.
CASES = [*((EMA, *case) for case in CASES), *((DynamicEMA, *case) for case in CASES[:2])]


@pytest.mark.slow
@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize(("block", "shape", "factor", "layout"), CASES)
def test_float32_is_within_1e_5_of_the_truth(block, implementation, shape, factor, layout):
    block = randomised(block(shape[1], factor=factor), scale=0.5)
    x, dy = random(shape, dtype=torch.float32), random(shape, seed=2, dtype=torch.float32)

    truth = run(block, "reference", x.double(), dy.double())
    actual = run(block, implementation, laid_out(x, layout), dy, device=device_for(implementation))

    # Weight and bias of a layer together: the summands of a bias gradient may be large and cancel.
    for layer in ("y", "x", "gn", "conv1x1", "conv3x3"):
        names = [name for name in truth if name.partition(".")[0] == layer]
        error = sum(distance(actual[name], truth[name]) ** 2 for name in names) ** 0.5
        assert error <= 1e-5 * sum(truth[name].norm().item() ** 2 for name in names) ** 0.5, layer


# The kernels compute in float32 what they load as either, so fewer cases are enough.
HALVES = [*((torch.bfloat16, *case) for case in CASES[::2]), *((torch.float16, *case) for case in CASES[:2])]


@pytest.mark.slow
@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize(("dtype", "block", "shape", "factor", "layout"), HALVES)
def test_half_precision_is_no_further_from_the_truth_than_the_reference(
    dtype, block, implementation, shape, factor, layout
):
    block = randomised(block(shape[1], factor=factor, implementation=implementation), scale=0.5).to(dtype)
    x, dy = laid_out(random(shape, dtype=dtype), layout), random(shape, seed=2, dtype=dtype)
    device = device_for(implementation)
    try:
        block.implementation_for(x.to(device))
    except ModelError as error:
        assert (implementation, dtype) == ("cpp", torch.float16), error
        pytest.skip(f"not with the C++ compiler at hand: {error}")

    truth = run(block, "reference", x.double(), dy.double(), dtype=torch.float64)
    published = run(block, "reference", x, dy)
    actual = run(block, implementation, x, dy, device=device)

    for name, value in truth.items():
        assert distance(actual[name], value) <= distance(published[name], value) + 1e-6 * value.norm().item(), name


@pytest.mark.slow
@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_small_variance_beside_a_large_mean_survives_in_float32(implementation, layout):
    names = ("y", "x", "gn.weight", "gn.bias")
    errors = {"reference": dict.fromkeys(names, 0.0), implementation: dict.fromkeys(names, 0.0)}
    for seed in range(4):  # several seeds, because the rounding error of large summands is random
        block = randomised(EMA(8, factor=2), scale=0.5, seed=seed)
        block.conv1x1.bias.data += 30  # saturates the gates: the variance is that of the input
        block.conv3x3.weight.data -= block.conv3x3.weight.data.mean(dim=(1, 2, 3), keepdim=True)
        x = 1000 + random((1, 8, 20, 24), seed=seed, dtype=torch.float32)
        dy = random(x.shape, seed=seed + 100, dtype=torch.float32)
        truth = run(block, "reference", x.double(), dy.double())
        for name, sums in errors.items():
            device = "cpu" if name == "reference" else device_for(name)
            actual = run(block, name, laid_out(x, layout), dy, device=device)
            for tensor in names:
                sums[tensor] += (distance(actual[tensor], truth[tensor]) / truth[tensor].norm().item()) ** 2

    for tensor in names:
        assert errors[implementation][tensor] ** 0.5 <= 4 * errors["reference"][tensor] ** 0.5, tensor


# Triton's gradients are compared with the reference's above; its interpreter would take long here.
@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("implementation", ["reference", "factorised", "cpp"])
def test_gradients_are_those_of_the_output_to_second_order(block, implementation):
    ema = randomised(block(4, factor=2, implementation=implementation).double()).to(device_for(implementation))
    x = random((1, 4, 3, 4)).to(device_for(implementation)).requires_grad_()
    names, parameters = zip(*ema.named_parameters(), strict=True)

    def output(x, *parameters):
        return torch.func.functional_call(ema, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(output, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(output, (x, *parameters), fast_mode=True)


def sum_of_squares(block, parameters, x):
    return torch.func.functional_call(block, parameters, x).square().sum()


TRANSFORMED = {
    "jvp": lambda block, x: torch.func.jvp(block, (x,), (x.cos(),))[1],
    "grad": lambda block, x: torch.func.grad(sum_of_squares, argnums=2)(block, dict(block.named_parameters()), x),
    "hessian": lambda block, x: torch.func.hessian(lambda x: block(x).sum())(x),
    "vmap": lambda block, x: torch.vmap(block)(torch.stack([x, 2 * x])),
    "gradients of each sample": lambda block, x: torch.vmap(
        torch.func.grad(lambda parameters, image: sum_of_squares(block, parameters, image[None])), (None, 0)
    )(dict(block.named_parameters()), x)["conv3x3.weight"],
    "batched gradients": lambda block, x: torch.autograd.functional.jacobian(
        lambda x: block(x)[..., 0, 0], x, vectorize=True
    ),
    "batched gradients with a graph": lambda block, x: torch.autograd.functional.jacobian(
        block, x, vectorize=True, create_graph=True
    ).detach(),
}


# The operator handles transforms alike for all kernels, so two are enough for the slowest.
TRANSFORMS = [*itertools.product(["factorised", "cpp"], TRANSFORMED), ("triton", "grad"), ("triton", "vmap")]


@pytest.mark.slow
@pytest.mark.parametrize(("implementation", "transform"), TRANSFORMS)
def test_transforms_of_torch_func_give_what_they_give_of_the_reference(implementation, transform):
    device = device_for(implementation)
    blocks = [
        randomised(EMA(4, factor=2, implementation=name).double()).to(device) for name in ("reference", implementation)
    ]

    expected, actual = (TRANSFORMED[transform](block, random((2, 4, 3, 2)).to(device)) for block in blocks)

    assert expected.abs().max() > 1e-3
    assert_close(actual, expected)


@pytest.mark.parametrize("implementation", FAST)
def test_transforms_of_torch_func_keep_the_precision(implementation):
    """A bfloat16 input is computed in float32, even under autocast and with float32 parameters."""
    device = device_for(implementation)
    block = randomised(EMA(16, factor=4, implementation=implementation), scale=0.5).to(device)
    x = random((2, 16, 12, 9), dtype=torch.bfloat16).to(device)
    truth, half_a_step = block(x.float()), 2**-8

    with torch.autocast(device, dtype=torch.bfloat16):
        y, _ = torch.func.jvp(block, (x,), (x,))

    assert y.dtype == torch.bfloat16
    assert ((y.float() - truth).abs() <= 1.01 * half_a_step * truth.abs()).all()


@pytest.mark.parametrize("implementation", FAST)
def test_frozen_parameters_get_no_gradient(implementation):
    block = randomised(EMA(8, factor=2, implementation=implementation)).to(device_for(implementation))
    block.conv3x3.requires_grad_(False)
    x = random((1, 8, 5, 6), dtype=torch.float32).to(device_for(implementation))

    block(x).sum().backward()  # the input requires no gradient either

    assert block.conv3x3.weight.grad is None
    assert x.grad is None
    assert block.conv1x1.weight.grad.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_the_output_keeps_the_layout(implementation, layout):
    block = EMA(8, factor=2, implementation=implementation).to(device_for(implementation))
    x = laid_out(random((2, 8, 5, 6), dtype=torch.float32), layout).to(device_for(implementation)).requires_grad_()

    y = block(x)
    y.square().sum().backward()

    assert y.stride() == torch.empty_like(x).stride()  # equal to x.stride() unless x has gaps
    assert layout == "strided" or y.stride() == x.stride() == x.grad.stride()


@pytest.mark.parametrize("implementation", FAST)
def test_an_empty_batch_and_one_that_is_not_a_number(implementation):
    block = EMA(8, factor=2, implementation=implementation).to(device_for(implementation))
    x = random((2, 8, 5, 6), dtype=torch.float32).to(device_for(implementation))
    x[1] = torch.nan

    y = block(x)
    empty = x[:0].requires_grad_()
    block(empty).sum().backward()

    assert empty.grad.shape == (0, 8, 5, 6)
    assert all(parameter.grad.count_nonzero() == 0 for parameter in block.parameters())
    assert torch.isfinite(y[0]).all()
    assert torch.isnan(y[1]).all()


@pytest.mark.slow
@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_repeat_bit_for_bit(implementation, layout, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = device_for(implementation)
    # Triton's interpreter computes in one thread, where order cannot change.
    shape = (1, 8, 9, 7) if (implementation, device) == ("triton", "cpu") else (4, 32, 19, 21)
    block = randomised(EMA(shape[1], factor=shape[1] // 4), scale=0.5)
    x, dy = laid_out(random(shape, dtype=torch.float32), layout), random(shape, seed=3)

    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(block, implementation, x, dy.float(), device=device) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)

    assert all(torch.equal(first[name], second[name]) for name in first)


# Tensors saved for the backward


@pytest.mark.slow
@pytest.mark.parametrize("backend", [None, "inductor"])
@pytest.mark.parametrize("implementation", FAST)
def test_only_the_input_and_its_statistics_are_kept(implementation, backend):
    device = device_for(implementation)
    block = EMA(64, factor=8, implementation=implementation).to(device)
    if backend is not None:
        torch._dynamo.reset()
        block.compile(fullgraph=True, dynamic=False, backend=backend)
    x = random((1, 64, 48, 64), dtype=torch.float32).to(device).requires_grad_()
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    block(x)  # compiles, if at all, outside the hooks

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x)

    parameters = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    # The row and column means of a 48 × 64 map have 1/27 of its size.
    assert sum(size for pointer, size in kept.items() if pointer not in parameters) <= 1.05 * x.nbytes


# Autocast, compilation, export


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_autocast_passes_through(implementation):
    device = device_for(implementation)
    block = randomised(EMA(16, factor=4, implementation=implementation), scale=0.5).to(device)
    x = random((2, 16, 12, 9), dtype=torch.float32).to(device).requires_grad_()

    with torch.autocast(device, dtype=torch.bfloat16):
        y = block(x)
        z = block(x.bfloat16())
    (y.float().square().sum() + z.float().square().sum()).backward()

    assert y.dtype == torch.float32
    assert z.dtype == torch.bfloat16
    assert_close(z.float(), y, rtol=0.1, atol=0.1)
    assert block.conv3x3.weight.grad.dtype == torch.float32


# PyTorch traces the same graph for every backend, so half of the cases skip the slow code generation. It sees one
# operator for all kernels, so Triton's, slow in the interpreter, are left to the test of the operator.
COMPILED = [
    (EMA, "factorised", "contiguous", False, "inductor"),
    (EMA, "factorised", "channels_last", True, "inductor"),
    (DynamicEMA, "factorised", "channels_last", True, "aot_eager"),
    (EMA, "cpp", "channels_last", True, "inductor"),
    (EMA, "cpp", "contiguous", False, "aot_eager"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("block", "implementation", "layout", "dynamic_shapes", "backend"), COMPILED)
def test_compiles_whole_with_static_and_dynamic_shapes(block, implementation, layout, dynamic_shapes, backend):
    device = device_for(implementation)
    block = randomised(block(16, factor=4, implementation=implementation), scale=0.5).to(device)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic_shapes, backend=backend)

    for shape in [(2, 16, 5, 6), (3, 16, 7, 4)] if dynamic_shapes else [(2, 16, 5, 6)]:
        x = laid_out(random(shape, dtype=torch.float32), layout).to(device).requires_grad_()
        dy = random(shape, seed=2, dtype=torch.float32).to(device)
        inputs = (x, *block.parameters())
        y, expected = compiled(x), block(x)
        gradients, expected_gradients = (torch.autograd.grad(output, inputs, dy) for output in (y, expected))

        assert_close(y, expected)
        assert y.stride() == expected.stride()
        assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-4)


# All kernels have the same meta kernel, so one layout is enough for the slowest.
REGISTERED = [
    *itertools.product(["factorised", "cpp"], ["contiguous", "channels_last", "strided"]),
    ("triton", "strided"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kernels", "layout"), REGISTERED)
def test_the_operator_is_registered_as_pytorch_demands(kernels, layout):
    device = device_for(kernels)
    block = randomised(EMA(8, factor=2), scale=0.5).to(device)
    if layout == "channels_last":
        block = block.to(memory_format=torch.channels_last)
    x = laid_out(random((2, 8, 5, 6), dtype=torch.float32), layout).to(device).requires_grad_()

    torch.library.opcheck(torch.ops.ema_seg.ema, (x, *block._parameters_of_block()[0], 2, 1e-5, False, kernels))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_the_flop_counter_counts_every_implementation(implementation):
    device = device_for(implementation)
    block = EMA(32, factor=4, implementation=implementation).to(device)
    x = torch.zeros(2, 32, 10, 12, device=device, requires_grad=True)

    with FlopCounterMode(display=False) as counter:
        y = block(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()

    groups, cg, height, width = 8, 8, 10, 12
    gates = groups * cg * cg * (height + width)
    if implementation == "reference":  # the whole 3×3 convolution, and both weighted sums of Cg channels
        expected = gates + groups * cg * (9 * cg + 2) * height * width
    else:  # one output channel of it, and the weighted sum of the normalised channels
        expected = gates + groups * cg * (9 + 1) * height * width
    assert counter.get_total_flops() == 2 * expected
    # The gradients of both factors of each product; the short form also recomputes the products.
    assert backward.get_total_flops() == counter.get_total_flops() * (2 if implementation == "reference" else 3)


def exported(block):
    """Export a block for any batch size, height and width."""
    free = torch.export.Dim.DYNAMIC
    x = random((2, 16, 9, 12), dtype=torch.float32)
    return torch.export.export(block, (x,), dynamic_shapes={"x": {0: free, 2: free, 3: free}})


@pytest.mark.slow
def test_every_implementation_exports_the_same_graph():
    programs = [exported(EMA(16, factor=4, implementation=name).eval()) for name in ("reference", "cpp", "triton")]

    assert len({program.graph_module.code for program in programs}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_exports_as_plain_operators_that_onnxruntime_runs(block, tmp_path):
    block = randomised(block(16, factor=4, implementation="factorised"), scale=0.5).eval()

    program = exported(block)
    onnx = torch.onnx.export(program, dynamo=True, verbose=False)
    onnx.save(tmp_path / "ema.onnx")

    operators = {node.target.namespace for node in program.graph.nodes if hasattr(node.target, "namespace")}
    assert operators == {"aten"}
    session = onnxruntime.InferenceSession(tmp_path / "ema.onnx")
    for shape in ((2, 16, 9, 12), (3, 16, 7, 5)):
        images = random(shape, seed=5, dtype=torch.float32)
        expected = block(images).detach()
        assert_close(program.module()(images), expected)
        assert_close(torch.from_numpy(session.run(None, {"x": images.numpy()})[0]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*TorchScript-based ONNX:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("implementation", ["reference", "cpp"])
def test_traces_as_plain_operators(implementation, tmp_path):
    """TorchScript and the ONNX exporter without torch.export, the older ways of deployment, need plain operators."""
    block = randomised(EMA(16, factor=4, implementation=implementation), scale=0.5).eval()
    x, other = random((2, 16, 9, 12), dtype=torch.float32), random((3, 16, 9, 12), seed=5, dtype=torch.float32)

    torch.jit.trace(block, x).save(tmp_path / "ema.pt")
    sizes = {"x": {0: "batch"}, "y": {0: "batch"}}
    names = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": sizes}
    torch.onnx.export(block, (x,), tmp_path / "ema.onnx", dynamo=False, **names)

    block.implementation = "factorised"  # runs on every device
    assert_close(torch.jit.load(tmp_path / "ema.pt")(other), block(other))
    (y,) = onnxruntime.InferenceSession(tmp_path / "ema.onnx").run(None, {"x": other.numpy()})
    assert_close(torch.from_numpy(y), block(other).detach(), rtol=1e-4, atol=1e-5)


# Selection of the implementation


def test_auto_takes_kernels_and_says_which():
    assert EMA(8, factor=2).implementation_for(torch.zeros(1, 8, 2, 2)) == "cpp"
    assert EMA(8, factor=2, implementation="factorised").implementation_for(torch.zeros(1, 8, 2, 2)) == "factorised"


def test_auto_takes_the_first_kernels_that_compute_the_input(monkeypatch):
    """On a CUDA device the C++ kernels are not available, and Triton's come next."""
    monkeypatch.setattr(choice, "_reason_unavailable", lambda kernels, *_: "not here" if kernels == "cpp" else None)

    assert EMA(8, factor=2).implementation_for(torch.zeros(1, 8, 2, 2)) == "triton"


def test_auto_falls_back_to_pytorch_where_no_kernels_compute_the_input():
    meta = torch.zeros(1, 8, 2, 2, device="meta")

    block = EMA(8, factor=2).to("meta")

    assert block.implementation_for(meta) == "factorised"
    assert block(meta).shape == (1, 8, 2, 2)


def test_the_environment_variable_takes_the_place_of_the_argument(monkeypatch):
    block = EMA(8, factor=2, implementation="cpp")
    x = torch.zeros(1, 8, 2, 2)

    monkeypatch.setenv(choice.ENVIRONMENT_VARIABLE, "reference")
    assert block.implementation_for(x) == "reference"
    monkeypatch.setenv(choice.ENVIRONMENT_VARIABLE, "")
    assert block.implementation_for(x) == "cpp"
    monkeypatch.setenv(choice.ENVIRONMENT_VARIABLE, "tritn")
    with pytest.raises(ConfigError, match=r"EMA_SEG_IMPLEMENTATION: .*'tritn'.*Did you mean 'triton'"):
        block(x)
    monkeypatch.setenv(choice.ENVIRONMENT_VARIABLE, "cpp")
    with pytest.raises(ModelError, match=r"; set the environment variable EMA_SEG_IMPLEMENTATION, .* to auto"):
        EMA(8, factor=2).to("meta")(x.to("meta"))


def test_an_unknown_implementation_is_named_with_what_there_is():
    with pytest.raises(ConfigError, match=r"must be one of auto, reference, cpp, triton, factorised, got 'fast'"):
        build_attention("ema", 8, implementation="fast")


def test_kernels_that_cannot_compute_the_input_say_why():
    with pytest.raises(ModelError, match=r"'cpp' cannot be used: .*meta"):
        EMA(8, factor=2, implementation="cpp").to("meta")(torch.zeros(1, 8, 2, 2, device="meta"))
    with pytest.raises(ModelError, match=r"'triton' cannot be used: .*meta.*EMA_SEG_IMPLEMENTATION=auto"):
        EMA(8, factor=2, implementation="triton").to("meta")(torch.zeros(1, 8, 2, 2, device="meta"))


# Invalid arguments and inputs


@pytest.mark.parametrize("factor", [32, 5, 0, -1, 8.0, True, "many"])
def test_ema_names_the_valid_factors(factor):
    with pytest.raises(ModelError, match="valid factors are 1, 2, 4, 8, 16, or 'auto'"):
        EMA(16, factor=factor)


@pytest.mark.parametrize("channels", [0, -4, 8.0, "8"])
def test_ema_needs_a_positive_whole_number_of_channels(channels):
    with pytest.raises(ModelError, match=f"positive whole number of channels, got {channels!r}"):
        EMA(channels)


def test_the_reference_says_that_it_does_not_mix_dtypes():
    block = EMA(8, factor=2, implementation="reference")

    with pytest.raises(ModelError, match=r"parameters are torch.float32 and the input is torch.bfloat16, .* convert"):
        block(torch.zeros(1, 8, 2, 2, dtype=torch.bfloat16))


@pytest.mark.parametrize("implementation", ["reference", *FAST])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(16, 8, 8), r"\(B, 16, H, W\), got \(16, 8, 8\)"),
        (torch.zeros(1, 8, 8, 8), r"\(B, 16, H, W\), got \(1, 8, 8, 8\)"),
        (torch.zeros(1, 16, 8, 8, dtype=torch.uint8), "floating-point numbers of .*, got torch.uint8"),
        (torch.zeros(1, 16, 8, 8).to(torch.float8_e5m2), "floating-point numbers of .*, got torch.float8_e5m2"),
        (torch.zeros(1, 16, 0, 8), r"at least one row and one column, got .*\(1, 16, 0, 8\)"),
    ],
)
def test_ema_says_which_input_it_expects(implementation, x, message):
    with pytest.raises(ModelError, match=message):
        EMA(16, factor=4, implementation=implementation)(x)


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_an_input_on_another_device_than_the_parameters_is_named(implementation):
    with pytest.raises(ModelError, match="parameters are on cpu and the input is on meta"):
        EMA(8, factor=2, implementation=implementation)(torch.zeros(1, 8, 2, 2, device="meta"))


# The weight map


@pytest.mark.parametrize("block", BLOCKS)
def test_the_weight_map_is_what_forward_multiplies_by(block):
    ema = randomised(block(12, factor=3))
    x = random((2, 12, 5, 7), dtype=torch.float32)

    weights = ema.weight_map(x)

    assert weights.shape == (2, 3, 5, 7)
    assert ((weights > 0) & (weights < 1)).all()
    assert_close(ema(x), x * weights.repeat_interleave(4, dim=1))


@pytest.mark.parametrize("block", [EMA(16, factor=2), DynamicEMA(16, factor=2)])
def test_channel_weights_are_the_softmaxes_of_the_branches(block):
    torch.nn.init.normal_(block.gn.bias)
    x = torch.randn(3, 16, 5, 7)
    pointwise, spatial = block.channel_weights(x)

    assert_close(spatial.flatten(0, 1), block.conv3x3(x.reshape(6, 8, 5, 7)).mean(dim=(2, 3)).softmax(dim=1))
    constant = block.gn.bias.softmax(dim=0).expand(3, 2, 8)
    if block.dynamic:
        assert not torch.allclose(pointwise, constant, atol=1e-3)
    else:
        assert_close(pointwise, constant)
