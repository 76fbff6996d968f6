"""ema-seg: what an attention block does for semantic segmentation, and what it costs."""

__version__ = "0.1.0"
