"""Reports of evaluations (``report.json``, tables, figures) and comparisons of many reports."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ema_seg.reporting.assessment import assess_checkpoint, check_classes, check_settings, find_device
    from ema_seg.reporting.compare import compare_runs
    from ema_seg.reporting.comparison_files import report_comparison, write_comparison
    from ema_seg.reporting.figures import colourise, draw_class_iou, draw_confusion_matrix, draw_samples
    from ema_seg.reporting.report import build_report, load_report, write_report
    from ema_seg.reporting.runs import read_folder, read_runs
    from ema_seg.reporting.tables import print_report, render_markdown

__all__ = [
    "assess_checkpoint",
    "build_report",
    "check_classes",
    "check_settings",
    "colourise",
    "compare_runs",
    "draw_class_iou",
    "draw_confusion_matrix",
    "draw_samples",
    "find_device",
    "load_report",
    "print_report",
    "read_folder",
    "read_runs",
    "render_markdown",
    "report_comparison",
    "write_comparison",
    "write_report",
]

# Lazy imports: reading and comparing reports needs no torch, whose import takes longer than that work.
_MODULES = {
    "assess_checkpoint": "assessment",
    "build_report": "report",
    "check_classes": "assessment",
    "check_settings": "assessment",
    "colourise": "figures",
    "compare_runs": "compare",
    "draw_class_iou": "figures",
    "draw_confusion_matrix": "figures",
    "draw_samples": "figures",
    "find_device": "assessment",
    "load_report": "report",
    "print_report": "tables",
    "read_folder": "runs",
    "read_runs": "runs",
    "render_markdown": "tables",
    "report_comparison": "comparison_files",
    "write_comparison": "comparison_files",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
