"""The command ``train.py``: from its arguments to a run or a sweep.

``main`` composes the configuration, that of a resumed or repeated run from the run's own file, and hands it to Hydra,
which calls ``_train`` for a run or for each job of a sweep. The training itself is ``ema_seg.train.train``.
"""

import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ema_seg.cli.command_line import argument, expand_home, key_of, reports_errors, run_config
from ema_seg.cli.composition import CONFIGS, compose, launch
from ema_seg.cli.early_checks import check_early, check_root, check_source
from ema_seg.cli.job import gpus_per_job, train_job
from ema_seg.cli.resume import (
    register_repeated,
    register_resumed,
    require_identical,
    require_same_job,
    resume_unfinished,
)
from ema_seg.cli.run_folder import hold_folder, is_named_by_time, require_free
from ema_seg.runtime.distributed.exit_handlers import ignore_exit_signals
from ema_seg.runtime.distributed.group import join_launcher
from ema_seg.runtime.distributed.launchers import detect_launcher
from ema_seg.runtime.distributed.ranks import rank_info
from ema_seg.runtime.errors import ConfigError
from ema_seg.runtime.host_memory import gc_frozen_imports, keep_freed_memory
from ema_seg.sweeps import count_devices, read_job

__all__ = ["main"]


@reports_errors
def main() -> None:
    """Compose the configuration, that of a resumed or repeated run from its own file, and train."""
    keep_freed_memory()
    sys.argv = expand_home(sys.argv)
    with join_launcher() as started_by:
        now = datetime.now()
        if started_by is not None:
            now = _broadcast_start_time(started_by, now)
        OmegaConf.register_new_resolver("started", now.strftime, replace=True)
        OmegaConf.register_new_resolver("parallel_jobs", _parallel_jobs, replace=True)
        resumed, rerun = argument("resume"), argument("rerun")
        if resumed and _is_sweep():
            raise ConfigError(
                f"resume={resumed}: a sweep resumes its jobs when the same command is run again; remove resume."
            )
        if rerun and (resumed or _is_sweep()):
            raise ConfigError(f"rerun={rerun}: repeats one run from its start; remove resume and -m.")
        if resumed not in (None, "auto") and any(key_of(text) == "init_from" for text in sys.argv[1:]):
            raise ConfigError(
                f"resume={resumed}: continues with the weights of that run, which init_from would replace; remove one "
                "of the two."
            )
        config_name = "train"
        if rerun:
            config_name = register_repeated(Path(rerun))
        elif resumed not in (None, "auto"):
            config_name = register_resumed(Path(str(resumed)))
        if config_name == "train" and "--hydra-help" not in sys.argv:
            # experiment is in the defaults list, where Hydra rejects the + that other programs need.
            sys.argv = [text.replace("+experiment=", "experiment=", 1) for text in sys.argv]
        composed: DictConfig | None = compose(CONFIGS, config_name)
        if resumed == "auto" and composed:
            resume_unfinished(composed)
            composed = None  # the command line has changed
        launch(_train, CONFIGS, config_name, composed)
    ignore_exit_signals()


def _broadcast_start_time(started_by: str, now: datetime) -> datetime:
    """Broadcast rank 0's start time, so that all ranks share one run folder."""
    from ema_seg.runtime.distributed.collectives import broadcast

    if _is_sweep():
        raise ConfigError(
            f"-m: {started_by} has started several processes, but each job of a sweep starts its own; start the sweep "
            "in one process: python train.py -m …"
        )
    return broadcast(now)


def _is_sweep() -> bool:
    return bool({"-m", "--multirun"} & set(sys.argv))


def _parallel_jobs(devices: Any) -> int:
    """Return the number of parallel jobs: GPUs // GPUs per job, at least 1; 2 without GPUs."""
    return max(1, count_devices() // gpus_per_job(devices)) if count_devices() else 2


def _train(composed: DictConfig) -> None:
    """Train, test and report one run, or one job of a sweep."""
    run = Path(HydraConfig.get().runtime.output_dir)
    if OmegaConf.select(composed, "sweep.job") is None:
        reports_errors(_train_run)(composed, run)
    else:
        train_job(composed, run)


def _train_run(composed: DictConfig, run: Path) -> None:
    for text in HydraConfig.get().overrides.task:
        if text.lstrip("+~").startswith(("sweep=", "sweep.", "launcher=")):
            raise ConfigError(
                f"{text}: works only in a sweep (python train.py -m {text} …); remove it to train one run."
            )
    config = run_config(composed)
    job = read_job(run)
    by_time = not config["resume"] and is_named_by_time()
    if not (config["resume"] or by_time):
        require_free(run)

    check_early(config)
    check_root(config["data"])
    if not config["resume"]:
        check_source(config.get("init_from"))

    # Heavy imports only now, so that --help, --cfg and early errors answer at once.
    with gc_frozen_imports():
        from ema_seg.cli.launch import produce_run
        from ema_seg.reporting import print_report
        from ema_seg.train import train

    if job:
        require_same_job(config, run)
    with hold_folder(run, by_time=by_time) as run:
        # Calls train in this process, or in one for each device.
        report = produce_run(train, config, run, resume=bool(config["resume"]), job=job, started_by=detect_launcher())
    ignore_exit_signals()
    if rank_info().rank == 0:
        print_report(report)
        print(f"run: {run}")
        if config.get("rerun"):
            require_identical(Path(config["rerun"]), run)
