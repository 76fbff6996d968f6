"""Batch normalisation over the batches of all processes together."""

from typing import TYPE_CHECKING

import torch
from lightning.pytorch.plugins.layer_sync import LayerSync
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ema_seg.distributed.collectives import global_sum, sum_in_place
from ema_seg.distributed.start import place

__all__ = ["SyncLayers"]


class SyncLayers(LayerSync):
    """Has Lightning convert a model's BatchNorm layers before it trains in several processes.

    For GPUs by timm's conversion, because torch's drops the activations within timm's layers; for the CPU, where
    torch's layers do not work, to layers that compute the same.

    Args:
        cuda: whether the model trains on GPUs.
    """

    def __init__(self, *, cuda: bool) -> None:
        self.cuda = cuda

    def apply(self, model: nn.Module) -> nn.Module:
        """Convert the layers in place; they keep their parameters and the names in a checkpoint."""
        if self.cuda:
            return convert_sync_batchnorm(model)
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                kind = type(module)
                module.__class__ = type(f"Sync{kind.__name__}", (_SyncOnAnyDevice, kind), {})
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Leave the layers as they are: in a process by itself they compute what they did."""
        return model


if TYPE_CHECKING:
    _AnyBatchNorm = _BatchNorm
else:
    _AnyBatchNorm = object


class _SyncOnAnyDevice(_AnyBatchNorm):
    """Placed before a class of BatchNorm layers: has them normalise with mean and variance over all processes.

    As with torch's layers, the running variance is the unbiased one of all processes' values.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or place().size == 1:
            return super().forward(x)
        channels = (1, -1, *(1,) * (x.dim() - 2))
        others = [axis for axis in range(x.dim()) if axis != 1]
        count = float(sum_in_place(torch.tensor(x.numel() // x.shape[1])))
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = global_sum(values.sum(others)) / count
        centred = values - mean.view(channels)
        variance = global_sum(centred.square().sum(others)) / count
        self._follow(mean.detach(), variance.detach() * count / max(count - 1, 1))
        normalised = centred * (variance + self.eps).rsqrt().view(channels)
        if self.affine:
            normalised = normalised * self.weight.view(channels) + self.bias.view(channels)
        normalised = normalised.to(x.dtype)
        for name in ("drop", "act"):  # of timm's layers
            if hasattr(self, name):
                normalised = getattr(self, name)(normalised)
        return normalised

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)
