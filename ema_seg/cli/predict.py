"""The command ``ema-seg predict``: from its arguments to masks, overlays and areas of many images."""

import re
import sys
from pathlib import Path

from omegaconf import DictConfig

from ema_seg.cli.command_line import expand_home, plain_config, reports_errors, require_set
from ema_seg.cli.composition import CONFIGS, compose, launch
from ema_seg.config import Predicting, check_settings
from ema_seg.runtime.escaping import for_terminal
from ema_seg.runtime.host_memory import gc_frozen_imports, keep_freed_memory
from ema_seg.runtime.hub import hub_address

__all__ = ["main"]

_CAMERA = re.compile("camera:([0-9]+)")


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
    require_set(
        config,
        run="the folder of a run or a checkpoint",
        source="an image, a video, a folder, a pattern or camera:0",
        out="a folder for the results",
    )

    # Heavy imports only now, so that --help and --cfg answer at once.
    with gc_frozen_imports():
        from ema_seg.inference.files import find_files, is_video, segment_files
        from ema_seg.inference.results import Results
        from ema_seg.inference.segmenter import Segmenter
        from ema_seg.inference.video import segment_camera, segment_videos
        from ema_seg.models.checkpoint import checkpoint_digest, checkpoint_path

    source, out = config["source"], Path(config["out"])
    camera = _CAMERA.fullmatch(source)
    files = {} if camera else find_files(source, out)
    options = {key: config[key] for key in ("device", "precision", "compile")}
    details = {key: config[key] for key in ("alpha", "probabilities", "weight_maps")}
    segmenter = Segmenter.load(config["run"], **options)
    results = Results(out, segmenter, **details)
    name = config["run"] if hub_address(config["run"]) else str(Path(config["run"]).resolve())
    digest = checkpoint_digest(checkpoint_path(config["run"]))
    results.claim({"model": name, "sha256": digest}, overwrite=config["overwrite"])

    work = {key: config[key] for key in ("batch_size", "workers", "overwrite")}
    if camera:
        segment_camera(int(camera[1]), results, **work)
        print(out)
        return
    problems: list[str] = []
    if images := {file: name for file, name in files.items() if not is_video(file)}:
        problems += segment_files(images, results, **work)
    if videos := {file: name for file, name in files.items() if is_video(file)}:
        problems += segment_videos(videos, results, **work)
    for problem in problems:
        print(f"error: {for_terminal(problem)}", file=sys.stderr)
    print(f"{len(files) - len(problems)} of {len(files)} {'files' if videos else 'images'}: {out}")
    if problems:
        sys.exit(1)
