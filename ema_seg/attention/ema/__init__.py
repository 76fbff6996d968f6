"""Efficient Multi-scale Attention: the block, and four ways to compute it.

``reference`` is the published form, ``factorised`` the exact short form in PyTorch operations; ``cpp`` and
``triton_launch`` run fused kernels of the short form on CPUs and CUDA devices. ``operator`` registers these three as
one PyTorch operator, and ``choice`` selects the implementation for an input. ``ablated`` is the published form without
some of its parts.
"""

from ema_seg.attention.ema.ablated import AblatedEMA
from ema_seg.attention.ema.module import EMA, DynamicEMA

__all__ = ["EMA", "AblatedEMA", "DynamicEMA"]
