"""Configuration of train.py and eval.py: YAML files, composition and validation."""
