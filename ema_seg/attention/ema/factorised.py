"""EMA in its short form, in PyTorch operations, with the backward written by hand.

The published form evaluates a Cg-to-Cg convolution and keeps half a dozen maps of the input's size. Neither is
needed: the convolution enters the result only through two weighted sums over its output channels, which are
linear in the input, so a convolution to one single channel and nine sums replace it; and all that the backward
needs follows from the input and its row and column means. docs/ema.md has the derivation; the names follow it.

Half-precision inputs are computed in float32, float64 ones in float64. Feature maps are (B, G, Cg, H, W) here, a
view of (B, C, H, W) in any memory layout; statistics of channels are (B, G, Cg).
"""

from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor  # there is no public way to ask
from torch.nn.functional import conv2d, pad

from ema_seg.attention.ema import reference
from ema_seg.attention.ema.reference import Parameters

__all__ = ["apply", "differentiable_backward", "weight_map"]


# Bytes of a feature map, in the dtype of the arithmetic, that a CPU works on at a time: what is made of them on the way
# then stays in its cache, and in memory that the process already has.
_PART = 2**22

# Images and groups of (B, G, Cg, H, W).
_Part = tuple[slice, slice]


def apply(x: Tensor, parameters: Parameters, groups: int, eps: float, dynamic: bool) -> Tensor:
    """Re-weight ``x``: arguments and result as in ``reference.forward``."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # an operator of autograd's would not be a plain one
        features = x.unflatten(1, (groups, -1))
        return _reweight(features, _Forward.of(features, parameters, eps, dynamic).weights).flatten(1, 2)
    with _no_autocast(x.device):
        return _Factorised.apply(x, groups, eps, dynamic, *parameters)


def weight_map(x: Tensor, parameters: Parameters, groups: int, eps: float, dynamic: bool) -> Tensor:
    """The weights in (0, 1) that multiply each group: (B, groups, H, W) in x's dtype."""
    with _no_autocast(x.device):
        return _Forward.of(x.unflatten(1, (groups, -1)), parameters, eps, dynamic).weights.to(x.dtype)


