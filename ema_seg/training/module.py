"""The Lightning module: one training step, one validation pass, one optimiser with its schedule."""

import math
import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule
from torch import Tensor, distributed, nn

from ema_seg.data.base import IGNORE_INDEX
from ema_seg.distributed.collectives import sum_in_place
from ema_seg.distributed.start import alone, place
from ema_seg.errors import CheckpointError, ConfigError, TrainingError
from ema_seg.evaluation import ConfusionMatrix
from ema_seg.evaluation.confusion import Scores
from ema_seg.evaluation.inference import LESS_MEMORY, predict
from ema_seg.models import load_segmenter, model_stride
from ema_seg.models.limits import explained_memory, explained_sizes
from ema_seg.training.losses import build_loss
from ema_seg.training.optimisation import build_optimizer, build_schedule
from ema_seg.training.sharded import whole

__all__ = ["SegmentationModule"]


class SegmentationModule(LightningModule):
    """Trains a segmenter and scores it on the validation images at their own size.

    Logs ``train/loss`` per epoch, and the mean and the largest norm of a step's gradient before any clipping, as
    ``train/gradient_norm`` and ``train/gradient_norm_max``, which a checkpoint within an epoch keeps; per validation
    ``val/miou``, ``val/mean_accuracy``, ``val/pixel_accuracy`` and ``val_iou/<class>`` of each class that occurs, all
    from one confusion matrix, and ``val/loss``, the mean over the images of each whole image's loss.

    Args:
        model: maps float images (B, 3, H, W) to logits (B, K, H, W).
        loss: maps logits and int64 train ids (B, H, W) to a scalar.
        optimizer: keyword arguments of ``build_optimizer``.
        schedule: keyword arguments of ``build_schedule``.
        classes: the K class names.
        config: the run's whole configuration as plain data; like the class names it is stored in every
            checkpoint, so that a checkpoint alone is enough to rebuild the model.

    Raises:
        TrainingError: in a training step whose loss is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        *,
        classes: Sequence[str],
        optimizer: Mapping[str, Any],
        schedule: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.classes = list(classes)
        self.config = dict(config)
        self.optimizer_settings = dict(optimizer)
        self.schedule_settings = dict(schedule)
        self.stride = model_stride(model)
        self.confusion = ConfusionMatrix(len(classes))
        self.validation_loss, self.validation_images = 0.0, 0
        self.iou_names = _tags("val_iou", self.classes)
        self.crops = "images"  # what the last batch was of, for messages
        # Of loss times images, images, gradient norms and steps, and the largest norm. Lightning's own means would
        # begin anew in a run that goes on within an epoch.
        self.sums: Tensor
        self.register_buffer("sums", torch.zeros(5), persistent=False)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # every argument of the constructor is in the checkpoint
        cls, checkpoint_path: str | PathLike[str], map_location: Any = "cpu"
    ) -> "SegmentationModule":
        """Rebuild the module that a checkpoint of ``train.py`` holds, in training mode as Lightning's own does.

        Args:
            checkpoint_path: such as ``checkpoints/best.ckpt`` of a run.
            map_location: the device of the module.

        Raises:
            CheckpointError: see ``load_segmenter``; or the checkpoint's configuration does not name how it was trained.
        """
        path = Path(checkpoint_path)
        model, checkpoint = load_segmenter(path)
        config, classes = checkpoint["config"], checkpoint["classes"]
        for name in ("loss", "optimizer", "schedule"):
            if not isinstance(config.get(name), Mapping):
                raise CheckpointError(
                    f"ckpt={path}: its config must have the section {name}; use ema_seg.models.load_segmenter for the "
                    "model alone."
                )
        loss = build_loss(config["loss"], len(classes))
        settings = {"optimizer": config["optimizer"], "schedule": config["schedule"], "config": config}
        return cls(model, loss, classes=classes, **settings).train().to(torch.device(map_location or "cpu"))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K, H, W) of images (B, 3, H, W)."""
        return self.model(images)

    def on_train_epoch_start(self) -> None:
        """Start the sums of the epoch from zero."""
        self.sums.zero_()

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        """Make the random numbers of the step, such as dropout's, depend on nothing before it."""
        entropy = np.random.SeedSequence((self.config["seed"], self.current_epoch, batch_index, self.global_rank))
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """Loss of one batch of crops."""
        self._check_crops(batch["image"])
        try:
            with explained_sizes(batch["image"]):
                logits = self(batch["image"])
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ConfigError(
                f"data.batch_size={len(batch['name'])}: this decoder normalises the mean of a whole image over the "
                "batch, which takes more than one image; set data.batch_size to 2 or more."
            ) from error
        loss = self.loss(logits, batch["mask"])
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.global_step} (epoch {self.current_epoch}), in the batch of "
                f"{', '.join(batch['name'])}; lower optimizer.lr, lengthen schedule.warmup_steps, set "
                "trainer.gradient_clip_val, or look at these samples."
            )
        size = len(batch["name"])
        self.log("loss", loss, prog_bar=True, logger=False, batch_size=size)
        self.sums[:2] += torch.stack([loss.detach().float() * size, torch.tensor(float(size), device=loss.device)])
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Note the norm of the gradient, which tells whether a block lets it vanish or explode."""
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        self.sums[2:4] += torch.stack([norm.float(), torch.ones_like(norm, dtype=torch.float32)])
        self.sums[4] = torch.maximum(self.sums[4], norm.float())

    def epoch_means(self) -> dict[str, float]:
        """Loss and norm of the gradient in this epoch so far; to be called by all processes."""
        loss, images, norm, steps, largest = self._global_sums().tolist()
        return {
            "train/loss": loss / images,
            "train/gradient_norm": norm / steps if steps else float("nan"),
            "train/gradient_norm_max": largest,
        }

    def _global_sums(self) -> Tensor:
        """The sums over all processes; of the gradient, which is the same in all of them, one's."""
        return torch.cat([sum_in_place(self.sums[:2].clone()), self.sums[2:]])

    def on_train_epoch_end(self) -> None:
        """Log the means."""
        self.log_dict(self.epoch_means())

    def _check_crops(self, images: Tensor) -> None:
        height, width = images.shape[-2:]
        self.crops = f"{height} x {width} pixels"
        if height % self.stride or width % self.stride:
            raise ConfigError(
                f"data.augmentation makes crops of {height} x {width} pixels, but the model takes multiples of "
                f"{self.stride}; change data.augmentation.crop.height and width."
            )

    def on_validation_epoch_start(self) -> None:
        """Start the scores of this validation from zero, of one model in all processes."""
        self.confusion = ConfusionMatrix(len(self.classes))
        self.validation_loss, self.validation_images = 0.0, 0
        if place().size > 1:
            # The first process's, which are those in the checkpoints. The weights are the same everywhere.
            for buffer in self.model.buffers():
                distributed.broadcast(buffer, 0)

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """Count the pixels of whole images, at their own size, and add up the loss of each."""
        for logits, target in zip(self.score(batch), batch["mask"], strict=True):
            if (target != IGNORE_INDEX).any():
                # By itself: the processes need not have the same number of images.
                with alone(), explained_memory(logits[None], LESS_MEMORY):
                    self.validation_loss += float(self.loss(logits[None], target[None]))
                self.validation_images += 1

    def score(self, batch: dict[str, Any]) -> list[Tensor]:
        """Count the pixels of whole images in the confusion matrix.

        Returns:
            The logits K x H x W of each image.
        """
        predicted = predict(self.model, batch["image"], self.stride)
        for logits, target in zip(predicted, batch["mask"], strict=True):
            self.confusion.update(logits.argmax(dim=0), target)
        return predicted

    def compute_scores(self) -> Scores:
        """Compute the scores over the images of all processes; a collective."""
        sum_in_place(self.confusion.matrix)
        return self.confusion.compute()

    def on_validation_epoch_end(self) -> None:
        """Log the loss and the scores over the images of all processes."""
        scores = self.compute_scores()
        loss, images = sum_in_place(torch.tensor([self.validation_loss, self.validation_images], dtype=torch.float64))
        self.log("val/loss", float(loss / images))
        for index, iou in enumerate(scores["iou"]):
            if not math.isnan(iou):
                self.log(self.iou_names[index], iou)
        self.log("val_miou", scores["miou"], prog_bar=True, logger=False)
        for name in ("miou", "mean_accuracy", "pixel_accuracy"):
            self.log(f"val/{name}", scores[name])

    def configure_optimizers(self) -> Any:
        """The optimiser, and its schedule stepped after every step."""
        optimizer = build_optimizer(self.model, **self.optimizer_settings)
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise ConfigError(
                f"trainer.max_epochs={self.trainer.max_epochs} trains for ever, and the learning rate's schedule needs "
                "an end; set epochs, or +trainer.max_steps."
            )
        schedule = build_schedule(optimizer, int(steps), **self.schedule_settings)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilding the model needs."""
        checkpoint["config"] = self.config
        checkpoint["classes"] = self.classes
        checkpoint["sums"] = self._global_sums().cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the sums of the epoch, of which the first process keeps what all have."""
        if "sums" in checkpoint:
            self.sums.copy_(checkpoint["sums"])
            if place().rank:
                self.sums[:2] = 0


def _tags(group: str, classes: Sequence[str]) -> list[str]:
    """Return names of curves that every logger takes, one per class; MLflow refuses most punctuation."""
    names = [re.sub(r"[^\w-]", "_", name) for name in classes]
    if len(set(names)) < len(names):
        names = [f"{name}_{index}" for index, name in enumerate(names)]
    return [f"{group}/{name}" for name in names]
