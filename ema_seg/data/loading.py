"""Loading of batches: samplers, worker processes, timeouts, and the skipping of unreadable samples."""

import csv
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler, default_collate, get_worker_info

from ema_seg.data.processes import start_method
from ema_seg.data.transforms import TensorSample
from ema_seg.runtime.distributed.collectives import gather
from ema_seg.runtime.distributed.exit_handlers import PREEMPTION_SIGNALS
from ema_seg.runtime.distributed.ranks import rank_info
from ema_seg.runtime.errors import ConfigError, DataError, EmaSegError
from ema_seg.runtime.escaping import for_terminal
from ema_seg.runtime.texts import read_table

__all__ = [
    "Loader",
    "RoundRobinSampler",
    "Samples",
    "SeededBatchSampler",
    "SkippedSamples",
    "call_with_timeout",
    "collate_crops",
    "collate_images",
    "read_each",
    "read_skipped",
]

T = TypeVar("T")


class SkippedSamples:
    """Record of unreadable samples that were skipped, at most ``max_skipped``.

    Args:
        max_skipped: Number of samples that may be skipped.
    """

    def __init__(self, max_skipped: int) -> None:
        self.max_skipped = max_skipped
        self.samples: dict[tuple[str, str], str] = {}
        self._file: Path | None = None

    def attach_file(self, file: Path) -> None:
        """Share the record through a CSV file (split, name, reason): read it, and append new samples to it.

        All ranks of a run, and a resumed run, use the same file.
        """
        self._file = file
        self._read()

    def add(self, split: str, name: str, reason: str) -> None:
        """Record a skipped sample, and print a warning if it is new.

        Raises:
            DataError: ``max_skipped`` samples have been skipped already.
        """
        self._read()
        if (split, name) in self.samples:
            return
        if len(self.samples) >= self.max_skipped:
            raise DataError(
                f"{reason.rstrip('.')}; data.max_skipped={self.max_skipped} is reached (samples skipped so far: "
                f"{len(self.samples)}); repair the files, or raise it."
            )
        self.samples[split, name] = reason
        told = f"warning: {reason} Skipped ({len(self.samples)} of at most {self.max_skipped})."
        print(for_terminal(told), file=sys.stderr, flush=True)
        if self._file is not None:
            with self._file.open("a", newline="", encoding="utf-8", errors="surrogateescape") as file:
                csv.writer(file).writerow([split, name, reason])

    def all_gather(self) -> None:
        """All-gather the skipped samples; every rank must call it.

        Raises:
            DataError: All ranks together have skipped more than ``max_skipped`` samples.
        """
        for samples in gather(self.samples):
            self.samples |= samples
        if len(self.samples) > self.max_skipped:
            raise DataError(
                f"data.max_skipped={self.max_skipped}: {len(self.samples)} samples cannot be read; repair the files, "
                f"or raise it; the last one: {list(self.samples.values())[-1]}"
            )

    def _read(self) -> None:
        if self._file is not None:
            self.samples.update(read_skipped(self._file))


def read_skipped(file: Path) -> dict[tuple[str, str], str]:
    """Read the file of ``SkippedSamples``: reasons by split and name; empty if it does not exist."""
    if not file.is_file():
        return {}
    # A kill may have truncated the last line.
    return {(row[0], row[1]): row[2] for row in read_table(file) if len(row) == 3}


