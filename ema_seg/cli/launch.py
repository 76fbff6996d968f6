"""Training and evaluation of a run, from its configuration to its report, in one or several processes."""

import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, seed_everything
from omegaconf import OmegaConf

from ema_seg.cli.checks import check_config
from ema_seg.data.datamodule import check_batch_divides
from ema_seg.evaluate import evaluate, write_submission
from ema_seg.inference.device import find_device
from ema_seg.models import encoder_normalisation, load_checkpoint
from ema_seg.models.checkpoint import checkpoint_path
from ema_seg.reporting import load_report
from ema_seg.reporting.report import FILES, report_manifest
from ema_seg.runtime.distributed.collectives import broadcast, require_shared
from ema_seg.runtime.distributed.preemption import Preemption
from ema_seg.runtime.distributed.ranks import rank_info
from ema_seg.runtime.distributed.spawn import run_together
from ema_seg.runtime.errors import ConfigError, DataError, Preempted, TrainingError
from ema_seg.runtime.execution import deterministic_algorithms, tf32
from ema_seg.runtime.files import write_file
from ema_seg.runtime.hub import hub_address
from ema_seg.runtime.texts import read_json, read_yaml
from ema_seg.training import find_batch_size, resolve_world_size, set_cuda_device, training_device
from ema_seg.training.initial import gives_encoder

__all__ = ["complete_config", "complete_paths", "evaluate_run", "produce_run", "submit_run"]


def produce_run(
    train: Callable[..., Path],
    config: dict[str, Any],
    run: Path,
    *,
    resume: bool = False,
    job: Mapping[str, Any] | None = None,
    quiet: bool = False,
    callbacks: Sequence[Callback] = (),
    started_by: str | None = None,
) -> dict[str, Any]:
    """Train the model of a configuration, test the best checkpoint, and write the report.

    Args:
        train: ``ema_seg.train.train``, which every process calls.
        config: the resolved configuration of ``train.py`` as plain data.
        run: the run's folder; receives ``config.yaml``, the files of ``train`` and ``report/``.
        resume: continue from the last checkpoint in that folder.
        job: see ``evaluate``.
        quiet: print no line per epoch and show no progress bar.
        callbacks: further Lightning callbacks; picklable.
        started_by: the launcher of this process's group, if any; see ``resolve_world_size``.

    Returns:
        The report, as in ``report.json``; an empty dict on ranks other than 0.

    Raises:
        EmaSegError: any error that the user can correct.
    """
    check_config(config)
    processes = resolve_world_size(config["trainer"], started_by)
    if config["data"]["batch_size"] != "auto":
        check_batch_divides(config["data"]["batch_size"], processes)
    if processes == 1:
        find_device(config["evaluation"]["device"])  # with more processes, this would occupy GPU memory for nothing
    directory = Path(config["report"]["dir"] or run / "report")
    threads = _threads_of(Path(config["rerun"])) if config.get("rerun") else None
    if rank_info().rank == 0:
        report_manifest(directory).check(FILES)  # before the training, not only after it
    settings = {"resume": resume, "job": job, "quiet": quiet, "callbacks": list(callbacks), "threads": threads}
    return _run_and_load_report(_train_and_evaluate, processes, directory, train, config, run, directory, settings)


