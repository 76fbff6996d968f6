"""FSDP training: weights, gradients and optimiser state are sharded over the ranks."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ema_seg.models.head import SegmentationHead
from ema_seg.runtime.distributed.ranks import rank_info

__all__ = ["ShardedStrategy", "full_tensor"]

# A block with fewer weights is sharded with its parent: an all-gather of its own would cost more than it saves.
_LEAST_WEIGHTS = 100_000


class ShardedStrategy(DDPStrategy):
    """Strategy that applies PyTorch's ``fully_shard``, with the same checkpoints as a single process writes.

    Each large block in the model's ``Sequential`` and ``ModuleList`` containers is all-gathered for its own forward and
    backward pass. A validation gathers all weights once, because the ranks may have different numbers of images; so the
    weights, but not gradients and optimiser state, must fit on one device.

    Lightning's own strategies shard the checkpoint or do not support the CPU.
    """

    def _setup_model(self, model: nn.Module) -> nn.Module:  # type: ignore[override]  # no wrapper: the module itself
        segmenter = cast(nn.Module, model.model)
        segmenter.to(memory_format=torch.contiguous_format)  # FSDP shards no other layout
        self._mesh: DeviceMesh = init_device_mesh(self.root_device.type, (rank_info().size,))
        for block in _blocks(segmenter):
            fully_shard(block, mesh=self._mesh)
        fully_shard(segmenter, mesh=self._mesh)
        return model

    def _sharded(self) -> Iterator[FSDPModule]:
        assert self.lightning_module is not None
        return (module for module in self.lightning_module.modules() if isinstance(module, FSDPModule))

    def on_validation_start(self) -> None:
        """All-gather the weights."""
        for module in self._sharded():
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()

    def on_validation_end(self) -> None:
        """Reshard the weights."""
        assert self.lightning_module is not None
        for module in self._sharded():
            # PyTorch's default: the root stays gathered after the forward pass, as the backward pass needs it first.
            module.set_reshard_after_forward(module is not self.lightning_module.model, recurse=False)
            module.reshard()

    def _register_ddp_hooks(self) -> None:
        """Register nothing: on GPUs Lightning would demand a DDP wrapper, and there is none."""

    def teardown(self) -> None:
        """Tear down without moving module and optimisers to the CPU: sharded tensors cannot be moved."""
        module, self._lightning_module = self._lightning_module, None
        self.optimizers = []
        super().teardown()
        self._lightning_module = module

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the full weights on the CPU on rank 0, and an empty dict on the others."""
        return gather_full_state(super().lightning_module_state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the full state on the CPU on rank 0, and an empty dict on the others."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        return gather_full_state(optimizer.state_dict())

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this rank's shard of the full state."""
        states = map(_own_state, self.optimizers, checkpoint["optimizer_states"])
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": list(states)})


def _own_state(optimizer: Optimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Shard an optimiser's state like its parameters, tensor by tensor: the full state may not fit on a device."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    state = dict(saved["state"])
    for number, parameter in zip(numbers, parameters, strict=False):  # the optimiser rejects other numbers
        if number in state and isinstance(parameter, DTensor):
            state[number] = {name: _spread_like(parameter, value) for name, value in state[number].items()}
    return {**saved, "state": state}


def _spread_like(parameter: DTensor, value: Any) -> Any:
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def _blocks(segmenter: nn.Module) -> list[nn.Module]:
    """List the large elements of a model's ``Sequential`` and ``ModuleList`` containers, the inner ones first.

    FSDP gathers a module's weights when it is called. These elements are called; other modules may only lend their
    weights or another method, as a segmentation head does.
    """
    containers = [
        module
        for module in segmenter.modules()
        if isinstance(module, nn.Sequential | nn.ModuleList) and not isinstance(module, SegmentationHead)
    ]
    elements = [element for container in containers for element in container.children()]
    called = [element for element in elements if not isinstance(element, nn.ModuleList | nn.ModuleDict)]
    return [block for block in reversed(called) if sum(p.numel() for p in block.parameters()) >= _LEAST_WEIGHTS]


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor, all-gathered if it is sharded; a collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_full_state(value: Any) -> Any:
    """Gather the sharded tensors of a state; return an empty dict on ranks other than 0. A collective."""
    gathered = _gather(value)
    return gathered if rank_info().rank == 0 else {}


def _gather(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _gather(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_gather(item) for item in value]
    if isinstance(value, DTensor):
        gathered = value.full_tensor()
        return gathered.cpu() if rank_info().rank == 0 else torch.empty(0)
    return value
