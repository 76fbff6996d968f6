"""Number of processes of a training, their devices, and the arguments of Lightning's Trainer."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy

from ema_seg.runtime.distributed.ranks import RankInfo, rank_info
from ema_seg.runtime.errors import ConfigError
from ema_seg.training.parallel.sharded import ShardedStrategy
from ema_seg.training.parallel.sync_batch_norm import SyncLayers

__all__ = [
    "replicated_strategy",
    "requested_world_size",
    "resolve_world_size",
    "set_cuda_device",
    "trainer_arguments",
    "training_device",
]

# Limit without GPUs, where a mistyped number could fill the node with processes.
_PROCESSES_OF_A_CORE = 4
_STRATEGIES = ("auto", "ddp", "fsdp")


class _Devices(NamedTuple):
    """Devices per node (None for all) and number of nodes (None for any) that the section ``trainer`` requests.

    ``last`` is the highest GPU index that it names.
    """

    devices: int | None
    machines: int | None
    last: int | None = None


def requested_world_size(settings: Mapping[str, Any]) -> int:
    """Return the world size that ``trainer`` requests; 1 for each of devices and nodes that it leaves open.

    Raises:
        ConfigError: a setting is invalid.
    """
    asked = _read(settings)
    return (asked.devices or 1) * (asked.machines or 1)


def resolve_world_size(settings: Mapping[str, Any], started_by: str | None = None) -> int:
    """Return the world size of the training.

    Args:
        settings: the section ``trainer``.
        started_by: the launcher that has started this process as one rank of a group, such as ``"torchrun"``; the
            process must have joined the process group. None if there is none.

    Raises:
        ConfigError: a setting is invalid, contradicts the processes that were started, or requests devices that this
            node does not have.
    """
    asked = _read(settings)
    if started_by is None:
        if asked.machines not in (None, 1):
            raise ConfigError(
                f"trainer.num_nodes={asked.machines}: torchrun or srun must start processes on each machine; see "
                "docs/distributed.md."
            )
        there = _count_devices(settings.get("accelerator"))
        if asked.devices is not None and there is not None and asked.devices > there:
            raise ConfigError(f"devices={asked.devices}: must be at most {there}, the number of GPUs of this machine.")
        _require_named(asked, there)
        cores = os.cpu_count() or 1
        if there is None and (asked.devices or 1) > _PROCESSES_OF_A_CORE * cores:
            raise ConfigError(
                f"devices={asked.devices}: must be at most {_PROCESSES_OF_A_CORE * cores} processes on the {cores} "
                "cores of this machine."
            )
        return asked.devices or there or 1
    here, there = rank_info(), _count_devices(settings.get("accelerator"))
    _require_started(asked, here, started_by)
    if there is not None and here.local_size > there:
        raise ConfigError(
            f"{started_by} has started {here.local_size} processes on this machine, but each sees {there} "
            f"{'GPU' if there == 1 else 'GPUs'}; start one process per GPU, and let each see all GPUs (Slurm: "
            "--gpus-per-node, not --gpus-per-task)."
        )
    _require_named(asked, there)
    return here.size


def training_device(settings: Mapping[str, Any]) -> torch.device:
    """Return the device that this process trains on."""
    if not _count_devices(settings.get("accelerator")):
        return torch.device("cpu")
    devices = settings.get("devices")
    local = rank_info().local_rank
    return torch.device("cuda", devices[local] if isinstance(devices, list) else local)


def set_cuda_device(settings: Mapping[str, Any]) -> None:
    """Make the GPU that this process trains on the current CUDA device."""
    device = training_device(settings)
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _require_started(asked: _Devices, here: RankInfo, started_by: str) -> None:
    if asked.devices not in (None, here.local_size):
        raise ConfigError(
            f"devices={asked.devices}: must be {here.local_size}, the number of processes that {started_by} has "
            "started on this machine; set that, or auto, as trainer=ddp does."
        )
    machines = here.size // here.local_size
    if here.size % here.local_size:
        raise ConfigError(
            f"{started_by} has started {here.local_size} of {here.size} processes on this machine; start the same "
            "number on each machine."
        )
    if asked.machines not in (None, machines):
        raise ConfigError(
            f"trainer.num_nodes={asked.machines}: must be {machines}, the number of machines on which {started_by} has "
            "started processes; set that, or remove it."
        )


def _require_named(asked: _Devices, there: int | None) -> None:
    if asked.last is not None and there is not None and asked.last >= there:
        raise ConfigError(
            f"devices: the GPUs of this machine are 0 to {there - 1}, got {asked.last}; choose among those."
        )


def _read(settings: Mapping[str, Any]) -> _Devices:
    strategy, devices, machines = (settings.get(key) for key in ("strategy", "devices", "num_nodes"))
    if strategy not in (None, *_STRATEGIES):
        raise ConfigError(f"trainer.strategy={strategy}: must be one of {', '.join(_STRATEGIES)}.")
    if machines is not None and not _is_count(machines):
        raise ConfigError(f"trainer.num_nodes={machines!r}: must be a number of machines of at least 1.")
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if isinstance(devices, list) and devices and all(device == 0 or _is_count(device) for device in devices):
        return _Devices(len(devices), machines, max(devices))
    if devices in (None, "auto", -1):
        return _Devices(None, machines)
    if not _is_count(devices):
        raise ConfigError(
            f"devices={devices!r}: must be a number of devices, auto for all, or a list of GPUs such as [0,1]."
        )
    return _Devices(devices, machines)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _count_devices(accelerator: str | None) -> int | None:
    """Count this node's GPUs if the accelerator may use them; None for the CPU, which any number of ranks can share."""
    if accelerator in ("gpu", "cuda", "auto", None):
        return torch.cuda.device_count() or None
    return None


