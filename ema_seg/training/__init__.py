"""Training: losses, optimisation, the Lightning module, its callbacks and its trainer."""

from ema_seg.training.parallel.batch_size import find_batch_size
from ema_seg.training.parallel.strategy import resolve_world_size, set_cuda_device, training_device

__all__ = [
    "find_batch_size",
    "resolve_world_size",
    "set_cuda_device",
    "training_device",
]
