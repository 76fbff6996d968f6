"""The configuration of train.py and eval.py, and the way to it from a command line."""
