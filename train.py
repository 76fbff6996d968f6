"""Training of a segmentation model with attention blocks, test of its best checkpoint, report of mIoU and throughput.

python train.py --help lists the settings.
"""

import sys

if __name__ == "__main__":
    # Before the slow imports: a signal must end the command with a message and status 75 from the start.
    from ema_seg.runtime.distributed.exit_handlers import install_exit_handlers

    install_exit_handlers()

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from ema_seg.cli.command_line import (
    argument,
    expand_home,
    plain_config,
    quoted,
    read_config,
    reports_errors,
    saved_config,
)
from ema_seg.cli.composition import compose, launch
from ema_seg.cli.early_checks import check_early, check_root
from ema_seg.runtime.distributed.exit_handlers import ignore_exit_signals
from ema_seg.runtime.distributed.start import (
    SecondaryFailure,
    detect_launcher,
    process_group,
    rank_info,
    report_first_failure,
)
from ema_seg.runtime.errors import ConfigError, Preempted, TrainingError
from ema_seg.runtime.host_memory import gc_frozen_imports, keep_freed_memory
from ema_seg.sweeps import (
    claim_devices,
    count_devices,
    hash_config,
    is_running,
    lock_run,
    machine_keys,
    read_job,
    read_plan,
    run_job,
)

CONFIGS = Path(__file__).resolve().parent / "configs"


@reports_errors
def main() -> None:
    """Compose the configuration, that of a resumed or repeated run from its own file, and train."""
    keep_freed_memory()
    sys.argv = expand_home(sys.argv)
    with _group() as started_by:
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
        config_name = "train"
        if rerun:
            config_name = _register_repeated(Path(rerun))
        elif resumed not in (None, "auto"):
            config_name = _register_resumed(Path(str(resumed)))
        if config_name == "train" and "--hydra-help" not in sys.argv:
            # experiment is in the defaults list, where Hydra rejects the + that other programs need.
            sys.argv = [text.replace("+experiment=", "experiment=", 1) for text in sys.argv]
        composed = compose(CONFIGS, config_name)
        if resumed == "auto" and composed:
            _resume_unfinished(composed)
        launch(_train, CONFIGS, config_name)
    ignore_exit_signals()


