"""Callbacks of a run: progress bar, speed, a line and a row per epoch, pictures of validation images."""

import csv
import sys
import time
from collections.abc import Sequence
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm, convert_inf
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F

from ema_seg.data import SegmentationDataModule
from ema_seg.data.datamodule import spread_evenly
from ema_seg.data.normalise import Normalise
from ema_seg.data.transforms import TensorSample
from ema_seg.evaluation import Example, predict_example
from ema_seg.inference.attention import attention_weights
from ema_seg.reporting import draw_samples
from ema_seg.runtime.errors import DataError
from ema_seg.runtime.files import write_file
from ema_seg.runtime.texts import read_rows
from ema_seg.training.averaging import UNAVERAGED
from ema_seg.training.module import AUXILIARY_LOSS, SegmentationModule

__all__ = ["EpochLog", "KernelSearch", "Pictures", "ProgressBar", "attention_map"]

_COLUMNS = (
    "epoch",
    "step",
    "train/loss",
    "train/gradient_norm",
    "train/gradient_norm_max",
    "val/miou",
    "val/mean_accuracy",
    "val/pixel_accuracy",
    "learning_rate",
    "images_per_second",
    "seconds",
    "val/loss",
)
# Columns that are written only if a run has values for them.
_OPTIONAL = (UNAVERAGED, AUXILIARY_LOSS)


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar, which counts epochs from 1, as ``EpochLog`` does, and disappears at the end."""

    def init_train_tqdm(self) -> Tqdm:
        """Create a bar that disappears at the end: each epoch has its line in the log."""
        bar = super().init_train_tqdm()
        bar.leave = False
        return bar

    def on_train_epoch_start(self, trainer: Trainer, *arguments: Any) -> None:
        """Reset the bar and show the number of the epoch."""
        self.train_progress_bar.reset(convert_inf(self.total_train_batches))
        self.train_progress_bar.initial = 0
        self.train_progress_bar.set_description(epoch_of(trainer))

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return Lightning's metrics, loss and speed, without the logger's version: only the name of its folder."""
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        loss = cast(SegmentationModule, pl_module).last_loss
        if loss is not None:
            metrics["loss"] = f"{loss.item():.3f}"
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EpochLog):
                metrics["images/s"] = f"{callback.speed:.1f}"
        return metrics

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show a GPU's loss only at log steps: reading it waits for the device."""
        super().on_train_start(trainer, pl_module)
        if pl_module.device.type != "cpu":
            self._refresh_rate = max(self._refresh_rate, trainer.log_every_n_steps)  # type: ignore[attr-defined]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bars, so that the error message starts on a new line."""
        for bar in (self._val_progress_bar, self._train_progress_bar):
            if bar is not None:
                bar.close()


def epoch_of(trainer: Trainer) -> str:
    """Return the epoch's name: ``"epoch 3/20"``, or ``"epoch 3"`` if the number of epochs is open."""
    epochs = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
    return f"epoch {trainer.current_epoch + 1}{epochs}"


class KernelSearch(Callback):
    """cuDNN's search for the fastest kernel of each shape, in training alone.

    Crops have one size. Validation images may have thousands, and each would be searched for.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch the search on."""
        torch.backends.cudnn.benchmark = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch the search off."""
        torch.backends.cudnn.benchmark = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch the search on again."""
        torch.backends.cudnn.benchmark = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Switch the search off for what follows in this process, after a failure too."""
        torch.backends.cudnn.benchmark = False


class EpochLog(Callback):
    """Log of a training: speed in the progress bar, and for each epoch one row of ``metrics.csv`` and one line.

    A resumed run keeps the rows of the epochs that it does not repeat. (Lightning's own CSV logger starts a new file,
    and leaves most cells empty.)

    Args:
        path: the file to write.
        quiet: print no line.
    """

    def __init__(self, path: Path, *, quiet: bool = False) -> None:
        self.path = path
        self.quiet = quiet
        self._rows: list[dict[str, Any]] = []
        self._start = self._train_seconds = 0.0
        self._images = 0
        self._validated = False
        self._earlier: dict[str, Any] = {"seconds": 0.0, "images": 0}

    def state_dict(self) -> dict[str, Any]:
        """Return seconds and images of the epoch so far, for a run that resumes within it."""
        return {"seconds": time.perf_counter() - self._start, "images": self._images}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore seconds and images of an unfinished epoch."""
        self._earlier = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the rows of earlier epochs; a resumed run's first epoch is not known earlier."""
        self._rows = _read_rows(self.path, trainer.current_epoch)
        # Lightning does not call this hook if a run resumes within an epoch.
        self.on_train_epoch_start(trainer, pl_module)
        self._start -= self._earlier["seconds"]
        self._images = self._earlier["images"]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the clock and the number of images."""
        self._start = time.perf_counter()
        self._images = 0
        self._validated = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images and the time of this epoch."""
        self._images += len(batch["name"]) * trainer.world_size
        self._train_seconds = time.perf_counter() - self._start

    @property
    def speed(self) -> float:
        """Mean images per second of this epoch so far."""
        return self._images / self._train_seconds if self._images else 0.0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark the scores as those of this epoch; Lightning also keeps earlier ones."""
        self._validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the epoch's row and line, after its validation if there was one."""
        means = cast(SegmentationModule, pl_module).epoch_means()
        speed = self.speed
        rate = max(group["lr"] for group in trainer.optimizers[0].param_groups)
        pl_module.log_dict({"learning_rate": rate, "images_per_second": speed})
        if not trainer.is_global_zero:
            return
        logged = trainer.logged_metrics | trainer.callback_metrics | means
        row: dict[str, Any] = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "learning_rate": rate,
            "images_per_second": speed,
            "seconds": time.perf_counter() - self._start,
        }
        known = [*_COLUMNS, *(name for name in _OPTIONAL if name in logged)]
        current = [name for name in known if name in logged and (self._validated or not name.startswith("val/"))]
        row |= {name: float(logged[name]) for name in current if name not in row}
        self._rows.append({name: _shown(row[name]) if name in row else "" for name in known})
        _write_rows(self.path, self._rows)
        # Standard error, because standard output carries the report and the path of the run.
        if not self.quiet:
            line = f"{_line(row, trainer)}\n"  # with the newline: Ctrl-C may come between two writes
            if trainer.progress_bar_callback is None:
                sys.stderr.write(line)
                sys.stderr.flush()
            else:
                Tqdm.write(line, file=sys.stderr, end="")  # above the bar
            sys.stderr.flush()