class Readable(Protocol):
    """Data set, read by index, that can name the samples and files it reads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...

    def name(self, index: int, /) -> str:
        """Return the name of a sample."""

    def files(self, index: int, /) -> str:
        """Return the names of its files."""


class _Item(NamedTuple):
    """A sample, None if it is unreadable, with names and reasons of the samples skipped for it."""

    sample: Any
    skipped: list[tuple[str, str]]


class Samples(Dataset[_Item]):
    """Data set that loader workers read, by index or by (index, random seed).

    With a seed, torch's generator is seeded with it, and the next sample replaces an unreadable one, so that batches
    stay full. Without a seed, an unreadable sample is skipped.

    Args:
        dataset: The data set, or another reader of its files.
        workers: Number of worker processes.
        max_skipped: Number of samples that may be skipped for one item; the error of the next one is raised.
        timeout: Seconds to read a sample in the main process; :class:`Loader` waits as long for a worker's batch.
    """

    def __init__(self, dataset: Readable, workers: int, max_skipped: int, timeout: float) -> None:
        self.dataset = dataset
        self.max_skipped = max_skipped
        self.timeout = timeout
        # In shared memory, a row per worker: its pid, and the index of the sample it is reading, or -1.
        self.workers = torch.full((max(1, workers), 2), -1).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: int | tuple[int, int]) -> _Item:
        index, seed = (draw, None) if isinstance(draw, int) else draw
        skipped: list[tuple[str, str]] = []
        while True:
            try:
                return _Item(self._read(index, seed), skipped)
            except DataError as error:
                if len(skipped) >= self.max_skipped:
                    raise
                skipped.append((self.dataset.name(index), str(error)))
            if seed is None:
                return _Item(None, skipped)
            index = (index + 1) % len(self.dataset)

    def _read(self, index: int, seed: int | None) -> Any:
        info = get_worker_info()
        slot = self.workers[info.id if info else 0]
        slot[1] = index
        generator = torch.default_generator
        state = generator.get_state()
        try:
            if seed is not None:
                generator.manual_seed(seed)
            if info:
                return self.dataset[index]
            return call_with_timeout(self.timeout, self.dataset.files(index), lambda: self.dataset[index])
        finally:
            generator.set_state(state)
            slot[1] = -1


def call_with_timeout(seconds: float, what: str, read: Callable[[], T]) -> T:
    """Call ``read`` with a timeout, for reads in the main process, and return its result.

    ``read`` runs in a daemon thread: a thread that waits for a network disk reacts to no signal, so only another thread
    can give up and let the process end.

    Args:
        seconds: Timeout.
        what: The file or folder that ``read`` reads, for messages.
        read: A function that reads from a disk.

    Raises:
        EmaSegError: ``read`` has not returned in time.
    """
    outcome: Future[T] = Future()

    def work() -> None:
        try:
            outcome.set_result(read())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    if not wait([outcome], seconds).done:
        raise DiskTimeoutError(format_timeout_message([what], seconds))
    return outcome.result()


class DiskTimeoutError(EmaSegError):
    """Error of a disk that does not respond; not a DataError, so that no next sample is tried."""


def format_timeout_message(waited_for: list[str], seconds: float) -> str:
    return (
        f"{_listed(waited_for) or 'data'}: the disk did not respond for {seconds:g} seconds; check it, or raise "
        "data.timeout (--timeout of the data check)."
    )


def _listed(files: list[str]) -> str:
    return ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


class SeededBatchSampler(Sampler[tuple[int, int]]):
    """Sampler of one rank's part of every full batch: pairs of an index and the seed of its augmentation.

    Order and seeds depend only on the seed and the epoch, which Lightning sets; without Lightning, each pass is the
    next epoch. The parts of all ranks form the batches that a single process would draw.
    """

    def __init__(self, size: int, seed: int, batch_size: int) -> None:
        self.size = size
        self.seed = seed
        self.batch_size = batch_size
        self.epoch = 0
        self.skipped = 0  # samples to skip at the beginning of the next pass

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size // self.batch_size * (self.batch_size // rank_info().size)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        random = np.random.default_rng((self.seed, self.epoch))
        self.epoch += 1
        order, seeds = random.permutation(self.size), random.integers(2**63, size=self.size)
        here, batches = rank_info(), self.size // self.batch_size
        own = np.arange(batches * self.batch_size).reshape(batches, here.size, -1)[:, here.rank].ravel()
        own, self.skipped = own[self.skipped :], 0
        return iter(zip(order[own].tolist(), seeds[own].tolist(), strict=True))


class RoundRobinSampler(Sampler[int]):
    """Sampler of one rank's part of the indices below ``size``, in order: index i goes to rank i % world size."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return len(self._indices())

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices())

    def _indices(self) -> range:
        here = rank_info()
        return range(here.rank, self.size, here.size)


class Loader(DataLoader[Any]):
    """DataLoader of :class:`Samples` that counts its batches and raises errors of one sentence.

    Args:
        samples: The samples to read.
        collate: Makes a batch of a list of samples.
        skipped: Records the unreadable samples.
        split: Name of their split.
        workers: Worker processes; 0 reads in this one.
        batch_size: Samples in a batch.
        sampler: Order of the samples.
        pin_memory: Copy batches to page-locked memory, for a GPU to read from.
    """

    batches_consumed = 0  # batches of this epoch that have been read or skipped

    def __init__(
        self,
        samples: Samples,
        collate: Callable[[list[Any]], Any],
        *,
        skipped: SkippedSamples,
        split: str,
        workers: int,
        batch_size: int,
        sampler: Sampler[Any],
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            samples,
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=_Collate(collate),
            num_workers=workers,
            # Its own generator, so that loading does not advance the one of the training.
            generator=torch.Generator(),
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=_start_worker,
            multiprocessing_context=start_method() if workers > 0 else None,
            timeout=samples.timeout if workers > 0 else 0,
        )
        self.samples = samples
        self.skipped = skipped
        self.split = split

    def check_worker_number_rationality(self) -> None:
        """Suppress torch's warning about more workers than cores: the number is the user's choice."""

    def __iter__(self) -> Any:
        self.batches_consumed = (
            self.sampler.skipped // (self.batch_size or 1) if isinstance(self.sampler, SeededBatchSampler) else 0
        )
        try:
            for batch, skipped in super().__iter__():
                for name, reason in skipped:
                    self.skipped.add(self.split, name, reason)
                self.batches_consumed += 1
                if batch is not None:
                    yield batch
        except EmaSegError as error:
            text = str(error)
            if not text.startswith("Caught "):  # raised in this process
                raise
            # A worker sends its traceback as text; the last line is "<class of the exception>: <sentence>".
            raise type(error)(text.rstrip().splitlines()[-1].partition(": ")[2]) from None
        except RuntimeError as error:
            if explained := self.convert_worker_error(error):
                raise explained from error
            raise

    def convert_worker_error(self, error: RuntimeError) -> DataError | None:
        """Convert torch's error about a stalled or killed worker of this loader to a DataError; else return None.

        Torch may raise the error of a killed worker anywhere in the main thread, not only while it waits for a batch.
        """
        text = str(error)
        workers: dict[int, int] = dict(self.samples.workers.tolist())
        if text.startswith("DataLoader timed out"):
            waiting = {process: index for process, index in workers.items() if index >= 0}
            for process in waiting:
                os.kill(process, signal.SIGTERM)  # so that nothing waits for them at exit
            files = [self.samples.dataset.files(index) for index in waiting.values()]
            return DataError(format_timeout_message(files, self.samples.timeout))
        if not text.startswith("DataLoader worker (pid"):
            return None
        lost = [int(number) for number in re.findall(r"\d+", re.split(" is | exited ", text)[0])]
        if not set(lost) & set(workers):
            return None
        files = [self.samples.dataset.files(workers[process]) for process in lost if workers.get(process, -1) >= 0]
        how = f"{text} {error.__cause__}".partition("signal: ")[2].partition(".")[0].strip()
        return DataError(
            f"{_listed(files) or 'data.workers'}: the system killed a loader worker{f' ({how})' if how else ''}"
            f"{' while it read this' if files else ''}, often because memory ran out; lower data.workers or "
            f"data.batch_size{', or check the files' if files else ''}."
        )


