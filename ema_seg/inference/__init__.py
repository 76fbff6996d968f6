"""Inference: from a model and an image to logits and masks."""

from ema_seg.inference.prediction import autocast, pad_to_stride, predict, segment

__all__ = ["autocast", "pad_to_stride", "predict", "segment"]
