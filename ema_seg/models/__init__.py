"""Encoder–decoder models with attention blocks at chosen placements."""

from ema_seg.models.build import build_segmenter, decoder_names, model_stride, segmenter_from_config
from ema_seg.models.checkpoint import load_checkpoint, load_segmenter, model_weights
from ema_seg.models.weights import Normalisation, encoder_normalisation

__all__ = [
    "Normalisation",
    "build_segmenter",
    "decoder_names",
    "encoder_normalisation",
    "load_checkpoint",
    "load_segmenter",
    "model_stride",
    "model_weights",
    "segmenter_from_config",
]
