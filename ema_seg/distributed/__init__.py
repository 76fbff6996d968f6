"""Several processes, on one machine or many, that do one thing together."""
