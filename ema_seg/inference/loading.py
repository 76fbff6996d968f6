"""Loading of a trained model in any of its forms: a checkpoint, or an exported file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ema_seg.data.normalise import Normalise
from ema_seg.inference.device import find_device
from ema_seg.inference.exported import ExportedModel, Metadata, is_exported, runs_on_cuda
from ema_seg.models import load_segmenter, model_stride

__all__ = ["LoadedModel", "load_model"]


class LoadedModel(NamedTuple):
    """Model with what prediction needs.

    Attributes:
        model: model in evaluation mode, on the device.
        device: the device.
        saved: ``config``, ``classes`` and, but for early checkpoints, ``palette``.
        stride: number that height and width of the model's input must be multiples of.
        normalise: the normalisation of the model's input.
        exported: metadata of an exported model; None for a checkpoint.
    """

    model: nn.Module
    device: torch.device
    saved: Mapping[str, Any]
    stride: int
    normalise: Normalise
    exported: Metadata | None


def load_model(path: Path, device_name: str, key: str = "evaluation.device") -> LoadedModel:
    """Load a checkpoint or an exported model.

    Args:
        path: the file.
        device_name: see ``find_device``. For "auto", an exported model whose software has no CUDA runs on the CPU.
        key: name of its setting, for errors.

    Raises:
        CheckpointError: the file is missing, damaged or not one of this project.
        ConfigError: there is no such device; or an exported model cannot run on it, see ``ExportedModel``.
    """
    device = find_device(device_name, key)
    if is_exported(path):
        if device_name == "auto" and device.type == "cuda" and not runs_on_cuda(path):
            device = torch.device("cpu")
        artefact = ExportedModel(path, device).eval()
        metadata = artefact.metadata
        saved: Mapping[str, Any] = {name: getattr(metadata, name) for name in ("config", "classes", "palette")}
        return LoadedModel(artefact, device, saved, artefact.stride, artefact.normalise, metadata)
    model, saved = load_segmenter(path)
    normalise = Normalise(saved["config"]["data"]["mean"], saved["config"]["data"]["std"])
    return LoadedModel(model.to(device), device, saved, model_stride(model), normalise, None)
