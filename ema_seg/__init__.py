"""ema-seg: effect and cost of attention blocks in semantic segmentation."""

__version__ = "0.1.0"
