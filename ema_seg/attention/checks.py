"""Checks of block arguments and inputs, with one-sentence errors."""

from collections.abc import Sequence

from torch import Tensor

from ema_seg.runtime.errors import ModelError

__all__ = [
    "PARTS",
    "check_batch",
    "check_choice",
    "check_odd",
    "check_positive",
    "largest_divisor",
]

# Values of the option ``parts``, for blocks whose paper also measures the channel and the spatial half alone.
PARTS = ("both", "channel", "spatial")


def check_positive(block: str, name: str, value: object) -> None:
    """Raise ModelError unless the argument ``name`` of ``block`` is a whole number above zero."""
    if type(value) is not int or value < 1:  # True would pass for 1
        raise ModelError(f"{block}: {name} must be a whole number of at least 1, got {value!r}.")


def check_odd(block: str, name: str, value: object) -> None:
    """Raise ModelError unless the argument is an odd whole number, so that a kernel has a middle."""
    if type(value) is not int or value < 1 or value % 2 == 0:
        raise ModelError(f"{block}: {name} must be an odd whole number of at least 1, got {value!r}.")


def check_choice(block: str, name: str, value: object, known: Sequence[object]) -> None:
    """Raise ModelError unless the argument is one of ``known``."""
    if not any(type(value) is type(choice) and value == choice for choice in known):
        raise ModelError(f"{block}: {name} must be one of {', '.join(map(str, known))}, got {value!r}.")


def check_batch(block: str, x: Tensor) -> None:
    """Raise ModelError for a batch of one image, on which BatchNorm of global descriptors cannot be trained."""
    if x.shape[0] == 1:
        raise ModelError(
            f"{block}: needs at least 2 images per batch in training, because it normalises global descriptors over "
            "the batch; raise data.batch_size."
        )


def largest_divisor(number: int, most: int) -> int:
    """Return the largest divisor of ``number`` that is at most ``most``."""
    return max(divisor for divisor in range(1, min(number, most) + 1) if number % divisor == 0)
