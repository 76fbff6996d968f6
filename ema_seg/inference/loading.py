"""Loading of a trained model in any of its forms: a checkpoint, or an exported file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ema_seg.data.normalise import Normalise
from ema_seg.inference.exported import ExportedModel, Metadata, is_exported
from ema_seg.models import load_segmenter, model_stride

__all__ = ["LoadedModel", "load_model"]


class LoadedModel(NamedTuple):
    """Model with what prediction needs.

    Attributes:
        model: model in evaluation mode, on the device.
        saved: ``config``, ``classes`` and, but for early checkpoints, ``palette``.
        stride: number that height and width of the model's input must be multiples of.
        normalise: the normalisation of the model's input.
        exported: metadata of an exported model; None for a checkpoint.
    """

    model: nn.Module
    saved: Mapping[str, Any]
    stride: int
    normalise: Normalise
    exported: Metadata | None


def load_model(path: Path, device: torch.device) -> LoadedModel:
    """Load a checkpoint or an exported model.

    Raises:
        CheckpointError: the file is missing, damaged or not one of this project.
        ConfigError: an exported model cannot run here; see ``ExportedModel``.
    """
    if is_exported(path):
        artefact = ExportedModel(path, device).eval()
        metadata = artefact.metadata
        saved: Mapping[str, Any] = {name: getattr(metadata, name) for name in ("config", "classes", "palette")}
        return LoadedModel(artefact, saved, artefact.stride, artefact.normalise, metadata)
    model, saved = load_segmenter(path)
    normalise = Normalise(saved["config"]["data"]["mean"], saved["config"]["data"]["std"])
    return LoadedModel(model.to(device), saved, model_stride(model), normalise, None)
