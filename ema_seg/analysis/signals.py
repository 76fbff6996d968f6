"""Signals of attention blocks: what a block computes from its input, apart from how it applies it.

The signal of a block with a method ``weight_map`` is its weights, and they multiply the input. The signal of any other
block is what it adds to its input, such as the context vector of GC. That of EMAU is its reconstruction, and what its
ReLU at the end takes from negative sums.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ema_seg.attention import ShuffleAttention

__all__ = ["Signal", "apply_signal", "hooked", "neutral_values", "read_signal", "recorded_signals", "replaced_signals"]


@dataclass(frozen=True)
class Signal:
    """Signal of one image.

    Attributes:
        values: float32 (G, h, w), where G divides the block's channels, and h and w may be 1.
        multiplies: they are weights of the input; otherwise they are added to it.
    """

    values: Tensor
    multiplies: bool


def read_signal(block: nn.Module, x: Tensor, y: Tensor) -> Signal:
    """Compute a block's signal for one image.

    Args:
        block: the block.
        x: its input (1, C, H, W).
        y: its output for this input.
    """
    weight_map = getattr(block, "weight_map", None)
    if weight_map is None:
        return Signal((y.float() - x.float())[0], multiplies=False)
    return Signal(weight_map(x)[0].float(), multiplies=True)


def apply_signal(block: nn.Module, x: Tensor, signal: Signal) -> Tensor:
    """Compute the block's output for an input (1, C, H, W) and a signal, in the input's dtype."""
    groups = x.unflatten(1, (len(signal.values), -1))
    values = signal.values.unsqueeze(1)
    y = (groups * values if signal.multiplies else groups + values).flatten(1, 2).to(x.dtype)
    # The layers that follow expect its permuted channels, whatever the weights.
    return block.shuffle(y) if isinstance(block, ShuffleAttention) else y


def neutral_values(signal: Signal) -> Tensor:
    """Return the values (G, 1, 1) in the place of a signal's with which the block's output is its input."""
    return torch.full_like(signal.values[:, :1, :1], float(signal.multiplies))


@contextmanager
def recorded_signals(blocks: Mapping[str, nn.Module], signals: dict[str, Signal]) -> Iterator[None]:
    """Record the signals of the blocks in ``signals`` whenever the model runs on one image."""

    def record(name: str, block: nn.Module, x: Tensor, y: Tensor) -> None:
        signals[name] = read_signal(block, x, y)

    with hooked(blocks, record):
        yield


@contextmanager
def replaced_signals(blocks: Mapping[str, nn.Module], change: Callable[[str, Signal], Tensor]) -> Iterator[None]:
    """Replace the signals of the blocks whenever the model runs on one image.

    Args:
        blocks: the blocks by name.
        change: returns the new values of a block's signal, (G, h, w).
    """

    def run_again(name: str, block: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        signal = read_signal(block, x, y)
        return apply_signal(block, x, replace(signal, values=change(name, signal))).to(y.dtype)

    with hooked(blocks, run_again):
        yield


@contextmanager
def hooked(
    blocks: Mapping[str, nn.Module], function: Callable[[str, nn.Module, Tensor, Tensor], Any]
) -> Iterator[None]:
    """Call ``function`` with name, block, input and output after each block; a returned tensor becomes the output."""
    handles = [
        block.register_forward_hook(lambda block, inputs, y, name=name: function(name, block, inputs[0], y))
        for name, block in blocks.items()
    ]
    try:
        # A compiled model ignores hooks that are registered after its compilation.
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for handle in handles:
            handle.remove()
