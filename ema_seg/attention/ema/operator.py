"""Custom PyTorch operator of EMA's short form, with its rules for autograd, compilation and the FLOP counter."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ema_seg.attention.ema import reference
from ema_seg.attention.ema.factorised import compute_dtype, without_autocast
from ema_seg.attention.ema.reference import Parameters
from ema_seg.runtime.execution import tf32

__all__ = ["KERNELS", "apply", "apply_differentiably", "import_kernels"]

# Kernel modules, the fastest for a device first; imported at their first use.
KERNELS = {"cpp": "cpp", "triton": "triton_launch", "factorised": "factorised"}


class Kernels(Protocol):
    """Interface of a kernel module.

    ``x`` is (B, C, H, W), contiguous or channels-last, and ``dy`` has its layout. The parameters have the dtype of the
    arithmetic (float64 for a float64 ``x``, else float32) and are contiguous, ``w3`` contiguous or channels-last.
    ``groups``, ``eps`` and ``dynamic`` are those of ``reference.forward``. Call ``unavailable`` first; ``forward`` and
    ``backward`` may raise ModelError if the kernels cannot compute ``x``.
    """

    def unavailable(self, x: Tensor) -> str | None:
        """Return why these kernels cannot compute x's device and dtype, as a clause, or None if they can."""

    def forward(
        self, x: Tensor, parameters: Parameters, groups: int, eps: float, dynamic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Re-weight ``x``.

        Returns:
            y like ``x``; the row and column means (N, Cg, H + W) of the N = B · groups groups; and mean and
            1 / standard deviation of their gated channels (2, N, Cg). Both statistics have the dtype of the arithmetic.
        """

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        means: Tensor,
        moments: Tensor,
        parameters: Parameters,
        groups: int,
        eps: float,
        dynamic: bool,
    ) -> tuple[Tensor, Parameters]:
        """Compute the gradients, from the inputs and outputs of ``forward``; each has the strides of its tensor."""


@cache
def import_kernels(name: str) -> Kernels:
    """Import the module of one of ``KERNELS``."""
    return import_module(f"ema_seg.attention.ema.{KERNELS[name]}")


def apply(x: Tensor, parameters: Parameters, groups: int, eps: float, dynamic: bool, kernels: str) -> Tensor:
    """Re-weight ``x`` with one of ``KERNELS``; other arguments as in ``reference.forward``."""
    inputs = x, *parameters, groups, eps, dynamic, kernels
    if torch.compiler.is_compiling() or not _are_plain(x):
        return torch.ops.ema_seg.ema.default(*inputs)[0]
    # Past the dispatcher, which takes as long as the launches: a small map on a GPU waits for the host.
    return (_Differentiable.apply if torch.is_grad_enabled() else _ema)(*inputs)[0]


def apply_differentiably(x: Tensor, parameters: Parameters, groups: int, eps: float, dynamic: bool) -> Tensor:
    """Compute the same as ``apply`` by the published form, which supports every derivative and transform."""
    wide = compute_dtype(x.dtype)
    with without_autocast(x.device), _without_tf32(x.device):
        return reference.forward(x.to(wide), parameters.to(wide), groups, eps, dynamic).to(x.dtype)


# torch.library.custom_op would take four times as long to call, which a small map on a GPU waits for.
_LIBRARY = torch.library.Library("ema_seg", "FRAGMENT")
_PARAMETERS = "Tensor w1, Tensor b1, Tensor w3, Tensor b3, Tensor gamma, Tensor beta"
_OPTIONS = "int groups, float eps, bool dynamic, str kernels"
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_LIBRARY.define(f"ema(Tensor x, {_PARAMETERS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)", tags=_TAGS)
_LIBRARY.define(
    f"ema_backward(Tensor dy, Tensor x, Tensor means, Tensor moments, {_PARAMETERS}, {_OPTIONS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def _ema(x: Tensor, *parameters_and_options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Call ``Kernels.forward`` for an ``x`` in any memory layout and parameters in any dtype."""
    *parameters, groups, eps, dynamic, kernels = parameters_and_options
    dense = _make_dense(x)
    results = import_kernels(kernels).forward(dense, _convert_parameters(parameters, x), groups, eps, dynamic)
    return _match_strides(results[0], dense, x), *results[1:]


def _ema_backward(
    dy: Tensor, x: Tensor, means: Tensor, moments: Tensor, *parameters_and_options: Any
) -> tuple[Tensor, ...]:
    """Compute the gradients of x and of the six parameters, each with shape, dtype and strides of its tensor."""
    *parameters, groups, eps, dynamic, kernels = parameters_and_options
    dense, converted = _make_dense(x), _convert_parameters(parameters, x)
    dx, gradients = import_kernels(kernels).backward(
        _match_memory_format(dy, dense), dense, means, moments, converted, groups, eps, dynamic
    )
    matched = (
        gradient if parameter is like else torch.empty_like(parameter).copy_(gradient)
        for gradient, parameter, like in zip(gradients, parameters, converted, strict=True)
    )
    return _match_strides(dx, dense, x), *matched


_LIBRARY.impl("ema", _ema, "CompositeExplicitAutograd")
_LIBRARY.impl("ema_backward", _ema_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("ema_seg::ema", lib=_LIBRARY)
def _(x: Tensor, *parameters_and_options: Any) -> tuple[Tensor, Tensor, Tensor]:
    w1, groups = parameters_and_options[0], parameters_and_options[6]
    batch, _, height, width = x.shape
    count, channels = batch * groups, w1.shape[0]
    means = x.new_empty((count, channels, height + width), dtype=compute_dtype(x.dtype))
    moments = x.new_empty((2, count, channels), dtype=compute_dtype(x.dtype))
    return torch.empty_like(x), means, moments


@torch.library.register_fake("ema_seg::ema_backward", lib=_LIBRARY)
def _(dy: Tensor, x: Tensor, means: Tensor, moments: Tensor, *parameters_and_options: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(x), *map(torch.empty_like, parameters_and_options[:6])


class _Differentiable(torch.autograd.Function):
    """Operator with its backward, which is another operator."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        if _are_plain(inputs[0]):
            y, means, moments = _ema(*inputs)
        else:
            with torch._C._AutoDispatchBelowAutograd():  # else the dispatcher would call this function again
                y, means, moments = torch.ops.ema_seg.ema.default(*inputs)
        ctx.mark_non_differentiable(means, moments)
        ctx.set_materialize_grads(False)
        x, *parameters = inputs[:7]
        ctx.save_for_backward(x, means, moments, *parameters)
        ctx.options = inputs[7:]
        return y, means, moments

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 11
        x, means, moments, *parameters = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _differentiable_backward(dy, x, Parameters(*parameters), *ctx.options[:-1])
        elif _are_plain(x, dy):
            grads = _ema_backward(dy, x, means, moments, *parameters, *ctx.options)
        else:
            grads = torch.ops.ema_seg.ema_backward.default(dy, x, means, moments, *parameters, *ctx.options)
        return *grads, None, None, None, None  # for the options


def _are_plain(x: Tensor, dy: Tensor | None = None) -> bool:
    """Return whether the dispatcher would only call the kernels.

    It does more in a trace or under the FLOP counter, for subclasses of tensors, and for a batch of gradients.
    """
    if type(x) is not Tensor or torch._C._len_torch_dispatch_stack():
        return False
    return dy is None or torch._C._dispatch_keys(dy) == torch._C._dispatch_keys(x)


_LIBRARY.impl("ema", lambda *inputs: _Differentiable.apply(*inputs), "Autograd")


def _differentiable_backward(
    dy: Tensor, x: Tensor, parameters: Parameters, groups: int, eps: float, dynamic: bool
) -> tuple[Tensor, ...]:
    """Compute the gradients of x and of the parameters with a graph, for second derivatives."""
    # Tensors that require no gradient are replaced by aliases that do, so that every tensor has a gradient.
    inputs = [tensor if tensor.requires_grad else tensor.detach().requires_grad_() for tensor in (x, *parameters)]
    y = apply_differentiably(inputs[0], Parameters(*inputs[1:]), groups, eps, dynamic)
    with _without_tf32(x.device):
        return torch.autograd.grad(y, inputs, dy, create_graph=True)


def _without_tf32(device: torch.device) -> AbstractContextManager[None]:
    """Keep cuDNN from rounding the factors of float32 convolutions to 10 bits, as it does by default."""
    return tf32(False) if device.type == "cuda" else nullcontext()


@register_flop_formula(torch.ops.ema_seg.ema)
def _flops(x_shape: tuple[int, ...], w1_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Count two operations per multiply–add of the gates' 1×1 convolution and the two weighted channel sums."""
    batch, channels, height, width = x_shape
    return 2 * batch * channels * (w1_shape[0] * (height + width) + (9 + 1) * height * width)


@register_flop_formula(torch.ops.ema_seg.ema_backward)
def _flops_of_backward(dy_shape: tuple[int, ...], *shapes: Any, **_: Any) -> int:
    """Count each product of the forward three times: recomputed, and differentiated by both factors."""
    return 3 * _flops(dy_shape, shapes[3])


def _convert_parameters(parameters: Sequence[Tensor], x: Tensor) -> Parameters:
    """Convert the parameters for the kernels, to the dtype of the arithmetic; most need no conversion."""
    dtype = compute_dtype(x.dtype)
    return Parameters(
        *(
            parameter if parameter.dtype == dtype and _is_dense(parameter) else parameter.to(dtype).contiguous()
            for parameter in parameters
        )
    )


def _is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor is contiguous or channels-last."""
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)


def _make_dense(x: Tensor) -> Tensor:
    """Return ``x`` itself if it is contiguous or channels-last, else a contiguous copy."""
    return x if _is_dense(x) else x.contiguous()


def _match_memory_format(tensor: Tensor, dense: Tensor) -> Tensor:
    if dense.is_contiguous():
        return tensor.contiguous()
    return tensor.contiguous(memory_format=torch.channels_last)


def _match_strides(result: Tensor, dense: Tensor, x: Tensor) -> Tensor:
    """Give the result for ``dense`` the strides of ``torch.empty_like(x)``, which the fake implementations promise."""
    return result if dense is x else torch.empty_like(x).copy_(result)
