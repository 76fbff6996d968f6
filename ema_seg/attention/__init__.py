"""Attention blocks: a feature map in, the re-weighted feature map of the same shape out.

One file per block, and one row per block in the table below; ``build_attention`` is how configurations
and models make one by its name.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from ema_seg.attention.ema import EMA, DynamicEMA
from ema_seg.attention.scse import SCSE
from ema_seg.attention.se import SE
from ema_seg.errors import ConfigError, did_you_mean

__all__ = ["EMA", "SCSE", "SE", "DynamicEMA", "attention_names", "build_attention"]


def _no_attention(channels: int) -> nn.Identity:
    return nn.Identity()


_BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "none": _no_attention,
    "ema": EMA,
    "ema_dynamic": DynamicEMA,
    "se": SE,
    "scse": SCSE,
}


def attention_names() -> tuple[str, ...]:
    """The names that ``build_attention`` knows."""
    return tuple(_BLOCKS)


def build_attention(name: str, channels: int, **options: Any) -> nn.Module:
    """Make the attention block called ``name`` for feature maps of shape (B, channels, H, W).

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
            f"attention.name: no block is called {name!r}; there are {', '.join(_BLOCKS)}.{did_you_mean(name, _BLOCKS)}"
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