class _Factorised(torch.autograd.Function):
    """Keeps the input, its row and column means, and the two moments of each gated channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, eps: float, dynamic: bool, *parameters_of_block: Tensor) -> Tensor:
        parameters = Parameters(*parameters_of_block)
        features = x.unflatten(1, (groups, -1))
        if _at_once(features):
            forward = _Forward.of(features, parameters, eps, dynamic)
            y, statistics = _reweight(features, forward.weights).flatten(1, 2), forward.statistics
        else:
            y, statistics = torch.empty_like(x), _Statistics.empty(features)
            outputs = y.unflatten(1, (groups, -1))
            for part in _parts(features):
                features_of_part = _contiguous(features[part])
                forward = _Forward.of(features_of_part, parameters, eps, dynamic)
                outputs[part] = _reweight(features_of_part, forward.weights)
                for of_all, of_part in zip(statistics, forward.statistics, strict=True):
                    of_all[part] = of_part
        ctx.save_for_backward(x, *parameters, *statistics)
        ctx.options = groups, eps, dynamic
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x, *saved = ctx.saved_tensors
        parameters, statistics = Parameters(*saved[:6]), _Statistics(*saved[6:])
        with _no_autocast(x.device):
            if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or is_legacy_batchedtensor(dy)):
                dx, *grads = differentiable_backward(dy, x, parameters, *ctx.options)
            else:
                dx, *grads = _backward_in_parts(dy, x, parameters, statistics, *ctx.options)
        candidates = (dx, *(None for _ in ctx.options), *grads)
        return tuple(
            gradient if needed else None for gradient, needed in zip(candidates, ctx.needs_input_grad, strict=True)
        )


def _at_once(features: Tensor) -> bool:
    """Whether to compute (B, G, Cg, H, W) at once, not in parts: in a graph, on a GPU, and where there is little."""
    small = features.numel() * _wide(features.dtype).itemsize <= _PART and features.is_contiguous()
    return small or features.device.type != "cpu" or _traced()


def _parts(features: Tensor) -> list[_Part]:
    """The parts of (B, G, Cg, H, W) that are computed one after the other: some images, or some groups of one."""
    batch, groups, channels, height, width = features.shape
    group = channels * height * width * _wide(features.dtype).itemsize
    images = max(1, _PART // (groups * group))
    some = max(1, _PART // group)
    if features.stride(2) == 1:  # channels-last: memory is read in lines of 64 bytes
        some = max(some, 64 // (channels * features.element_size()))
    return [
        (slice(image, image + images), slice(start, start + some))
        for image in range(0, batch, images)
        for start in range(0, groups, some)
    ]


def _contiguous(part: Tensor) -> Tensor:
    """The part in the dtype of the arithmetic, copied if it is laid out otherwise: PyTorch is slow on other layouts."""
    return part.to(_wide(part.dtype)).contiguous()


def _backward_in_parts(
    dy: Tensor, x: Tensor, parameters: Parameters, statistics: "_Statistics", groups: int, eps: float, dynamic: bool
) -> tuple[Tensor, ...]:
    """Gradients of x and of the six parameters, each in the dtype of what it is the gradient of."""
    features, dy = x.unflatten(1, (groups, -1)), dy.unflatten(1, (groups, -1))
    small = parameters.to(_wide(x.dtype))
    if _at_once(features):
        dfeatures, gradients = _backward(dy, features, small, statistics, dynamic)
        dx = dfeatures.flatten(1, 2).to(x.dtype)
    else:
        dx, gradients = torch.empty_like(x), Parameters(*map(torch.zeros_like, small))
        results = dx.unflatten(1, (groups, -1))
        for part in _parts(features):
            of_part = _Statistics(*(statistic[part] for statistic in statistics))
            results[part], summands = _backward(
                _contiguous(dy[part]), _contiguous(features[part]), small, of_part, dynamic
            )
            for gradient, summand in zip(gradients, summands, strict=True):
                gradient += summand
    return dx, *(grad.to(p.dtype) for grad, p in zip(gradients, parameters, strict=True))


def differentiable_backward(
    dy: Tensor, x: Tensor, parameters: Parameters, groups: int, eps: float, dynamic: bool
) -> tuple[Tensor, ...]:
    """The gradients of x and of the parameters by way of the published form.

    They are what second derivatives need where gradients are enabled, and ``dy`` may be the batch that autograd makes
    of ``is_grads_batched`` and ``vectorize``.
    """
    # Aliases that need gradients where the caller's tensors do not, so that each has a gradient to return.
    inputs = [tensor if tensor.requires_grad else tensor.detach().requires_grad_() for tensor in (x, *parameters)]
    wide = _wide(x.dtype)
    with _no_autocast(x.device), torch.enable_grad():
        wide_y = reference.forward(inputs[0].to(wide), Parameters(*inputs[1:]).to(wide), groups, eps, dynamic)
        y = wide_y.to(x.dtype)
    return torch.autograd.grad(y, inputs, dy, create_graph=torch.is_grad_enabled())


class _Statistics(NamedTuple):
    """What the backward needs beside x, in the dtype of the arithmetic."""

    # Means over each row (B, G, Cg, H) and over each column (B, G, Cg, W). Apart, because torch.compile with dynamic
    # shapes takes the strides of a kept tensor of H + W columns for constants (torch 2.14).
    rows: Tensor
    columns: Tensor
    mean: Tensor  # of the gated channel, (B, G, Cg)
    rstd: Tensor  # 1 / sqrt(variance + eps) of the gated channel, (B, G, Cg)

    @classmethod
    def empty(cls, features: Tensor) -> "_Statistics":
        *channels, height, width = features.shape
        sizes = (*channels, height), (*channels, width), channels, channels
        return cls(*(features.new_empty(size, dtype=_wide(features.dtype)) for size in sizes))


class _Forward(NamedTuple):
    weights: Tensor  # (B, G, H, W)
    statistics: _Statistics

    @classmethod
    def of(cls, features: Tensor, parameters: Parameters, eps: float, dynamic: bool) -> "_Forward":
        features = features.to(_wide(features.dtype))
        parameters = parameters.to(features.dtype)
        rows, columns = features.mean(dim=-1), features.mean(dim=-2)
        row_gate, column_gate = _gates(torch.cat([rows, columns], dim=-1), parameters, features)
        gated = _times_(features * row_gate, column_gate)
        mean = gated.mean(dim=(-2, -1))
        # Two passes, because the difference of two large sums would lose a small variance.
        centred = _minus_(gated, mean[..., None, None])
        area = centred.shape[-2] * centred.shape[-1]
        rstd = (torch.linalg.vector_norm(centred, dim=(-2, -1)).square() / area + eps).rsqrt()
        statistics = _Statistics(rows, columns, mean, rstd)
        return cls(_Mixing.of(features, parameters, statistics, dynamic).weights(features, centred), statistics)


class _Mixing(NamedTuple):
    """How the weight map is mixed from the channels, by what is small."""

    a1: Tensor  # softmax that weighs the 3×3 branch: (B, G, Cg) if dynamic, else (1, 1, Cg)
    a2: Tensor  # softmax that weighs the 1×1 branch: (B, G, Cg)
    shifted: Tensor  # sums of x over the window of each tap of the 3×3 kernel: (B, G, Cg, 3, 3)
    kernel: Tensor  # 3×3 kernel to a single channel: (B, G, Cg, 3, 3) if dynamic, else (1, 1, Cg, 3, 3)
    kappa: Tensor  # weights of the centred gated channels: (B, G, Cg)
    constant: Tensor  # (B, G)

    @classmethod
    def of(cls, features: Tensor, parameters: Parameters, statistics: _Statistics, dynamic: bool) -> "_Mixing":
        _, _, w3, b3, gamma, beta = parameters
        height, width = features.shape[-2:]
        shifted = _shifted_sums(features, statistics)
        a1 = (statistics.mean if dynamic else beta[None, None]).softmax(dim=-1)
        a2 = (b3 + torch.einsum("ocij,bgcij->bgo", w3, shifted) / (height * width)).softmax(dim=-1)
        return cls(
            a1,
            a2,
            shifted,
            kernel=torch.einsum("bgo,ocij->bgcij", a1, w3),
            kappa=a2 * gamma * statistics.rstd,
            constant=(a1 * b3).sum(dim=-1) + (a2 * beta).sum(dim=-1),
        )

    def weights(self, features: Tensor, centred: Tensor) -> Tensor:
        """The weight map (B, G, H, W)."""
        mixed = _convolve(features, self.kernel) + _sum_over_channels(centred, self.kappa)
        return (mixed + self.constant[..., None, None]).sigmoid()


def _reweight(features: Tensor, weights: Tensor) -> Tensor:
    return (features * weights.unsqueeze(2)).to(features.dtype)


def _backward(
    dy: Tensor, features: Tensor, parameters: Parameters, statistics: _Statistics, dynamic: bool
) -> tuple[Tensor, Parameters]:
    """Gradients of the features and of the parameters, which are in the dtype of the arithmetic."""
    w1, _, w3, b3, gamma, beta = parameters
    features, dy = features.to(w1.dtype), dy.to(w1.dtype)
    rows, columns, mean, rstd = statistics
    means = torch.cat([rows, columns], dim=-1)
    height, width = features.shape[-2:]
    area = height * width
    row_gate, column_gate = _gates(means, parameters, features)
    # The gates in the other order than in the forward: torch.compile would take equal expressions for one, and keep its
    # value, a map of the input's size, from the forward to the backward.
    centred = _minus_(_times_(features * column_gate, row_gate), mean[..., None, None])
    mixing = _Mixing.of(features, parameters, statistics, dynamic)
    a1, a2, shifted, kernel, kappa, _ = mixing

    # The weight map and its logit; (B, G, H, W).
    weights = mixing.weights(features, centred)
    dlogit = _sum_of_products(features, dy) * weights * (1 - weights)
    dconstant = dlogit.sum(dim=(-2, -1))  # (B, G)
    dlogit5 = dlogit.unsqueeze(2)

    # The two mixtures: the single-channel convolution, and the normalised channels.
    dx_convolution, dkernel = _convolve_backward(dlogit, features, kernel)
    correlation = (centred * dlogit5).sum(dim=(-2, -1))  # (B, G, Cg)
    da1_constant = (dconstant if dynamic else dconstant.sum()[None, None])[..., None]
    da1 = torch.einsum("ocij,bgcij->bgo", w3, dkernel) + b3 * da1_constant
    da2 = gamma * rstd * correlation + beta * dconstant[..., None]
    dm1, dm2 = _softmax_backward(a1, da1), _softmax_backward(a2, da2)

    # The gated map, through its normalisation (and, if dynamic, its mean).
    du = _times_(centred, (-kappa * rstd.square() * correlation / area)[..., None, None])
    offset = (dm1 if dynamic else 0) - kappa * dconstant[..., None]
    du = _plus_(du, (offset / area)[..., None, None])
    du = _plus_product_(du, kappa[..., None, None], dlogit5)

    # The gates, and through them the means.
    dgated = du * features
    drow_gate = (dgated * column_gate).sum(dim=-1)
    dcolumn_gate = _times_(dgated, row_gate).sum(dim=-2)
    gates = torch.cat([row_gate.squeeze(-1), column_gate.squeeze(-2)], dim=-1)
    dgates = torch.cat([drow_gate, dcolumn_gate], dim=-1) * gates * (1 - gates)
    drows, dcolumns = (w1.flatten(1).T @ dgates).split([height, width], dim=-1)

    # The sums in the softmax of the 3×3 branch: of everything, less a border row and a border column, plus a corner.
    dshifted = torch.einsum("bgo,ocij->bgcij", dm2, w3) / area
    drows = drows / width + dshifted.sum(dim=(-2, -1))[..., None] - _at_borders(dshifted.sum(dim=-1), height)
    dcolumns = dcolumns / height - _at_borders(dshifted.sum(dim=-2), width)

    dx = _times_(_times_(du, row_gate), column_gate)
    dx = _plus_(dx, dx_convolution)
    dx = _plus_product_(dx, dy, weights.unsqueeze(2))
    dx = _plus_(dx, drows[..., :, None])
    dx = _plus_(dx, dcolumns[..., None, :])
    dx = _plus_at_corners(dx, dshifted)

    dw1 = (dgates @ means.transpose(-2, -1)).sum(dim=(0, 1))
    db1 = dgates.sum(dim=(0, 1, 3))
    dw3 = torch.einsum("bgo,bgcij->ocij", dm2, shifted) / area + torch.einsum("bgo,bgcij->ocij", a1, dkernel)
    db3 = dm2.sum(dim=(0, 1)) + (a1 * da1_constant).sum(dim=(0, 1))
    dgamma = (a2 * rstd * correlation).sum(dim=(0, 1))
    dbeta = (a2 * dconstant[..., None]).sum(dim=(0, 1)) + (0 if dynamic else dm1[0, 0])
    return dx, Parameters(dw1.reshape(w1.shape), db1, dw3, db3, dgamma, dbeta)


def _no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast would round the convolution's operands, after care was taken to compute in float32."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic."""
    return dtype if dtype == torch.float64 else torch.float32


