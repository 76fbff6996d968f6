"""Encoder–decoder models with attention blocks at chosen placements."""

from ema_seg.models.build import build_segmenter, decoder_names, model_stride
from ema_seg.models.weights import Normalisation, encoder_normalisation

__all__ = ["Normalisation", "build_segmenter", "decoder_names", "encoder_normalisation", "model_stride"]
