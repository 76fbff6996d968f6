"""Attention blocks: a feature map in, the re-weighted feature map of the same shape out.

Each block has one file, and one row in the table below. Configurations and models build a block by its name with
``build_attention``.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from ema_seg.attention.bam import BAM
from ema_seg.attention.cbam import CBAM
from ema_seg.attention.coord import CoordinateAttention
from ema_seg.attention.eca import ECA
from ema_seg.attention.ela import ELA
from ema_seg.attention.ema import EMA, AblatedEMA, DynamicEMA
from ema_seg.attention.emau import EMAU
from ema_seg.attention.ese import ESE
from ema_seg.attention.gam import GAM
from ema_seg.attention.gc import GC
from ema_seg.attention.ge import GatherExcite
from ema_seg.attention.nam import NAM
from ema_seg.attention.scse import SCSE
from ema_seg.attention.se import SE
from ema_seg.attention.shuffle import ShuffleAttention
from ema_seg.attention.simam import SimAM
from ema_seg.attention.srm import SRM
from ema_seg.attention.strip import StripPooling
from ema_seg.attention.triplet import TripletAttention
from ema_seg.runtime.errors import ConfigError, did_you_mean

__all__ = [
    "BAM",
    "CBAM",
    "ECA",
    "ELA",
    "EMA",
    "EMAU",
    "ESE",
    "GAM",
    "GC",
    "NAM",
    "SCSE",
    "SE",
    "SRM",
    "AblatedEMA",
    "CoordinateAttention",
    "DynamicEMA",
    "GatherExcite",
    "ShuffleAttention",
    "SimAM",
    "StripPooling",
    "TripletAttention",
    "attention_names",
    "build_attention",
]


def _no_attention(channels: int) -> nn.Identity:
    return nn.Identity()


_BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "none": _no_attention,
    "ema": EMA,
    "ema_dynamic": DynamicEMA,
    "ema_ablated": AblatedEMA,
    "se": SE,
    "ese": ESE,
    "scse": SCSE,
    "eca": ECA,
    "cbam": CBAM,
    "bam": BAM,
    "coord": CoordinateAttention,
    "ela": ELA,
    "strip": StripPooling,
    "ge": GatherExcite,
    "gc": GC,
    "simam": SimAM,
    "shuffle": ShuffleAttention,
    "triplet": TripletAttention,
    "nam": NAM,
    "gam": GAM,
    "emau": EMAU,
    "srm": SRM,
}


def attention_names() -> tuple[str, ...]:
    """Return the names that ``build_attention`` accepts."""
    return tuple(_BLOCKS)


def build_attention(name: str, channels: int, **options: Any) -> nn.Module:
    """Build the attention block called ``name`` for feature maps of shape (B, channels, H, W).

    Args:
        name: one of ``attention_names()``; ``"none"`` gives an identity.
        channels: number of input and output channels.
        **options: the block's own keyword arguments, such as ``factor`` for EMA.

    Raises:
        ConfigError: no block has this name, or the block has no such option.
        ModelError: the block cannot be built for this number of channels.
    """
    if name not in _BLOCKS:
        raise ConfigError(
            f"attention.name: must be one of {', '.join(_BLOCKS)}, got {name!r}.{did_you_mean(name, _BLOCKS)}"
        )
    block = _BLOCKS[name]
    known = [option for option in inspect.signature(block).parameters if option not in ("channels", "c2")]
    for option in options:
        if option not in known:
            raise ConfigError(
                f"attention.{option}: the block {name!r} has no such option; "
                f"it has {', '.join(known) if known else 'none'}."
            )
    return block(channels, **options)
