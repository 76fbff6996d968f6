"""Predictions to scores, and a model to its cost."""

from ema_seg.evaluation.confusion import ConfusionMatrix, Scores
from ema_seg.evaluation.inference import autocast, pad_to_stride, predict

__all__ = ["ConfusionMatrix", "Scores", "autocast", "pad_to_stride", "predict"]
