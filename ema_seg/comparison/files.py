"""Writer of a comparison's folder: JSON, CSV, LaTeX, Markdown, page, figures and pictures."""

import json
from pathlib import Path

from ema_seg.comparison.compare import compare_matches, match_runs
from ema_seg.comparison.page import write_page
from ema_seg.comparison.pictures import draw_examples
from ema_seg.comparison.runs import Runs
from ema_seg.comparison.schema import FIGURES, FILES, Comparison, comparison_manifest
from ema_seg.comparison.tables import (
    comparison_as_csv,
    comparison_as_latex,
    comparison_as_markdown,
    print_comparison,
)
from ema_seg.runtime.errors import DataError
from ema_seg.runtime.files import write_file

__all__ = ["report_comparison", "write_comparison"]


def report_comparison(runs: Runs, directory: Path, baseline: dict[str, str] | None = None) -> Path:
    """Compare runs, write everything into a directory, and print the table.

    Args:
        runs: see ``read_folder`` and ``read_runs``.
        directory: folder for ``comparison.*``, ``figures/`` and ``examples/``.
        baseline: see ``ema_seg.comparison.compare.match_runs``.

    Returns:
        The path of ``comparison.json``.
    """
    if directory.exists() and not directory.is_dir():
        raise DataError(f"{directory}: must be a folder, got a file; move it, or choose another folder (--output).")
    comparison_manifest(directory).check([*FILES, *FIGURES])
    matches = match_runs(runs, baseline)
    comparison = compare_matches(runs, matches)
    examples, notes = draw_examples(comparison["examples"], matches.rows, directory)
    comparison["examples"], comparison["notes"] = examples, [*comparison["notes"], *notes]
    path = write_comparison(comparison, directory)
    print_comparison(comparison)
    return path


def write_comparison(comparison: Comparison, directory: str | Path) -> Path:
    """Write ``comparison.{json,csv,tex,md,html}`` and ``figures/``; each file appears whole or not at all.

    Args:
        comparison: result of ``compare_runs``; the pictures of its examples are in the directory already.
        directory: created if missing; an earlier comparison in it is replaced, but no other file.

    Returns:
        The path of ``comparison.json``.

    Raises:
        DataError: the directory cannot be written to, or a file would replace one that no comparison has written.
    """
    directory = Path(directory)
    from ema_seg.comparison.figures import draw_comparison  # imports Matplotlib, which is slow

    comparison_manifest(directory).claim(FILES)
    figures = [f"figures/{name}.png" for name in draw_comparison(comparison, directory)]
    texts = {
        "csv": comparison_as_csv(comparison),
        "tex": comparison_as_latex(comparison),
        "md": comparison_as_markdown(comparison, figures),
        "json": json.dumps(comparison, indent=1, allow_nan=False, ensure_ascii=False) + "\n",
    }
    for suffix, text in texts.items():
        write_file(directory / f"comparison.{suffix}", text.encode(errors="backslashreplace"))
    write_page(comparison, directory)
    return directory / "comparison.json"
