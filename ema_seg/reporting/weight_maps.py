"""Weight maps of a trained model's attention blocks on an image.

``python -m ema_seg.reporting.weight_maps weights.png runs/my_run/checkpoints/best.ckpt street.png``
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ema_seg.data.decoding import decode_image
from ema_seg.data.normalise import Normalise
from ema_seg.data.source import File, FolderSource
from ema_seg.inference.attention import attention_weights, without_padding
from ema_seg.models import load_segmenter, model_stride
from ema_seg.runtime.errors import DataError, EmaSegError, ModelError, one_line
from ema_seg.runtime.escaping import for_terminal

__all__ = ["draw_weight_maps", "main"]

_GROUPS = 4


def draw_weight_maps(image: np.ndarray, maps: Mapping[str, np.ndarray]) -> Figure:
    """Draw a row for each block: the image, the mean weight map and the maps of the groups that vary most.

    Each map has its own colour scale, given in its title: the weights of one map often lie close together.

    Args:
        image: uint8 RGB (H, W, 3).
        maps: float (groups, h, w) by the name of the block.
    """
    columns = 1 + min(_GROUPS, max(len(groups) for groups in maps.values()))
    figure = Figure(figsize=(2.6 * (columns + 1), 2.2 * len(maps)), layout="compressed")
    for axes_row, (name, groups) in zip(
        figure.subplots(len(maps), columns + 1, squeeze=False), maps.items(), strict=True
    ):
        for axes in axes_row:
            axes.set_axis_off()
        axes_row[0].imshow(image)
        axes_row[0].set_title(f"{name}\n{len(groups)} groups, {groups.shape[1]} × {groups.shape[2]}", fontsize=8)
        _draw_map(axes_row[1], groups.mean(axis=0), "mean of the groups")
        # The groups whose weights vary most over the pixels, in index order.
        chosen = sorted(np.argsort(-groups.std(axis=(1, 2)))[:_GROUPS])
        for axes, group in zip(axes_row[2:], chosen, strict=False):
            _draw_map(axes, groups[group], f"group {group}")
    return figure


def _draw_map(axes: Axes, weights: np.ndarray, title: str) -> None:
    axes.imshow(weights, cmap="viridis")
    axes.set_title(f"{title}\n{weights.min():.2f} to {weights.max():.2f}", fontsize=8)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the weight maps of the checkpoint and image on the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ema_seg.reporting.weight_maps",
        description="Draw the weight maps of a trained model's attention blocks on an image.",
    )
    parser.add_argument("figure", type=Path, help="where to write the figure: .png, .jpg, .pdf or .svg")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint of train.py")
    parser.add_argument("image", type=Path, help="an image, taken at its own size and turned upright")
    options = parser.parse_args(arguments)
    try:
        model, checkpoint = load_segmenter(options.checkpoint)
        pixels = decode_image(File(FolderSource(options.image.parent), options.image.name), upright=True)
        data = checkpoint["config"]["data"]
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        stride = model_stride(model)
        maps = attention_weights(model, image, stride, Normalise(data["mean"], data["std"]))
        if not maps:
            raise ModelError(
                f"{options.checkpoint}: no attention block of the model has weights for positions; give another."
            )
        shown = {name: without_padding(groups, image.shape[-2:], stride).numpy() for name, groups in maps.items()}
        try:
            draw_weight_maps(pixels, shown).savefig(options.figure, dpi=150)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{options.figure}: the figure cannot be written ({one_line(error)}); choose another path."
            ) from error
    except EmaSegError as error:
        print(f"error: {for_terminal(str(error))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