def _traced() -> bool:
    """Whether a graph is being made of the operations, by torch.compile, torch.export or torch.jit."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _gates(means: Tensor, parameters: Parameters, features: Tensor) -> tuple[Tensor, Tensor]:
    """Row gate (B, G, Cg, H, 1) and column gate (B, G, Cg, 1, W)."""
    gates = (parameters.w1.flatten(1) @ means + parameters.b1[:, None]).sigmoid()
    row_gate, column_gate = gates.split(features.shape[-2:], dim=-1)
    return row_gate.unsqueeze(-1), column_gate.unsqueeze(-2)


def _shifted_sums(features: Tensor, statistics: _Statistics) -> Tensor:
    """Sum x over what each tap of a zero-padded 3×3 kernel sees of it: (B, G, Cg, 3, 3).

    The tap in row 0 never sees the last row, the one in row 2 never the first; columns likewise.
    """
    height, width = features.shape[-2:]
    rows, columns = statistics.rows * width, statistics.columns * height
    left_out_row = pad(rows[..., -1:], (0, 2)) + pad(rows[..., :1], (2, 0))
    left_out_column = pad(columns[..., -1:], (0, 2)) + pad(columns[..., :1], (2, 0))
    first, last = features[..., :1, :], features[..., -1:, :]
    corner = (
        pad(last[..., -1:], (0, 2, 0, 2))
        + pad(last[..., :1], (2, 0, 0, 2))
        + pad(first[..., -1:], (0, 2, 2, 0))
        + pad(first[..., :1], (2, 0, 2, 0))
    )
    total = rows.sum(dim=-1)[..., None, None]
    return total - left_out_row[..., :, None] - left_out_column[..., None, :] + corner


def _at_borders(taps: Tensor, length: int) -> Tensor:
    """Gradients of the left-out border sums, taps (B, G, Cg, 3), at their places: (B, G, Cg, length)."""
    places = torch.zeros(*taps.shape[:-1], length, dtype=taps.dtype, device=taps.device)
    places[..., 0] += taps[..., 2]
    places[..., -1] += taps[..., 0]
    return places


def _plus_at_corners(dx: Tensor, dshifted: Tensor) -> Tensor:
    dx[..., 0, 0] += dshifted[..., 2, 2]
    dx[..., 0, -1] += dshifted[..., 2, 0]
    dx[..., -1, 0] += dshifted[..., 0, 2]
    dx[..., -1, -1] += dshifted[..., 0, 0]
    return dx


def _convolve(features: Tensor, kernel: Tensor) -> Tensor:
    """Convolve each group with its 3×3 kernel to one channel: (B, G, H, W)."""
    if not _as_matrix_products(features):
        images, weight = _convolution_operands(features, kernel)
        return conv2d(images, weight, padding=1, groups=len(weight)).reshape(*features.shape[:2], *features.shape[-2:])
    height, width = features.shape[-2:]
    taps = kernel.flatten(-2).transpose(-2, -1) @ features.flatten(-2)
    padded = pad(taps.unflatten(-1, (height, width)), (1, 1, 1, 1))
    moved = [padded[:, :, 3 * i + j, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return reduce(torch.add, moved)


def _convolve_backward(dmap: Tensor, features: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the features and of the kernel from that of the map."""
    if not _as_matrix_products(features):
        images, weight = _convolution_operands(features, kernel)
        dmap = dmap.reshape(len(images), len(weight), *dmap.shape[-2:])
        dimages, dweight, _ = torch.ops.aten.convolution_backward(
            dmap, images, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], len(weight), [True, True, False]
        )
        return dimages.reshape(features.shape), dweight.unflatten(0, (-1, features.shape[1])).sum_to_size(kernel.shape)
    height, width = features.shape[-2:]
    padded = pad(dmap, (1, 1, 1, 1))
    moved = [padded[..., 2 - i : 2 - i + height, 2 - j : 2 - j + width] for i in range(3) for j in range(3)]
    taps = torch.stack(moved, dim=2).flatten(-2)
    dkernel = (features.flatten(-2) @ taps.transpose(-2, -1)).unflatten(-1, (3, 3))
    dfeatures = (kernel.flatten(-2) @ taps).reshape(features.shape)
    return dfeatures, dkernel.sum_to_size(kernel.shape)


