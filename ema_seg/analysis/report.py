"""Result of an analysis: ``analysis.json``, and from it the tables, the figures and the page.

``analysis.json`` is strict JSON. Scores, shares and differences are fractions; null means undefined.

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

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ema_seg.analysis.tables import FIGURES, render_markdown
from ema_seg.reporting.page import write_page
from ema_seg.runtime.errors import DataError
from ema_seg.runtime.files import Manifest, write_file
from ema_seg.runtime.texts import read_json

if TYPE_CHECKING:
    from ema_seg.analysis.interventions import Sample
    from ema_seg.analysis.receptive_field import ReceptiveField

__all__ = ["FILES", "SCHEMA", "Pictures", "load_analysis", "write_analysis"]

SCHEMA = "ema-seg.analysis/1"
FILES = ("analysis.json", "analysis.md", "analysis.html", *(f"figures/{name}.png" for name in FIGURES))
"""Files of an analysis's folder besides the manifest; without a result there is no figure of it."""

Mask = NDArray[np.integer]


@dataclass
class Pictures:
    """What the figures show beside the report.

    Attributes:
        maps: some images with the maps of the blocks, (h, w) by name.
        examples: by intervention, the image where it matters most, the prediction with it and the model's own, H x W.
        fields: receptive fields by model.
    """

    maps: "list[tuple[Sample, Mapping[str, NDArray[np.float32]]]]" = field(default_factory=list)
    examples: "dict[str, tuple[Sample, Mask, Mask]]" = field(default_factory=dict)
    fields: "dict[str, ReceptiveField]" = field(default_factory=dict)


def write_analysis(report: Mapping[str, Any], directory: Path, pictures: Pictures) -> None:
    """Write the files of an analysis; each appears whole or not at all, ``analysis.json`` last.

    Raises:
        DataError: a file cannot be written, or would replace one that no analysis has written.
    """
    # Imports Matplotlib, which reading an analysis does not need.
    from ema_seg.analysis.figures import draw_all

    figures = draw_all(report, pictures)
    absent = {f"figures/{name}.png" for name in FIGURES if name not in figures}
    manifest = Manifest(directory)
    manifest.claim(file for file in FILES if file not in absent)
    # Figures of an earlier analysis would show another model.
    manifest.remove(absent)
    for name, figure in figures.items():
        content = BytesIO()
        figure.savefig(content, format="png", dpi=130)
        write_file(directory / "figures" / f"{name}.png", content.getvalue())
    text = render_markdown(report, tuple(figures))
    write_file(directory / "analysis.md", text.encode(errors="backslashreplace"))
    write_page(text, directory / "analysis.html")
    content_of_report = json.dumps(report, indent=1, allow_nan=False, default=str)
    write_file(directory / "analysis.json", f"{content_of_report}\n".encode(errors="backslashreplace"))


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
