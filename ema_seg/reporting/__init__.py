"""Report of one run: ``report.json``, tables, figures, predicted masks."""

from typing import TYPE_CHECKING

from ema_seg.runtime.lazy import lazy_attributes

if TYPE_CHECKING:
    from ema_seg.reporting.figures import draw_class_iou, draw_confusion_matrix, draw_samples
    from ema_seg.reporting.report import build_report, load_report, write_report
    from ema_seg.reporting.tables import print_report, render_markdown

__all__ = [
    "build_report",
    "draw_class_iou",
    "draw_confusion_matrix",
    "draw_samples",
    "load_report",
    "print_report",
    "render_markdown",
    "write_report",
]

# Lazy imports: reading a report needs no torch, whose import takes longer than that work.
_MODULES = {
    "build_report": "report",
    "draw_class_iou": "figures",
    "draw_confusion_matrix": "figures",
    "draw_samples": "figures",
    "load_report": "report",
    "print_report": "tables",
    "render_markdown": "tables",
    "write_report": "report",
}

__getattr__ = lazy_attributes(__name__, _MODULES)
