"""Batch normalisation synchronised over all ranks."""

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.plugins.layer_sync import LayerSync
from timm.layers import convert_sync_batchnorm
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from ema_seg.runtime.distributed.collectives import sum_in_place
from ema_seg.runtime.distributed.ranks import rank_info

__all__ = ["SyncLayers"]


class SyncLayers(LayerSync):
    """Lightning plugin that converts a model's BatchNorm layers to synchronised ones.

    On GPUs it uses timm's conversion, because torch's drops the activations inside timm's layers. On the CPU, where
    torch's synchronised layers do not work, it uses layers that compute the same.

    Args:
        cuda: whether the model trains on GPUs.
    """

    def __init__(self, *, cuda: bool) -> None:
        self.cuda = cuda

    def apply(self, model: nn.Module) -> nn.Module:
        """Convert the layers in place; parameters and names in the state dict stay the same."""
        if self.cuda:
            return convert_sync_batchnorm(model)
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                kind = type(module)
                module.__class__ = type(f"Sync{kind.__name__}", (_SyncOnAnyDevice, kind), {})
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Return the model as it is: in a single process the converted layers compute ordinary batch norm."""
        return model


if TYPE_CHECKING:
    _AnyBatchNorm = _BatchNorm
else:
    _AnyBatchNorm = object


class _SyncOnAnyDevice(_AnyBatchNorm):
    """Mixin before a class of BatchNorm layers, which then normalise with mean and variance over all ranks.

    As in torch's layers, the running variance is the unbiased variance over all ranks.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or rank_info().size == 1:
            return super().forward(x)
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        y, mean, variance, count = _Normalise.apply(values, self.weight, self.bias, self.eps)
        self._follow(mean, variance * count / (count - 1).clamp_min(1))
        y = y.to(x.dtype)
        for name in ("drop", "act"):  # of timm's layers
            if hasattr(self, name):
                y = getattr(self, name)(y)
        return y

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


class _Normalise(torch.autograd.Function):
    """Batch normalisation with one collective per pass, which also returns mean, biased variance and count."""

    @staticmethod
    def forward(
        context: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        axes, own = _reduced_axes(x), x.numel() // x.shape[1]
        variance, mean = torch.var_mean(x, axes, correction=0)
        parts = torch.stack(_gathered(torch.stack([mean, variance, torch.full_like(mean, own)])))  # (processes, 3, C)
        means, variances, counts = parts.unbind(dim=1)
        count = counts.sum(dim=0)
        mean = (means * counts).sum(dim=0) / count
        # Variance within the ranks plus variance between them: a sum of squares would cancel under a large mean.
        variance = ((variances + (means - mean).square()) * counts).sum(dim=0) / count
        scale = (variance + eps).rsqrt()
        normalised = (x - _broadcastable(mean, x)) * _broadcastable(scale, x)
        context.save_for_backward(normalised, scale, weight, count)
        context.mark_non_differentiable(mean, variance, count)
        y = normalised if weight is None else normalised * _broadcastable(weight, x)
        return y if bias is None else y + _broadcastable(bias, x), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        normalised, scale, weight, count = context.saved_tensors
        axes = _reduced_axes(gradient)
        own = torch.stack([gradient.sum(axes), (gradient * normalised).sum(axes)])
        along_mean, along_values = (_broadcastable(total / count, gradient) for total in sum_in_place(own.clone()))
        factor = scale if weight is None else scale * weight
        inward = (gradient - along_mean - normalised * along_values) * _broadcastable(factor, gradient)
        # The gradients of weight and bias are reduced later, with those of all other parameters.
        return inward, None if weight is None else own[1], None if weight is None else own[0], None


def _gathered(tensor: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(rank_info().size)]
    distributed.all_gather(parts, tensor)
    return parts


def _reduced_axes(x: Tensor) -> list[int]:
    """Return all axes but the channels'."""
    return [axis for axis in range(x.dim()) if axis != 1]


def _broadcastable(values: Tensor, x: Tensor) -> Tensor:
    """Reshape per-channel values so that they broadcast with ``x``."""
    return values.view(1, -1, *(1,) * (x.dim() - 2))
