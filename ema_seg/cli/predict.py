"""The command ``ema-seg predict``: from its arguments to masks, overlays and areas of many images."""

import sys
from pathlib import Path

from omegaconf import DictConfig

from ema_seg.cli.command_line import expand_home, plain_config, reports_errors
from ema_seg.cli.composition import CONFIGS, compose, launch
from ema_seg.config import Predicting, check_settings
from ema_seg.runtime.errors import ConfigError
from ema_seg.runtime.escaping import for_terminal
from ema_seg.runtime.host_memory import gc_frozen_imports, keep_freed_memory

__all__ = ["main"]


@reports_errors
def main() -> None:
    """Compose the configuration and predict."""
    keep_freed_memory()
    sys.argv = expand_home(sys.argv)
    launch(_predict, CONFIGS, "predict", compose(CONFIGS, "predict"))


@reports_errors
def _predict(composed: DictConfig) -> None:
    config = plain_config(composed)
    check_settings(config, Predicting)
    for key, meaning in (
        ("run", "the folder of a run or a checkpoint"),
        ("source", "an image, a folder or a pattern"),
        ("out", "a folder for the results"),
    ):
        if config[key] is None:
            raise ConfigError(f"{key}: must be set; give {key}=<{meaning}>.")

    # Heavy imports only now, so that --help and --cfg answer at once.
    with gc_frozen_imports():
        from ema_seg.inference.files import find_images, segment_files
        from ema_seg.inference.segmenter import Segmenter

    images, root = find_images(config["source"])
    out = Path(config["out"])
    options = {key: config[key] for key in ("device", "precision", "compile")}
    segmenter = Segmenter.load(config["run"], **options)
    kept = ("batch_size", "workers", "alpha", "probabilities", "weight_maps", "overwrite")
    problems = segment_files(
        segmenter,
        images,
        root,
        out,
        origin=str(Path(config["run"]).resolve()),
        **{key: config[key] for key in kept},
    )
    for problem in problems:
        print(f"error: {for_terminal(problem)}", file=sys.stderr)
    print(f"{len(images) - len(problems)} of {len(images)} images: {out}")
    if problems:
        sys.exit(1)