@contextmanager
def _group() -> Iterator[str | None]:
    """Join the process group if torchrun, Slurm or submitit started us; yield the launcher's name, else None."""
    started_by = detect_launcher()
    with process_group() if started_by else nullcontext():
        yield started_by


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
    return max(1, count_devices() // _gpus_per_job(devices)) if count_devices() else 2


def _gpus_per_job(devices: Any) -> int:
    """Return the number of GPUs per job that ``trainer.devices`` sets; 1 if it leaves the number open."""
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return max(1, len(devices))
    return int(devices) if str(devices).isdigit() and int(devices) else 1


def _resume_unfinished(composed: DictConfig) -> None:
    """Change ``sys.argv`` to resume the unfinished run of the same configuration, if there is one.

    Candidates are hydra.run.dir if it is given, else the siblings of a new run's folder, the last by name first.
    """
    unfinished = _unfinished_run(composed)
    from ema_seg.runtime.distributed.collectives import broadcast  # imports torch, so only after the checks

    folder = broadcast(unfinished)
    text = "null" if folder is None else quoted(folder)
    sys.argv = [f"resume={text}" if argument.startswith("resume=") else argument for argument in sys.argv]
    if folder is not None:
        sys.argv.append(f"hydra.run.dir={text}")


def _unfinished_run(composed: DictConfig) -> Path | None:
    here = Path(str(composed.hydra.run.dir))
    named = any(text.startswith("hydra.run.dir=") for text in sys.argv[1:])
    with open_dict(composed):
        del composed["hydra"]
    config = _run_config(composed)
    check_early(config)
    check_root(config["data"])
    with gc_frozen_imports():
        from ema_seg.run import complete_config
        from ema_seg.training import check_config

    check_config(config)
    complete_config(config)
    found = [here] if named else sorted(here.parent.glob("*"), key=lambda folder: folder.name, reverse=True)
    for folder in found:
        if not named and is_running(folder):
            continue
        kept = [folder / "checkpoints" / name for name in ("last.ckpt", "previous.ckpt")]
        if any(path.is_file() for path in kept) and _is_unfinished(config, folder):
            return folder
    return None


def _is_unfinished(config: dict[str, Any], run: Path) -> bool:
    """Return whether the run in this folder has this configuration and no report."""
    try:
        saved = read_config(run, key="resume")
    except ConfigError:  # not a run, or an incomplete one
        return False
    report = Path(str(saved.get("report", {}).get("dir") or run / "report"))
    return not (report / "report.json").is_file() and _is_same(config, saved)


def _register_resumed(run: Path) -> str:
    """Register a run's own configuration as the primary config, to which the command line's overrides apply."""
    return _register(saved_config(run, key="resume"), str(run))


def _register_repeated(run: Path) -> str:
    """Register a run's own configuration for a new run; allow overrides of machine settings only."""
    # The new run must not write into the original's report folder.
    config = {**saved_config(run, key="rerun"), "report": {"dir": None}}
    free = ("rerun", "hydra", *machine_keys(config))
    for text in sys.argv[1:]:
        if text.startswith("-") or not ("=" in text or text.startswith("~")):
            continue  # an option of Hydra's, such as --cfg, or its value
        key = text.lstrip("+~").partition("=")[0]
        if not any(key == name or key.startswith(f"{name}.") for name in free):
            raise ConfigError(f"rerun={run}: {text} would make it a different run; remove it.")
    name = "${data.name}_${model.decoder}_${attention.name}"
    return _register(config, f"runs/${{started:%Y-%m-%d_%H-%M-%S}}_{name}_rerun")


def _register(config: dict[str, Any], folder: str) -> str:
    """Store a configuration in Hydra's ConfigStore, for a run in this folder, and return its name there."""
    settings = {"run": {"dir": folder}, "output_subdir": None}
    logs = [{"override hydra/hydra_logging": "quiet"}, {"override hydra/job_logging": "stderr"}]
    node = {"rerun": None, **config, "resume": None, "hydra": settings, "defaults": ["_self_", *logs]}
    ConfigStore.instance().store("saved", node)
    return "saved"


def _train(composed: DictConfig) -> None:
    """Train, test and report one run, or one job of a sweep."""
    run = Path(HydraConfig.get().runtime.output_dir)
    if OmegaConf.select(composed, "sweep.job") is None:
        reports_errors(_train_run)(composed, run)
    else:
        _train_job(composed, run)


def _train_run(composed: DictConfig, run: Path) -> None:
    for text in HydraConfig.get().overrides.task:
        if text.lstrip("+~").startswith(("sweep=", "sweep.", "launcher=")):
            raise ConfigError(
                f"{text}: works only in a sweep (python train.py -m {text} …); remove it to train one run."
            )
    config = _run_config(composed)
    job = read_job(run)
    by_time = not config["resume"] and _is_named_by_time()
    if not (config["resume"] or by_time):
        _require_free(run)

    check_early(config)
    check_root(config["data"])

    # Heavy imports only now, so that --help, --cfg and early errors answer at once.
    with gc_frozen_imports():
        from ema_seg.reporting import print_report
        from ema_seg.run import produce_run

    if job:
        _require_same_job(config, run)
    with _hold_folder(run, by_time=by_time) as run:
        report = produce_run(config, run, resume=bool(config["resume"]), job=job, started_by=detect_launcher())
    ignore_exit_signals()
    if rank_info().rank == 0:
        print_report(report)
        print(f"run: {run}")
        if config.get("rerun"):
            _compare(Path(config["rerun"]), run)


def _require_free(run: Path) -> None:
    """Raise a ConfigError if a new run in this folder would replace a run or another program's files."""
    if read_job(run) or (run / "checkpoints").exists():
        raise ConfigError(
            f"{run}: holds a run already; continue it with resume={run}, or choose another hydra.run.dir."
        )
    if (run / "config.yaml").exists():  # from a run without a checkpoint yet, or another program
        try:
            foreign = None if "trainer" in read_config(run, key="resume") else "config.yaml"
        except ConfigError:
            foreign = "config.yaml"
    else:
        foreign = next((name for name in ("environment.json", "metrics.csv") if (run / name).exists()), None)
    if foreign:
        raise ConfigError(
            f"{run / foreign}: was not written by train.py and would be replaced; choose another hydra.run.dir."
        )


def _is_named_by_time() -> bool:
    """Return whether the run's folder is named by the time, so that another command may choose the same name."""
    folder = OmegaConf.to_container(HydraConfig.get().run, resolve=False)
    assert isinstance(folder, dict)
    return "${started:" in str(folder["dir"]) or "${now:" in str(folder["dir"])


@contextmanager
def _hold_folder(run: Path, *, by_time: bool) -> Iterator[Path]:
    """Lock the run's folder in rank 0, and yield the folder in all ranks.

    Commands that start within the same second choose the same name; all but the first append a number to it.
    """
    from ema_seg.runtime.distributed.collectives import broadcast

    with ExitStack() as stack:
        if rank_info().rank == 0:
            run = _hold_unused(run, stack) if by_time else run
            if not by_time:
                stack.enter_context(lock_run(run))
        yield broadcast(run)


def _hold_unused(run: Path, stack: ExitStack) -> Path:
    for number in count(1):
        folder = run if number == 1 else run.with_name(f"{run.name}_{number}")
        with ExitStack() as attempt, suppress(ConfigError):  # another command holds the lock
            attempt.enter_context(lock_run(folder))
            if not (folder / "config.yaml").exists():
                stack.push(attempt.pop_all())
                return folder
    raise AssertionError


def _compare(original: Path, run: Path) -> None:
    """Compare a rerun with its original, print and save the result; raise a TrainingError if they differ."""
    from ema_seg.comparison.repeat import compare_runs, describe_comparison
    from ema_seg.runtime.files import write_file

    comparison = compare_runs(original, run)
    write_file(run / "rerun.json", f"{json.dumps(comparison, indent=2)}\n".encode())
    lines, identical = describe_comparison(comparison)
    print(f"compared with {original}:", *lines, sep="\n")
    if not identical:
        raise TrainingError(
            f"rerun={original}: {run} must be bitwise identical, but differs; see {run / 'rerun.json'}."
        )


def _require_same_job(config: dict[str, Any], run: Path) -> None:
    """Raise a ConfigError if overrides give a resumed job of a sweep another identity."""
    if not _is_same(config, read_config(run, key="resume")):
        raise ConfigError(
            f"resume={run}: the overrides would make this job of a sweep a different one; remove them, or add them to "
            "the sweep's command."
        )


def _is_same(config: dict[str, Any], saved: dict[str, Any]) -> bool:
    """Return whether both have the same identity; ``data.batch_size=auto`` takes the saved batch size."""
    if config["data"]["batch_size"] == "auto":
        config = {**config, "data": {**config["data"], "batch_size": saved.get("data", {}).get("batch_size")}}
    return hash_config(config) == hash_config(saved)


def _train_job(composed: DictConfig, run: Path) -> None:
    """Train one job of a sweep; record its errors in its folder instead of ending the sweep."""
    with _group() as started_by:
        try:
            if rank_info().rank:
                _follow_job(composed, run, started_by)
            else:
                _lead_job(composed, run, started_by)
        except Preempted as error:  # launchers expect SystemExit
            print(error, file=sys.stderr)
            sys.exit(error.exit_status)
    _free_memory()  # only here: a job's exception keeps its objects alive


def _lead_job(composed: DictConfig, run: Path, started_by: str | None) -> None:
    from ema_seg.runtime.distributed.collectives import broadcast

    (planned,) = (job for job in read_plan(run.parent).jobs if job.folder == run.name)
    job: dict[str, Any] = {"identity": planned.identity, "overrides": planned.overrides}
    launcher = HydraConfig.get().runtime.choices["launcher"]
    worked = False

    def work(resume: bool) -> None:
        nonlocal worked
        worked = True
        broadcast((resume,))
        if composed.sweep.deal_devices and composed.trainer.accelerator != "cpu":
            devices = composed.trainer.devices
            claim_devices(run.parent, devices if OmegaConf.is_list(devices) else _gpus_per_job(devices))
        _produce_job(composed, run, resume, {**job, "launcher": launcher}, started_by)

    run_job(run, job, work, retry=composed.sweep.retry)
    if not worked:
        broadcast(())


def _follow_job(composed: DictConfig, run: Path, started_by: str | None) -> None:
    """Train a job in a rank other than 0, as rank 0 decides."""
    from ema_seg.runtime.distributed.collectives import broadcast

    told: tuple[bool, ...] = ()
    for resume in broadcast(told):
        _produce_job(composed, run, resume, None, started_by)


def _produce_job(
    composed: DictConfig, run: Path, resume: bool, job: dict[str, Any] | None, started_by: str | None
) -> None:
    with gc_frozen_imports():
        from ema_seg.run import produce_run

    callbacks = _search_callbacks(composed, run)
    config = _run_config(composed)
    try:
        with report_first_failure():
            produce_run(config, run, resume=resume, job=job, quiet=True, callbacks=callbacks, started_by=started_by)
    except SecondaryFailure as silent:
        if rank_info().rank or silent.first is None:
            raise
        raise silent.first from None


def _search_callbacks(composed: DictConfig, run: Path) -> list[Any]:
    """Return the callback that prunes a trial of a search; no callbacks for other jobs."""
    if composed.sweep.get("trial") is None:
        return []
    from ema_seg.sweeps.search import PruningCallback

    return [PruningCallback(run.parent, composed.sweep.trial, seed=composed.sweep.seed, grace=composed.sweep.grace)]


def _run_config(composed: DictConfig) -> dict[str, Any]:
    """Return the resolved configuration of a run, without the ``sweep`` section."""
    config = plain_config(composed)
    config.pop("sweep", None)
    return config


def _free_memory() -> None:
    """Free a job's memory and compiled code, before the next job in this process."""
    import torch

    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
