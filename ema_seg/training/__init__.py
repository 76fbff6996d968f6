"""Training: losses, optimisation, the Lightning module and its callbacks, and ``fit``, which joins them."""

from ema_seg.training.check import check_config, check_model
from ema_seg.training.fit import fit
from ema_seg.training.parallel.batch_size import find_batch_size
from ema_seg.training.parallel.strategy import resolve_world_size, set_cuda_device, training_device

__all__ = [
    "check_config",
    "check_model",
    "find_batch_size",
    "fit",
    "resolve_world_size",
    "set_cuda_device",
    "training_device",
]
