"""A run from its configuration to its report, in as many processes as it asks for."""

import json
import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, seed_everything
from omegaconf import OmegaConf

from ema_seg.data.datamodule import check_shares
from ema_seg.distributed.collectives import agree, require_shared
from ema_seg.distributed.preemption import Preemption
from ema_seg.distributed.start import place, run_together
from ema_seg.errors import ConfigError, Preempted, TrainingError
from ema_seg.models import encoder_normalisation
from ema_seg.models.mode import deterministic_algorithms
from ema_seg.reporting import assess_checkpoint, find_device, load_report
from ema_seg.reporting.files import write_file
from ema_seg.training import check_config, count_processes, find_batch_size, fit, take_device, training_device

__all__ = ["complete_config", "evaluate_run", "produce_run"]


def produce_run(
    config: dict[str, Any],
    run: Path,
    *,
    resume: bool = False,
    job: Mapping[str, Any] | None = None,
    quiet: bool = False,
    callbacks: Sequence[Callback] = (),
    started_by: str | None = None,
) -> dict[str, Any]:
    """Train what a configuration describes, test the best checkpoint, and write the report.

    Args:
        config: the resolved configuration of ``train.py`` as plain data.
        run: the run's folder, which receives ``config.yaml``, what ``fit`` writes, and ``report/``.
        resume: go on from the last checkpoint in that folder.
        job: see ``assess_checkpoint``.
        quiet: print no line per epoch and show no progress bar.
        callbacks: Lightning's, besides the run's own; picklable.
        started_by: what has started this process as one of a group that trains the run; see ``count_processes``.

    Returns:
        The report, as ``report.json`` holds it; nothing in a process of a group but the first.

    Raises:
        EmaSegError: whatever a user can correct, from the parts that find it.
    """
    check_config(config)
    processes = count_processes(config["trainer"], started_by)
    if config["data"]["batch_size"] != "auto":
        check_shares(config["data"]["batch_size"], processes)
    if processes == 1:
        find_device(config["evaluation"]["device"])  # elsewhere it would take memory of a device for nothing
    directory = Path(config["report"]["dir"] or run / "report")
    threads = _threads_of(Path(config["rerun"])) if config.get("rerun") else None
    settings = {"resume": resume, "job": job, "quiet": quiet, "callbacks": list(callbacks), "threads": threads}
    return _report_of(_work, processes, directory, config, run, directory, settings)


def _work(config: dict[str, Any], run: Path, directory: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What each of the processes does."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    here = place()
    if here.rank:
        warnings.simplefilter("ignore")  # the first process's are enough
    run, directory = agree((run.absolute(), directory.absolute()))
    for folder in (run, directory):
        require_shared(folder)
    take_device(config["trainer"])
    evaluation = _evaluation(config)
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])  # on which the order of additions depends
    seed_everything(config["seed"], workers=True, verbose=False)
    complete_config(config)
    quiet = settings["quiet"] or here.rank > 0
    wanted = bool(config["trainer"].get("deterministic"))
    with Preemption().watched() as preemption, deterministic_algorithms(wanted):
        if config["data"]["batch_size"] == "auto":
            config["data"]["batch_size"] = _batch_size(config, run, settings)
        if here.rank == 0:
            write_file(run / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)).encode())
        best = fit(
            config,
            run,
            resume=settings["resume"],
            quiet=quiet,
            callbacks=settings["callbacks"],
            preemption=preemption,
        )
        return assess_checkpoint(
            best, config["data"], evaluation, directory, run=str(run), job=settings["job"], quiet=quiet
        )


