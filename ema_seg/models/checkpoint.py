"""Reading of checkpoints, and models rebuilt from a checkpoint alone."""

import hashlib
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ema_seg.config import Rebuilding, check_settings, require_plain
from ema_seg.models.auxiliary import AUXILIARY
from ema_seg.models.build import segmenter_from_config
from ema_seg.models.hub_methods import HubMethods
from ema_seg.models.shared import CONFIG, WEIGHTS, read_shared
from ema_seg.models.weights import first_not_finite
from ema_seg.runtime.errors import CheckpointError, ConfigError, DataError, one_line
from ema_seg.runtime.hub import download_model, hub_address

__all__ = [
    "check_classes",
    "check_contents",
    "checkpoint_digest",
    "checkpoint_path",
    "load_checkpoint",
    "load_segmenter",
    "model_weights",
]

_MODEL_PREFIX = "model."


def checkpoint_path(source: str | PathLike[str]) -> Path:
    """Find the file of weights that a run, a shared model or a checkpoint has.

    Args:
        source: the folder of a run, whose best checkpoint is taken; a folder that ``ema-seg push`` wrote; a model on
            the Hub (``hf://user/name``, ``hf://user/name@revision``), which is downloaded; or a file.

    Returns:
        The path of a checkpoint, or of a ``model.safetensors``, for ``load_checkpoint``.

    Raises:
        ConfigError: the address of the Hub is malformed.
        DataError: there is no such file or folder, the folder has no model, or the Hub cannot be reached.
    """
    if (address := hub_address(source)) is not None:
        return download_model(address, (CONFIG, WEIGHTS)) / WEIGHTS
    path = Path(source)
    if not path.exists():
        raise DataError(f"{path}: no such folder or file; give the folder of a run, or a checkpoint of train.py.")
    if not path.is_dir():
        return path
    best = path / "checkpoints" / "best.ckpt"
    if not best.is_file() and (path / CONFIG).exists():
        return path / WEIGHTS
    if not best.is_file():
        raise DataError(
            f"{path}: the folder has no checkpoints/best.ckpt; give the folder of a run that has validated, or a "
            "checkpoint."
        )
    return best


