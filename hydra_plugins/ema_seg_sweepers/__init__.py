"""Hydra's way to the sweeps of ``train.py``; Hydra looks for its plugins in this namespace only."""
