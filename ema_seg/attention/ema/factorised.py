"""EMA's short form in PyTorch operations, with a hand-written backward.

The published form evaluates a Cg-to-Cg convolution and keeps half a dozen maps of the input's size. Neither is
needed. The convolution enters the result only through two weighted sums over its output channels, which are linear in
the input, so a convolution to a single channel and nine sums replace it. The backward recomputes everything from the
input, its row and column means, and the moments of the gated channels. docs/ema.md has the derivation; the names
follow it.

The arithmetic is float64 for float64 inputs, else float32. Feature maps are (B, G, Cg, H, W) here, a view of
(B, C, H, W) in any memory layout; statistics of channels are (B, G, Cg).

The groups are independent, so only a few are computed at a time: their intermediate maps take little memory, and stay
in the cache of a CPU.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ema_seg.attention.ema.reference import Parameters

__all__ = ["backward", "compute_dtype", "forward", "plain", "unavailable", "weight_map", "without_autocast"]

# Bytes of features computed at a time, in the dtype of the arithmetic.
_CHUNK_BYTES_CPU = 2**22
_CHUNK_BYTES = 2**28


def unavailable(x: Tensor) -> None:
    """Return None: PyTorch's operations compute any ``x``."""


def plain(x: Tensor, parameters: Parameters, groups: int, eps: float, dynamic: bool) -> Tensor:
    """Re-weight ``x`` as ``reference.forward`` does, with PyTorch's own operators only, for portable graphs."""
    features, weights = _features_and_weights(x, parameters, groups, eps, dynamic)
    return (features * weights.unsqueeze(2)).flatten(1, 2).to(x.dtype)


def weight_map(x: Tensor, parameters: Parameters, groups: int, eps: float, dynamic: bool) -> Tensor:
    """Compute the weights in (0, 1) of each group, (B, groups, H, W) in x's dtype; arguments as in ``plain``."""
    return _features_and_weights(x, parameters, groups, eps, dynamic)[1].to(x.dtype)


def _features_and_weights(
    x: Tensor, parameters: Parameters, groups: int, eps: float, dynamic: bool
) -> tuple[Tensor, Tensor]:
    wide = compute_dtype(x.dtype)
    features = x.unflatten(1, (groups, -1)).to(wide)
    with without_autocast(x.device):
        return features, _Forward.of(features, parameters.to(wide), eps, dynamic).weights


