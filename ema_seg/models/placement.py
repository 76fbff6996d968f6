"""Placement of attention blocks in an encoder–decoder model of segmentation-models-pytorch.

Three placements, in any combination:

- ``encoder``: on chosen feature maps that the encoder passes to the decoder;
- ``decoder``: after each block of the decoder, or after the whole decoder if it is not a chain of blocks;
- ``head``: just before the segmentation head.

One forward and backward pass of the finished model on a small image finds the feature maps that the decoder reads and
the channels of each block's output, so no table per decoder and encoder is needed.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from segmentation_models_pytorch.base import SegmentationModel
from segmentation_models_pytorch.encoders.timm_vit import TimmViTEncoder
from torch import Tensor, nn

from ema_seg.models.vision_transformer import PyramidDecoder, TransformerEncoder
from ema_seg.runtime.errors import ModelError
from ema_seg.runtime.execution import evaluation_mode

__all__ = [
    "PLACEMENTS",
    "attention_blocks",
    "attention_tensors",
    "feature_modules",
    "inner_encoder",
    "modules_before_attention",
    "names_without_wrappers",
    "parameter_stages",
    "place_attention",
    "run_encoder",
    "run_once",
]

PLACEMENTS = ("encoder", "decoder", "head")

# Attributes that hold a decoder's blocks, by smp's name of the architecture: one container here, the blocks themselves
# below. A decoder in neither table has no chain of blocks, and counts as one block.
_BLOCK_CONTAINERS = {
    "unet": "blocks",
    "unetplusplus": "blocks",
    "manet": "blocks",
    "linknet": "blocks",
    "fpn": "seg_blocks",
    "upernet": "fpn_conv_blocks",
    "dpt": "fusion_blocks",
}
_BLOCK_ATTRIBUTES = {"pan": ("gau3", "gau2", "gau1")}

BuildBlock = Callable[[int, str], nn.Module]


class AttentionAfter(nn.Module):
    """A decoder block followed by attention on its output (B, C, H, W)."""

    def __init__(self, block: nn.Module, attention: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        """Run the block on its inputs, then attention on its output."""
        return self.attention(self.block(*inputs, **options))


class AttentionBefore(nn.Module):
    """Attention on the decoder's output (B, C, H, W), followed by the segmentation head."""

    def __init__(self, attention: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        """Compute the logits from the re-weighted features."""
        return self.head(self.attention(features))


class AttentionOnFeatures(nn.Module):
    """Encoder with attention on chosen feature maps, before the decoder reads them.

    Args:
        encoder: an encoder as smp's; it returns a list of feature maps, or that list and prefix tokens.
        attention: one block per chosen index into that list.

    The feature pyramid of a vision transformer takes the place of an encoder.
    """

    def __init__(self, encoder: nn.Module, attention: dict[int, nn.Module]) -> None:
        super().__init__()
        self.encoder = encoder
        self.attention = nn.ModuleDict({str(stage): block for stage, block in attention.items()})

    @property
    def out_channels(self) -> Sequence[int]:
        """Channels of each feature map."""
        return self.encoder.out_channels  # type: ignore[return-value]

    @property
    def output_stride(self) -> int:
        """Stride of the last feature map, in pixels of the input."""
        return self.encoder.output_stride  # type: ignore[return-value]

    def forward(self, images: Tensor) -> Any:
        """Compute the encoder's feature maps and re-weight the chosen ones; prefix tokens pass unchanged."""
        output = self.encoder(images)
        features, *tokens = output if isinstance(output, tuple) else (output,)
        features = [
            self.attention[str(stage)](feature) if str(stage) in self.attention else feature
            for stage, feature in enumerate(features)
        ]
        return (features, *tokens) if tokens else features


# Attribute of each wrapper that holds the wrapped module.
_WRAPPED = {AttentionAfter: "block", AttentionBefore: "head", AttentionOnFeatures: "encoder"}


def names_without_wrappers(model: nn.Module) -> dict[str, str]:
    """Map the name of each parameter and buffer to its name in the model without attention.

    ``decoder.blocks.0.block.conv1.weight`` becomes ``decoder.blocks.0.conv1.weight``; the tensors of attention blocks
    keep their names, such as ``decoder.blocks.0.attention.conv1x1.weight``.
    """
    wrappers = {path: _WRAPPED[type(module)] for path, module in model.named_modules() if type(module) in _WRAPPED}
    names = {name: name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    for path in sorted(wrappers, key=len, reverse=True):  # the inner ones first
        wrapped = f"{path}.{wrappers[path]}."
        for name, plain in names.items():
            if plain.startswith(wrapped):
                names[name] = f"{path}.{plain.removeprefix(wrapped)}"
    return names


def attention_tensors(model: nn.Module) -> set[str]:
    """Return the names of the parameters and buffers of the attention blocks that ``place_attention`` inserted."""
    blocks = tuple(f"{path}.attention." for path, module in model.named_modules() if type(module) in _WRAPPED)
    return {name for name, _ in (*model.named_parameters(), *model.named_buffers()) if name.startswith(blocks)}


def attention_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the attention blocks that ``place_attention`` inserted by their names in the model, in order of execution.

    Identities, which ``attention=none`` inserts, are left out.
    """
    blocks: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if type(module) in _WRAPPED:
            inside = module.attention
            several = inside.items() if isinstance(inside, nn.ModuleDict) else [("", inside)]
            blocks |= {f"{path}.attention.{name}".strip("."): block for name, block in several}
    return {name: block for name, block in blocks.items() if not isinstance(block, nn.Identity)}


def inner_encoder(model: nn.Module) -> nn.Module:
    """Return the model's encoder without the attention on its features."""
    encoder = model.encoder
    inner = encoder.encoder if isinstance(encoder, AttentionOnFeatures) else encoder
    assert isinstance(inner, nn.Module)
    return inner


def modules_before_attention(model: nn.Module) -> list[nn.Module]:
    """Return the encoder and the decoder's blocks that attention follows, without the attention; empty for others."""
    blocks = [module.block for module in model.modules() if isinstance(module, AttentionAfter)]
    return [inner_encoder(model), *blocks] if isinstance(model, SegmentationModel) else blocks


def feature_modules(model: SegmentationModel, decoder: str) -> dict[str, nn.Module]:
    """Return the modules whose outputs are the model's features, by a name that is the same for its twins.

    Args:
        model: a segmenter.
        decoder: smp's name of the architecture.

    Returns:
        ``encoder``, whose output is a list of feature maps (see ``AttentionOnFeatures``); ``decoder 0`` and so on; and
        ``logits``. Attention is part of the module that it follows.
    """
    blocks = {f"decoder {place}": block for place, (_, _, block) in enumerate(_decoder_blocks(model, decoder))}
    return {"encoder": getattr(*_feature_source(model)), **blocks, "logits": model.segmentation_head}


def parameter_stages(model: nn.Module) -> dict[str, int]:
    """Find the stage of each of the encoder's parameters: the index of the first feature map that depends on it.

    The gradients of the feature maps of a small image find the stages, so no table per encoder is needed. The stages of
    a plain vision transformer are its embedding and each of its blocks, because a decoder may read its last map alone.

    Args:
        model: a segmenter.

    Returns:
        The stage by the parameter's name in ``model``, from 0; attention blocks on the encoder's features are left out.
        A parameter that no feature map depends on has the last stage.
    """
    encoder = inner_encoder(model)
    prefix = "encoder." if encoder is model.encoder else "encoder.encoder."
    parameters = dict(encoder.named_parameters())
    if isinstance(encoder, TransformerEncoder | TimmViTEncoder):
        return {f"{prefix}{name}": stage for name, stage in _transformer_stages(parameters).items()}
    trained = {name: parameter.requires_grad for name, parameter in parameters.items()}
    found: dict[str, int] = {}
    stage = -1
    try:
        with evaluation_mode(model), torch.enable_grad():
            for parameter in parameters.values():
                parameter.requires_grad_(parameter.is_floating_point())
            output = encoder(_small_image(model))
            for feature in output[0] if isinstance(output, tuple) else output:
                left = [name for name in parameters if name not in found]
                if not (feature.requires_grad and left):
                    continue  # the image itself, or a map without channels
                wanted = [parameters[name] for name in left]
                gradients = torch.autograd.grad(feature.sum(), wanted, retain_graph=True, allow_unused=True)
                reached = [name for name, gradient in zip(left, gradients, strict=True) if gradient is not None]
                stage += bool(reached)
                found |= dict.fromkeys(reached, stage)
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(trained[name])
    return {f"{prefix}{name}": found.get(name, max(stage, 0)) for name in parameters}


def _transformer_stages(names: Iterable[str]) -> dict[str, int]:
    """Return 0 for what is before a transformer's blocks, 1 and so on for its blocks, and the last for the norm."""
    found = {name: re.search(r"\bblocks\.(\d+)\.", name) for name in names}
    blocks = {name: 1 + int(block[1]) for name, block in found.items() if block}
    last, after = max(blocks.values()), False
    stages = {}
    for name in found:
        after |= name in blocks
        stages[name] = blocks.get(name, last if after else 0)
    return stages


def place_attention(
    model: SegmentationModel,
    decoder: str,
    build_block: BuildBlock,
    placements: Sequence[str],
    *,
    encoder_stages: Sequence[int] | None = None,
) -> None:
    """Insert attention blocks into ``model``, in place.

    Args:
        model: a model of segmentation-models-pytorch with ``encoder``, ``decoder``, ``segmentation_head``.
        decoder: smp's name of the architecture, such as ``"unet"``.
        build_block: builds a block for a number of channels, at a path in the finished model, such as
            ``"decoder.blocks.0.attention"``.
        placements: some of ``PLACEMENTS``.
        encoder_stages: indices into the encoder's list of feature maps (index i has stride 2^i for most
            encoders); None takes every feature map that the decoder reads.

    Raises:
        ModelError: a placement is unknown, or a stage is not read by the decoder.
    """
    unknown = [place for place in placements if place not in PLACEMENTS]
    if unknown:
        raise ModelError(f"placement {unknown[0]!r} is unknown; choose among {', '.join(PLACEMENTS)}.")
    if not placements:
        return
    blocks = _decoder_blocks(model, decoder)
    probe = _probe(model, [block for _, _, block in blocks])
    paths = {module: path for path, module in model.named_modules()}
    parent, name = _feature_source(model)
    source = getattr(parent, name)

    if "encoder" in placements:
        stages = _chosen_stages(probe.stages, encoder_stages, decoder)
        attention = {stage: build_block(probe.stages[stage], f"{paths[source]}.attention.{stage}") for stage in stages}
        setattr(parent, name, AttentionOnFeatures(source, attention))
    if "decoder" in placements:
        for (container, place, block), channels in zip(blocks, probe.block_channels, strict=True):
            # Unet++ keeps placeholder blocks without channels for encoders that lack the stride-2 feature map.
            if channels > 0:
                _replace(container, place, AttentionAfter(block, build_block(channels, f"{paths[block]}.attention")))
    if "head" in placements:
        attention_block = build_block(probe.head_channels, "segmentation_head.attention")
        model.segmentation_head = AttentionBefore(attention_block, model.segmentation_head)


def _decoder_blocks(model: SegmentationModel, decoder: str) -> list[tuple[nn.Module, str, nn.Module]]:
    """List the decoder's blocks as (parent module, name in it, block), in order of registration."""
    if decoder in _BLOCK_CONTAINERS:
        whole = model.decoder.decoder if isinstance(model.decoder, PyramidDecoder) else model.decoder
        container = getattr(whole, _BLOCK_CONTAINERS[decoder])
        return [(container, name, block) for name, block in container.named_children()]
    if decoder in _BLOCK_ATTRIBUTES:
        return [
            (model.decoder, name, getattr(model.decoder, name))
            for name in _BLOCK_ATTRIBUTES[decoder]
            if hasattr(model.decoder, name)
        ]
    return [(model, "decoder", model.decoder)]


def _feature_source(model: SegmentationModel) -> tuple[nn.Module, str]:
    """Return the module whose output the decoder reads, as (parent module, name in it)."""
    return (model.decoder, "pyramid") if isinstance(model.decoder, PyramidDecoder) else (model, "encoder")


def _replace(parent: nn.Module, name: str, block: nn.Module) -> None:
    if isinstance(parent, nn.ModuleDict):
        parent[name] = block
    elif isinstance(parent, nn.ModuleList):
        parent[int(name)] = block
    else:
        setattr(parent, name, block)


def _chosen_stages(available: dict[int, int], chosen: Sequence[int] | None, decoder: str) -> list[int]:
    if chosen is None:
        return list(available)
    for stage in chosen:
        if stage not in available:
            raise ModelError(
                f"placement.encoder_stages: stage {stage} of the encoder does not feed the {decoder} decoder; "
                f"choose among {', '.join(map(str, available))}."
            )
    return sorted(set(chosen))


@dataclass(frozen=True)
class _Probe:
    stages: dict[int, int]  # channels of each feature map that the decoder reads, by index
    block_channels: list[int]
    head_channels: int


def _probe(model: SegmentationModel, blocks: list[nn.Module]) -> _Probe:
    """Run the model once to find the feature maps that the decoder reads and the channels of each block's output.

    The decoder reads a feature map if a gradient reaches it from the logits.
    """
    features: list[Tensor] = []
    channels: dict[nn.Module, int] = {}
    head_input: list[Tensor] = []

    def detach_features(_: nn.Module, __: Any, output: Any) -> Any:
        maps, *tokens = output if isinstance(output, tuple) else (output,)
        features.extend(feature.detach().requires_grad_() for feature in maps)
        return (list(features), *tokens) if tokens else list(features)

    handles = [
        getattr(*_feature_source(model)).register_forward_hook(detach_features),
        model.segmentation_head.register_forward_pre_hook(lambda _, inputs: head_input.append(inputs[0])),
        *(
            block.register_forward_hook(lambda module, _, output: channels.update({module: output.shape[1]}))
            for block in blocks
        ),
    ]
    try:
        with evaluation_mode(model), torch.enable_grad():
            model(_small_image(model)).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
    stages = {
        stage: feature.shape[1]
        for stage, feature in enumerate(features)
        if feature.grad is not None and feature.shape[1] > 0
    }
    return _Probe(stages, [channels[block] for block in blocks], head_input[0].shape[1])


def run_once(model: SegmentationModel) -> None:
    """Run the model on a small image, to raise the errors of its forward pass."""
    with evaluation_mode(model), torch.inference_mode():
        model(_small_image(model))


def run_encoder(model: SegmentationModel) -> list[Tensor]:
    """Compute the encoder's feature maps of a small image."""
    with evaluation_mode(model), torch.inference_mode():
        output = model.encoder(_small_image(model))
    return list(output[0] if isinstance(output, tuple) else output)


def _small_image(model: nn.Module) -> Tensor:
    """Build a small image that every decoder takes: PAN pools its stride-32 features three times."""
    encoder: Any = inner_encoder(model)
    size = getattr(encoder, "input_size", None)  # of a vision transformer that takes one size only
    height, width = size[1:] if size else (256, 256)
    if getattr(getattr(encoder, "model", None), "dynamic_img_size", False):
        height = width = 4 * encoder.output_stride
    parameter = next(model.parameters())
    return torch.zeros(1, 3, height, width, dtype=parameter.dtype, device=parameter.device)
