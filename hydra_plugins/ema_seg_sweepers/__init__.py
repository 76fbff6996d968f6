"""Hydra sweepers of ``train.py``; Hydra looks for plugins only in the namespace ``hydra_plugins``."""
