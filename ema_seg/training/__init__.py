"""Training: losses, optimisation, the Lightning module and its callbacks, and ``fit``, which joins them."""

from ema_seg.training.fit import fit

__all__ = ["fit"]
