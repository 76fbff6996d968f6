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
from torch.nn.functional import conv2d, pad

from ema_seg.attention.ema import reference
from ema_seg.attention.ema.reference import Parameters

__all__ = ["apply", "differentiable_backward", "weight_map"]


def apply(x: Tensor, parameters: Parameters, groups: int, eps: float, dynamic: bool) -> Tensor:
    """Re-weight ``x``: arguments and result as in ``reference.forward``."""
    if torch.compiler.is_exporting():  # an operator of autograd's would not be a plain one
        return _reweight(x, _Forward.of(x, parameters, groups, eps, dynamic).weights)
    with _no_autocast(x.device):
        return _Factorised.apply(x, groups, eps, dynamic, *parameters)


def weight_map(x: Tensor, parameters: Parameters, groups: int, eps: float, dynamic: bool) -> Tensor:
    """The weights in (0, 1) that multiply each group: (B, groups, H, W) in x's dtype."""
    with _no_autocast(x.device):
        return _Forward.of(x, parameters, groups, eps, dynamic).weights.to(x.dtype)


class _Factorised(torch.autograd.Function):
    """Keeps the input, its row and column means, and the two moments of each gated channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, eps: float, dynamic: bool, *parameters_of_block: Tensor) -> Tensor:
        parameters = Parameters(*parameters_of_block)
        forward = _Forward.of(x, parameters, groups, eps, dynamic)
        ctx.save_for_backward(x, *parameters, *forward.statistics)
        ctx.options = groups, eps, dynamic
        return _reweight(x, forward.weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x, *saved = ctx.saved_tensors
        parameters, statistics = Parameters(*saved[:6]), _Statistics(*saved[6:])
        with _no_autocast(x.device):
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                dx, *of_parameters = differentiable_backward(dy, x, parameters, *ctx.options)
            else:
                dx, *of_parameters = _backward(dy, x, parameters, statistics, *ctx.options)
        candidates = (dx, *(None for _ in ctx.options), *of_parameters)
        return tuple(
            gradient if needed else None for gradient, needed in zip(candidates, ctx.needs_input_grad, strict=True)
        )


def differentiable_backward(
    dy: Tensor, x: Tensor, parameters: Parameters, groups: int, eps: float, dynamic: bool
) -> tuple[Tensor, ...]:
    """The gradients of x and of the parameters by way of the published form, for second derivatives."""
    # Aliases that need gradients where the caller's tensors do not, so that each has a gradient to return.
    inputs = [tensor if tensor.requires_grad else tensor.detach().requires_grad_() for tensor in (x, *parameters)]
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    with _no_autocast(x.device):
        wide_y = reference.forward(inputs[0].to(wide), Parameters(*inputs[1:]).to(wide), groups, eps, dynamic)
    y = wide_y.to(x.dtype)
    return torch.autograd.grad(y, inputs, dy, create_graph=True)


class _Statistics(NamedTuple):
    """What the backward needs beside x, in the dtype of the arithmetic."""

    # Means over each row (B, G, Cg, H) and over each column (B, G, Cg, W). Apart, because torch.compile with dynamic
    # shapes takes the strides of a kept tensor of H + W columns for constants (torch 2.14).
    rows: Tensor
    columns: Tensor
    mean: Tensor  # of the gated channel, (B, G, Cg)
    rstd: Tensor  # 1 / sqrt(variance + eps) of the gated channel, (B, G, Cg)


class _Forward(NamedTuple):
    weights: Tensor  # (B, G, H, W)
    statistics: _Statistics

    @classmethod
    def of(cls, x: Tensor, parameters: Parameters, groups: int, eps: float, dynamic: bool) -> "_Forward":
        features = _grouped(x, groups)
        parameters = parameters.to(features.dtype)
        height, width = features.shape[-2:]
        rows, columns = _sum_along_rows(features) / width, _sum_along_columns(features) / height
        row_gate, column_gate = _gates(torch.cat([rows, columns], dim=-1), parameters, features)
        gated = _times_(features * row_gate, column_gate)
        mean = gated.mean(dim=(-2, -1))
        # Two passes, because the difference of two large sums would lose a small variance.
        centred = _minus_(gated, mean[..., None, None])
        rstd = (centred.square().mean(dim=(-2, -1)) + eps).rsqrt()
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


def _reweight(x: Tensor, weights: Tensor) -> Tensor:
    return (x.unflatten(1, (weights.shape[1], -1)) * weights.unsqueeze(2)).flatten(1, 2).to(x.dtype)


def _backward(
    dy: Tensor,
    x: Tensor,
    parameters: Parameters,
    statistics: _Statistics,
    groups: int,
    eps: float,
    dynamic: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x and of the six parameters, each in the dtype of what it is the gradient of."""
    features, dy5 = _grouped(x, groups), _grouped(dy, groups)
    w1, _, w3, b3, gamma, beta = small = parameters.to(features.dtype)
    rows, columns, mean, rstd = statistics
    means = torch.cat([rows, columns], dim=-1)
    height, width = features.shape[-2:]
    area = height * width
    row_gate, column_gate = _gates(means, small, features)
    # The gates in the other order than in the forward: torch.compile would take equal expressions for one, and keep its
    # value, a map of the input's size, from the forward to the backward.
    centred = _minus_(_times_(features * column_gate, row_gate), mean[..., None, None])
    mixing = _Mixing.of(features, small, statistics, dynamic)
    a1, a2, shifted, kernel, kappa, _ = mixing

    # The weight map and its logit; (B, G, H, W).
    weights = mixing.weights(features, centred)
    dlogit = _sum_of_products(features, dy5) * weights * (1 - weights)
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
    drow_gate = _sum_along_rows(dgated * column_gate)
    dcolumn_gate = _sum_along_columns(_times_(dgated, row_gate))
    gates = torch.cat([row_gate.squeeze(-1), column_gate.squeeze(-2)], dim=-1)
    dgates = torch.cat([drow_gate, dcolumn_gate], dim=-1) * gates * (1 - gates)
    drows, dcolumns = (w1.flatten(1).T @ dgates).split([height, width], dim=-1)

    # The sums in the softmax of the 3×3 branch: of everything, less a border row and a border column, plus a corner.
    dshifted = torch.einsum("bgo,ocij->bgcij", dm2, w3) / area
    drows = drows / width + dshifted.sum(dim=(-2, -1))[..., None] - _at_borders(dshifted.sum(dim=-1), height)
    dcolumns = dcolumns / height - _at_borders(dshifted.sum(dim=-2), width)

    dx = _times_(_times_(du, row_gate), column_gate)
    dx = _plus_(dx, dx_convolution)
    dx = _plus_product_(dx, dy5, weights.unsqueeze(2))
    dx = _plus_(dx, drows[..., :, None])
    dx = _plus_(dx, dcolumns[..., None, :])
    dx = _plus_at_corners(dx, dshifted)

    dw1 = (dgates @ means.transpose(-2, -1)).sum(dim=(0, 1))
    db1 = dgates.sum(dim=(0, 1, 3))
    dw3 = torch.einsum("bgo,bgcij->ocij", dm2, shifted) / area + torch.einsum("bgo,bgcij->ocij", a1, dkernel)
    db3 = dm2.sum(dim=(0, 1)) + (a1 * da1_constant).sum(dim=(0, 1))
    dgamma = (a2 * rstd * correlation).sum(dim=(0, 1))
    dbeta = (a2 * dconstant[..., None]).sum(dim=(0, 1)) + (0 if dynamic else dm1[0, 0])
    grads = (dw1.reshape(w1.shape), db1, dw3, db3, dgamma, dbeta)
    return dx.flatten(1, 2).to(x.dtype), *(grad.to(p.dtype) for grad, p in zip(grads, parameters, strict=True))


