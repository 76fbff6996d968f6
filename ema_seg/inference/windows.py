"""Prediction of images that are too large for the memory, in windows that overlap.

Where windows overlap the logits of all count, with weights that fall linearly to zero at each window's edge, so that no
seam shows. Memory holds the logits of one window, and of the pixels that it shares with the next ones.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["OVERLAP", "blend_windows", "window_starts"]

OVERLAP = 128  # pixels that neighbours share at least

Predict = Callable[[Tensor], Tensor]


def blend_windows(image: Tensor, window: int, predict: Predict) -> Iterator[tuple[int, int, Tensor]]:
    """Predict an image window by window; yield its logits in blocks that cover it.

    Args:
        image: 3 x H x W.
        window: height and width of a window; an image that is smaller in a direction has one window there.
        predict: maps a window 3 x h x w to logits K x h x w, which may be overwritten.

    Yields:
        The first row, the first column and the logits K x h x w of a block. Where one window alone covers a pixel its
        logits are that window's.
    """
    height, width = image.shape[1:]
    tops, lefts = window_starts(height, window), window_starts(width, window)
    rows, columns = min(window, height), min(window, width)
    down, across = _weights(tops, rows), _weights(lefts, columns)
    from_above: Tensor | None = None  # weighted logits of the rows that the windows above share with the next ones
    for index, top in enumerate(tops):
        finished_rows = (tops[index + 1] if index + 1 < len(tops) else height) - top
        below: Tensor | None = None
        from_left: Tensor | None = None  # likewise of columns
        for place, left in enumerate(lefts):
            finished = (lefts[place + 1] if place + 1 < len(lefts) else width) - left
            logits = predict(image[:, top : top + rows, left : left + columns])
            logits *= (down[index][:, None] * across[place]).to(logits)
            if from_left is not None:
                logits[:, :, : from_left.shape[2]] += from_left
            from_left = logits[:, :, finished:].clone()
            block = logits[:, :, :finished]
            if from_above is not None:
                block[:, : from_above.shape[1]] += from_above[:, :, left : left + finished]
            if below is None:
                below = logits.new_empty((len(logits), rows - finished_rows, width))
            below[:, :, left : left + finished] = block[:, finished_rows:]
            yield top, left, block[:, :finished_rows]
        from_above = below


def window_starts(length: int, window: int) -> list[int]:
    """Return the first pixels of windows that cover a length evenly and share ``OVERLAP`` pixels or more."""
    if length <= window:
        return [0]
    count = -(-(length - OVERLAP) // (window - OVERLAP))
    return [round(index * (length - window) / (count - 1)) for index in range(count)]


def _weights(starts: list[int], window: int) -> list[Tensor]:
    """Return the weights of each window's pixels along an axis; those of all windows at a pixel add up to 1."""
    pixels = torch.arange(window, dtype=torch.float64) + 0.5
    total = torch.zeros(starts[-1] + window, dtype=torch.float64)
    found = []
    for index, start in enumerate(starts):
        weights = torch.ones_like(pixels)
        if index > 0:
            weights = weights.minimum(pixels / (starts[index - 1] + window - start))
        if index + 1 < len(starts):
            weights = weights.minimum(pixels.flip(0) / (start + window - starts[index + 1]))
        total[start : start + window] += weights
        found.append(weights)
    return [weights / total[start : start + window] for start, weights in zip(starts, found, strict=True)]
