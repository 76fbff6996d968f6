"""The last checks of a training, and the first files that it writes."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from ema_seg.evaluation import describe_environment
from ema_seg.runtime.errors import ConfigError, one_line
from ema_seg.runtime.files import write_file
from ema_seg.training.checkpoints import BestCheckpoint, replace_last, require_fitting_state
from ema_seg.training.loggers import build_loggers
from ema_seg.training.validation import require_validation

__all__ = ["TrainingStart"]


class TrainingStart(Callback):
    """Start of a training: runs the last checks, starts the loggers, writes ``environment.json``, calls ``on_start``.

    ``taken`` is the table of ``initialise``, which it writes into ``init_from.txt``; None for no file.
    It comes after ``EpochLog``, which checks ``metrics.csv``.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        run: Path,
        best: BestCheckpoint,
        checkpoint: Path | None,
        on_start: Callable[[], None],
        taken: str | None = None,
    ) -> None:
        self.config, self.run, self.best = config, run, best
        self.checkpoint, self.on_start, self.taken = checkpoint, on_start, taken
        # Passed to Lightning later, because it would start them before it restores a checkpoint.
        self.loggers = build_loggers(run, config.get("logger", {}))
        self.reached = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the last checks and start writing; the optimiser's state and the loaders exist by now.

        Raises:
            CheckpointError: the optimiser's restored state does not fit the model.
            ConfigError: the training would end before its first validation, or a logger cannot be started.
        """
        self.reached = True
        if self.checkpoint is not None:
            require_fitting_state(trainer.optimizers[0], self.checkpoint)
        if not self.best.best_model_path:
            require_validation(trainer)
        trainer.loggers = self.loggers
        _log_configuration(trainer, self.config)
        if self.checkpoint is not None:
            replace_last(self.checkpoint)
        _write_environment(self.run, trainer)
        if self.taken and trainer.is_global_zero:
            write_file(self.run / "init_from.txt", f"{self.taken}\n".encode())
        self.on_start()


def _log_configuration(trainer: Trainer, config: Mapping[str, Any]) -> None:
    for logger in trainer.loggers:
        try:
            logger.log_hyperparams(dict(config))
        except Exception as error:  # no account, no server, no disk: each logger has its own type
            raise ConfigError(
                f"logger: {type(logger).__name__} cannot be started ({one_line(error)[:300]}); correct that, or choose "
                "another logger."
            ) from error


def _write_environment(run: Path, trainer: Trainer) -> None:
    if trainer.is_global_zero:
        environment = describe_environment(trainer.strategy.root_device)
        write_file(run / "environment.json", f"{json.dumps(environment, indent=2)}\n".encode())
