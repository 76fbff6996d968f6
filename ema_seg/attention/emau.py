"""Expectation–maximisation attention unit (EMAU), of EMANet.

Paper: Li et al., "Expectation-Maximization Attention Networks for Semantic Segmentation", ICCV 2019,
https://arxiv.org/abs/1907.13426
"""

import math
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ema_seg.attention.checks import check_positive
from ema_seg.runtime.distributed.ranks import is_single_process
from ema_seg.runtime.errors import ModelError

__all__ = ["EMAU"]

_EPSILON = 1e-6


class EMAU(nn.Module):
    """Sum of the input and its reconstruction from a few bases, fitted to each image by expectation–maximisation.

    A 1×1 convolution is followed by T iterations. Expectation: the responsibilities of the K bases for a pixel are
    the softmax of their dot products with it. Maximisation: each basis becomes the mean of the pixels, weighted by
    its responsibilities and scaled to length 1. The reconstruction passes a ReLU and a 1×1 convolution with
    BatchNorm, is added to the input, and the sum passes another ReLU: the output has no negative values.

    As in the authors' code, no gradient flows through the iterations. The first convolution is therefore frozen at its
    random weights; it only has to give the features negative values too. The input's gradient flows through the
    addition.

    The bases start from a buffer: a moving average of the images' final bases, updated after each batch in training
    mode. With ``torch.distributed`` initialised, the mean of the bases is averaged over the ranks with equal weights,
    so the buffer is the same on all of them.

    Args:
        channels: number C of input channels.
        bases: number K of bases; the paper uses 64.
        iterations: number T of iterations; the paper uses 3.
        momentum: fraction of the buffer that is kept at each update, from 0 to 1; the paper uses 0.9.

    Shape:
        Input and output: (B, C, H, W).

    Raises:
        ModelError: an argument has an invalid value.
    """

    mu: Tensor

    def __init__(self, channels: int, bases: int = 64, iterations: int = 3, momentum: float = 0.9) -> None:
        check_positive("EMAU", "channels", channels)
        check_positive("EMAU", "bases", bases)
        check_positive("EMAU", "iterations", iterations)
        if not isinstance(momentum, float | int) or not 0 <= momentum <= 1:
            raise ModelError(f"EMAU: momentum must be a number from 0 to 1, got {momentum!r}.")
        super().__init__()
        self.iterations = iterations
        self.momentum = momentum
        self.register_buffer("mu", _normalise(torch.randn(1, channels, bases)))
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=1)
        self.conv2 = nn.Sequential(nn.Conv2d(channels, channels, kernel_size=1, bias=False), nn.BatchNorm2d(channels))
        for convolution in (self.conv1, cast(nn.Conv2d, self.conv2[0])):
            nn.init.normal_(convolution.weight, std=math.sqrt(2 / channels))
        self.conv1.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Add the reconstruction to ``x`` (B, C, H, W)."""
        with torch.no_grad():
            reconstruction, mu = self._iterate(self.conv1(x).flatten(2))
            if self.training:
                self._follow(mu)
        return (x + self.conv2(reconstruction.reshape(x.shape).relu())).relu()

    def _iterate(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Fit the bases to features (B, C, N); return the reconstruction (B, C, N) and the bases (B, C, K)."""
        mu = self.mu.expand(features.shape[0], -1, -1)
        for _ in range(self.iterations):
            z = (features.transpose(1, 2) @ mu).softmax(dim=2)  # (B, N, K)
            mu = _normalise(features @ (z / (_EPSILON + z.sum(dim=1, keepdim=True))))
        return mu @ z.transpose(1, 2), mu

    def _follow(self, mu: Tensor) -> None:
        """Move the buffer a step towards the mean of the bases (B, C, K) over the batch and all ranks."""
        mean = mu.mean(dim=0, keepdim=True).to(self.mu.dtype)
        if dist.is_available() and dist.is_initialized() and not is_single_process():
            dist.all_reduce(mean)
            mean = mean / dist.get_world_size()
        self.mu.lerp_(mean, 1 - self.momentum)

    def extra_repr(self) -> str:
        """Show the options in ``print(model)``."""
        return f"bases={self.mu.shape[2]}, iterations={self.iterations}, momentum={self.momentum}"


def _normalise(bases: Tensor) -> Tensor:
    """Divide each of the bases (B, C, K) by its length."""
    return bases / (_EPSILON + bases.norm(dim=1, keepdim=True))
