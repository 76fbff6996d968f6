"""The command ``eval.py``: from its arguments to the report of one checkpoint."""

import sys
from contextlib import suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ema_seg.cli.command_line import argument, config_of_run_or_checkpoint, expand_home, plain_config, reports_errors
from ema_seg.cli.composition import CONFIGS, compose, launch, offer_settings_of_run
from ema_seg.cli.early_checks import check_root
from ema_seg.config import Evaluating, Evaluation, check_settings
from ema_seg.runtime.distributed.group import join_launcher
from ema_seg.runtime.distributed.launchers import detect_launcher
from ema_seg.runtime.distributed.ranks import rank_info
from ema_seg.runtime.errors import ConfigError, EmaSegError
from ema_seg.runtime.host_memory import gc_frozen_imports, keep_freed_memory
from ema_seg.runtime.hub import hub_address
from ema_seg.sweeps import read_job

__all__ = ["main"]


@reports_errors
def main() -> None:
    """Compose the configuration on top of the run's own, and evaluate."""
    keep_freed_memory()
    sys.argv = expand_home(sys.argv)
    with join_launcher():
        saved = _saved_config()
        # Settings that are newer than the run have their defaults.
        newer = {name: field.default for name, field in Evaluation.model_fields.items() if not field.is_required()}
        evaluation = newer | saved.get("evaluation", {})
        offer_settings_of_run(saved | {"evaluation": evaluation}, "data", "evaluation")
        launch(_evaluate, CONFIGS, "eval", compose(CONFIGS, "eval"))


def _saved_config() -> dict[str, Any]:
    """Read the configuration of the run or checkpoint on the command line; empty if there is none."""
    for key in ("run", "ckpt"):
        if source := argument(key):
            return config_of_run_or_checkpoint(Path(source), key=key)
    return {}


@reports_errors
def _evaluate(composed: DictConfig) -> None:
    """Score, measure and report one checkpoint."""
    config = plain_config(composed)
    if bool(config.get("run")) == bool(config.get("ckpt")):
        raise ConfigError("run, ckpt: exactly one must be set; give run=<folder of a run> or ckpt=<checkpoint file>.")
    check_settings(config, Evaluating)
    check_root(config["data"])
    source = config["run"] or config["ckpt"]
    if hub_address(source) is not None and config["report"]["dir"] is None:
        raise ConfigError(f"report.dir: must be set for the model {source}; give report.dir=<folder>.")

    # Heavy imports only now, so that --help and --cfg answer at once.
    with gc_frozen_imports():
        from ema_seg.cli.launch import evaluate_run, submit_run
        from ema_seg.data import find_dataset_class
        from ema_seg.inference.exported import is_exported
        from ema_seg.inference.protocol import check_protocol
        from ema_seg.models.checkpoint import checkpoint_path
        from ema_seg.models.shared import WEIGHTS
        from ema_seg.reporting import print_report
        from ema_seg.reporting.submission import check_submission

    checkpoint = checkpoint_path(source)
    check_protocol(config["evaluation"])
    submission, split = config["evaluation"]["submission"], config["data"]["evaluation_split"]
    dataset = find_dataset_class(config["data"]["name"])
    if submission:
        check_submission(Path(submission), dataset, config["data"]["name"])
    if submission and split in dataset.unlabelled_splits:
        submit_run(
            checkpoint, config["data"], config["evaluation"], devices=config["devices"], started_by=detect_launcher()
        )
        if rank_info().rank == 0:
            print(f"submission: {submission}; the split {split!r} has no labels, so there are no scores")
        return
    run = Path(config["run"]) if config["run"] else _run_of(checkpoint)
    without_root = is_exported(checkpoint) or checkpoint.name == WEIGHTS
    directory = Path(config["report"]["dir"] or _default_folder(run, without_root))
    try:
        report = evaluate_run(
            checkpoint,
            config["data"],
            config["evaluation"],
            directory,
            devices=config["devices"],
            run=str(run),
            job=read_job(run),
            started_by=detect_launcher(),
        )
    except EmaSegError:
        with suppress(OSError):
            directory.rmdir()  # if it is empty
        raise
    if rank_info().rank == 0:
        print_report(report)
        print(f"report: {directory}")
        if submission:
            print(f"submission: {submission}")


def _default_folder(run: Path, without_root: bool) -> Path:
    """Return ``report`` to evaluate a finished run without changes; else make a new folder.

    So a changed evaluation keeps the run's own report, and an unfinished run does not pass for a finished one. The root
    of the data is no change for a model that has none.
    """
    unchanged = ("run=", "ckpt=", "report.", "devices=", *(["data.root="] if without_root else []))
    changes = [text for text in HydraConfig.get().overrides.task if not text.startswith(unchanged)]
    own = run / "report"
    unfinished = (run / "checkpoints" / "last.ckpt").exists() and not (own / "report.json").exists()
    return _make_folder(run / f"report_{datetime.now():%Y-%m-%d_%H-%M-%S}") if changes or unfinished else own


def _make_folder(path: Path) -> Path:
    """Make a new folder; append a number if the name is taken, for example by a command in the same second.

    Only rank 0 makes it; the other ranks receive its name later.
    """
    if rank_info().rank:
        return path
    for number in count(1):
        numbered = path if number == 1 else path.with_name(f"{path.name}_{number}")
        try:
            numbered.mkdir(parents=True)
        except FileExistsError:
            continue
        return numbered
    raise AssertionError


def _run_of(checkpoint: Path) -> Path:
    """Return the run's folder of a checkpoint in ``checkpoints/``; for any other, the checkpoint's own folder."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