def trainer_arguments(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """Return keyword arguments and plugins of Lightning's Trainer for this process.

    Args:
        settings: the section ``trainer``.
    """
    here = rank_info()
    arguments = dict(settings)
    sync_batchnorm = arguments.pop("sync_batchnorm", False)
    environment: ClusterEnvironment
    if here.size == 1:
        # Otherwise Lightning would detect Slurm, and wait for other processes.
        environment = LightningEnvironment()
        # Lightning reads the rank from RANK, which may be left over; on a rank other than 0 nothing is logged.
        environment.set_global_rank(0)
        if not isinstance(arguments.get("devices"), list):
            arguments["devices"] = 1
        return {**arguments, "num_nodes": 1, "strategy": "auto"}, [environment]
    environment = TorchElasticEnvironment()
    if not isinstance(arguments.get("devices"), list):
        arguments["devices"] = here.local_size
    sharded = settings.get("strategy") == "fsdp"
    arguments |= {
        "num_nodes": here.size // here.local_size,
        "strategy": ShardedStrategy() if sharded else replicated_strategy(),
        "use_distributed_sampler": False,
    }
    if sharded:
        # Weights gathered for a validation would be inference tensors, which a training cannot update.
        arguments["inference_mode"] = False
    cuda = _count_devices(settings.get("accelerator")) is not None
    return arguments, [environment, *([SyncLayers(cuda=cuda)] if sync_batchnorm else [])]


def replicated_strategy() -> DDPStrategy:
    """Return Lightning's DDP strategy, for models that may have unused parameters, such as an encoder's classifier."""
    return DDPStrategy(
        # By default DDP broadcasts buffers in every forward pass, but the ranks may validate different numbers of
        # images. The module broadcasts them once before each validation instead.
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        # DDP would wait for the gradients of unused parameters. Without this it also reorders its gradient buckets
        # after the first step: three or more ranks would add up a gradient in another order after a resume.
        find_unused_parameters=True,
    )
