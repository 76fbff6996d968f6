"""Search for the largest batch that fits into GPU memory: ``data.batch_size=auto``."""

import gc
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ema_seg.data import SegmentationDataModule
from ema_seg.inference import autocast
from ema_seg.models import model_stride, segmenter_from_config
from ema_seg.models.auxiliary import add_auxiliary_head, auxiliary_logits
from ema_seg.models.head import row_logits
from ema_seg.runtime.distributed.collectives import gather
from ema_seg.runtime.distributed.ranks import rank_info, single_process
from ema_seg.runtime.errors import ConfigError
from ema_seg.runtime.limits import is_out_of_memory
from ema_seg.training.freezing import freeze_parts
from ema_seg.training.losses import build_loss
from ema_seg.training.optimisation import build_optimizer

__all__ = ["check_auto_batch_size", "find_batch_size", "largest_that_fits"]

# Usable share of the free memory; kernels, a validation's pictures and fragmentation need the rest.
_SHARE = 0.9


def check_auto_batch_size(config: Mapping[str, Any], device: torch.device) -> None:
    """Raise a ConfigError if no batch size can be found for this configuration on this device."""
    if device.type != "cuda":
        raise ConfigError(f"data.batch_size=auto: needs a CUDA GPU, got {device.type}; give a number.")
    if config["trainer"].get("strategy") == "fsdp":
        raise ConfigError(
            "data.batch_size=auto: the search runs the unsharded model on one device, which trainer.strategy=fsdp "
            "avoids; give a number."
        )
    autocast(device, config["trainer"]["precision"])  # raises if the precision is not supported


def find_batch_size(config: Mapping[str, Any], device: torch.device) -> int:
    """Find the largest global batch size whose share fits on every device, by training on synthetic crops.

    Each trial runs two steps, because the optimiser allocates its state in the first. Afterwards memory and torch's
    random generators are as before.

    Args:
        config: see ``ema_seg.train.train``; its ``data.batch_size`` is ignored.
        device: the device that this process trains on.

    Raises:
        ConfigError: no crop fits, or only one and the decoder needs two, or no size can be found here (see
            ``check_auto_batch_size``).
    """
    check_auto_batch_size(config, device)
    data = SegmentationDataModule(**{**config["data"], "batch_size": rank_info().size, "workers": 0})
    data.setup("fit")
    devices = [device] if device.type == "cuda" else []
    # Additional copies of the weights' size: DDP's gradient buckets, and averaged weights.
    copies = (rank_info().size > 1) + bool(config["training"]["weight_averaging"])
    most = len(data.train_dataset) // rank_info().size
    with torch.random.fork_rng(devices), single_process():
        crop = data.read_first_readable(data.train_dataset, 0)["image"]
        attempt = _Attempt(config, data.num_classes, crop.shape, device, copies)
        own = largest_that_fits(attempt.fits, most)
    smallest = min(gather(own))
    # With synchronised batch norm, one crop per process is enough.
    least = 1 if rank_info().size > 1 and config["trainer"]["sync_batchnorm"] else attempt.least
    if smallest < least:
        height, width = crop.shape[1:]
        found = "only one" if smallest else "not even one"
        needed = ", but the model's batch norm needs at least 2" if smallest else ""
        raise ConfigError(
            f"data.batch_size=auto: {found} crop of {height} x {width} pixels fits into the memory of {device}"
            f"{needed}; lower data.augmentation.crop.height and width, set trainer.precision=bf16-mixed, or choose a "
            "smaller model.encoder."
        )
    return smallest * rank_info().size


def largest_that_fits(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number from 1 to ``most`` that fits; 0 if none does.

    Args:
        fits: whether a number fits; if it does, so do all smaller ones.
        most: 1 or more.
    """
    fitting, failing = 0, most + 1
    while failing - fitting > 1:
        # Double until a number fails, then bisect: no trial is much larger than the answer.
        number = min(max(1, 2 * fitting), failing - 1) if failing > most else (fitting + failing) // 2
        if fits(number):
            fitting = number
        else:
            failing = number
    return fitting


class _Attempt:
    """Trial trainings on synthetic crops, as ``train`` would train, that leave nothing in memory.

    Attributes:
        least: the smallest batch that one process can train on, as far as tried.
    """

    def __init__(
        self, config: Mapping[str, Any], classes: int, crop: torch.Size, device: torch.device, copies: int
    ) -> None:
        self.config = config
        self.classes = classes
        self.crop = crop
        self.device = device
        self.copies = copies
        self.least = 1
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
        self.most = None if free is None else _SHARE * free

    def fits(self, batch_size: int) -> bool:
        """Return whether two training steps fit into memory; a batch too small for batch norm counts as fitting."""
        try:
            self._train(batch_size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            self.least = batch_size + 1
            return True
        else:
            return self.most is None or torch.cuda.max_memory_reserved(self.device) <= self.most
        finally:
            self._free_memory()

    def _train(self, batch_size: int) -> None:
        config, device = self.config, self.device
        model = segmenter_from_config(config, self.classes, pretrained=False)
        if config["model"].get("auxiliary"):
            add_auxiliary_head(model, self.classes)
        model.to(device).train()
        frozen = config.get("freeze") or {}
        if frozen.get("until") is None:
            freeze_parts(model, frozen, epoch=0)
        stride = model_stride(model)
        height, width = (side + -side % stride for side in self.crop[1:])
        memory_format = torch.channels_last if config["training"]["channels_last"] else torch.contiguous_format
        model.to(memory_format=memory_format)
        kept = [torch.empty_like(parameter) for parameter in model.parameters() for _ in range(self.copies)]
        strips = config["training"].get("loss_strips", "auto")
        loss = build_loss(config["loss"], self.classes, strips=strips).to(device)
        optimizer = build_optimizer(model, **{**config["optimizer"], "layer_decay": None})
        images = torch.zeros(batch_size, 3, height, width, device=device).to(memory_format=memory_format)
        # Contains all classes, because some losses allocate memory for each class present.
        target = torch.randint(self.classes, (batch_size, height, width), device=device)
        for _ in range(2):
            with autocast(device, config["trainer"]["precision"]):
                value = loss(row_logits(model, images), target)
                if (auxiliary := auxiliary_logits(model)) is not None:
                    value = value + loss(auxiliary, target)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
        del kept

    def _free_memory(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
