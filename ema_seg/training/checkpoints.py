"""Checkpoints of a run: when and how they are written, and which one a run resumes from."""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor
from torch.optim import Optimizer

from ema_seg.models import load_checkpoint, model_weights
from ema_seg.runtime.distributed.preemption import Preemption
from ema_seg.runtime.distributed.ranks import rank_info
from ema_seg.runtime.errors import CheckpointError, ConfigError, one_line
from ema_seg.runtime.escaping import for_terminal
from ema_seg.training.lightning_patches import validates_next

__all__ = [
    "AtomicCheckpoints",
    "BestCheckpoint",
    "LastCheckpoint",
    "RunEarlyStopping",
    "load_last",
    "replace_last",
    "require_fitting_state",
    "require_same_model",
    "stopped_early",
    "weights_to_match",
]

_DEEPEST = 20  # levels in a checkpoint's state
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"

# Sections that determine a checkpoint's weights and optimiser state, and settings in them that affect neither.
_FIXED = ("model", "attention", "placement", "optimizer")
_CHANGEABLE_SETTINGS = ("model.encoder_weights", "attention.implementation")


class AtomicCheckpoints(TorchCheckpointIO):
    """Atomic writer of checkpoints: it syncs a temporary file and renames it, so a kill leaves the old or the new file.

    Lightning's own writer uses the system's temporary folder, which may be on another disk. ``last.ckpt`` is kept as
    ``previous.ckpt`` when the next one replaces it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint atomically; see the class.

        Raises:
            CheckpointError: the file cannot be written.
        """
        path = Path(path)
        partial = path.with_name(f"{path.name}.partial")
        try:
            self._save(checkpoint, path, partial)
        except OSError as error:
            partial.unlink(missing_ok=True)  # it may have filled the disk
            raise CheckpointError(
                f"{path}: the checkpoint cannot be written ({error.strerror}); the previous one is unchanged; free "
                f"disk space or grant permission, and continue with resume={path.parent.parent}."
            ) from error

    def _save(self, checkpoint: dict[str, Any], path: Path, partial: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _ArchiveFile(FileIO(partial, "wb")) as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # If writing fails, torch still closes its archive and reports the unfinished archive instead of the
                # reason, such as Ctrl-C.
                raise error.__context__ or error from None
            file.flush()
            os.fsync(file.fileno())
        if path.name == LAST and path.exists():
            _link(path, path.with_name(PREVIOUS))
        partial.replace(path)


class _ArchiveFile(BufferedWriter):
    """Binary file that ignores writes after it has been closed.

    torch's archive writes its end when it is freed. After Ctrl-C the file may be closed by then, and an exception at
    that point aborts the process.
    """

    def write(self, data: Any, /) -> int:
        """Write the bytes, unless the file is closed."""
        return len(memoryview(data)) if self.closed else super().write(data)


def _link(path: Path, name: Path) -> None:
    """Hard-link a file to a second name, replacing the file there; copy it on disks without links."""
    temporary = name.with_name(f"{name.name}.partial")
    temporary.unlink(missing_ok=True)
    try:
        temporary.hardlink_to(path)
    except OSError:
        shutil.copyfile(path, temporary)
    temporary.replace(name)


class BestCheckpoint(ModelCheckpoint):
    """Callback that keeps a run's best checkpoint under a fixed name, even after the run's folder has been moved."""

    def __init__(self, run: Path, **arguments: Any) -> None:
        super().__init__(run / "checkpoints", filename="best", enable_version_counter=False, **arguments)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the record of the best checkpoint, which Lightning would drop after a move of the folder."""
        super().load_state_dict(_relocate(state_dict, str(state_dict["dirpath"]), str(self.dirpath)))
        self.current_score = state_dict["current_score"]

    def best_path(self) -> Path:
        """Return the path of the best checkpoint.

        Raises:
            CheckpointError: there is none, because the training ended before its first validation.
        """
        best = Path(self.best_model_path)
        if not self.best_model_path or not best.is_file():
            run = Path(str(self.dirpath)).parent
            raise CheckpointError(
                f"{run}: the training ended before its first validation, so no checkpoint was chosen as the best; "
                f"raise trainer.max_time or trainer.max_steps, and continue with resume={run}."
            )
        return best


class LastCheckpoint(Checkpoint):
    """Callback that writes the checkpoint to resume from: after each epoch, every ``every`` steps, and on preemption.

    It skips the last step of an epoch and other steps that a validation follows, because a resumed run would skip the
    validation. It also skips batches whose gradients are still accumulating.

    Args:
        run: the run's folder.
        every: optimiser steps between checkpoints; None for none within an epoch, except on preemption.
        preemption: the receiver of preemption signals.
    """

    def __init__(self, run: Path, every: int | None, preemption: Preemption) -> None:
        self.run, self.every, self.preemption = run, every, preemption
        self.path = run / "checkpoints" / LAST

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save a checkpoint if one is due.

        Raises:
            Preempted: after saving, if the run is preempted.
        """
        if (batch_idx + 1) % trainer.accumulate_grad_batches or batch_idx + 1 == trainer.num_training_batches:
            return
        leaving = self.preemption.is_due()
        if validates_next(trainer):
            return
        if leaving or (self.every and trainer.global_step % self.every == 0):
            trainer.save_checkpoint(self.path)
        if leaving:
            self._stop_preempted(trainer, f"in epoch {trainer.current_epoch + 1}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save a checkpoint, and stop if the run is preempted."""
        trainer.save_checkpoint(self.path)
        if self.preemption.is_due(now=True):
            self._stop_preempted(trainer, f"after epoch {trainer.current_epoch + 1}")

    def _stop_preempted(self, trainer: Trainer, where: str) -> None:
        self.preemption.leave(f" at step {trainer.global_step}, {where}; continue with resume={self.run}")


class RunEarlyStopping(EarlyStopping):
    """Early stopping that checks each validation exactly once.

    A resumed run uses its own patience; Lightning's class would restore the one in the checkpoint.
    """

    def __init__(self, monitor: str, patience: int) -> None:
        # At the end of an epoch without validation, Lightning would otherwise check an earlier validation again, whose
        # scores a resumed run does not have.
        super().__init__(monitor, patience=patience, mode="max", check_on_train_epoch_end=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore everything but the patience."""
        super().load_state_dict({**state_dict, "patience": self.patience})


def _relocate(value: Any, old: str, new: str) -> Any:
    """Replace the folder ``old`` by ``new`` in every path of a nested record."""
    if isinstance(value, str):
        return new + value[len(old) :] if value.startswith(old) else value
    if isinstance(value, dict):
        return {_relocate(key, old, new): _relocate(item, old, new) for key, item in value.items()}
    return value


def load_last(run: Path) -> tuple[Path, dict[str, Any]]:
    """Read the checkpoint to resume from: ``last.ckpt``, or ``previous.ckpt`` if that one cannot be read.

    Args:
        run: the run's folder.

    Returns:
        Its path, and its content as ``load_checkpoint`` returns it.

    Raises:
        CheckpointError: neither file can be read.
    """
    last, previous = (run / "checkpoints" / name for name in (LAST, PREVIOUS))
    try:
        return last, _load_whole(last)
    except CheckpointError as error:
        if not previous.is_file():
            raise
        saved = _load_whole(previous)
        if rank_info().rank == 0:
            told = f"warning: {error} Resuming from {previous.name}, step {saved['global_step']}."
            print(for_terminal(told), file=sys.stderr)
        return previous, saved


def weights_to_match(config: Mapping[str, Any], saved: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the weights of the resumed or repeated run, if any; the model must match their shapes."""
    if saved is None and config.get("rerun"):
        original = Path(config["rerun"]) / "checkpoints" / "best.ckpt"
        saved = load_checkpoint(original) if original.is_file() else None
    return None if saved is None else model_weights(saved)


def replace_last(path: Path) -> None:
    """Replace the unreadable ``last.ckpt`` by ``previous.ckpt``, if ``load_last`` chose that one.

    Otherwise the next checkpoint would keep the unreadable file as ``previous.ckpt``.
    """
    if path.name == PREVIOUS and rank_info().rank == 0:
        _link(path, path.with_name(LAST))


def require_same_model(saved: Mapping[str, Any], config: Mapping[str, Any], run: Path) -> None:
    """Check that the settings of model and optimiser equal those in the checkpoint to resume from.

    Args:
        saved: the checkpoint.
        config: the configuration of the resumed run.
        run: the run's folder, for the message.

    Raises:
        ConfigError: a setting differs.
    """
    differing = []
    for section in _FIXED:
        if section == "placement" and config["attention"]["name"] == "none":
            continue  # there is no block to place
        differing += list(_differences(section, saved["config"].get(section, {}), config[section]))
    differing += _differences("freeze", saved["config"].get("freeze") or {}, config.get("freeze") or {})
    averaged = [settings.get("training", {}).get("weight_averaging") for settings in (saved["config"], config)]
    if bool(averaged[0]) != bool(averaged[1]):  # a checkpoint with averaging holds both kinds of weights
        differing.append(("training.weight_averaging", *averaged))
    for key, before, now in differing:
        if key not in _CHANGEABLE_SETTINGS:
            raise ConfigError(
                f"{key}={now}: must be {before}, as in the checkpoint of resume={run}; remove the override, or start a "
                "new run."
            )


def _differences(key: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted key and both values of each setting that differs; None for a missing one."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys([*before, *now]):
            yield from _differences(f"{key}.{name}", before.get(name), now.get(name))
    elif before != now:
        yield key, before, now


def _load_whole(path: Path) -> dict[str, Any]:
    saved = load_checkpoint(path)
    missing = [key for key in ("optimizer_states", "loops", "callbacks", "global_step", "epoch") if key not in saved]
    if missing:
        raise CheckpointError(
            f"ckpt={path}: holds no {missing[0]}, so no training can resume from it (best.ckpt holds weights only); "
            "restore the file, or start a new run."
        )
    try:
        _check_state(saved)
    except ValueError as error:
        raise _damaged(path, error) from error
    return saved


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"ckpt={path}: its training state is damaged ({one_line(error)[:300]}); restore the file, or start a new run."
    )


def _check_state(saved: Mapping[str, Any]) -> None:
    """Raise a ValueError about a state that Lightning would restore, but with which the run would fail or diverge."""
    for key in ("loops", "epoch", "global_step"):
        for name, value in _leaves(saved[key], key):
            if value is not None and not (isinstance(value, int) and value >= 0):
                raise ValueError(f"{name} must be a whole number of 0 or more, got {value!r:.80}")
    try:
        progress = saved["loops"]["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"]
        steps = progress["optimizer"]["step"]["total"]["completed"]
    except (KeyError, TypeError) as error:
        raise ValueError("loops must hold the progress of fit_loop") from error
    if steps != saved["global_step"]:
        raise ValueError(f"loops must hold {saved['global_step']} steps, as global_step does, got {steps}")
    callbacks = saved["callbacks"]
    if not isinstance(callbacks, dict) or not all(isinstance(state, dict) for state in callbacks.values()):
        raise ValueError("callbacks must hold a state for each callback")
    if not any(name.startswith(BestCheckpoint.__name__) for name in callbacks):
        raise ValueError("callbacks must hold the record of the best checkpoint")
    for key in ("optimizer_states", "lr_schedulers"):
        if not isinstance(saved.get(key), list) or len(saved[key]) != 1:
            raise ValueError(f"{key} must hold one state")
    for state in callbacks.values():
        if not isinstance(state.get("wait_count", 0), int):
            raise ValueError(f"callbacks: wait_count must be a whole number, got {state['wait_count']!r:.80}")
    for key in ("current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
        for name, value in _leaves(saved.get(key), key):
            # Infinity is valid: it may be the square of a large gradient.
            if isinstance(value, Tensor | float) and torch.isnan(torch.as_tensor(value)).any():
                raise ValueError(f"{name} holds nan")


def require_fitting_state(optimizer: Optimizer, path: Path) -> None:
    """Check that the restored state of an optimiser fits its parameters; torch checks that only within a step.

    Raises:
        CheckpointError: a value is neither a tensor nor a number, or a tensor has another shape than its parameter.
    """
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if not isinstance(value, Tensor | int | float | None):
                raise _damaged(path, ValueError(f"the optimiser's {key} must be a tensor, got {type(value).__name__}"))
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                shapes = f"{tuple(parameter.shape)}, got {tuple(value.shape)}"
                raise _damaged(path, ValueError(f"the optimiser's {key} of a parameter must be of shape {shapes}"))


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the value of each leaf in nested dicts, lists and tuples."""
    if not isinstance(value, dict | list | tuple):
        yield name, value
        return
    if name.count(".") > _DEEPEST:
        raise ValueError(f"{name[:80]} must be nested at most {_DEEPEST} levels deep")
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _leaves(item, f"{name}.{key}")


def stopped_early(saved: Mapping[str, Any], trainer: Trainer) -> bool:
    """Return whether early stopping had ended the training of a checkpoint; Lightning would train one more epoch."""
    trained = saved["epoch"] + 1 >= (trainer.min_epochs or 0) and saved["global_step"] >= (trainer.min_steps or 0)
    return trained and any(
        saved["callbacks"].get(stopper.state_key, {}).get("wait_count", 0) >= stopper.patience
        for stopper in trainer.early_stopping_callbacks
    )