def _train_and_evaluate(
    train: Callable[..., Path], config: dict[str, Any], run: Path, directory: Path, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Train and evaluate in this process, alone or as one rank of several."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    here = rank_info()
    if here.rank:
        warnings.simplefilter("ignore")  # rank 0 shows them
    run, directory = broadcast((run.absolute(), directory.absolute()))
    for folder in (run, directory):
        require_shared(folder)
    set_cuda_device(config["trainer"])
    evaluation = _evaluation(config)
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])  # the summation order depends on it
    seed_everything(config["seed"], workers=True, verbose=False)
    complete_config(config, resumed=run if settings["resume"] else None)
    quiet = settings["quiet"] or here.rank > 0
    wanted = bool(config["trainer"].get("deterministic"))
    multiply = tf32(config["training"].get("tf32"))
    with Preemption().watched() as preemption, deterministic_algorithms(wanted), multiply:
        if config["data"]["batch_size"] == "auto":
            config["data"]["batch_size"] = _batch_size(config, run, settings)
        best = train(
            config,
            run,
            resume=settings["resume"],
            quiet=quiet,
            callbacks=settings["callbacks"],
            preemption=preemption,
            on_start=partial(_write_config, config, run),
        )
        report = evaluate(best, config["data"], evaluation, directory, run=str(run), job=settings["job"], quiet=quiet)
        _write_config(config, run)  # if nothing was left to train, only after a successful evaluation
        return report


def _write_config(config: Mapping[str, Any], run: Path) -> None:
    if rank_info().rank == 0:
        write_file(run / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(config))).encode())


