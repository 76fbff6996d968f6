"""Format of an analysis: the keys of ``analysis.json``, from which its tables, figures and page are drawn.

It is strict JSON. Scores, shares and differences are fractions; null means undefined.

===================  ==================================================================================
``schema``           ``"ema-seg.analysis/1"``
``created``          time of writing, ISO 8601 in UTC
``run``              folder of the run, or null
``checkpoint``       path of the checkpoint
``data``             ``name``, ``root``, ``split``, ``images`` (how many), ``skipped``
``model``            ``decoder``, ``encoder`` and the model's other settings
``attention``        ``name``, ``placement`` and the block's other settings
``classes``          the K names
``palette``          K colours
``bootstrap``        ``replicates`` and ``seed`` of all intervals, which are of 95 % and over images
``scores``           of the model itself, without sliding windows, scales and flips: ``miou``, ``boundary_miou``,
                     ``small``, ``medium``, ``large`` (mIoU by the size of objects), ``iou`` (K values)
``interventions``    list: ``block`` (a name, or "all blocks"), ``intervention``, ``changed`` (share of the pixels
                     whose class changes, the mean over images), and differences to ``scores``: ``differences`` by
                     score, ``classes``; each has ``difference``, ``low``, ``high``, or is null
``blocks``           list: ``name``, ``multiplies`` (false: it adds, and its map is the size of what it adds),
                     ``groups``, ``size`` of the map in the first image, ``mean``, ``min``, ``max``, ``spread`` (mean
                     standard deviation over ``positions``, ``images``, ``groups``), ``classes`` and ``regions`` (mean
                     weight there, and its difference from that of all labelled pixels; empty without positions),
                     ``channel_weights`` (of EMA: standard deviation over images of the softmax of each branch)
``agreement``        correlation of the maps of each pair of blocks, the mean over images
``receptive_field``  ``images``, ``size`` of the first; ``models``: by model ``side`` in pixels and ``area`` (share of
                     the image) of the square around the centre that holds each share of the contributions
``twin``             the model trained without attention: ``checkpoint``, ``scores``, ``differences``, ``classes`` as
                     above, ``similarity`` (linear CKA by stage); or null
``environment``      see ``ema_seg.evaluation.describe_environment``
===================  ==================================================================================
"""

from pathlib import Path
from typing import Any

from ema_seg.runtime.errors import DataError
from ema_seg.runtime.texts import read_json

__all__ = ["ALL_BLOCKS", "INTERVENTIONS", "SCHEMA", "load_analysis"]

SCHEMA = "ema-seg.analysis/1"

INTERVENTIONS = {
    "off": "the block's output is its input",
    "uniform": "the signal is its mean over the positions of the image",
    "static": "the signal is its mean over all images, the same for every input",
    "swapped": "the signal is that of another image",
    "blurred": "the signal is blurred, with a standard deviation of a sixteenth of the map's shorter side",
}
"""Meaning of each intervention by name; see ``ema_seg.analysis.signals`` for a block's signal."""

ALL_BLOCKS = "all blocks"
"""Name of the intervention on all blocks at once."""


def load_analysis(path: Path) -> dict[str, Any]:
    """Read an ``analysis.json``.

    Raises:
        DataError: the file is missing, or is not an analysis of this schema.
    """
    advice = "write it again with ema-seg analyse"
    try:
        report = read_json(path, advice=advice)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {advice}.") from error
    schema = report.get("schema") if isinstance(report, dict) else None
    if schema != SCHEMA:
        raise DataError(f"{path}: must be an analysis with the schema {SCHEMA!r}, got {schema!r}; {advice}.")
    return report
