"""Training whose weights, gradients and optimiser state are spread over the processes (FSDP)."""

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

from ema_seg.distributed.start import place

__all__ = ["ShardedStrategy", "whole"]

# A block with fewer weights goes with the one around it: gathering it by itself would take longer than it saves.
_LEAST_WEIGHTS = 100_000


class ShardedStrategy(DDPStrategy):
    """PyTorch's ``fully_shard``, with checkpoints that are the same as those of one process.

    Each block of the model's sequences and lists is gathered for its own forward and backward pass. A validation
    gathers all weights once, because the processes need not have the same number of images; so the weights, but not
    gradients and optimiser state, have to fit on a device.

    Lightning's own strategies for this leave the checkpoint in pieces or do without a CPU.
    """

    def _setup_model(self, model: nn.Module) -> nn.Module:  # type: ignore[override]  # no wrapper: the module itself
        segmenter = cast(nn.Module, model.model)
        segmenter.to(memory_format=torch.contiguous_format)  # what can be divided
        self._mesh: DeviceMesh = init_device_mesh(self.root_device.type, (place().size,))
        for block in _blocks(segmenter):
            fully_shard(block, mesh=self._mesh)
        fully_shard(segmenter, mesh=self._mesh)
        return model

    def _sharded(self) -> Iterator[FSDPModule]:
        assert self.lightning_module is not None
        return (module for module in self.lightning_module.modules() if isinstance(module, FSDPModule))

    def on_validation_start(self) -> None:
        """Gather the weights."""
        for module in self._sharded():
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()

    def on_validation_end(self) -> None:
        """Keep only the own part again."""
        assert self.lightning_module is not None
        for module in self._sharded():
            # As it is by default: what comes last in a forward pass comes first in the backward pass.
            module.set_reshard_after_forward(module is not self.lightning_module.model, recurse=False)
            module.reshard()

    def _register_ddp_hooks(self) -> None:
        """Nothing, for there is no wrapper; Lightning demands one on GPUs."""

    def teardown(self) -> None:
        """Leave module and optimisers where they are: what is spread over GPUs cannot be moved, and ends with them."""
        module, self._lightning_module = self._lightning_module, None
        self.optimizers = []
        super().teardown()
        self._lightning_module = module

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole weights on the CPU, of the first process; nothing of the others."""
        return _whole_state(super().lightning_module_state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state on the CPU, of the first process; nothing of the others."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        return _whole_state(optimizer.state_dict())

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the own part of the whole state."""
        states = map(_own_state, self.optimizers, checkpoint["optimizer_states"])
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": list(states)})


def _own_state(optimizer: Optimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The same state, spread as the parameters are: tensor by tensor, because all of them may not fit on a device."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    state = dict(saved["state"])
    for number, parameter in zip(numbers, parameters, strict=False):  # other numbers are for the optimiser to refuse
        if number in state and isinstance(parameter, DTensor):
            state[number] = {name: _spread_like(parameter, value) for name, value in state[number].items()}
    return {**saved, "state": state}


def _spread_like(parameter: DTensor, value: Any) -> Any:
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def _blocks(segmenter: nn.Module) -> list[nn.Module]:
    """The large elements of the sequences and lists in a model, the inner ones first.

    They are known to be called as modules. Of others it may be that only their weights or another method are used.
    """
    containers = [module for module in segmenter.modules() if isinstance(module, nn.Sequential | nn.ModuleList)]
    elements = [element for container in containers for element in container.children()]
    called = [element for element in elements if not isinstance(element, nn.ModuleList | nn.ModuleDict)]
    return [block for block in reversed(called) if sum(p.numel() for p in block.parameters()) >= _LEAST_WEIGHTS]


def whole(tensor: Tensor) -> Tensor:
    """A tensor as it is, gathered from the processes if it is spread over them; to be called by all of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _whole_state(value: Any) -> Any:
    """The same state with whole tensors; empty in all processes but the first."""
    gathered = _gather(value)
    return gathered if place().rank == 0 else {}


def _gather(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _gather(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_gather(item) for item in value]
    if isinstance(value, DTensor):
        gathered = value.full_tensor()
        return gathered.cpu() if place().rank == 0 else torch.empty(0)
    return value