def _no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast would round the convolution's operands, after care was taken to compute in float32."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(B, C, H, W) as (B, G, Cg, H, W), a view if the dtype is one that is computed in."""
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    return x.unflatten(1, (groups, -1)).to(wide)


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
    zero = torch.zeros_like(rows[..., 0])
    left_out_row = torch.stack([rows[..., -1], zero, rows[..., 0]], dim=-1)
    left_out_column = torch.stack([columns[..., -1], zero, columns[..., 0]], dim=-1)
    corner = torch.stack(
        [
            *(features[..., -1, -1], zero, features[..., -1, 0]),
            *(zero, zero, zero),
            *(features[..., 0, -1], zero, features[..., 0, 0]),
        ],
        dim=-1,
    ).unflatten(-1, (3, 3))
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

    It reads the features once where PyTorch's convolution to a single channel is slow, but its nine maps must not
    outweigh the channels of the group, and the product would copy features that are not contiguous.
    """
    return features.shape[2] >= 4 and features.is_contiguous()


def _convolution_operands(features: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    batch, groups, width = features.shape[:3]
    if kernel.shape[:2] == (1, 1):
        return features.flatten(1, 2), kernel[0].expand(groups, -1, -1, -1)
    # A kernel for each group of each image: the images become groups of one convolution.
    return features.reshape(1, batch * groups * width, *features.shape[-2:]), kernel.flatten(0, 1)


def _sum_along_rows(features: Tensor) -> Tensor:
    """Sums over the width: (B, G, Cg, H)."""
    if not _as_products_with_ones(features):
        return features.sum(dim=-1)
    channels_last = features.flatten(1, 2).permute(0, 2, 3, 1)
    sums = features.new_ones(1, features.shape[-1]) @ channels_last  # (B, H, 1, C)
    return sums.squeeze(2).transpose(1, 2).unflatten(1, features.shape[1:3])


def _sum_along_columns(features: Tensor) -> Tensor:
    """Sums over the height: (B, G, Cg, W)."""
    if not _as_products_with_ones(features):
        return features.sum(dim=-2)
    channels_last = features.flatten(1, 2).permute(0, 2, 3, 1)
    sums = features.new_ones(1, features.shape[-2]) @ channels_last.flatten(2)  # (B, 1, W · C)
    return sums.unflatten(2, channels_last.shape[2:]).squeeze(1).transpose(1, 2).unflatten(1, features.shape[1:3])


def _as_products_with_ones(features: Tensor) -> bool:
    """Whether to sum by a matrix product: on CPUs PyTorch's sums of channels-last maps take many times as long."""
    return features.device.type == "cpu" and features.stride(2) == 1 and not torch.compiler.is_compiling()


def _sum_over_channels(features: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over the channels of a group: (B, G, Cg, H, W), (B, G, Cg) to (B, G, H, W)."""
    if torch.compiler.is_compiling():  # the compiler fuses a product and a sum with what is around it
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
    return tensor * factor if torch.compiler.is_compiling() else tensor.mul_(factor)


def _plus_(tensor: Tensor, summand: Tensor) -> Tensor:
    return tensor + summand if torch.compiler.is_compiling() else tensor.add_(summand)


def _minus_(tensor: Tensor, subtrahend: Tensor) -> Tensor:
    return tensor - subtrahend if torch.compiler.is_compiling() else tensor.sub_(subtrahend)


def _plus_product_(tensor: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return tensor + first * second if torch.compiler.is_compiling() else tensor.addcmul_(first, second)
