"""Comparison of many runs: statistics, tables, figures and a page, from their ``report.json``."""

from typing import TYPE_CHECKING

from ema_seg.runtime.lazy import lazy_attributes

if TYPE_CHECKING:
    from ema_seg.comparison.compare import compare_runs
    from ema_seg.comparison.files import report_comparison, write_comparison
    from ema_seg.comparison.runs import read_folder, read_runs

__all__ = ["compare_runs", "read_folder", "read_runs", "report_comparison", "write_comparison"]

# Lazy imports: reading and comparing reports needs no Matplotlib, whose import takes longer than that work.
_MODULES = {
    "compare_runs": "compare",
    "read_folder": "runs",
    "read_runs": "runs",
    "report_comparison": "files",
    "write_comparison": "files",
}

__getattr__ = lazy_attributes(__name__, _MODULES)
