"""Files of an analysis: ``analysis.json``, and from it the tables, the figures and the page."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ema_seg.analysis.figures import Pictures, draw_all
from ema_seg.analysis.tables import FIGURES, render_markdown
from ema_seg.reporting.page import write_page
from ema_seg.reporting.report import replace_figures
from ema_seg.runtime.files import Manifest, write_file

__all__ = ["FILES", "write_analysis"]

FILES = ("analysis.json", "analysis.md", "analysis.html", *(f"figures/{name}.png" for name in FIGURES))
"""Files of an analysis's folder besides the manifest; without a result there is no figure of it."""


def write_analysis(report: Mapping[str, Any], directory: Path, pictures: Pictures) -> None:
    """Write the files of an analysis; each appears whole or not at all, ``analysis.json`` last.

    Raises:
        DataError: a file cannot be written, or would replace one that no analysis has written.
    """
    figures = draw_all(report, pictures)
    replace_figures(Manifest(directory), FILES, figures, dpi=130)
    text = render_markdown(report, tuple(figures))
    write_file(directory / "analysis.md", text.encode(errors="backslashreplace"))
    write_page(text, directory / "analysis.html")
    content_of_report = json.dumps(report, indent=1, allow_nan=False, default=str)
    write_file(directory / "analysis.json", f"{content_of_report}\n".encode(errors="backslashreplace"))