def _evaluation(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the evaluation's settings; in a process group, ``device=auto`` becomes the type of the training's device.

    Raises:
        ConfigError: the device is not available, or all ranks would share it.
    """
    settings: Mapping[str, Any] = config["evaluation"]
    if rank_info().size == 1:
        return settings
    trained_on = training_device(config["trainer"]).type
    if settings["device"] == "auto":
        return {**settings, "device": trained_on}
    device = find_device(settings["device"])
    if device.type != "cpu" and trained_on == "cpu":
        raise ConfigError(
            f"evaluation.device={settings['device']}: the {rank_info().size} processes train on the CPU and would "
            "share one device; set evaluation.device=auto."
        )
    return settings


def _threads_of(run: Path) -> int | None:
    """Read the number of threads per process of a run; None without ``environment.json``.

    Raises:
        ConfigError: the file does not hold a valid number of threads.
    """
    path = run / "environment.json"
    try:
        threads = read_json(path)["threads"]
        if type(threads) is not int or not 1 <= threads <= 2**12:  # torch accepts any number, and may crash
            raise ValueError(threads)
        return threads
    except OSError:
        return None
    except (KeyError, TypeError, ValueError, DataError) as error:
        raise ConfigError(
            f"rerun={run}: {path} must hold threads, a whole number from 1 to 4096, as train.py wrote it; restore it."
        ) from error


def _batch_size(config: dict[str, Any], run: Path, settings: Mapping[str, Any]) -> int:
    """Find the largest batch size that fits; for a resumed run, read the one in its saved configuration."""
    if settings["resume"]:
        # Rank 0 alone reads the file, because it rewrites it next.
        return broadcast(int(read_yaml(run / "config.yaml")["data"]["batch_size"]) if rank_info().rank == 0 else 0)
    found = find_batch_size(config, training_device(config["trainer"]))
    if rank_info().rank == 0:
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
    """Test a checkpoint, and write the report; see ``evaluate``.

    Args:
        checkpoint: see ``evaluate``.
        data: see ``evaluate``.
        settings: see ``evaluate``.
        directory: see ``evaluate``.
        devices: number of processes, each on its own GPU if there are GPUs; "auto" for one per GPU; or a list of GPU
            indices.
        run: see ``evaluate``.
        job: see ``evaluate``.
        started_by: the launcher of this process's group, if any; see ``resolve_world_size``.

    Returns:
        The report, as in ``report.json``; an empty dict on ranks other than 0.

    Raises:
        EmaSegError: any error that the user can correct.
    """
    trainer = _evaluation_trainer(settings, devices)
    processes = resolve_world_size(trainer, started_by)
    arguments = (checkpoint, dict(data), dict(settings), directory, run, job, trainer)
    return _run_and_load_report(_assess, processes, directory, *arguments)


def submit_run(
    checkpoint: Path,
    data: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    devices: int | str | list[int] = 1,
    started_by: str | None = None,
) -> None:
    """Write the masks of a split without labels for the benchmark's server; see ``write_submission``.

    Args:
        checkpoint: see ``evaluate``.
        data: see ``evaluate``.
        settings: see ``write_submission``.
        devices: see ``evaluate_run``.
        started_by: see ``evaluate_run``.

    Raises:
        EmaSegError: any error that the user can correct.
    """
    trainer = _evaluation_trainer(settings, devices)
    processes = resolve_world_size(trainer, started_by)
    arguments = (checkpoint, dict(data), dict(settings), trainer)
    if processes == rank_info().size:
        _submit(*arguments)
    else:
        run_together(_submit, processes, *arguments)


def _evaluation_trainer(settings: Mapping[str, Any], devices: int | str | list[int]) -> dict[str, Any]:
    """Return the options of Lightning's Trainer that choose the processes of an evaluation."""
    return {"accelerator": "cpu" if settings["device"] == "cpu" else "auto", "devices": devices}


def _submit(checkpoint: Path, data: dict[str, Any], settings: dict[str, Any], trainer: Mapping[str, Any]) -> None:
    set_cuda_device(trainer)
    write_submission(checkpoint, data, settings)


def _run_and_load_report(
    work: Callable[..., dict[str, Any]], processes: int, directory: Path, *arguments: Any
) -> dict[str, Any]:
    """Call ``work`` here if all ``processes`` are running already, else in new ones, and return the report.

    Raises:
        TrainingError: the new processes ended without writing the report.
    """
    path = directory / "report.json"
    earlier = _file_stamp(path)
    try:
        if processes == rank_info().size:
            return work(*arguments)
        run_together(work, processes, *arguments)
    except Preempted:
        if _file_stamp(path) == earlier:
            raise  # otherwise the report was complete when the signal came
    if _file_stamp(path) == earlier:
        raise TrainingError(f"{path}: not written, although all {processes} processes exited with status 0; try again.")
    return load_report(path)


def _file_stamp(path: Path) -> tuple[int, int] | None:
    """Return inode and modification time, which change when a file is replaced; None if it does not exist."""
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
    set_cuda_device(trainer)
    # Each rank may have named the folder by its own clock.
    directory = broadcast(directory.absolute())
    require_shared(directory)
    return evaluate(checkpoint, data, settings, directory, run=run, job=job)


def complete_config(config: dict[str, Any], resumed: Path | None = None) -> None:
    """Fill in the encoder's normalisation and make paths absolute, in place, so that the saved config is complete.

    Args:
        config: the configuration of a run.
        resumed: the run's folder if it is resumed; its normalisation is taken.

    Raises:
        EmaSegError: see ``encoder_normalisation`` and ``load_checkpoint``.
    """
    data = config["data"]
    if data["mean"] is None or data["std"] is None:
        for key, values in _normalisation(config, resumed).items():
            data[key] = list(values) if data[key] is None else data[key]
    complete_paths(config)


def complete_paths(config: dict[str, Any]) -> None:
    """Make the paths that identify a run absolute, in place."""
    for section, key in ((config["data"], "root"), (config["data"], "classes"), (config, "init_from")):
        if section.get(key) is not None and not (key == "init_from" and hub_address(section[key])):
            section[key] = str(Path(section[key]).absolute())


def _normalisation(config: Mapping[str, Any], resumed: Path | None) -> Mapping[str, Any]:
    """Return mean and std of the resumed run, of the run that gives the encoder, or of the encoder's weights."""
    if resumed is not None:
        # Rank 0 alone reads the file, because it rewrites it next.
        return broadcast(_mean_and_std(read_yaml(resumed / "config.yaml")) if rank_info().rank == 0 else {})
    if config.get("init_from"):
        trained = load_checkpoint(checkpoint_path(config["init_from"]))["config"]
        if gives_encoder(trained, config):
            return _mean_and_std(trained)
    return encoder_normalisation(config["model"]["encoder"], config["model"]["encoder_weights"])._asdict()


def _mean_and_std(config: Any) -> dict[str, Any]:
    return {key: config["data"][key] for key in ("mean", "std")}