def checkpoint_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ``train.py`` or a shared model onto the CPU, without running code that it may contain.

    Args:
        path: the checkpoint, or the ``model.safetensors`` of a shared model; see ``checkpoint_path``.

    Returns:
        At least ``state_dict``, ``config`` (the run's configuration) and ``classes`` (the class names); ``palette``
        (their colours) if the checkpoint has it.

    Raises:
        CheckpointError: the file is missing, damaged or not written by ``train.py``.
    """
    if path.suffix == ".safetensors":
        checkpoint = read_shared(path)
        check_contents(path, checkpoint)
        return checkpoint
    if not path.is_file():
        raise CheckpointError(f"ckpt={path}: no such file; give the path of a checkpoint that train.py wrote.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and zipfile each raise their own types
        raise CheckpointError(
            f"ckpt={path}: the file is truncated or not a checkpoint of plain data ({type(error).__name__}); "
            "give a checkpoint that train.py wrote."
        ) from error
    missing = [
        key for key in ("state_dict", "config", "classes") if not isinstance(checkpoint, dict) or key not in checkpoint
    ]
    if missing:
        raise CheckpointError(
            f"ckpt={path}: the file was not written by train.py (it lacks {', '.join(missing)}); "
            "to start from foreign encoder weights use model.encoder_weights=<file>."
        )
    check_contents(path, checkpoint)
    return checkpoint


def check_contents(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Check the types of weights, config and classes, and that the weights are finite."""
    weights, config, classes = (checkpoint[key] for key in ("state_dict", "config", "classes"))
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise CheckpointError(f"ckpt={path}: its state_dict must hold weights by name; give one that train.py wrote.")
    for name, weight in weights.items():
        if not isinstance(weight, torch.Tensor):
            raise CheckpointError(
                f"ckpt={path}: {name} must be a tensor, got {type(weight).__name__}; give a checkpoint that train.py "
                "wrote."
            )
    if found := first_not_finite(weights):
        raise CheckpointError(f"ckpt={path}: {found}; give a checkpoint from before its training diverged.")
    if not isinstance(classes, list | tuple) or not classes or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(f"ckpt={path}: its classes must be a list of names; give one that train.py wrote.")
    palette = checkpoint.get("palette")
    if palette is not None and not _is_palette(palette, len(classes)):
        raise CheckpointError(
            f"ckpt={path}: its palette must hold three numbers from 0 to 255 for each of its {len(classes)} classes; "
            "give one that train.py wrote."
        )
    if not isinstance(config, dict):
        raise CheckpointError(f"ckpt={path}: its config must hold settings by name; give one that train.py wrote.")
    try:
        require_plain(config)
        check_settings(config, Rebuilding)
    except ConfigError as error:
        reason = str(error).removesuffix(".")
        raise CheckpointError(
            f"ckpt={path}: its config was not written by train.py ({reason}); give another checkpoint."
        ) from error


def _is_palette(palette: object, count: int) -> bool:
    if not isinstance(palette, list) or len(palette) != count:
        return False
    return all(
        isinstance(colour, list) and len(colour) == 3 and all(type(part) is int and 0 <= part <= 255 for part in colour)
        for colour in palette
    )


def model_weights(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Select the segmenter's state dict from a checkpoint that ``load_checkpoint`` has read.

    The auxiliary head, which only a training has, is left out.
    """
    return {
        name.removeprefix(_MODEL_PREFIX): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(_MODEL_PREFIX) and not name.startswith(f"{_MODEL_PREFIX}{AUXILIARY}.")
    }


def load_auxiliary_weights(model: nn.Module, checkpoint: Mapping[str, Any], path: Path) -> None:
    """Load the weights of a segmenter's auxiliary head from a checkpoint that ``load_checkpoint`` has read from a path.

    Raises:
        CheckpointError: the checkpoint's weights are not those of the head.
    """
    prefix = f"{_MODEL_PREFIX}{AUXILIARY}."
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(prefix)
    }
    try:
        model.get_submodule(AUXILIARY).load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"ckpt={path}: its weights do not fit the auxiliary head of its config ({one_line(error)[:300]}); give "
            "another checkpoint."
        ) from error


def load_segmenter(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild the model of a checkpoint.

    Returns:
        The model on the CPU, in evaluation mode, and the checkpoint.

    Raises:
        CheckpointError: see ``load_checkpoint``; or the weights do not fit the checkpoint's configuration.
    """
    checkpoint = load_checkpoint(path)
    weights = model_weights(checkpoint)
    classes = len(checkpoint["classes"])
    model = segmenter_from_config(checkpoint["config"], classes, pretrained=False, weights=weights)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"ckpt={path}: its weights do not fit the model of its config ({one_line(error)[:300]}); give another "
            "checkpoint."
        ) from error
    assert isinstance(model, HubMethods)
    model.origin = {key: checkpoint.get(key) for key in ("config", "classes", "palette")}
    return model.eval(), checkpoint


def check_classes(trained: Sequence[str], found: Sequence[str], dataset: str, checkpoint: Path, advice: str) -> None:
    """Check that a checkpoint's classes are those of the data, in the same order.

    Args:
        trained: the class names in the checkpoint.
        found: the class names of the data.
        dataset: name of the data set, for the message.
        checkpoint: path of the checkpoint, for the message.
        advice: end of the message.

    Raises:
        DataError: the classes differ.
    """
    if tuple(trained) == tuple(found):
        return
    first, other = (f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''}" for names in (trained, found))
    pairs = enumerate(zip(trained, found, strict=False))
    differing = next(
        (f"; class {index} is {now!r} instead of {before!r}" for index, (before, now) in pairs if before != now), ""
    )
    raise DataError(
        f"{checkpoint}: was trained on {len(trained)} classes ({first}), but data={dataset} has "
        f"{len(found)} ({other}){differing}; {advice}."
    )