@torch.no_grad()
def forward(x: Tensor, parameters: Parameters, groups: int, eps: float, dynamic: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Re-weight ``x``; see ``operator.Kernels``."""
    features = x.unflatten(1, (groups, -1))
    batch, _, channels, height, width = features.shape
    y, new_empty = torch.empty_like(x), parameters.w1.new_empty
    means = new_empty((batch, groups, channels, height + width))
    mean, rstd = moments = new_empty((2, batch, groups, channels))
    results = y.unflatten(1, (groups, -1))
    with without_autocast(x.device):
        for part in _parts(features):
            wide = _contiguous(features[part])
            weights, means[part], mean[part], rstd[part] = _Forward.of(wide, parameters, eps, dynamic)
            torch.mul(wide, weights.unsqueeze(2), out=results[part])
    return y, means.flatten(0, 1), moments.flatten(1, 2)


@torch.no_grad()
def backward(
    dy: Tensor,
    x: Tensor,
    means: Tensor,
    moments: Tensor,
    parameters: Parameters,
    groups: int,
    eps: float,
    dynamic: bool,
) -> tuple[Tensor, Parameters]:
    """Compute the gradients of ``x`` and of the parameters; see ``operator.Kernels``."""
    features, dy = x.unflatten(1, (groups, -1)), dy.unflatten(1, (groups, -1))
    sizes = (len(x), groups)
    means, (mean, rstd) = means.unflatten(0, sizes), moments.unflatten(1, sizes)
    dx, gradients = torch.empty_like(x), Parameters(*map(torch.zeros_like, parameters))
    results = dx.unflatten(1, (groups, -1))
    with without_autocast(x.device):
        for part in _parts(features):
            statistics = means[part], mean[part], rstd[part]
            results[part], summands = _backward(
                _contiguous(dy[part]), _contiguous(features[part]), *statistics, parameters, dynamic
            )
            for gradient, summand in zip(gradients, summands, strict=True):
                gradient += summand
    return dx, gradients


def _parts(features: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield slices of (B, G, Cg, H, W) to compute one after the other: some images, or some groups of one."""
    batch, groups, channels, height, width = features.shape
    size = _CHUNK_BYTES_CPU if features.device.type == "cpu" else _CHUNK_BYTES
    group = channels * height * width * compute_dtype(features.dtype).itemsize
    images = max(1, size // (groups * group))
    some = max(1, size // group)
    if features.stride(2) == 1:  # channels-last: read whole cache lines of 64 bytes
        some = max(some, 64 // (channels * features.element_size()))
    for image in range(0, batch, images):
        for start in range(0, groups, some):
            yield slice(image, image + images), slice(start, start + some)


def _contiguous(part: Tensor) -> Tensor:
    """Convert a part to the dtype of the arithmetic, contiguous because PyTorch is slow on other layouts."""
    return part.to(compute_dtype(part.dtype)).contiguous()


class _Forward(NamedTuple):
    """Weight map, and the statistics that the backward needs besides x."""

    weights: Tensor  # (B, G, H, W)
    means: Tensor  # over each row and over each column, (B, G, Cg, H + W)
    mean: Tensor  # of the gated channel, (B, G, Cg)
    rstd: Tensor  # 1 / sqrt(variance + eps) of the gated channel, (B, G, Cg)

    @classmethod
    def of(cls, features: Tensor, parameters: Parameters, eps: float, dynamic: bool) -> "_Forward":
        means = torch.cat([features.mean(dim=-1), features.mean(dim=-2)], dim=-1)
        row_gate, column_gate = _gates(means, parameters, features)
        gated = _times_(features * row_gate, column_gate)
        mean = gated.mean(dim=(-2, -1))
        # Two passes, because the difference of two large sums would lose a small variance.
        centred = _minus_(gated, mean[..., None, None])
        area = features.shape[-2] * features.shape[-1]
        rstd = (torch.linalg.vector_norm(centred, dim=(-2, -1)).square() / area + eps).rsqrt()
        mixing = _Mixing.of(features, parameters, means, mean, rstd, dynamic)
        return cls(mixing.weights(features, centred), means, mean, rstd)


class _Mixing(NamedTuple):
    """Coefficients that mix the weight map from the channels."""

    a1: Tensor  # softmax that weighs the 3×3 branch: (B, G, Cg) if dynamic, else (1, 1, Cg)
    a2: Tensor  # softmax that weighs the 1×1 branch: (B, G, Cg)
    shifted: Tensor  # sums of x over the window of each tap of the 3×3 kernel: (B, G, Cg, 3, 3)
    kernel: Tensor  # 3×3 kernel to a single channel: (B, G, Cg, 3, 3) if dynamic, else (1, 1, Cg, 3, 3)
    kappa: Tensor  # weights of the centred gated channels: (B, G, Cg)
    constant: Tensor  # (B, G)

    @classmethod
    def of(
        cls, features: Tensor, parameters: Parameters, means: Tensor, mean: Tensor, rstd: Tensor, dynamic: bool
    ) -> "_Mixing":
        _, _, w3, b3, gamma, beta = parameters
        height, width = features.shape[-2:]
        shifted = _shifted_sums(features, means)
        a1 = (mean if dynamic else beta[None, None]).softmax(dim=-1)
        a2 = (b3 + torch.einsum("ocij,bgcij->bgo", w3, shifted) / (height * width)).softmax(dim=-1)
        return cls(
            a1,
            a2,
            shifted,
            kernel=torch.einsum("bgo,ocij->bgcij", a1, w3),
            kappa=a2 * gamma * rstd,
            constant=(a1 * b3).sum(dim=-1) + (a2 * beta).sum(dim=-1),
        )

    def weights(self, features: Tensor, centred: Tensor) -> Tensor:
        """Compute the weight map (B, G, H, W)."""
        mixed = _convolve(features, self.kernel) + torch.einsum("bgchw,bgc->bghw", centred, self.kappa)
        return (mixed + self.constant[..., None, None]).sigmoid()


def _backward(
    dy: Tensor,
    features: Tensor,
    means: Tensor,
    mean: Tensor,
    rstd: Tensor,
    parameters: Parameters,
    dynamic: bool,
) -> tuple[Tensor, Parameters]:
    """Compute the gradients of the features and of the parameters."""
    w1, _, w3, b3, gamma, beta = parameters
    height, width = features.shape[-2:]
    area = height * width
    row_gate, column_gate = _gates(means, parameters, features)
    centred = (features * row_gate).mul_(column_gate).sub_(mean[..., None, None])
    mixing = _Mixing.of(features, parameters, means, mean, rstd, dynamic)
    a1, a2, shifted, kernel, kappa, _ = mixing

    # The weight map and the gradient of its logit: (B, G, H, W).
    weights = mixing.weights(features, centred)
    dlogit = (features * dy).sum(dim=2) * weights * (1 - weights)
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
    offset = (dm1 if dynamic else 0) - kappa * dconstant[..., None]
    du = centred.mul_((-kappa * rstd.square() * correlation / area)[..., None, None])
    du.add_((offset / area)[..., None, None]).addcmul_(kappa[..., None, None], dlogit5)

    # The gates, and through them the means.
    dgated = du * features
    drow_gate = (dgated * column_gate).sum(dim=-1)
    dcolumn_gate = dgated.mul_(row_gate).sum(dim=-2)
    gates = torch.cat([row_gate.squeeze(-1), column_gate.squeeze(-2)], dim=-1)
    dgates = torch.cat([drow_gate, dcolumn_gate], dim=-1) * gates * (1 - gates)
    drows, dcolumns = (w1.flatten(1).T @ dgates).split([height, width], dim=-1)

    # The shifted sums in the softmax of the 3×3 branch: the total, minus a border row and column, plus a corner.
    dshifted = torch.einsum("bgo,ocij->bgcij", dm2, w3) / area
    drows = drows / width + dshifted.sum(dim=(-2, -1))[..., None] - _at_borders(dshifted.sum(dim=-1), height)
    dcolumns = dcolumns / height - _at_borders(dshifted.sum(dim=-2), width)

    dx = du.mul_(row_gate).mul_(column_gate).add_(dx_convolution).addcmul_(dy, weights.unsqueeze(2))
    dx.add_(drows[..., :, None]).add_(dcolumns[..., None, :])
    dx[..., 0, 0] += dshifted[..., 2, 2]
    dx[..., 0, -1] += dshifted[..., 2, 0]
    dx[..., -1, 0] += dshifted[..., 0, 2]
    dx[..., -1, -1] += dshifted[..., 0, 0]

    dw1 = (dgates @ means.transpose(-2, -1)).sum(dim=(0, 1)).view(w1.shape)
    db1 = dgates.sum(dim=(0, 1, 3))
    dw3 = torch.einsum("bgo,bgcij->ocij", dm2, shifted) / area + torch.einsum("bgo,bgcij->ocij", a1, dkernel)
    db3 = dm2.sum(dim=(0, 1)) + (a1 * da1_constant).sum(dim=(0, 1))
    dgamma = (a2 * rstd * correlation).sum(dim=(0, 1))
    dbeta = (a2 * dconstant[..., None]).sum(dim=(0, 1)) + (0 if dynamic else dm1[0, 0])
    return dx, Parameters(dw1, db1, dw3, db3, dgamma, dbeta)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic for features of ``dtype``."""
    return dtype if dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Disable autocast in a context: it would round the operands of products that need float32."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def _gates(means: Tensor, parameters: Parameters, features: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the row gate (B, G, Cg, H, 1) and the column gate (B, G, Cg, 1, W)."""
    gates = (parameters.w1.flatten(1) @ means + parameters.b1[:, None]).sigmoid()
    row_gate, column_gate = gates.split(features.shape[-2:], dim=-1)
    return row_gate.unsqueeze(-1), column_gate.unsqueeze(-2)


def _shifted_sums(features: Tensor, means: Tensor) -> Tensor:
    """Sum x over the window of each tap of a zero-padded 3×3 kernel: (B, G, Cg, 3, 3).

    A tap in row 0 never sees the last row, one in row 2 never the first; columns likewise.
    """
    height, width = features.shape[-2:]
    rows, columns = means.split([height, width], dim=-1)
    rows, columns = rows * width, columns * height
    first, last = features[..., :1, :], features[..., -1:, :]
    corner = (
        pad(last[..., -1:], (0, 2, 0, 2))
        + pad(last[..., :1], (2, 0, 0, 2))
        + pad(first[..., -1:], (0, 2, 2, 0))
        + pad(first[..., :1], (2, 0, 2, 0))
    )
    total = rows.sum(dim=-1)[..., None, None]
    return total - _border_sums(rows)[..., :, None] - _border_sums(columns)[..., None, :] + corner


def _border_sums(sums: Tensor) -> Tensor:
    """Select the row sum (or column sum) that each of three taps never sees: (…, length) to (…, 3)."""
    return pad(sums[..., -1:], (0, 2)) + pad(sums[..., :1], (2, 0))


def _at_borders(taps: Tensor, length: int) -> Tensor:
    """Place the gradients of the border sums of ``_border_sums``, (B, G, Cg, 3), in zeros (B, G, Cg, length)."""
    places = torch.zeros(*taps.shape[:-1], length, dtype=taps.dtype, device=taps.device)
    places[..., 0] += taps[..., 2]
    places[..., -1] += taps[..., 0]
    return places


def _convolve(features: Tensor, kernel: Tensor) -> Tensor:
    """Convolve each group with its 3×3 kernel to one channel: (B, G, H, W)."""
    if _use_matrix_products(features):
        maps = (kernel.flatten(-2).transpose(-2, -1) @ features.flatten(-2)).unflatten(-1, features.shape[-2:])
        return reduce(torch.add, (window[:, :, tap] for tap, window in enumerate(_windows(maps))))
    return _weighted_sum(_windows(features), kernel).sum(dim=2)


def _convolve_backward(dmap: Tensor, features: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of the features and of the kernel from that of the map."""
    windows = _windows(dmap.unsqueeze(2))[::-1]
    if _use_matrix_products(features):
        maps = torch.cat(windows, dim=2).flatten(-2)
        dkernel = features.flatten(-2) @ maps.transpose(-2, -1)
        dfeatures = (kernel.flatten(-2) @ maps).reshape(features.shape)
    else:
        dkernel = torch.stack([(features * window).sum(dim=(-2, -1)) for window in windows], dim=-1)
        dfeatures = _weighted_sum(windows, kernel)
    return dfeatures, dkernel.unflatten(-1, (3, 3)).sum_to_size(kernel.shape)


def _weighted_sum(windows: list[Tensor], kernel: Tensor) -> Tensor:
    """Sum the windows of the taps, (B, G, Cg or 1, H, W), weighted by the kernel: (B, G, Cg, H, W)."""
    first, *others = kernel.flatten(-2).unsqueeze(-2).unbind(dim=-1)  # (B, G, Cg, 1)
    total = windows[0] * first.unsqueeze(-1)
    for window, weight in zip(windows[1:], others, strict=True):
        total = _plus_product_(total, window, weight.unsqueeze(-1))
    return total


def _windows(maps: Tensor) -> list[Tensor]:
    """Return the window of the maps (…, H, W) for each tap of a zero-padded 3×3 kernel, row by row."""
    height, width = maps.shape[-2:]
    padded = pad(maps, (1, 1, 1, 1))
    return [padded[..., i : i + height, j : j + width] for i in range(3) for j in range(3)]


def _use_matrix_products(features: Tensor) -> bool:
    """Return whether to apply the nine taps as one matrix product, which reads the features once.

    For groups of few channels its nine maps would be much larger than the features; there the taps' products are
    summed instead. PyTorch's own convolution to a single channel is many times slower.
    """
    return features.shape[2] >= 4


def _softmax_backward(probabilities: Tensor, gradient: Tensor) -> Tensor:
    return probabilities * (gradient - (probabilities * gradient).sum(dim=-1, keepdim=True))


# Without autograd or tracing, maps of the features' size are updated in place: allocating one costs more than
# computing it.


def _in_place() -> bool:
    return not torch.is_grad_enabled() and not torch.jit.is_tracing()


def _times_(tensor: Tensor, factor: Tensor) -> Tensor:
    return tensor.mul_(factor) if _in_place() else tensor * factor


def _minus_(tensor: Tensor, subtrahend: Tensor) -> Tensor:
    return tensor.sub_(subtrahend) if _in_place() else tensor - subtrahend


def _plus_product_(tensor: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return tensor.addcmul_(first, second) if _in_place() else tensor + first * second