def _line(row: dict[str, Any], trainer: Trainer) -> str:
    scores = f"val mIoU {row['val/miou']:.4f}" if "val/miou" in row else "not validated"
    if UNAVERAGED in row:
        scores += f" ({row[UNAVERAGED]:.4f} without averaging)"
    losses = f"{row['train/loss']:.3f}"
    if AUXILIARY_LOSS in row:
        losses += f" (auxiliary {row[AUXILIARY_LOSS]:.3f})"
    return (
        f"{epoch_of(trainer)}  loss {losses}  {scores}  {row['images_per_second']:.1f} images/s  {row['seconds']:.0f} s"
    )


def _shown(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = StringIO(newline="")
    columns = [*_COLUMNS, *(name for name in _OPTIONAL if any(name in row for row in rows))]
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue().encode())


def _read_rows(path: Path, epochs: int) -> list[dict[str, Any]]:
    """Read the rows of the first ``epochs`` epochs."""
    if not path.is_file():
        return []
    try:
        return [row for row in read_rows(path, advice="move it away") if int(row["epoch"]) < epochs]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: its rows are not as train.py wrote them, so none can be appended; move it away."
        ) from error


class Pictures(Callback):
    """Pictures every few epochs: input, truth, prediction and attention map of some validation images.

    They are written to ``<directory>/epoch_<number>.png``, and to TensorBoard if it is one of the loggers.

    Args:
        directory: folder of the pictures.
        every: epochs from one picture to the next; the last epoch is always drawn.
        count: number of images, spread evenly over the validation set.
    """

    def __init__(self, directory: Path, every: int, count: int = 3) -> None:
        self.directory = directory
        self.every = every
        self.count = count

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw if a picture is due; averaged weights, if any, are still swapped in at this point."""
        epoch = trainer.current_epoch + 1
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        if epoch % self.every and epoch != trainer.max_epochs:
            return
        data: SegmentationDataModule = trainer.datamodule  # type: ignore[attr-defined]
        dataset = data.val_dataset
        indices = spread_evenly(len(dataset), self.count)
        rows = [_row(pl_module, data, data.read_first_readable(dataset, index)) for index in indices]
        figure = draw_samples(rows, data.classes, data.palette)
        content = BytesIO()
        figure.savefig(content, format="png")
        write_file(self.directory / f"epoch_{epoch:03d}.png", content.getvalue())
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("validation", figure, global_step=trainer.global_step, close=False)


def _row(module: LightningModule, data: SegmentationDataModule, sample: TensorSample) -> Example:
    model: nn.Module = module.model  # type: ignore[assignment]
    stride: int = module.stride  # type: ignore[assignment]
    row = predict_example(model, sample, sample["name"], stride, data.normalise)
    weights = attention_map(model, sample["image"], stride, data.normalise)
    if weights is not None:
        row["weight_map"] = weights.cpu().numpy()
    return row


def attention_map(model: nn.Module, image: Tensor, stride: int, normalise: Normalise) -> Tensor | None:
    """Compute the weight map of the last attention block that has one, averaged over its channel groups.

    Args:
        model: a segmenter.
        image: uint8 RGB image (3, H, W).
        stride: the model's stride.
        normalise: the normalisation that the model was trained with.

    Returns:
        Weights, float32 (H, W); None if no block of the model has weights that vary over the positions.
    """
    maps = attention_weights(model, image, stride, normalise)
    if not maps:
        return None
    last = list(maps.values())[-1].mean(dim=0)
    height, width = image.shape[1:]
    padded = (height + -height % stride, width + -width % stride)
    return F.interpolate(last[None, None], size=padded, mode="bilinear")[0, 0, :height, :width]
