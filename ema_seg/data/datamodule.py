"""Lightning data module: samples to batches."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Sampler

from ema_seg.config import DataArguments, check_settings
from ema_seg.data import build_dataset, check_dataset, find_dataset_class
from ema_seg.data.base import Sample, SegmentationDataset
from ema_seg.data.cache import open_cache
from ema_seg.data.corruptions import CorruptedDataset
from ema_seg.data.loading import (
    Loader,
    RoundRobinSampler,
    Samples,
    SeededBatchSampler,
    SkippedSamples,
    call_with_timeout,
    collate_crops,
    collate_images,
)
from ema_seg.data.normalise import Normalise
from ema_seg.data.transforms import TensorSample, build_train_transform, to_tensors
from ema_seg.runtime.distributed.ranks import rank_info
from ema_seg.runtime.errors import ConfigError, DataError

__all__ = ["SampleSelection", "SegmentationDataModule", "check_batch_divides", "spread_evenly"]


# Messages suggest only numbers of processes below this.
_MANY_PROCESSES = 100

_DATASETS_OF_STAGE = {
    "fit": ("train_dataset", "val_dataset", "test_dataset"),
    "validate": ("val_dataset",),
    "test": ("test_dataset",),
}

# Report a search for labels after this many masks, which take some seconds.
_MANY_MASKS = 1000


class SegmentationDataModule(LightningDataModule):
    """Data module with training batches of augmented crops and evaluation batches of whole images.

    Training batches are ``{"image": B x 3 x H x W, "mask": B x H x W, "name": list[str]}``. Images of
    evaluation batches keep their own sizes: ``{"image": list of 3 x H x W, "mask": list of H x W, "name":
    list[str]}``. Images and masks are uint8; :class:`ema_seg.data.normalise.Normalise` normalises images on the device.

    Shuffling and augmentation depend only on torch's seed and the epoch: the same seed gives the same batches, for any
    number of workers, and a resumed run trains on the batches that it would have had without the interruption.

    Each rank loads an equal part of every training batch, so that a step has the same crops for any world size.
    Evaluation images go to the ranks round-robin; none is repeated or dropped, so one rank may have an image more than
    another.

    Args:
        name: The data set, a key of :data:`ema_seg.data.DATASETS`.
        root: Its folder or archive; None for the default folder of the generated data set.
        batch_size: Crops in a training batch of all ranks together; an incomplete last batch is dropped.
        evaluation_batch_size: Images in an evaluation batch of one rank.
        workers: Worker processes of each loader; 0 loads in the main process.
        augmentation: Steps of :func:`ema_seg.data.transforms.build_train_transform`.
        mean: Mean of each RGB channel, for images in [0, 1].
        std: Standard deviation of each RGB channel, for images in [0, 1].
        evaluation_split: The split of ``test_dataloader``; ``val_dataloader`` always reads "val".
        timeout: Seconds that the disk may take to list the files, to read a sample or to deliver a batch.
        max_skipped: Number of unreadable samples that may be skipped. In a training batch the next sample replaces
            such a sample; an evaluation goes on without it.
        cache: Folder for the decoded images and masks of the training and validation splits; None decodes the files
            each time. See :func:`ema_seg.data.cache.open_cache`.
        **options: The data set's own options.

    Raises:
        ConfigError: A number is out of range, or a name is unknown.
        DataError: On the first use of a data set, if its files are missing or malformed.
    """

    def __init__(
        self,
        *,
        name: str,
        root: str | os.PathLike[str] | None,
        batch_size: int,
        evaluation_batch_size: int,
        workers: int,
        augmentation: Mapping[str, Mapping[str, Any] | None],
        mean: Sequence[float],
        std: Sequence[float],
        evaluation_split: str = "val",
        timeout: float = 300.0,
        max_skipped: int = 0,
        cache: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        given = {
            "name": name,
            "root": None if root is None else str(root),
            "batch_size": batch_size,
            "evaluation_batch_size": evaluation_batch_size,
            "workers": workers,
            "augmentation": dict(augmentation),
            "mean": mean,
            "std": std,
            "evaluation_split": evaluation_split,
            "timeout": timeout,
            "max_skipped": max_skipped,
            "cache": None if cache is None else str(cache),
        }
        check_settings(given, DataArguments, "data.")
        self.dataset_name = name
        self.root = root
        self.batch_size = batch_size
        self.evaluation_batch_size = evaluation_batch_size
        self.workers = workers
        self.evaluation_split = evaluation_split
        self.cache = None if cache is None else Path(cache).expanduser()
        self.options = options
        self.normalise = Normalise(mean, std)
        self.without_labels = False  # set it to predict a split that is published without labels
        self.pin_memory = False  # set it if the batches go to a GPU; with Lightning the trainer's device decides
        self.timeout = timeout
        self.skipped = SkippedSamples(max_skipped)
        self._resume_state: dict[str, int] = {}  # see state_dict
        self._seed: int | None = None
        self._training: Loader | None = None
        self._loaders: list[Loader] = []
        self._datasets_with_labels: list[SegmentationDataset] = []
        self.train_transform = build_train_transform(augmentation, mean)

    @cached_property
    def train_dataset(self) -> SegmentationDataset:
        """Train split, augmented."""
        return self._build("train", self.train_transform)

    @cached_property
    def val_dataset(self) -> SegmentationDataset:
        """Val split at the images' own sizes."""
        return self._build("val", to_tensors)

    @cached_property
    def test_dataset(self) -> SegmentationDataset:
        """Split ``evaluation_split`` at the images' own sizes."""
        if self.evaluation_split == "val":
            return self.val_dataset
        return self._build(self.evaluation_split, to_tensors)

    def _build(self, split: str, transform: Callable[[Sample], TensorSample]) -> SegmentationDataset:
        check_dataset(self.dataset_name, self.root, self.options)
        build = partial(build_dataset, self.dataset_name, self.root, split, transform, **self.options)
        if find_dataset_class(self.dataset_name).makes_files:
            return build()
        return call_with_timeout(self.timeout, str(self.root), build)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by train id."""
        return self.test_dataset.classes

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """RGB colours of the classes, by train id."""
        return self.test_dataset.palette

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.test_dataset.num_classes

    def setup(self, stage: str) -> None:
        """Find the files of the stage ("fit", "validate", "test"), and a label in them, to fail early."""
        if stage == "fit":
            self._check_batch(len(self.train_dataset))
        if stage in {"fit", "validate"} and len(self.val_dataset) < rank_info().size:
            images, processes = len(self.val_dataset), rank_info().size
            raise ConfigError(
                f"{self.val_dataset.root}: {images} validation images for {processes} processes; each process needs at "
                f"least one; use at most {images} processes."
            )
        for name in _DATASETS_OF_STAGE[stage]:
            dataset = getattr(self, name)
            self._use_cache(dataset)
            dataset.without_labels = self.without_labels
            if self.without_labels:
                continue
            if rank_info().rank == 0 and dataset not in self._datasets_with_labels:  # Lightning repeats setup
                self._require_labels(dataset)
                self._datasets_with_labels.append(dataset)

    def _use_cache(self, dataset: SegmentationDataset) -> None:
        """Let a data set of the training read the cache, which is built first if it is not there."""
        if self.cache is not None and dataset.cache is None and dataset.split in ("train", "val"):
            dataset.cache = open_cache(
                self.cache, dataset, self.dataset_name, self.options, workers=self.workers, timeout=self.timeout
            )

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled batches of crops; in an epoch resumed midway, only the remaining ones."""
        batch_size = self.batch_size // rank_info().size
        if self._seed is None:  # equal on all ranks only before training, which seeds each rank anew
            self._seed = torch.initial_seed()
        draws = SeededBatchSampler(len(self.train_dataset), self._seed, self.batch_size)
        draws.skipped, self._resume_state = self._batches_to_skip() * batch_size, {}
        self._training = self._loader(self.train_dataset, collate_crops, "train", batch_size, draws)
        return self._training

    def state_dict(self) -> dict[str, Any]:
        """Return the number of batches consumed in an unfinished epoch, and the values that determine their order."""
        loader = self._training
        if loader is None or loader.batches_consumed >= (
            self.trainer.num_training_batches if self.trainer else len(loader)
        ):
            return {"batches": 0}
        return {"batches": loader.batches_consumed, **self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next ``train_dataloader`` skip the batches that ``state`` counts."""
        self._resume_state = state

    def _order(self) -> dict[str, int]:
        assert self._seed is not None
        return {"seed": self._seed, "data.batch_size": self.batch_size, "images": len(self.train_dataset)}

    def _batches_to_skip(self) -> int:
        batches = self._resume_state.get("batches", 0)
        if batches:
            for key, value in self._order().items():
                if self._resume_state[key] != value:
                    raise ConfigError(
                        f"{key}: must stay {self._resume_state[key]} until the interrupted epoch is complete, "
                        f"got {value}; the order of its samples depends on it; restore it, or start a new run."
                    )
        return batches

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the val split in order, as batches of whole images."""
        return self._evaluation_loader(self.val_dataset, "val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the split ``evaluation_split`` in order, as batches of whole images."""
        return self._evaluation_loader(self.test_dataset, self.evaluation_split)

    def corrupted_dataloader(self, indices: Sequence[int]) -> DataLoader[Any]:
        """Return images of the split ``evaluation_split`` with all corruptions, see ``CorruptedDataset``."""
        return self._evaluation_loader(CorruptedDataset(self.test_dataset, indices), self.evaluation_split)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move crops to the device; images of a validation are moved one size at a time, and counted on the host."""
        if self.trainer is not None and self.trainer.training:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        return batch

    @contextmanager
    def worker_errors_converted(self) -> Iterator[None]:
        """Convert torch's error about a stalled or killed loader worker, which it may raise anywhere, to a DataError.

        Raises:
            DataError: A worker has stalled or was killed; the message names the file that it was reading.
        """
        try:
            yield
        except RuntimeError as error:
            for loader in self._loaders:
                if explained := loader.convert_worker_error(error):
                    raise explained from error
            raise

    def read_first_readable(
        self, dataset: SegmentationDataset, index: int, read: Callable[[int], Any] | None = None
    ) -> Any:
        """Return the sample, or the result of ``read``, at ``index`` or else the next readable index.

        Raises:
            DataError: More than ``max_skipped`` samples, or all, are unreadable.
        """
        for tried in range(len(dataset)):
            near = (index + tried) % len(dataset)
            try:
                return call_with_timeout(self.timeout, dataset.files(near), partial(read or dataset.__getitem__, near))
            except DataError:
                if tried >= self.skipped.max_skipped:
                    raise
        raise DataError(f"{dataset.root}: the split {dataset.split!r} has no readable image; check its files.")

    def _require_labels(self, dataset: SegmentationDataset) -> None:
        """Read masks until one has a labelled pixel, or all classes have one if the data set expects that.

        Raises:
            DataError: No label, or not each expected class, was found; the run would end in a meaningless score.
        """
        pixels = np.zeros(256, dtype=np.int64)
        unreadable: DataError | None = None
        for index in range(len(dataset)):
            try:
                mask = call_with_timeout(self.timeout, dataset.files(index), partial(dataset.read_mask, index))
            except DataError as error:  # counted when its sample is read
                unreadable = unreadable or error
                continue
            pixels += np.bincount(mask.ravel(), minlength=256)
            present = pixels[: dataset.num_classes] > 0
            if present.all() if dataset.expects_all_classes else present.any():
                return
            if index == _MANY_MASKS:
                absent = dataset.classes[int(np.argmin(present))]
                print(f"{dataset.root}: searching all {len(dataset)} masks for the class {absent!r}.", file=sys.stderr)
        if unreadable and not pixels.any():
            raise unreadable
        if problem := dataset.describe_problem(pixels):
            raise DataError(problem)

    def _evaluation_loader(self, dataset: SegmentationDataset | CorruptedDataset, split: str) -> Loader:
        return self._loader(dataset, collate_images, split, self.evaluation_batch_size, RoundRobinSampler(len(dataset)))

    def _loader(
        self,
        dataset: SegmentationDataset | CorruptedDataset,
        collate: Callable[[list[TensorSample]], dict[str, Any]],
        split: str,
        batch_size: int,
        sampler: Sampler[Any],
    ) -> Loader:
        loader = Loader(
            Samples(dataset, self.workers, self.skipped.max_skipped, self.timeout),
            collate,
            skipped=self.skipped,
            split=split,
            workers=self.workers,
            batch_size=batch_size,
            sampler=sampler,
            pin_memory=self.pin_memory
            or (self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"),
        )
        self._loaders.append(loader)
        return loader

    def _check_batch(self, images: int) -> None:
        if images < self.batch_size:
            raise ConfigError(
                f"data.batch_size={self.batch_size} is more than the {images} training images in"
                f" {self.train_dataset.root}; choose a smaller batch size."
            )
        check_batch_divides(self.batch_size, rank_info().size)


def check_batch_divides(batch_size: int, processes: int) -> None:
    """Raise ConfigError, which lists possible values, unless the world size divides the batch size."""
    if batch_size % processes:
        below = batch_size - batch_size % processes
        sizes = [str(size) for size in (below, below + processes) if size]
        most = min(processes, batch_size + 1, _MANY_PROCESSES)
        counts = [str(count) for count in range(1, most) if batch_size % count == 0]
        raise ConfigError(
            f"data.batch_size: must be divisible by the number of processes that share it ({processes}), got "
            f"{batch_size}; set {' or '.join(sizes)}, or use {' or '.join(counts)} "
            f"{'process' if counts == ['1'] else 'processes'}."
        )


def spread_evenly(length: int, count: int) -> list[int]:
    """Return at most ``count`` indices below ``length``, spread evenly from the first to the last."""
    return sorted({int(place) for place in np.linspace(0, length - 1, min(length, count)).round()})


class SampleSelection:
    """Samples of a data module's test split at chosen indices.

    Args:
        data: the data module.
        indices: positions in ``data.test_dataset``.
    """

    def __init__(self, data: SegmentationDataModule, indices: Sequence[int]) -> None:
        self.data = data
        self.indices = indices

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        sample: Mapping[str, Any] = self.data.read_first_readable(self.data.test_dataset, self.indices[index])
        return sample
