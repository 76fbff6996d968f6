"""A result to ``report.json``, tables and figures."""

from ema_seg.reporting.assessment import assess_checkpoint, check_settings
from ema_seg.reporting.figures import colourise, draw_class_iou, draw_confusion_matrix, draw_samples
from ema_seg.reporting.report import build_report, load_report, write_report
from ema_seg.reporting.tables import print_report, render_markdown

__all__ = [
    "assess_checkpoint",
    "build_report",
    "check_settings",
    "colourise",
    "draw_class_iou",
    "draw_confusion_matrix",
    "draw_samples",
    "load_report",
    "print_report",
    "render_markdown",
    "write_report",
]
