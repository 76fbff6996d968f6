"""Samples to batches: the Lightning data module."""

import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import cv2
import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from ema_seg.data import build_dataset
from ema_seg.data.base import SegmentationDataset
from ema_seg.data.transforms import TensorSample, build_eval_transform, build_train_transform
from ema_seg.distributed.start import place
from ema_seg.errors import ConfigError, EmaSegError

__all__ = ["SegmentationDataModule", "check_shares", "collate_crops", "collate_images"]

_MOST_WORKERS = 1024


class SegmentationDataModule(LightningDataModule):
    """Training batches of augmented crops, and evaluation batches of whole images.

    Training batches are ``{"image": B x 3 x H x W, "mask": B x H x W, "name": list[str]}``. Images of
    evaluation batches keep their own sizes: ``{"image": list of 3 x H x W, "mask": list of H x W, "name":
    list[str]}``.

    Shuffling and augmentation follow torch's seed and the epoch alone: the same seed gives the same batches, for
    any number of workers, and an epoch that a resumed run trains is the one that it would have been.

    Of several processes (see ``ema_seg.distributed``) each loads its share: of every training batch an equal part, so
    that a step sees the same crops however many processes there are; of the images of an evaluation those in its turn,
    none repeated to make the shares even and none left out, so that one process may have an image more than another.

    Args:
        name: The data set, a key of :data:`ema_seg.data.DATASETS`.
        root: Its folder or archive; None for the generated data set's own place.
        batch_size: Crops in a training batch, of all processes together; an incomplete last batch is dropped.
        evaluation_batch_size: Images in an evaluation batch of one process.
        workers: Worker processes of each loader; 0 loads in the main process.
        augmentation: Steps of :func:`ema_seg.data.transforms.build_train_transform`.
        mean: Mean of each RGB channel, for images in [0, 1].
        std: Standard deviation of each RGB channel, for images in [0, 1].
        evaluation_split: The split of ``test_dataloader``; ``val_dataloader`` always reads "val".
        **options: The data set's own options.

    Raises:
        ConfigError: A number is out of range, or a name is unknown.
        DataError: From the first use of a data set, where its files are not as they should be.
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
        **options: Any,
    ) -> None:
        super().__init__()
        _require_at_least(1, batch_size=batch_size, evaluation_batch_size=evaluation_batch_size)
        _require_at_least(0, workers=workers)
        if workers > _MOST_WORKERS:
            raise ConfigError(f"data.workers={workers}: each is a process; choose {_MOST_WORKERS} at most.")
        _require_channels(mean=mean, std=std)
        self.dataset_name = name
        self.root = root
        self.batch_size = batch_size
        self.evaluation_batch_size = evaluation_batch_size
        self.workers = workers
        self.evaluation_split = evaluation_split
        self.options = options
        self.mean = mean
        self.std = std
        self._had = 0
        self._training: _Loader | None = None
        self.train_transform = build_train_transform(augmentation, mean, std)
        self.eval_transform = build_eval_transform(mean, std)

    @cached_property
    def train_dataset(self) -> SegmentationDataset:
        """The train split, augmented."""
        return build_dataset(self.dataset_name, self.root, "train", self.train_transform, **self.options)

    @cached_property
    def val_dataset(self) -> SegmentationDataset:
        """The val split at the images' own sizes."""
        return build_dataset(self.dataset_name, self.root, "val", self.eval_transform, **self.options)

    @cached_property
    def test_dataset(self) -> SegmentationDataset:
        """The split ``evaluation_split`` at the images' own sizes."""
        if self.evaluation_split == "val":
            return self.val_dataset
        return build_dataset(self.dataset_name, self.root, self.evaluation_split, self.eval_transform, **self.options)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, by train id."""
        return self.test_dataset.classes

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """The RGB colours of the classes, by train id."""
        return self.test_dataset.palette

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return self.test_dataset.num_classes

    def setup(self, stage: str) -> None:
        """Find the files that the stage ("fit", "validate", "test") needs, to fail early."""
        if stage == "fit":
            self._check_batch(len(self.train_dataset))
        if stage in {"fit", "validate"} and len(self.val_dataset) < place().size:
            raise ConfigError(
                f"{self.val_dataset.root}: the {len(self.val_dataset)} validation images do not give each of "
                f"{place().size} processes one; train in fewer."
            )
        if stage == "test":
            _ = self.test_dataset

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of crops; where a run goes on within an epoch, first those that it has not had."""
        batch_size = self.batch_size // place().size
        draws = _Draws(len(self.train_dataset), torch.initial_seed(), self.batch_size)
        draws.skipped, self._had = self._had * batch_size, 0
        self._training = self._loader(
            _SeededSamples(self.train_dataset), batch_size=batch_size, sampler=draws, collate_fn=collate_crops
        )
        return self._training

    def state_dict(self) -> dict[str, Any]:
        """The number of batches that an unfinished epoch has had, for a checkpoint."""
        loader = self._training
        return {"batches": loader.passed % len(loader) if loader is not None and len(loader) else 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Have the next ``train_dataloader`` leave so many batches out."""
        self._had = state["batches"]

    def val_dataloader(self) -> DataLoader[Any]:
        """The val split in order, as batches of whole images."""
        return self._evaluation_loader(self.val_dataset)

    def test_dataloader(self) -> DataLoader[Any]:
        """The split ``evaluation_split`` in order, as batches of whole images."""
        return self._evaluation_loader(self.test_dataset)

    def _evaluation_loader(self, dataset: SegmentationDataset) -> DataLoader[Any]:
        return self._loader(
            dataset,
            batch_size=self.evaluation_batch_size,
            sampler=_InTurn(len(dataset)),
            collate_fn=collate_images,
        )

    def _loader(self, dataset: Dataset[Any], **arguments: Any) -> "_Loader":
        return _Loader(
            dataset,
            num_workers=self.workers,
            # Its own, so that loading draws nothing from the generator that training draws from.
            generator=torch.Generator(),
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_start_worker,
            multiprocessing_context=_start_method() if self.workers > 0 else None,
            **arguments,
        )

    def _check_batch(self, images: int) -> None:
        if images < self.batch_size:
            raise ConfigError(
                f"data.batch_size={self.batch_size} is more than the {images} training images in"
                f" {self.train_dataset.root}; choose a smaller batch size."
            )
        check_shares(self.batch_size, place().size)


def check_shares(batch_size: int, processes: int) -> None:
    """A ConfigError if a training batch cannot be dealt out equally to so many processes; it lists what can."""
    if batch_size % processes:
        below = batch_size - batch_size % processes
        sizes = [str(size) for size in (below, below + processes) if size]
        counts = [str(count) for count in range(1, processes) if batch_size % count == 0]
        raise ConfigError(
            f"data.batch_size={batch_size} is of all processes together and does not divide into {processes} equal "
            f"parts; choose {' or '.join(sizes)}, or train in {' or '.join(counts)} "
            f"{'process' if counts == ['1'] else 'processes'}."
        )


def _start_method() -> str | None:
    """How the workers are started: the platform's own way, where joblib's processes have put theirs in its place."""
    current = multiprocessing.get_start_method(allow_none=True)
    own = multiprocessing.get_all_start_methods()
    return None if current is None or current in own else own[0]


class _Draws(Sampler[tuple[int, int]]):
    """One process's part of every full batch, each sample with the seed of its augmentation.

    Order and seeds depend on nothing but the seed and the epoch, which Lightning sets; without it every pass is the
    next epoch. The parts of all processes make up the batches that a single one would draw.
    """

    def __init__(self, size: int, seed: int, batch_size: int) -> None:
        self.size = size
        self.seed = seed
        self.batch_size = batch_size
        self.epoch = 0
        self.skipped = 0  # samples at the beginning of the next pass

    def set_epoch(self, epoch: int) -> None:
        """Name the epoch of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size // self.batch_size * (self.batch_size // place().size)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        random = np.random.default_rng((self.seed, self.epoch))
        self.epoch += 1
        order, seeds = random.permutation(self.size), random.integers(2**63, size=self.size)
        here, batches = place(), self.size // self.batch_size
        own = np.arange(batches * self.batch_size).reshape(batches, here.size, -1)[:, here.rank].ravel()
        own, self.skipped = own[self.skipped :], 0
        return iter(zip(order[own].tolist(), seeds[own].tolist(), strict=True))


class _InTurn(Sampler[int]):
    """Every process's part of the indices below a size: the first one to the first process, the next to the next."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return len(self._indices())

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices())

    def _indices(self) -> range:
        here = place()
        return range(here.rank, self.size, here.size)


class _SeededSamples(Dataset[Any]):
    """A data set by (index, seed): its random numbers, from torch's generator, start from that seed."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: tuple[int, int]) -> Any:
        index, seed = draw
        generator = torch.default_generator
        state = generator.get_state()
        generator.manual_seed(seed)
        try:
            return self.dataset[index]
        finally:
            generator.set_state(state)


class _Loader(DataLoader[Any]):
    """A DataLoader that counts its batches, and out of which errors of ours come as the sentence that they were."""

    passed = 0  # batches of this epoch that have been handed out

    def __iter__(self) -> Any:
        self.passed = self.sampler.skipped // (self.batch_size or 1) if isinstance(self.sampler, _Draws) else 0
        try:
            for batch in super().__iter__():
                self.passed += 1
                yield batch
        except EmaSegError as error:
            text = str(error)
            if not text.startswith("Caught "):  # raised in this process
                raise
            # A worker sends the traceback as text, which ends in "<exception's class>: <sentence>".
            raise type(error)(text.rstrip().splitlines()[-1].partition(": ")[2]) from None


def collate_crops(samples: list[TensorSample]) -> dict[str, Any]:
    """Stack samples of one size into ``{"image": B x 3 x H x W, "mask": B x H x W, "name": list[str]}``.

    Raises:
        ConfigError: The samples differ in size.
    """
    first = samples[0]
    for other in samples:
        if other["image"].shape != first["image"].shape:
            raise ConfigError(
                f"training images differ in size when augmented: {first['name']} is {_shape(first)} pixels"
                f" but {other['name']} {_shape(other)}; crop all to one size, as CategoryLimitedCrop does."
            )
    return {
        "image": torch.stack([sample["image"] for sample in samples]),
        "mask": torch.stack([sample["mask"] for sample in samples]),
        "name": [sample["name"] for sample in samples],
    }


def collate_images(samples: list[TensorSample]) -> dict[str, Any]:
    """List samples of any sizes: ``{"image": list[3 x H x W], "mask": list[H x W], "name": list[str]}``."""
    return {
        "image": [sample["image"] for sample in samples],
        "mask": [sample["mask"] for sample in samples],
        "name": [sample["name"] for sample in samples],
    }


def _start_worker(_worker: int) -> None:
    # The workers are the parallelism: OpenCV's own threads on top would compete with them for the cores.
    cv2.setNumThreads(0)


def _require_at_least(minimum: int, **values: int) -> None:
    for key, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ConfigError(f"data.{key}={value!r} must be a whole number of at least {minimum}.")


def _require_channels(**values: Sequence[float]) -> None:
    for key, value in values.items():
        if not isinstance(value, list | tuple) or len(value) != 3 or not all(isinstance(x, int | float) for x in value):
            raise ConfigError(f"data.{key}={value!r} must be three numbers, one for each of red, green and blue.")


def _shape(sample: TensorSample) -> str:
    height, width = sample["mask"].shape
    return f"{width} x {height}"
