"""Inference: from a model and an image to logits and masks."""

from typing import TYPE_CHECKING

from ema_seg.runtime.lazy import lazy_attributes

if TYPE_CHECKING:
    from ema_seg.inference.prediction import autocast, pad_to_stride, predict, segment

__all__ = ["autocast", "pad_to_stride", "predict", "segment"]

# Lazy imports: writing a mask needs no torch, whose import takes longer than that work.
__getattr__ = lazy_attributes(__name__, dict.fromkeys(__all__, "prediction"))
