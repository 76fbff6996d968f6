"""Prediction of images that are too large for the memory, in windows that overlap.

Where windows overlap the logits of all count, with weights that fall linearly to zero at each window's edge, so that no
seam shows. Memory holds the logits of one window, and of the pixels that it shares with the next ones.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["OVERLAP", "blend_windows", "window_layout"]

OVERLAP = 128  # pixels that neighbours share

Predict = Callable[[Tensor], Tensor]


def blend_windows(image: Tensor, window: int, predict: Predict) -> Iterator[tuple[int, int, Tensor]]:
    """Predict an image window by window; yield its logits in blocks that cover it.

    Args:
        image: 3 x H x W.
        window: largest height and width of a window, at least twice ``OVERLAP``.
        predict: maps a window 3 x h x w to logits K x h x w, which may be overwritten.

    Yields:
        The first row, the first column and the logits K x h x w of a block. Where one window alone covers a pixel its
        logits are that window's.
    """
    height, width = image.shape[1:]
    (tops, rows), (lefts, columns) = window_layout(height, window), window_layout(width, window)
    down, across = _weights(tops, rows), _weights(lefts, columns)
    shared_rows = [top + rows - following for top, following in zip(tops, [*tops[1:], height], strict=True)]
    shared_columns = [left + columns - following for left, following in zip(lefts, [*lefts[1:], width], strict=True)]
    from_above = torch.empty(0)  # weighted logits of the rows that a row of windows shares with the one below
    for index, top in enumerate(tops):
        own_rows = rows - shared_rows[index]
        from_left: Tensor | None = None  # likewise of columns
        for place, left in enumerate(lefts):
            own_columns = columns - shared_columns[place]
            logits = predict(image[:, top : top + rows, left : left + columns])
            logits *= (down[index][:, None] * across[place]).to(logits)
            if from_left is not None:
                logits[:, :, : from_left.shape[2]] += from_left
            from_left = logits[:, :, own_columns:].clone()
            block, own = logits[:, :, :own_columns], slice(left, left + own_columns)
            if index > 0:
                block[:, : shared_rows[index - 1]] += from_above[:, : shared_rows[index - 1], own]
            elif place == 0:
                from_above = logits.new_empty((len(logits), max(shared_rows), width))
            from_above[:, : shared_rows[index], own] = block[:, own_rows:]
            yield top, left, block[:, :own_rows]


def window_layout(length: int, window: int) -> tuple[list[int], int]:
    """Return the first pixels of windows that cover a length, and their size.

    Neighbours share ``OVERLAP`` pixels or one more: the windows are smaller rather than share more.
    """
    if length <= window:
        return [0], length
    count = -(-(length - OVERLAP) // (window - OVERLAP))
    size = -(-(length + (count - 1) * OVERLAP) // count)
    return [index * (length - size) // (count - 1) for index in range(count)], size


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