def _evaluation(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the evaluation, for which each of several processes has a device of its own.

    Raises:
        ConfigError: the device that they name is none, or would be shared.
    """
    settings: Mapping[str, Any] = config["evaluation"]
    if place().size == 1:
        return settings
    trained_on = training_device(config["trainer"]).type
    if settings["device"] == "auto":
        return {**settings, "device": trained_on}
    device = find_device(settings["device"])
    if device.type != "cpu" and trained_on == "cpu":
        raise ConfigError(
            f"evaluation.device={settings['device']}: the {place().size} processes train on the CPU and would share "
            "one device; set evaluation.device=auto."
        )
    return settings


def _threads_of(run: Path) -> int | None:
    """The threads that each process of a run had; None if it does not say."""
    path = run / "environment.json"
    try:
        threads = json.loads(path.read_text(encoding="utf-8"))["threads"]
        if type(threads) is not int or not 1 <= threads <= 2**12:  # torch takes, or dies of, any number
            raise ValueError(threads)
        return threads
    except OSError:
        return None
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"rerun={run}: {path} is not as train.py wrote it; restore it.") from error


def _batch_size(config: dict[str, Any], run: Path, settings: Mapping[str, Any]) -> int:
    """The largest batch that fits; of a run that goes on, the one that it was begun with."""
    if settings["resume"]:
        # Read by the first process alone, which writes the file next.
        return agree(int(OmegaConf.load(run / "config.yaml").data.batch_size) if place().rank == 0 else 0)
    found = find_batch_size(config, training_device(config["trainer"]))
    if place().rank == 0:
        print(f"data.batch_size=auto: {found} is the largest that fits.", file=sys.stderr, flush=True)
    return found


def evaluate_run(
    checkpoint: Path,
    data: Mapping[str, Any],
    settings: Mapping[str, Any],
    directory: Path,
    *,
    devices: int | str | list[int] = 1,
    run: str | None = None,
    job: Mapping[str, Any] | None = None,
    started_by: str | None = None,
) -> dict[str, Any]:
    """Test a checkpoint, and write the report; see ``assess_checkpoint``.

    Args:
        checkpoint: see ``assess_checkpoint``.
        data: see ``assess_checkpoint``.
        settings: see ``assess_checkpoint``.
        directory: see ``assess_checkpoint``.
        devices: processes that score together, each on a GPU of its own if there are GPUs; "auto" for one on each, or
            the GPUs' numbers.
        run: see ``assess_checkpoint``.
        job: see ``assess_checkpoint``.
        started_by: what has started this process as one of a group that evaluates; see ``count_processes``.

    Returns:
        The report, as ``report.json`` holds it; nothing in a process of a group but the first.

    Raises:
        EmaSegError: whatever a user can correct, from the parts that find it.
    """
    accelerator = "cpu" if settings["device"] == "cpu" else "auto"
    trainer = {"accelerator": accelerator, "devices": devices}
    processes = count_processes(trainer, started_by)
    arguments = (checkpoint, dict(data), dict(settings), directory, run, job, trainer)
    return _report_of(_assess, processes, directory, *arguments)


def _report_of(work: Callable[..., dict[str, Any]], processes: int, directory: Path, *arguments: Any) -> dict[str, Any]:
    """Do the work here if this is one of the processes already, or else in new ones, which leave the report.

    Raises:
        TrainingError: they have not left it.
    """
    path = directory / "report.json"
    earlier = _version(path)
    try:
        if processes == place().size:
            return work(*arguments)
        run_together(work, processes, *arguments)
    except Preempted:
        if _version(path) == earlier:
            raise  # else it came too late for there to be anything to go on with
    if _version(path) == earlier:
        raise TrainingError(f"{path} was not written, though all {processes} processes have ended well; try again.")
    return load_report(path)


def _version(path: Path) -> tuple[int, int] | None:
    """What changes where a file is replaced; None of one that is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _assess(
    checkpoint: Path,
    data: dict[str, Any],
    settings: dict[str, Any],
    directory: Path,
    run: str | None,
    job: Mapping[str, Any] | None,
    trainer: Mapping[str, Any],
) -> dict[str, Any]:
    take_device(trainer)
    # Each may have named the folder by its own time.
    directory = agree(directory.absolute())
    require_shared(directory)
    return assess_checkpoint(checkpoint, data, settings, directory, run=run, job=job)


def complete_config(config: Mapping[str, Any]) -> None:
    """Fill in what the user has left to the project, so that the saved configuration says all of it."""
    data, model = config["data"], config["model"]
    if data["mean"] is None or data["std"] is None:
        normalisation = encoder_normalisation(model["encoder"], model["encoder_weights"])
        for key, values in normalisation._asdict().items():
            data[key] = list(values) if data[key] is None else data[key]
    for key in ("root", "classes"):
        if data.get(key) is not None:
            data[key] = str(Path(data[key]).absolute())
