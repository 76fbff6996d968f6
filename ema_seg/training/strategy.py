"""In how many processes a training runs, and how they share the work."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ema_seg.distributed.start import Place, place
from ema_seg.errors import ConfigError
from ema_seg.models import model_stride
from ema_seg.models.mode import evaluation_mode
from ema_seg.training.sharded import ShardedStrategy
from ema_seg.training.sync_batch_norm import SyncLayers

__all__ = ["count_processes", "named_processes", "take_device", "trainer_arguments", "training_device"]

# Without GPUs nothing else would keep a mistyped number from filling the machine with processes.
_PROCESSES_OF_A_CORE = 4
_STRATEGIES = ("auto", "ddp", "fsdp")


class _Devices(NamedTuple):
    """What ``trainer`` asks for: devices of each machine, None for all that there are, and machines, None for any.

    ``last`` is the highest number of a GPU among those that are named.
    """

    devices: int | None
    machines: int | None
    last: int | None = None


def named_processes(settings: Mapping[str, Any]) -> int:
    """The number of processes that ``trainer`` names; 1 where it leaves that to the machine.

    Raises:
        ConfigError: the settings are none.
    """
    asked = _read(settings)
    return (asked.devices or 1) * (asked.machines or 1)


def count_processes(settings: Mapping[str, Any], started_by: str | None = None) -> int:
    """The number of processes to train in.

    Args:
        settings: of ``trainer``.
        started_by: what has started this process as one of a group, which then is ``joined``; None if nothing has.

    Raises:
        ConfigError: the settings are none, or ask for other processes than have been started, or for devices that
            this machine does not have.
    """
    asked = _read(settings)
    if started_by is None:
        if asked.machines not in (None, 1):
            raise ConfigError(
                f"trainer.num_nodes={asked.machines} needs a process started on each machine, by torchrun or by srun; "
                "see docs/distributed.md."
            )
        there = _count_devices(settings.get("accelerator"))
        if asked.devices is not None and there is not None and asked.devices > there:
            raise ConfigError(f"{asked.devices} devices are more than the {there} GPUs of this machine.")
        _require_named(asked, there)
        cores = os.cpu_count() or 1
        if there is None and (asked.devices or 1) > _PROCESSES_OF_A_CORE * cores:
            raise ConfigError(
                f"{asked.devices} processes are too many for the {cores} cores of this machine; choose "
                f"{_PROCESSES_OF_A_CORE * cores} at most."
            )
        return asked.devices or there or 1
    here, there = place(), _count_devices(settings.get("accelerator"))
    _require_started(asked, here, started_by)
    if there is not None and here.local_size > there:
        raise ConfigError(
            f"{started_by} has started {here.local_size} processes on this machine, each of which sees {there} "
            f"{'GPU' if there == 1 else 'GPUs'}; start one process for each GPU, and let each see all of them (Slurm: "
            "--gpus-per-node, not --gpus-per-task)."
        )
    _require_named(asked, there)
    return here.size


def training_device(settings: Mapping[str, Any]) -> torch.device:
    """The device that ``trainer`` has this process train on."""
    if not _count_devices(settings.get("accelerator")):
        return torch.device("cpu")
    devices = settings.get("devices")
    local = place().local_rank
    return torch.device("cuda", devices[local] if isinstance(devices, list) else local)


def take_device(settings: Mapping[str, Any]) -> None:
    """Have a GPU without a number mean the one that ``trainer`` has this process use."""
    device = training_device(settings)
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _require_started(asked: _Devices, here: Place, started_by: str) -> None:
    if asked.devices not in (None, here.local_size):
        raise ConfigError(
            f"{asked.devices} is the number of devices, but {started_by} has started {here.local_size} processes on "
            "this machine, one for each device; use as many, or auto, as trainer=ddp does."
        )
    machines = here.size // here.local_size
    if here.size % here.local_size:
        raise ConfigError(
            f"{started_by} has started {here.local_size} of {here.size} processes on this machine; start as many on "
            "each."
        )
    if asked.machines not in (None, machines):
        raise ConfigError(
            f"trainer.num_nodes={asked.machines}, but {started_by} has started processes on {machines} machines; use "
            "as many, or leave it out."
        )


def _require_named(asked: _Devices, there: int | None) -> None:
    if asked.last is not None and there is not None and asked.last >= there:
        raise ConfigError(f"devices names the GPU {asked.last}, but those of this machine are 0 to {there - 1}.")


def _read(settings: Mapping[str, Any]) -> _Devices:
    strategy, devices, machines = (settings.get(key) for key in ("strategy", "devices", "num_nodes"))
    if strategy not in (None, *_STRATEGIES):
        raise ConfigError(f"trainer.strategy={strategy} is none of {', '.join(_STRATEGIES)}.")
    if machines is not None and not _is_count(machines):
        raise ConfigError(f"trainer.num_nodes={machines!r} is no number of machines.")
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if isinstance(devices, list) and devices and all(device == 0 or _is_count(device) for device in devices):
        return _Devices(len(devices), machines, max(devices))
    if devices in (None, "auto", -1):
        return _Devices(None, machines)
    if not _is_count(devices):
        raise ConfigError(
            f"devices={devices!r} is no number of devices; give one, or auto for all, or GPUs such as [0,1]."
        )
    return _Devices(devices, machines)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _count_devices(accelerator: str | None) -> int | None:
    """The devices of this machine that the accelerator may mean; None on the CPU, which any number can share."""
    if accelerator in ("gpu", "cuda", "auto", None):
        return torch.cuda.device_count() or None
    return None


def trainer_arguments(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """Keyword arguments of Lightning's Trainer for this process, and plugins besides its others.

    Args:
        settings: of ``trainer``.
    """
    here = place()
    arguments = dict(settings)
    sync_batchnorm = arguments.pop("sync_batchnorm", False)
    environment: ClusterEnvironment
    if here.size == 1:
        # Said to Lightning, which would otherwise wait for others that it takes Slurm to have started.
        environment = LightningEnvironment()
        # Lightning reads it from RANK, which something else may have left; with another rank nothing is logged.
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
        "strategy": ShardedStrategy() if sharded else _ReplicatedStrategy(),
        "use_distributed_sampler": False,
    }
    if sharded:
        # Weights that are gathered for a validation would be of its mode, which a training cannot change.
        arguments["inference_mode"] = False
    cuda = _count_devices(settings.get("accelerator")) is not None
    return arguments, [environment, *([SyncLayers(cuda=cuda)] if sync_batchnorm else [])]


class _ReplicatedStrategy(DDPStrategy):
    """Lightning's strategy, for models of which a part of the weights may have no use."""

    def __init__(self) -> None:
        # Buffers are not sent at every step, and above all not at every image of a validation, of which the processes
        # need not have the same number: the module sends them where it validates.
        super().__init__(broadcast_buffers=False, gradient_as_bucket_view=True)

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        # A step waits for the gradients of all weights, unless it is to look first which of them will come.
        unused = _keeps_order(self.root_device) or _has_unused(cast(nn.Module, model.model), self.root_device)
        self._ddp_kwargs["find_unused_parameters"] = unused
        return super()._setup_model(model)


def _keeps_order(device: torch.device) -> bool:
    """Whether a run that goes on has to add up gradients in the order in which it would have without a break.

    After a first step DDP puts the gradients in another order, unless it looks for those that do not come; and with
    their places changes the order in which three or more processes add them up.
    """
    return place().size > 2 and (device.type == "cpu" or torch.are_deterministic_algorithms_enabled())


def _has_unused(segmenter: nn.Module, device: torch.device) -> bool:
    """Whether a forward pass leaves a trainable weight out, such as the classifier's of an encoder."""
    parameters = [parameter for parameter in segmenter.parameters() if parameter.requires_grad]
    side = max(256, 8 * model_stride(segmenter))  # enough for every pyramid
    image = torch.zeros(1, 3, side, side, device=device, dtype=parameters[0].dtype)
    with evaluation_mode(segmenter), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        gradients = torch.autograd.grad(segmenter(image).sum(), parameters, allow_unused=True)
    return any(gradient is None for gradient in gradients)
