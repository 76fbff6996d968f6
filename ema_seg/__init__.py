"""ema-seg: effect and cost of attention blocks in semantic segmentation."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike

    from ema_seg.inference.segmenter import Segmenter

__all__ = ["load"]

__version__ = "0.1.0"


def load(
    source: str | PathLike[str], *, device: str = "auto", precision: str | None = None, compile: bool = False
) -> Segmenter:
    """Load a trained model, ready to segment pictures.

    ``ema_seg.load("runs/my_run")("street.jpg").save("mask.png")``

    Args:
        source: the folder of a run, whose best checkpoint is taken, or a checkpoint of ``train.py``; or a model that
            ``ema-seg push`` wrote: its folder, ``hf://user/name`` or ``hf://user/name@revision``; or a file that
            ``ema-seg export`` wrote.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        precision: "32-true", "bf16-mixed" or "16-mixed"; None for that of the run's evaluation.
        compile: compile the model, for pictures of one size.

    Raises:
        EmaSegError: the source is not one of these, the Hub cannot be reached, or this machine lacks the device.
    """
    from ema_seg.inference.segmenter import Segmenter  # takes seconds to import

    return Segmenter.load(source, device=device, precision=precision, compile=compile)
