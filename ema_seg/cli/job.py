"""A job of a sweep: one training whose errors are recorded in its folder instead of ending the sweep."""

import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ema_seg.cli.command_line import run_config
from ema_seg.runtime.distributed.group import SecondaryFailure, join_launcher, report_first_failure
from ema_seg.runtime.distributed.ranks import rank_info
from ema_seg.runtime.errors import Preempted
from ema_seg.runtime.host_memory import gc_frozen_imports
from ema_seg.sweeps import claim_devices, read_plan, run_job

__all__ = ["gpus_per_job", "train_job"]


def train_job(composed: DictConfig, run: Path) -> None:
    """Train one job of a sweep; record its errors in its folder instead of ending the sweep."""
    with join_launcher() as started_by:
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
            claim_devices(run.parent, devices if OmegaConf.is_list(devices) else gpus_per_job(devices))
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
        from ema_seg.cli.launch import produce_run
        from ema_seg.train import train

    callbacks = _search_callbacks(composed, run)
    config = run_config(composed)
    try:
        with report_first_failure():
            produce_run(
                train, config, run, resume=resume, job=job, quiet=True, callbacks=callbacks, started_by=started_by
            )
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


def gpus_per_job(devices: Any) -> int:
    """Return the number of GPUs per job that ``trainer.devices`` sets; 1 if it leaves the number open."""
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return max(1, len(devices))
    return int(devices) if str(devices).isdigit() and int(devices) else 1


def _free_memory() -> None:
    """Free a job's memory and compiled code, before the next job in this process."""
    import torch

    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
