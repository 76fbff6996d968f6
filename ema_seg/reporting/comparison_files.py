"""Comparisons as files: everything that a folder of one holds."""

import json
from pathlib import Path

from ema_seg.reporting.comparison import Comparison
from ema_seg.reporting.comparison_tables import comparison_as_csv, comparison_as_latex, comparison_as_markdown
from ema_seg.reporting.files import write_file

__all__ = ["write_comparison"]


def write_comparison(comparison: Comparison, directory: str | Path) -> Path:
    """Write ``comparison.{json,csv,tex,md,html}`` and ``figures/``; each file appears whole or not at all.

    Args:
        comparison: what ``compare_runs`` returned; its examples' pictures lie in the directory already.
        directory: made if missing; an earlier comparison in it is replaced.

    Returns:
        The path of ``comparison.json``.

    Raises:
        DataError: the directory cannot be written to.
    """
    # Matplotlib comes with the figures.
    from ema_seg.reporting.comparison_figures import draw_comparison
    from ema_seg.reporting.page import write_page

    directory = Path(directory)
    draw_comparison(comparison, directory)
    figures = sorted(path.relative_to(directory).as_posix() for path in (directory / "figures").glob("*.png"))
    texts = {
        "csv": comparison_as_csv(comparison),
        "tex": comparison_as_latex(comparison),
        "md": comparison_as_markdown(comparison, figures),
        "json": json.dumps(comparison, indent=1, allow_nan=False, ensure_ascii=False) + "\n",
    }
    for suffix, text in texts.items():
        write_file(directory / f"comparison.{suffix}", text.encode())
    write_page(comparison, directory)
    return directory / "comparison.json"
