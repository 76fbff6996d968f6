"""Training: losses, optimisation, the Lightning module and its callbacks, and ``fit``, which joins them."""

from ema_seg.training.batch_size import find_batch_size
from ema_seg.training.check import check_config, check_model
from ema_seg.training.fit import fit
from ema_seg.training.strategy import count_processes, take_device, training_device

__all__ = [
    "check_config",
    "check_model",
    "count_processes",
    "find_batch_size",
    "fit",
    "take_device",
    "training_device",
]