def read_each(
    dataset: Readable, read: Callable[[Any, int], Any], split: str, *, workers: int, timeout: float
) -> Loader:
    """Return a loader of ``read(dataset, index)`` for each index in order, computed in worker processes.

    Args:
        dataset: The data set; names the files in errors.
        read: A function that can be pickled. It returns no None.
        split: Name of the split.
        workers: Worker processes; 0 reads in this one.
        timeout: Seconds that the disk may take for a sample.
    """
    return Loader(
        Samples(_Each(dataset, read), workers, 0, timeout),
        _unpack_single,
        skipped=SkippedSamples(0),
        split=split,
        workers=workers,
        batch_size=1,
        sampler=SequentialSampler(range(len(dataset))),
    )


class _Each:
    """Data set of the results of a function of another data set and an index."""

    def __init__(self, dataset: Readable, read: Callable[[Any, int], Any]) -> None:
        self.dataset = dataset
        self.read = read
        self.name, self.files = dataset.name, dataset.files

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.read(self.dataset, index)


def _unpack_single(results: list[Any]) -> Any:
    (result,) = results
    return result


class _Collate:
    """Collate function from items to their batch, None if no sample is readable, and the samples skipped for it."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list[_Item]) -> tuple[Any, list[tuple[str, str]]]:
        samples = [item.sample for item in items if item.sample is not None]
        return self.collate(samples) if samples else None, [entry for item in items for entry in item.skipped]


def collate_crops(samples: list[TensorSample]) -> dict[str, Any]:
    """Stack samples of one size into ``{"image": B x 3 x H x W, "mask": B x H x W, "name": list[str]}``, all uint8.

    The image is a view of contiguous B x H x W x 3.

    Raises:
        ConfigError: The samples differ in size.
    """
    first = samples[0]
    for other in samples:
        if other["image"].shape != first["image"].shape:
            raise ConfigError(
                f"data.augmentation: training images differ in size: {first['name']} is {_shape(first)} pixels but "
                f"{other['name']} {_shape(other)}; crop all to one size, as ScaledCrop does."
            )
    # In a worker, torch's function stacks right into the memory that it shares with the main process.
    return {
        "image": default_collate([sample["image"].permute(1, 2, 0) for sample in samples]).permute(0, 3, 1, 2),
        "mask": default_collate([sample["mask"] for sample in samples]),
        "name": [sample["name"] for sample in samples],
    }


def collate_images(samples: list[TensorSample]) -> dict[str, Any]:
    """Collect samples of any sizes in lists: ``{"image": list[3 x H x W], "mask": list[H x W], "name": list[str]}``."""
    return {
        "image": [sample["image"] for sample in samples],
        "mask": [sample["mask"] for sample in samples],
        "name": [sample["name"] for sample in samples],
    }


def _start_worker(number: int) -> None:
    info = get_worker_info()
    assert info is not None and isinstance(info.dataset, Samples)
    info.dataset.workers[number, 0] = os.getpid()
    # OpenCV's threads would compete with the workers for the cores.
    cv2.setNumThreads(0)
    # A cluster that preempts a job signals all its processes, but the main one needs its workers until it has saved a
    # checkpoint: they ignore the signals, except SIGTERM from their parent.
    for number in set(PREEMPTION_SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_parent_sigterm, args=(os.getppid(),), daemon=True).start()


def _exit_on_parent_sigterm(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _shape(sample: TensorSample) -> str:
    height, width = sample["mask"].shape
    return f"{width} x {height}"