def _as_matrix_products(features: Tensor) -> bool:
    """Whether to apply the nine taps as one matrix product, and to shift the nine maps that it gives.

    It reads the features once, where PyTorch's convolution to a single channel is slow; as measured, that pays for its
    nine maps from four channels on. It would copy features that are not contiguous.
    """
    return features.shape[2] >= 4 and features.is_contiguous()


def _convolution_operands(features: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    batch, groups, width = features.shape[:3]
    if kernel.shape[:2] == (1, 1):
        return features.flatten(1, 2), kernel[0].expand(groups, -1, -1, -1)
    # A kernel for each group of each image: the images become groups of one convolution.
    return features.reshape(1, batch * groups * width, *features.shape[-2:]), kernel.flatten(0, 1)


def _sum_over_channels(features: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over the channels of a group: (B, G, Cg, H, W), (B, G, Cg) to (B, G, H, W)."""
    if _traced():  # a compiler fuses a product and a sum with what is around it
        return (features * weights[..., None, None]).sum(dim=2)
    return torch.einsum("bgchw,bgc->bghw", features, weights)


def _sum_of_products(first: Tensor, second: Tensor) -> Tensor:
    """Scalar product of the channels of a group at each pixel: (B, G, H, W)."""
    return (first * second).sum(dim=2)


def _softmax_backward(probabilities: Tensor, gradient: Tensor) -> Tensor:
    return probabilities * (gradient - (probabilities * gradient).sum(dim=-1, keepdim=True))


# Maps of the input's size are updated in place, as the names say: allocating one costs more than computing it. A
# compiler decides on memory by itself, and what it traces stays differentiable.


def _times_(tensor: Tensor, factor: Tensor) -> Tensor:
    return tensor * factor if _traced() else tensor.mul_(factor)


def _plus_(tensor: Tensor, summand: Tensor) -> Tensor:
    return tensor + summand if _traced() else tensor.add_(summand)


def _minus_(tensor: Tensor, subtrahend: Tensor) -> Tensor:
    return tensor - subtrahend if _traced() else tensor.sub_(subtrahend)


def _plus_product_(tensor: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return tensor + first * second if _traced() else tensor.addcmul_(first, second)
