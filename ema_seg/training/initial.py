"""Start of a training from the weights of a trained model: ``init_from``."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ema_seg.models import load_segmenter
from ema_seg.models.build import default_depth
from ema_seg.models.checkpoint import checkpoint_path
from ema_seg.models.placement import attention_tensors, names_without_wrappers
from ema_seg.runtime.errors import CheckpointError

__all__ = ["TrainedModel", "gives_encoder", "initialise", "load_trained"]

_MOST_CLASSES = 8  # names of classes in the table
_NOT_OF_ENCODER = ("decoder", "encoder_weights", "auxiliary")


@dataclass(frozen=True)
class TrainedModel:
    """Weights of a trained model.

    Attributes:
        path: its checkpoint.
        tensors: its parameters and buffers by their names in the model without attention; see
            ``names_without_wrappers``.
        attention: those of these names that belong to attention blocks.
        class_layer: name of the layer that computes the logits; empty if the head has no convolution.
        classes: the class names, one for each row of that layer.
        config: the configuration of its run.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    attention: frozenset[str]
    class_layer: str
    classes: Sequence[str]
    config: Mapping[str, Any]


def load_trained(source: str) -> TrainedModel:
    """Load the weights that an evaluation of the model would use; later random numbers do not depend on it.

    Args:
        source: see ``checkpoint_path``.

    Raises:
        CheckpointError: see ``load_segmenter``.
        DataError: see ``checkpoint_path``.
    """
    path = checkpoint_path(source)
    with torch.random.fork_rng(devices=[]):
        model, checkpoint = load_segmenter(path)
    names = names_without_wrappers(model)
    return TrainedModel(
        path,
        {names[name]: tensor for name, tensor in model.state_dict().items()},
        frozenset(names[name] for name in attention_tensors(model)),
        _class_layer(model, names),
        checkpoint["classes"],
        checkpoint["config"],
    )


def gives_encoder(trained: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Return whether two configurations build the same encoder, so that no tensor of it has to be made anew."""

    def settings_of_encoder(model: Mapping[str, Any]) -> dict[str, Any]:
        own = {key: value for key, value in model.items() if not key.startswith(_NOT_OF_ENCODER)}
        return {"encoder_depth": default_depth(model["decoder"]), **own}

    return settings_of_encoder(trained["model"]) == settings_of_encoder(config["model"])


def initialise(model: nn.Module, trained: TrainedModel, classes: Sequence[str]) -> str:
    """Copy each tensor of a trained model that fits by name and shape into ``model``.

    Names are those of the model without attention, so that the layers around another block fit, too. The layer that
    computes the logits is copied row by row for the classes that both models name.

    Args:
        model: a segmenter on the CPU, changed in place.
        trained: see ``load_trained``.
        classes: the class names of ``model``.

    Returns:
        A table of what was taken, made anew and left, by part of the model.

    Raises:
        CheckpointError: no tensor fits.
    """
    names, attention = names_without_wrappers(model), attention_tensors(model)
    layer = _class_layer(model, names)
    rows = [(classes.index(name), trained.classes.index(name)) for name in classes if name in trained.classes]
    tensors = {names[name]: tensor for name, tensor in model.state_dict().items()}
    weights = tensors.get(f"{layer}.weight"), trained.tensors.get(f"{trained.class_layer}.weight")
    if weights[0] is None or weights[1] is None or weights[0].shape[1:] != weights[1].shape[1:]:
        rows = []  # a bias without its weights means nothing
    taken, new, used = Counter[str](), Counter[str](), set()
    for name, tensor in model.state_dict().items():
        part = _part(names[name], name in attention)
        of_classes = bool(layer) and names[name].rpartition(".")[0] == layer
        source = names[name].replace(layer, trained.class_layer, 1) if of_classes else names[name]
        found = trained.tensors.get(source)
        fits = found is not None and (
            bool(rows) and found.shape[1:] == tensor.shape[1:] if of_classes else found.shape == tensor.shape
        )
        (taken if fits else new)[part] += 1
        if found is None or not fits:
            continue
        used.add(source)
        if of_classes:
            own, theirs = map(list, zip(*rows, strict=True))
            tensor[own] = found[theirs].to(tensor.dtype)
        else:
            tensor.copy_(found)
    # Counters of batches are in every model.
    if not any(trained.tensors[name].ndim for name in used):
        raise CheckpointError(
            f"init_from={trained.path}: none of its {len(trained.tensors)} tensors fits the model by name and shape; "
            f"its model is {_describe(trained.config)}; choose the same model.encoder or model.decoder, or remove "
            "init_from."
        )
    left = Counter(_part(name, name in trained.attention) for name in trained.tensors if name not in used)
    return _table(trained, taken, new, left, [classes[own] for own, _ in rows], classes)


def _class_layer(model: nn.Module, names: Mapping[str, str]) -> str:
    """Return the name of the head's last convolution in the model without attention; empty if there is none."""
    head = model.segmentation_head
    assert isinstance(head, nn.Module)
    layers = [name for name, module in head.named_modules() if isinstance(module, nn.Conv2d)]
    return names[f"segmentation_head.{layers[-1]}.weight"].removesuffix(".weight") if layers else ""


def _part(name: str, is_attention: bool) -> str:
    return "attention" if is_attention else name.partition(".")[0]


def _describe(config: Mapping[str, Any]) -> str:
    return f"{config['model']['decoder']} on {config['model']['encoder']}"


def _table(
    trained: TrainedModel,
    taken: Mapping[str, int],
    new: Mapping[str, int],
    left: Mapping[str, int],
    common: Sequence[str],
    classes: Sequence[str],
) -> str:
    total = sum(taken.values())
    lines = [
        f"init_from={trained.path} ({_describe(trained.config)}): {total} of {total + sum(new.values())} tensors taken",
        f"  {'part':18} {'taken':>6} {'new':>6} {'left':>6}",
    ]
    for part in dict.fromkeys([*taken, *new, *left]):
        lines.append(f"  {part:18} {taken.get(part, 0):6} {new.get(part, 0):6} {left.get(part, 0):6}")
    if common:
        lines.append(f"  classes taken: {_some(common)}")
    if others := [name for name in classes if name not in common]:
        lines.append(f"  classes made anew: {_some(others)}")
    return "\n".join(lines)


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:_MOST_CLASSES])}{', …' if len(names) > _MOST_CLASSES else ''})"
