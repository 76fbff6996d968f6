"""Launchers that start this process as one of several: torchrun, Slurm and submitit."""

import os
from collections.abc import Mapping
from typing import Any

from ema_seg.runtime.errors import ConfigError

__all__ = ["detect_launcher"]


def detect_launcher() -> str | None:
    """Return "torchrun", "Slurm" or "submitit" if one started this process as one of several, else None.

    Translates Slurm's and submitit's environment variables to torchrun's, which ``process_group`` reads.
    """
    variables: Mapping[str, Any] = {}
    if "TORCHELASTIC_RUN_ID" in os.environ:
        name = "torchrun"
    # Only srun sets the number of a step's tasks: a batch script is one process, however many tasks the job has.
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        name, variables = "Slurm", _slurm()
    elif int(os.environ.get("SUBMITIT_LOCAL_NTASKS", 1)) > 1:
        name, variables = "submitit", _submitit()
    else:
        return None
    os.environ.update({key: str(value) for key, value in variables.items()})
    return name if int(os.environ["WORLD_SIZE"]) > 1 else None


def _slurm() -> dict[str, Any]:
    from lightning.fabric.plugins.environments import SLURMEnvironment

    size, first = int(os.environ["SLURM_STEP_NUM_TASKS"]), os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1")
    return {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": _tasks_of_machine(size),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(first),
        "MASTER_PORT": os.environ.get("MASTER_PORT")
        or _port(os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_STEP_ID", "0")),
    }


def _tasks_of_machine(size: int) -> int:
    """Return the local world size of a Slurm step; reject steps with unequal numbers of tasks per node."""
    layout = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # such as 4(x2),3
    counts = {part.partition("(")[0] for part in layout.split(",")}
    if len(counts) > 1:
        raise ConfigError(
            f"Slurm: the number of tasks must be the same on every machine, got {layout}; set it with "
            "--ntasks-per-node."
        )
    return size // int(os.environ.get("SLURM_STEP_NUM_NODES", 1))


def _port(job: str, step: str = "0") -> int:
    """Return a port that all ranks of a job's step share and most other jobs and steps do not use."""
    return 15000 + (int(job) + 1009 * int(step)) % 10000


def _submitit() -> dict[str, Any]:
    """Return torchrun's variables for submitit's local executor, whose tasks are on one machine."""
    size, job = os.environ["SUBMITIT_LOCAL_NTASKS"], os.environ["SUBMITIT_LOCAL_JOB_ID"]
    return {
        "RANK": os.environ["SUBMITIT_LOCAL_GLOBALID"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": os.environ["SUBMITIT_LOCAL_LOCALID"],
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": _port(job),
    }
