"""Lightning module: training step, validation, optimiser and schedule."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule
from numpy.typing import NDArray
from torch import Tensor, distributed, nn

from ema_seg.data.base import IGNORE_INDEX
from ema_seg.data.folder import distinct_colors
from ema_seg.data.normalise import Normalise
from ema_seg.evaluation import ConfusionMatrix
from ema_seg.evaluation.confusion import Scores
from ema_seg.evaluation.counter import Counter
from ema_seg.inference.prediction import LESS_MEMORY, model_input, pad_to_stride, predict
from ema_seg.models import load_segmenter, model_stride
from ema_seg.models.auxiliary import add_auxiliary_head, auxiliary_logits
from ema_seg.models.checkpoint import load_auxiliary_weights
from ema_seg.models.head import RowLogits, row_logits
from ema_seg.models.placement import parameter_stages
from ema_seg.runtime.distributed.collectives import sum_in_place
from ema_seg.runtime.distributed.ranks import rank_info, single_process
from ema_seg.runtime.errors import CheckpointError, ConfigError
from ema_seg.runtime.limits import reraise_out_of_memory, reraise_size_errors
from ema_seg.training.finite import FiniteCheck
from ema_seg.training.losses import build_loss
from ema_seg.training.optimisation import build_optimizer, build_schedule
from ema_seg.training.parallel.sharded import full_tensor

__all__ = ["AUXILIARY_LOSS", "MONITORED", "SegmentationModule"]

# The score that selects the best checkpoint, stops a training early and prunes a search.
MONITORED = "val/miou"

# Column of the auxiliary head's loss, before its weight.
AUXILIARY_LOSS = "train/auxiliary_loss"


class SegmentationModule(LightningModule):
    """Lightning module that trains a segmenter and scores it on the validation images at their own size.

    It logs per epoch ``train/loss``, and the mean and the maximum of the finite gradient norms before clipping as
    ``train/gradient_norm`` and ``train/gradient_norm_max``; a checkpoint within an epoch keeps their sums. It logs per
    validation ``val/miou``, ``val/mean_accuracy``, ``val/pixel_accuracy`` and ``val_iou/<class>`` of each class that
    occurs, all from one confusion matrix, and ``val/loss``, the mean over the images of each whole image's loss.

    With an auxiliary head (``ema_seg.models.auxiliary``) it minimises ``train/loss``, which is that of the model's own
    logits, plus ``config["model"]["auxiliary"]`` times ``train/auxiliary_loss``, the same loss of the head's logits.

    Args:
        model: maps float images (B, 3, H, W) to logits (B, K, H, W).
        loss: maps ``RowLogits`` or logits (B, K, H, W), and train ids (B, H, W), to a scalar.
        normalise: normalises the uint8 images.
        optimizer: keyword arguments of ``build_optimizer``.
        schedule: keyword arguments of ``build_schedule``.
        classes: the K class names.
        palette: their colours, (red, green, blue) from 0 to 255; None for distinct ones.
        frozen: names of parameters of ``model`` that do not train yet, but will later.
        config: the run's whole configuration as plain data; like the class names it is stored in every
            checkpoint, so that a checkpoint alone is enough to rebuild the model.

    Raises:
        TrainingError: the loss of a training step is not finite; raised at most ``log_every_n_steps`` steps later, and
            before anything is validated or saved.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        normalise: Normalise,
        *,
        classes: Sequence[str],
        palette: Sequence[Sequence[int]] | None = None,
        optimizer: Mapping[str, Any],
        schedule: Mapping[str, Any],
        config: Mapping[str, Any],
        frozen: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.normalise = normalise
        self.classes = list(classes)
        self.palette = [list(colour) for colour in palette or distinct_colors(len(classes))]
        self.config = dict(config)
        self.optimizer_settings = dict(optimizer)
        self.schedule_settings = dict(schedule)
        self.frozen = frozen
        # Before the devices are set up: FSDP would shard the encoder that finding the stages runs.
        self.stages = parameter_stages(model) if self.optimizer_settings.get("layer_decay") is not None else None
        self.stride = model_stride(model)
        # A patch of 14 pixels divides none of the usual crops, so they are padded as the images of an evaluation are.
        self.pads_crops = self.stride & (self.stride - 1) != 0
        self.confusion = ConfusionMatrix(len(classes))
        self.counter: Counter[None] | None = None  # of the validation that runs
        self.validation_losses: list[Tensor] = []
        self.iou_names = _tags("val_iou", self.classes)
        self.finite = FiniteCheck()
        # For the progress bar. Lightning would read a logged value for it in each step, and so wait for the device.
        self.last_loss: Tensor | None = None
        self.crops = "images"  # size of the last batch's crops, for messages
        self.auxiliary_weight: float | None = self.config.get("model", {}).get("auxiliary")
        # Sums of loss times images, images, gradient norms and steps, and the largest norm; and with an auxiliary head,
        # of its loss times images. Lightning's own means would restart in a run that resumes within an epoch.
        self.sums: Tensor
        self.register_buffer("sums", torch.zeros(5 if self.auxiliary_weight is None else 6), persistent=False)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # every argument of the constructor is in the checkpoint
        cls, checkpoint_path: str | PathLike[str], map_location: Any = "cpu"
    ) -> "SegmentationModule":
        """Rebuild the module of a checkpoint of ``train.py``, in training mode as Lightning's own method does.

        Args:
            checkpoint_path: such as ``checkpoints/best.ckpt`` of a run.
            map_location: the device of the module.

        Raises:
            CheckpointError: see ``load_segmenter``; or the config lacks the section loss, optimizer or schedule.
        """
        path = Path(checkpoint_path)
        model, checkpoint = load_segmenter(path)
        config, classes = checkpoint["config"], checkpoint["classes"]
        if config["model"].get("auxiliary"):
            add_auxiliary_head(model, len(classes))
            load_auxiliary_weights(model, checkpoint, path)
        for name in ("loss", "optimizer", "schedule"):
            if not isinstance(config.get(name), Mapping):
                raise CheckpointError(
                    f"ckpt={path}: its config must have the section {name}; use ema_seg.models.load_segmenter for the "
                    "model alone."
                )
        strips = config.get("training", {}).get("loss_strips", "auto")
        loss = build_loss(config["loss"], len(classes), strips=strips)
        settings = {"optimizer": config["optimizer"], "schedule": config["schedule"], "config": config}
        normalise = Normalise(config["data"]["mean"], config["data"]["std"])
        return (
            cls(model, loss, normalise, classes=classes, palette=checkpoint.get("palette"), **settings)
            .train()
            .to(torch.device(map_location or "cpu"))
        )

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits (B, K, H, W) of uint8 RGB images (B, 3, H, W)."""
        return self.model(model_input(self.model, images, self.normalise))

    def on_fit_start(self) -> None:
        """Read losses only at log steps on a device that computes while the host goes on."""
        if self.device.type != "cpu":
            self.finite.every = max(1, self.trainer.log_every_n_steps)  # type: ignore[attr-defined]

    def on_train_epoch_start(self) -> None:
        """Reset the sums of the epoch."""
        self.sums.zero_()

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        """Seed torch from (seed, epoch, batch, rank), so that dropout does not depend on earlier steps."""
        entropy = np.random.SeedSequence((self.config["seed"], self.current_epoch, batch_index, self.global_rank))
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """Compute the loss of one batch of crops."""
        self._check_crops(batch["image"])
        try:
            with reraise_size_errors(batch["image"]):
                images = pad_to_stride(model_input(self.model, batch["image"], self.normalise), self.stride)
                logits, auxiliary = row_logits(self.model, images), auxiliary_logits(self.model)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ConfigError(
                f"data.batch_size: must be at least 2 per process, got {len(batch['name'])}: the model has a batch "
                "norm over features pooled to 1 x 1; raise it."
            ) from error
        height, width = batch["image"].shape[-2:]
        loss = self.loss(logits.crop(height, width), batch["mask"])
        size = len(batch["name"])
        self.last_loss = loss.detach()
        self.sums[0] += loss.detach().float() * size
        self.sums[1] += size
        if auxiliary is not None and self.auxiliary_weight is not None:
            auxiliary_loss = self.loss(auxiliary.crop(height, width), batch["mask"])
            self.sums[5] += auxiliary_loss.detach().float() * size
            loss = loss + self.auxiliary_weight * auxiliary_loss
        self.finite.add(loss, self.global_step, self.current_epoch, batch["name"])
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Record the gradient norm, which shows whether a block makes gradients vanish or explode."""
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        norm = full_tensor(torch.nn.utils.get_total_norm(gradients)).float()
        # A loss scale that is too large overflows float16; the scaler then skips the step.
        finite = norm.isfinite()
        self.sums[2] += norm.where(finite, 0)
        self.sums[3] += finite
        self.sums[4] = torch.maximum(self.sums[4], norm.where(finite, 0))

    def epoch_means(self) -> dict[str, float]:
        """Return mean loss and gradient norms of this epoch so far; a collective."""
        loss, images, norm, steps, largest, *auxiliary = self._global_sums().tolist()
        means = {
            "train/loss": loss / images,
            "train/gradient_norm": norm / steps if steps else float("nan"),
            "train/gradient_norm_max": largest,
        }
        return means | ({AUXILIARY_LOSS: auxiliary[0] / images} if auxiliary else {})

    def _global_sums(self) -> Tensor:
        """All-reduce the sums of losses and images; the gradient norms are equal on all ranks already."""
        own = sum_in_place(torch.cat([self.sums[:2], self.sums[5:]]))
        return torch.cat([own[:2], self.sums[2:5], own[2:]])

    def on_train_epoch_end(self) -> None:
        """Log the means of the epoch."""
        self.finite.check()
        self.log_dict(self.epoch_means())

    def _check_crops(self, images: Tensor) -> None:
        height, width = images.shape[-2:]
        self.crops = f"{height} x {width} pixels"
        if not self.pads_crops and (height % self.stride or width % self.stride):
            raise ConfigError(
                f"data.augmentation: the sides of crops must be multiples of {self.stride}, the model's stride, got "
                f"{height} x {width} pixels; change data.augmentation.crop.height and width."
            )

    def on_validation_epoch_start(self) -> None:
        """Reset the scores of the validation, and broadcast the model's buffers."""
        self.finite.check()
        self.confusion = ConfusionMatrix(len(self.classes))
        if self.counter is not None:
            self.counter.close()  # of a validation that failed
        self.counter = Counter(len(self.classes), self._count)
        self.validation_losses = []
        if rank_info().size > 1:
            # Rank 0's buffers are those in the checkpoints. The weights are equal on all ranks.
            for buffer in self.model.buffers():
                distributed.broadcast(buffer, 0)

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """Score whole images at their own size, and add up their losses."""
        for logits, target in zip(self.score(batch), batch["mask"], strict=True):
            if (target != IGNORE_INDEX).any():
                # Without collectives: the ranks may have different numbers of images.
                with torch.no_grad(), single_process(), reraise_out_of_memory(logits, LESS_MEMORY):
                    loss = self.loss(logits, target[None].to(self.device, non_blocking=True))
                    self.validation_losses.append(loss)

    def score(self, batch: dict[str, Any]) -> list[RowLogits]:
        """Predict whole images and count their pixels.

        Returns:
            The logits 1 x K x H x W of each image.
        """
        predicted = predict(self.model, batch["image"], self.stride, self.normalise)
        assert self.counter is not None
        self.counter.add_batch(batch, predicted)
        return predicted

    def _count(self, name: str, prediction: NDArray[np.integer], truth: NDArray[np.integer]) -> None:
        self.confusion.update(prediction, truth)

    def compute_scores(self) -> Scores:
        """Compute the scores over the images of all ranks; a collective."""
        if self.counter is not None:
            with closing(self.counter):
                self.counter.results()
            self.counter = None
        sum_in_place(self.confusion.matrix)
        return self.confusion.compute()

    def on_validation_epoch_end(self) -> None:
        """Log the loss and the scores over the images of all ranks."""
        scores = self.compute_scores()
        losses = [float(loss) for loss in self.validation_losses]
        loss, images = sum_in_place(torch.tensor([sum(losses), len(losses)], dtype=torch.float64))
        self.log("val/loss", float(loss / images))
        for index, iou in enumerate(scores["iou"]):
            if not math.isnan(iou):
                self.log(self.iou_names[index], iou)
        self.log("val_miou", scores["miou"], prog_bar=True, logger=False)
        for name in ("miou", "mean_accuracy", "pixel_accuracy"):
            self.log(f"val/{name}", scores[name])

    def configure_optimizers(self) -> Any:
        """Build the optimiser and its schedule, which advances after every optimiser step."""
        settings = {**self.optimizer_settings, "stages": self.stages, "later": self.frozen}
        optimizer = build_optimizer(self.model, **settings)
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise ConfigError(
                f"trainer.max_epochs={self.trainer.max_epochs}: the training has no end, but the learning-rate "
                "schedule needs a number of steps; set epochs, or +trainer.max_steps."
            )
        schedule = build_schedule(optimizer, int(steps), **self.schedule_settings)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add config, classes, palette and the sums of the epoch to the checkpoint, unless a loss was not finite."""
        self.finite.check()
        checkpoint["config"] = self.config
        checkpoint["classes"] = self.classes
        checkpoint["palette"] = self.palette
        checkpoint["sums"] = self._global_sums().cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the sums of the epoch: rank 0 takes the totals of losses and images, the others start at zero."""
        if "sums" in checkpoint:
            self.sums.copy_(checkpoint["sums"])
            if rank_info().rank:
                self.sums[:2] = 0
                self.sums[5:] = 0


def _tags(group: str, classes: Sequence[str]) -> list[str]:
    """Return one curve name per class that every logger accepts; MLflow rejects most punctuation."""
    names = [re.sub(r"[^\w-]", "_", name) for name in classes]
    if len(set(names)) < len(names):
        names = [f"{name}_{index}" for index, name in enumerate(names)]
    return [f"{group}/{name}" for name in names]
