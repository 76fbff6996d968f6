"""Evaluation: scores of predictions, and cost of a model."""

from typing import TYPE_CHECKING

from ema_seg.runtime.lazy import lazy_attributes

if TYPE_CHECKING:
    from ema_seg.evaluation.confusion import ConfusionMatrix, Scores
    from ema_seg.evaluation.cost import Cost, measure_cost
    from ema_seg.evaluation.environment import describe_environment
    from ema_seg.evaluation.evaluator import Evaluation, ImageRecord, score_images
    from ema_seg.evaluation.examples import Example, choose_examples, predict_example, predict_examples
    from ema_seg.evaluation.strata import STRATA, count_strata, score_strata

__all__ = [
    "STRATA",
    "ConfusionMatrix",
    "Cost",
    "Evaluation",
    "Example",
    "ImageRecord",
    "Scores",
    "choose_examples",
    "count_strata",
    "describe_environment",
    "measure_cost",
    "predict_example",
    "predict_examples",
    "score_images",
    "score_strata",
]

# Lazy imports: intervals need no torch, whose import takes longer than a comparison.
_MODULES = {
    "confusion": ("ConfusionMatrix", "Scores"),
    "cost": ("Cost", "measure_cost"),
    "environment": ("describe_environment",),
    "evaluator": ("Evaluation", "ImageRecord", "score_images"),
    "examples": ("Example", "choose_examples", "predict_example", "predict_examples"),
    "strata": ("STRATA", "count_strata", "score_strata"),
}
__getattr__ = lazy_attributes(__name__, {name: module for module, names in _MODULES.items() for name in names})
