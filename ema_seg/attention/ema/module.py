"""Efficient Multi-scale Attention (EMA).

Paper: Ouyang et al., "Efficient Multi-Scale Attention Module with Cross-Spatial Learning",
ICASSP 2023, https://arxiv.org/abs/2305.13563
"""

import warnings
from collections.abc import Mapping
from functools import cache
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from ema_seg.attention.ema import choice, factorised, operator, reference
from ema_seg.attention.ema.reference import Parameters
from ema_seg.runtime.errors import ModelError

__all__ = ["EMA", "DynamicEMA", "groups_in_weights", "number_of_groups"]

_LARGEST_AUTO_FACTOR = 32
_SMALLEST_AUTO_WIDTH = 8  # channels per group
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class EMA(nn.Module):
    """One weight map per channel group, from a 1×1 and a 3×3 branch that weigh each other's channels.

    The channels are split into ``factor`` groups that are folded into the batch, so all groups share the
    same small weights. In a group ``x`` of Cg = channels / factor channels:

    1. *1×1 branch*: row means and column means of ``x`` pass one shared 1×1 convolution; their sigmoids
       gate ``x`` along both axes, and a GroupNorm with one channel per group normalises the result: ``x1``.
    2. *3×3 branch*: ``x2`` is a 3×3 convolution of ``x``.
    3. *Cross-spatial learning*: each branch, averaged over the map and passed through a softmax over its
       channels, weighs the channels of the other; the two H×W sums are added, and their sigmoid is the
       weight map that multiplies every channel of the group.

    Parameter names and semantics are those of the published module, so published state dicts load. All
    implementations compute the same function of the same parameters, up to rounding; docs/ema.md explains how.

    Args:
        channels: number C of input (and output) channels.
        c2: ignored; the published signature has it for model parsers that pass an output width.
        factor: number of channel groups, a divisor of ``channels``, or ``"auto"`` for the largest divisor
            that is at most 32 and leaves at least 8 channels per group (one group for fewer than 16 channels).
            A factor that leaves one channel per group gives a warning, once per process.
        implementation: ``"reference"`` is the published form, ``"factorised"`` the exact short form in PyTorch
            operations, ``"cpp"`` and ``"triton"`` its fused kernels for CPU and CUDA; ``"auto"`` selects the kernels
            that can compute an input, or PyTorch operations if none can. The environment variable
            ``EMA_SEG_IMPLEMENTATION``, if set, overrides this argument in every block.

    Shape:
        Input and output: (B, C, H, W), floating point, any H and W ≥ 1, any memory layout. The output of a
        contiguous or channels-last input is laid out like it, except in the reference.

    Raises:
        ConfigError: no implementation has that name.
        ModelError: ``channels`` cannot be split into ``factor`` groups, or an input does not fit the block or
            the implementation.
    """

    dynamic: ClassVar[bool] = False

    def __init__(
        self,
        channels: int,
        c2: int | None = None,
        factor: int | Literal["auto"] = 32,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        choice.check_name(implementation, "attention.implementation")
        self.groups = number_of_groups(channels, factor)
        self.implementation = implementation
        width = channels // self.groups
        self.gn = nn.GroupNorm(num_groups=width, num_channels=width)
        self.conv1x1 = nn.Conv2d(width, width, kernel_size=1)
        self.conv3x3 = nn.Conv2d(width, width, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Re-weight ``x`` (B, C, H, W) by its weight maps; same shape and dtype."""
        parameters, eps = self._parameters_of_block()
        implementation = self._choose(x, parameters)
        arguments = x, parameters, self.groups, eps, self.dynamic
        if implementation == "reference":
            return reference.forward(*arguments)
        if torch.jit.is_tracing():
            return factorised.plain(*arguments)
        if _is_transformed():
            return operator.apply_differentiably(*arguments)
        return operator.apply(*arguments, implementation)

    def implementation_for(self, x: Tensor) -> str:
        """Return the name of the implementation that ``forward`` uses for ``x``.

        ``torch.export`` records the plain operators of ``reference``, and a trace those of ``factorised``, whatever was
        requested. Transforms of ``torch.func`` and forward-mode derivatives use ``reference``, whose operators support
        all of them.

        Raises:
            ConfigError: the environment variable names no implementation.
            ModelError: ``x`` does not fit the block or the requested implementation.
        """
        chosen = self._choose(x, self._parameters_of_block()[0])
        return "reference" if _is_transformed() else chosen

    def weight_map(self, x: Tensor) -> Tensor:
        """Compute the weights that ``forward`` multiplies ``x`` by: (B, factor, H, W) in (0, 1), one map per group."""
        parameters, eps = self._parameters_of_block()
        self._check(x, parameters)
        return factorised.weight_map(x, parameters, self.groups, eps, self.dynamic)

    def channel_weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the softmax of each branch, which weighs the channels of the other: two of (B, factor, Cg).

        Returns:
            That of the 1×1 branch, which does not depend on ``x`` in the published block, and that of the 3×3 branch.
        """
        parameters, eps = self._parameters_of_block()
        self._check(x, parameters)
        with factorised.without_autocast(x.device):
            found = reference.channel_weights(x, parameters.to(x.dtype), self.groups, eps, self.dynamic)
        return found[0].unflatten(0, (-1, self.groups)), found[1].unflatten(0, (-1, self.groups))

    def _parameters_of_block(self) -> tuple[Parameters, float]:
        """Return the parameters and the eps of the normalisation; a module takes long to look up an attribute."""
        conv1x1, conv3x3, gn = self.conv1x1, self.conv3x3, self.gn
        biases = cast(Tensor, conv1x1.bias), cast(Tensor, conv3x3.bias)
        return Parameters(conv1x1.weight, biases[0], conv3x3.weight, biases[1], gn.weight, gn.bias), gn.eps

    def _choose(self, x: Tensor, parameters: Parameters) -> str:
        self._check(x, parameters)
        # Other software may read what they record. With symbolic sizes, the few operators of the published form are
        # recorded three times as fast; a trace would fix the sizes into which it splits.
        if torch.compiler.is_exporting():
            return "reference"
        return "factorised" if torch.jit.is_tracing() else choice.select_implementation(self.implementation, x)

    def _check(self, x: Tensor, parameters: Parameters) -> None:
        channels = self.groups * parameters.w1.shape[0]
        if x.ndim != 4 or x.shape[1] != channels:
            raise ModelError(f"EMA expects an input of shape (B, {channels}, H, W), got {tuple(x.shape)}.")
        if x.dtype not in _DTYPES:
            raise ModelError(
                f"EMA expects floating-point numbers of 16, 32 or 64 bits, got {x.dtype}; "
                "convert the input to float32, say."
            )
        if x.device != parameters.w1.device:
            raise ModelError(
                f"EMA's parameters are on {parameters.w1.device} and the input is on {x.device}; move one to the other."
            )
        if x.shape[2] == 0 or x.shape[3] == 0:
            raise ModelError(f"EMA expects at least one row and one column, got the shape {tuple(x.shape)}.")

    def extra_repr(self) -> str:
        """Show the number of groups and the implementation in ``print(model)``."""
        return f"factor={self.groups}, implementation={self.implementation!r}"


class DynamicEMA(EMA):
    """EMA whose 1×1 branch is pooled before its normalisation, so that both channel weightings depend on the input.

    The published block averages each channel over the map right after normalising it over that map. The average is
    always the bias of the normalisation, so the softmax of that branch is the same for every image. Here the gated
    channels are averaged before they are normalised. The parameters are the same.
    """

    dynamic = True


def _is_transformed() -> bool:
    """Return whether a ``torch.func`` transform or forward-mode differentiation is under way.

    The public functions ask this of one tensor at a time, and take a tenth of a small map's time.
    """
    if torch.compiler.is_compiling():
        return False
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def number_of_groups(channels: int, factor: int | Literal["auto"]) -> int:
    """Return the number of groups that ``factor`` stands for with this many channels.

    Warn once per process about an explicit factor that leaves one channel per group.

    Raises:
        ModelError: ``channels`` is not a positive whole number, or ``factor`` does not divide it.
    """
    if not isinstance(channels, int) or channels < 1:
        raise ModelError(f"EMA needs a positive whole number of channels, got {channels!r}.")
    divisors = [divisor for divisor in range(1, channels + 1) if channels % divisor == 0]
    if factor == "auto":
        largest = min(_LARGEST_AUTO_FACTOR, max(1, channels // _SMALLEST_AUTO_WIDTH))
        return max(divisor for divisor in divisors if divisor <= largest)
    if type(factor) is not int or factor not in divisors:  # True would pass for 1
        raise ModelError(
            f"EMA cannot split {channels} channels into factor={factor!r} groups; "
            f"valid factors are {', '.join(map(str, divisors))}, or 'auto'."
        )
    if factor == channels:
        _warn_of_single_channels()
    return factor


@cache
def _warn_of_single_channels() -> None:
    warnings.warn(
        "EMA's factor equals the number of channels, which leaves one channel per group: a softmax over one channel "
        "is always 1, so neither branch weighs channels, and ema_dynamic computes the same as ema; choose "
        "factor='auto' or a factor that leaves several channels per group.",
        stacklevel=4,
    )


def groups_in_weights(weights: Mapping[str, object], path: str, channels: int) -> int | None:
    """Return the number of groups of the EMA block at ``path`` of the model that ``weights`` belong to.

    Args:
        weights: a state dict, perhaps of another model.
        path: the block's name in the model, such as ``"decoder.blocks.0.attention"``.
        channels: number C of the block's channels.

    Returns:
        None if no weights of that name fit a block of ``channels`` channels.
    """
    for name in ("conv3x3", "conv1x1"):  # a block without a branch has only one of them
        weight = weights.get(f"{path}.{name}.weight")
        if isinstance(weight, Tensor) and weight.ndim == 4:
            width = weight.shape[0]
            return channels // width if width and channels % width == 0 else None
    return None
