"""Custom PyTorch operator of EMA's short form, with its rules for autograd, compilation and the FLOP counter."""

from contextlib import AbstractContextManager, nullcontext
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

    ``x`` is (B, C, H, W), contiguous or channels-last, and ``dy`` has its layout. The parameters are contiguous, in
    the dtype of the arithmetic (float64 for a float64 ``x``, else float32), ``w1`` as (Cg, Cg). ``groups``, ``eps``
    and ``dynamic`` are those of ``reference.forward``. Call ``unavailable`` first; ``forward`` and ``backward`` may
    raise ModelError if the kernels cannot compute ``x``.
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
        """Compute the gradients, like ``x`` and the parameters, from the inputs and outputs of ``forward``."""


def import_kernels(name: str) -> Kernels:
    """Import the module of one of ``KERNELS``."""
    return import_module(f"ema_seg.attention.ema.{KERNELS[name]}")


def apply(x: Tensor, parameters: Parameters, groups: int, eps: float, dynamic: bool, kernels: str) -> Tensor:
    """Re-weight ``x`` with one of ``KERNELS``; other arguments as in ``reference.forward``."""
    return ema(x, *parameters, groups, eps, dynamic, kernels)[0]


def apply_differentiably(x: Tensor, parameters: Parameters, groups: int, eps: float, dynamic: bool) -> Tensor:
    """Compute the same as ``apply`` by the published form, which supports every derivative and transform."""
    wide = compute_dtype(x.dtype)
    with without_autocast(x.device), _without_tf32(x.device):
        return reference.forward(x.to(wide), parameters.to(wide), groups, eps, dynamic).to(x.dtype)


@torch.library.custom_op("ema_seg::ema", mutates_args=())
def ema(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w3: Tensor,
    b3: Tensor,
    gamma: Tensor,
    beta: Tensor,
    groups: int,
    eps: float,
    dynamic: bool,
    kernels: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Call ``Kernels.forward`` for an ``x`` in any memory layout and parameters in any dtype."""
    parameters = _convert_parameters(Parameters(w1, b1, w3, b3, gamma, beta), x)
    y, means, moments = import_kernels(kernels).forward(_make_dense(x), parameters, groups, eps, dynamic)
    return _match_strides(y, x), means, moments


@ema.register_fake
def _(x: Tensor, *parameters_and_options: Any) -> tuple[Tensor, Tensor, Tensor]:
    w1, groups = parameters_and_options[0], parameters_and_options[6]
    batch, _, height, width = x.shape
    count, channels = batch * groups, w1.shape[0]
    means = x.new_empty((count, channels, height + width), dtype=compute_dtype(x.dtype))
    moments = x.new_empty((2, count, channels), dtype=compute_dtype(x.dtype))
    return torch.empty_like(x), means, moments


@torch.library.custom_op("ema_seg::ema_backward", mutates_args=())
def ema_backward(
    dy: Tensor,
    x: Tensor,
    means: Tensor,
    moments: Tensor,
    w1: Tensor,
    b1: Tensor,
    w3: Tensor,
    b3: Tensor,
    gamma: Tensor,
    beta: Tensor,
    groups: int,
    eps: float,
    dynamic: bool,
    kernels: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of x and of the six parameters, each with the shape and dtype of its tensor."""
    parameters = Parameters(w1, b1, w3, b3, gamma, beta)
    dense = _make_dense(x)
    dx, gradients = import_kernels(kernels).backward(
        _match_memory_format(dy, dense), dense, means, moments, _convert_parameters(parameters, x), groups, eps, dynamic
    )
    dw1, db1, dw3, db3, dgamma, dbeta = (
        grad.reshape(parameter.shape).to(parameter.dtype) for grad, parameter in zip(gradients, parameters, strict=True)
    )
    return _match_strides(dx, x), dw1, db1, dw3, db3, dgamma, dbeta


@ema_backward.register_fake
def _(dy: Tensor, x: Tensor, means: Tensor, moments: Tensor, *parameters_and_options: Any) -> tuple[Tensor, ...]:
    parameters = parameters_and_options[:6]
    return torch.empty_like(x), *(parameter.new_empty(parameter.shape) for parameter in parameters)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, *parameters = inputs[:7]
    _, means, moments = output
    ctx.mark_non_differentiable(means, moments)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, means, moments, *parameters)
    ctx.options = inputs[7:]


def _backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    unused = (None,) * len(ctx.options)
    if dy is None:
        return (None,) * 7 + unused
    x, means, moments, *parameters = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        grads = _differentiable_backward(dy, x, Parameters(*parameters), *ctx.options[:-1])
    else:
        grads = ema_backward(dy, x, means, moments, *parameters, *ctx.options)
    return *(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)), *unused


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


torch.library.register_autograd("ema_seg::ema", _backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.ema_seg.ema)
def _flops(x_shape: tuple[int, ...], w1_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Count two operations per multiply–add of the gates' 1×1 convolution and the two weighted channel sums."""
    batch, channels, height, width = x_shape
    return 2 * batch * channels * (w1_shape[0] * (height + width) + (9 + 1) * height * width)


@register_flop_formula(torch.ops.ema_seg.ema_backward)
def _flops_of_backward(dy_shape: tuple[int, ...], *shapes: Any, **_: Any) -> int:
    """Count each product of the forward three times: recomputed, and differentiated by both factors."""
    return 3 * _flops(dy_shape, shapes[3])


def _convert_parameters(parameters: Parameters, x: Tensor) -> Parameters:
    """Convert the parameters for the kernels: contiguous, in the dtype of the arithmetic, ``w1`` square."""
    dtype = compute_dtype(x.dtype)
    contiguous = Parameters(*(parameter.detach().to(dtype).contiguous() for parameter in parameters))
    return contiguous._replace(w1=contiguous.w1.flatten(1))


def _make_dense(x: Tensor) -> Tensor:
    """Return ``x`` itself if it is contiguous or channels-last, else a contiguous copy."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _match_memory_format(tensor: Tensor, dense: Tensor) -> Tensor:
    if dense.is_contiguous():
        return tensor.contiguous()
    return tensor.contiguous(memory_format=torch.channels_last)


def _match_strides(result: Tensor, x: Tensor) -> Tensor:
    """Give the result the strides of ``torch.empty_like(x)``, which the fake implementations promise.

    A copy is needed for an ``x`` that is neither contiguous nor channels-last.
    """
    promised = torch.empty_like(x, device="meta").stride()
    return result if result.stride() == promised else torch.empty_like(x).copy_(result)
