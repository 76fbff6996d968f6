"""Parts of a model that do not train: ``freeze.parts`` and ``freeze.until``."""

import gc
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from ema_seg.models.placement import attention_tensors, names_without_wrappers
from ema_seg.runtime.errors import ConfigError, did_you_mean

__all__ = ["Unfreezing", "find_parts", "freeze", "freeze_parts", "unfreeze"]

_ATTENTION = "attention"
# Short names of parts; others are names of modules.
_PARTS = {"head": "segmentation_head"}


def find_parts(model: nn.Module, parts: Sequence[str]) -> frozenset[str]:
    """Find the parameters of some parts of a model.

    Attention blocks belong to the part ``attention`` alone, and to patterns with that word: the pattern ``decoder``
    matches the same layers with any block.

    Args:
        model: a segmenter.
        parts: names of parts (``encoder``, ``decoder``, ``head``, ``attention``), or patterns such as
            ``encoder.layer[12]`` of names of modules and parameters in the model without attention.

    Returns:
        The names of the parameters in ``model``.

    Raises:
        ConfigError: a part matches no parameter, or together they match all.
    """
    names, attention = names_without_wrappers(model), attention_tensors(model)
    # A parameter can be matched by its name and by those of the modules that it is in.
    candidates = {name: list(_with_parents(names[name])) for name, _ in model.named_parameters()}
    found: set[str] = set()
    for part in parts:
        pattern = _PARTS.get(part, part)
        if part == _ATTENTION:
            matched = {name for name in candidates if name in attention}
        else:
            matched = {
                name
                for name, options in candidates.items()
                if (name not in attention or _ATTENTION in part)
                and any(fnmatchcase(option, pattern) for option in options)
            }
        if not matched:
            known = dict.fromkeys([_ATTENTION, *_PARTS, *(option for each in candidates.values() for option in each)])
            if not attention:
                known.pop(_ATTENTION)
            top = dict.fromkeys(each[-1] for each in candidates.values())
            raise ConfigError(
                f"freeze.parts: {part!r} matches nothing in the model; its parts are {', '.join(top)}"
                f"{', attention' if attention else ''}.{did_you_mean(part, known, most=3)}"
            )
        found |= matched
    if all(name in found or not parameter.requires_grad for name, parameter in model.named_parameters()):
        raise ConfigError(f"freeze.parts={list(parts)}: nothing would be left to train; leave a part out.")
    return frozenset(found)


def _with_parents(name: str) -> Iterable[str]:
    """Yield a dotted name and the names of its parents, the outermost last."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def freeze_parts(model: nn.Module, settings: Mapping[str, Any], epoch: int) -> "Unfreezing | None":
    """Freeze the parts that do not train in an epoch, in place.

    Args:
        model: a segmenter.
        settings: section ``freeze`` of a configuration; empty for nothing.
        epoch: the epoch in which the training starts or continues, from 0.

    Returns:
        The callback that unfreezes them later; None if there is nothing to unfreeze.

    Raises:
        ConfigError: see ``find_parts``.
    """
    parts, until = settings.get("parts"), settings.get("until")
    if not parts or (until is not None and epoch >= until):
        return None
    names = find_parts(model, parts)
    freeze(model, names)
    return None if until is None else Unfreezing(names, until)


def freeze(model: nn.Module, names: frozenset[str]) -> None:
    """Stop the training of some parameters, in place.

    Modules whose parameters are all frozen are put into evaluation mode, in which a batch norm keeps its statistics and
    dropout is off. Lightning keeps the modes of modules.
    """
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
    for module in _frozen_modules(model, names):
        module.eval()


def unfreeze(model: nn.Module, names: frozenset[str]) -> None:
    """Undo ``freeze``."""
    modules = _frozen_modules(model, names)
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(True)
    for module in modules:
        module.train()


def _frozen_modules(model: nn.Module, names: frozenset[str]) -> list[nn.Module]:
    """List the outermost modules that have parameters, all of them in ``names`` or without gradient by design.

    Modules without parameters, such as dropout, are among them if the other parameters of the module around them are in
    ``names``, attention blocks aside.
    """
    attention = attention_tensors(model)

    def is_frozen(parameters: Sequence[tuple[str, nn.Parameter]]) -> bool:
        return any(name in names for name, _ in parameters) and all(
            name in names or not parameter.requires_grad for name, parameter in parameters
        )

    def visit(module: nn.Module, path: str) -> list[nn.Module]:
        parameters = [(f"{path}{name}", parameter) for name, parameter in module.named_parameters()]
        if is_frozen(parameters):
            return [module]
        found = [each for name, child in module.named_children() for each in visit(child, f"{path}{name}.")]
        if is_frozen([pair for pair in parameters if pair[0] not in attention]):
            found += [child for child in module.children() if next(child.parameters(), None) is None]
        return found

    return visit(model, "")


class Unfreezing(Callback):
    """Callback that lets frozen parameters train from an epoch on.

    The optimiser holds them from the start, without a state as long as they have no gradient, so that its groups are
    the same in a run that resumes.

    Args:
        names: their names in the segmenter; by name, because FSDP replaces the parameters.
        until: number of epochs after which they train.
    """

    def __init__(self, names: frozenset[str], until: int) -> None:
        self.names, self.until = names, until

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Unfreeze the parameters if the epoch is due."""
        model = pl_module.model
        assert isinstance(model, nn.Module)
        if not self.names or trainer.current_epoch < self.until:
            return
        unfreeze(model, self.names)
        self.names = frozenset()
        strategy = trainer.strategy
        if isinstance(strategy, DDPStrategy) and strategy.model is not pl_module:
            # DDP reduces the gradients of the parameters that were trainable when it wrapped the model.
            strategy.model = pl_module
            gc.collect()  # the old wrapper's buckets
            strategy.configure_ddp()
