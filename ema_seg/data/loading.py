"""How samples get into batches: in which order, through which processes, and what happens where one does not."""

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
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from ema_seg.data.processes import start_method
from ema_seg.data.transforms import TensorSample
from ema_seg.distributed.collectives import gather
from ema_seg.distributed.leaving import LEAVE_SIGNALS
from ema_seg.distributed.start import place
from ema_seg.errors import ConfigError, DataError, EmaSegError
from ema_seg.escaping import for_terminal
from ema_seg.texts import read_table

__all__ = [
    "LONGEST_TIMEOUT",
    "Draws",
    "InTurn",
    "Loader",
    "Samples",
    "Skipped",
    "collate_crops",
    "collate_images",
    "read_skipped",
    "within",
]

T = TypeVar("T")

# Seconds; the system takes no number of any size.
LONGEST_TIMEOUT = 1_000_000


class Skipped:
    """Samples that could not be read and have been left out, of which there may be so many.

    Args:
        most: the number of samples.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.samples: dict[tuple[str, str], str] = {}
        self._file: Path | None = None

    def keep_in(self, file: Path) -> None:
        """Keep them in a file (CSV of split, name and reason), with those that are in it already.

        The processes of a run, and the command that goes on with it, so know of each other's.
        """
        self._file = file
        self._read()

    def add(self, split: str, name: str, reason: str) -> None:
        """Leave a sample out, and say so if it is a new one.

        Raises:
            DataError: it is one too many.
        """
        self._read()
        if (split, name) in self.samples:
            return
        if len(self.samples) >= self.most:
            raise DataError(
                f"{reason.rstrip('.')}; {len(self.samples)} samples have been skipped already, and data.max_skipped="
                f"{self.most} allows no more."
            )
        self.samples[split, name] = reason
        told = f"warning: {reason} Skipped, as {len(self.samples)} of at most {self.most}."
        print(for_terminal(told), file=sys.stderr, flush=True)
        if self._file is not None:
            with self._file.open("a", newline="", encoding="utf-8", errors="surrogateescape") as file:
                csv.writer(file).writerow([split, name, reason])

    def share(self) -> None:
        """Know of what the other processes have left out; to be called by all of them.

        Raises:
            DataError: together it is too much.
        """
        for samples in gather(self.samples):
            self.samples |= samples
        if len(self.samples) > self.most:
            raise DataError(
                f"{len(self.samples)} samples cannot be read, and data.max_skipped={self.most} allows no more; the last"
                f" one: {list(self.samples.values())[-1]}"
            )

    def _read(self) -> None:
        if self._file is not None:
            self.samples.update(read_skipped(self._file))


def read_skipped(file: Path) -> dict[tuple[str, str], str]:
    """The reasons in a file that ``Skipped`` has kept, by split and name; empty if there is none."""
    if not file.is_file():
        return {}
    # A kill may have cut the last line off.
    return {(row[0], row[1]): row[2] for row in read_table(file) if len(row) == 3}


class Readable(Protocol):
    """What is read by index, and can say what it reads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...

    def name(self, index: int, /) -> str:
        """The name of a sample."""

    def files(self, index: int, /) -> str:
        """Its files."""


class _Item(NamedTuple):
    """A sample, or None if it could not be read, and names and reasons of those that were tried before."""

    sample: Any
    skipped: list[tuple[str, str]]


class Samples(Dataset[_Item]):
    """What the loaders' workers read: a data set by index, or by index and seed of the random numbers.

    With a seed, torch's generator starts from it; and in place of a sample that cannot be read comes the next one, so
    that batches stay full. Without, such a sample is left out.

    Args:
        dataset: the data set, or what else reads its files.
        workers: the number of worker processes.
        max_skipped: how many samples may be unreadable before reading raises what was wrong with the last one.
        timeout: seconds that a sample may take where no other process waits for it.
    """

    def __init__(self, dataset: Readable, workers: int, max_skipped: int, timeout: float) -> None:
        self.dataset = dataset
        self.max_skipped = max_skipped
        self.timeout = timeout
        # Of each worker, seen by all processes: its number, and the sample that it is reading, if any.
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
            return within(self.timeout, self.dataset.files(index), lambda: self.dataset[index])
        finally:
            generator.set_state(state)
            slot[1] = -1


def within(seconds: float, what: str, read: Callable[[], T]) -> T:
    """What ``read`` gives; for this process, which no other one watches.

    It is called in a thread of its own. Whoever waits for the server of a network disk hears of no signal, so of
    threads only another one can give up, and the process can end.

    Args:
        seconds: how long it may take.
        what: the file or folder that it reads.
        read: a function that reads from a disk.

    Raises:
        EmaSegError: it has given nothing in that time.
    """
    outcome: Future[T] = Future()

    def work() -> None:
        try:
            outcome.set_result(read())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    if not wait([outcome], seconds).done:
        raise _Stalled(_stall([what], seconds))
    return outcome.result()


class _Stalled(EmaSegError):
    """The disk gives nothing: no reason to go on with the next sample."""


def _stall(waited_for: list[str], seconds: float) -> str:
    return (
        f"{_listed(waited_for) or 'data'}: nothing has come from the disk for {seconds:g} seconds; see what it is "
        "waiting for, or allow it more (data.timeout of a training, --timeout of a check)."
    )


def _listed(files: list[str]) -> str:
    return ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


class Draws(Sampler[tuple[int, int]]):
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


class InTurn(Sampler[int]):
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


class Loader(DataLoader[Any]):
    """A DataLoader of :class:`Samples` that counts its batches, and says in one sentence what went wrong.

    Args:
        samples: what to read.
        collate: puts a list of samples together.
        skipped: receives the samples that could not be read.
        split: the name of their split.
        workers: worker processes; 0 reads in this one.
        batch_size: samples of a batch.
        sampler: their order.
    """

    passed = 0  # batches of this epoch that have been handed out

    def __init__(
        self,
        samples: Samples,
        collate: Callable[[list[Any]], Any],
        *,
        skipped: Skipped,
        split: str,
        workers: int,
        batch_size: int,
        sampler: Sampler[Any],
    ) -> None:
        super().__init__(
            samples,
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=_Collate(collate),
            num_workers=workers,
            # Its own, so that loading draws nothing from the generator that training draws from.
            generator=torch.Generator(),
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_start_worker,
            multiprocessing_context=start_method() if workers > 0 else None,
            timeout=samples.timeout if workers > 0 else 0,
        )
        self.samples = samples
        self.skipped = skipped
        self.split = split

    def check_worker_number_rationality(self) -> None:
        """Skip torch's warning about more workers than cores: the number is the user's choice."""

    def __iter__(self) -> Any:
        self.passed = self.sampler.skipped // (self.batch_size or 1) if isinstance(self.sampler, Draws) else 0
        try:
            for batch, skipped in super().__iter__():
                for name, reason in skipped:
                    self.skipped.add(self.split, name, reason)
                self.passed += 1
                if batch is not None:
                    yield batch
        except EmaSegError as error:
            text = str(error)
            if not text.startswith("Caught "):  # raised in this process
                raise
            # A worker sends the traceback as text, which ends in "<exception's class>: <sentence>".
            raise type(error)(text.rstrip().splitlines()[-1].partition(": ")[2]) from None
        except RuntimeError as error:
            if explained := self.explain(error):
                raise explained from error
            raise

    def explain(self, error: RuntimeError) -> DataError | None:
        """What an error of torch's says about the workers of this loader; None if nothing.

        That a worker has died it may raise anywhere in the main thread, not only where a batch is waited for.
        """
        text = str(error)
        workers: dict[int, int] = dict(self.samples.workers.tolist())
        if text.startswith("DataLoader timed out"):
            waiting = {process: index for process, index in workers.items() if index >= 0}
            for process in waiting:
                os.kill(process, signal.SIGTERM)  # nobody has to wait for them any longer
            files = [self.samples.dataset.files(index) for index in waiting.values()]
            return DataError(_stall(files, self.samples.timeout))
        if not text.startswith("DataLoader worker (pid"):
            return None
        lost = [int(number) for number in re.findall(r"\d+", re.split(" is | exited ", text)[0])]
        if not set(lost) & set(workers):
            return None
        files = [self.samples.dataset.files(workers[process]) for process in lost if workers.get(process, -1) >= 0]
        how = f"{text} {error.__cause__}".partition("signal: ")[2].partition(".")[0].strip()
        return DataError(
            f"a process that loads data has been ended{f' ({how})' if how else ''} by the system"
            f"{f' while it read {_listed(files)}' if files else ''}; that is what happens where memory runs out: "
            "lower data.workers or data.batch_size, or look at that file."
        )


class _Collate:
    """Items to a batch of their samples, None if there is none, and what has been skipped for it."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list[_Item]) -> tuple[Any, list[tuple[str, str]]]:
        samples = [item.sample for item in items if item.sample is not None]
        return self.collate(samples) if samples else None, [entry for item in items for entry in item.skipped]


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


def _start_worker(number: int) -> None:
    info = get_worker_info()
    assert info is not None and isinstance(info.dataset, Samples)
    info.dataset.workers[number, 0] = os.getpid()
    # The workers are the parallelism: OpenCV's own threads on top would compete with them for the cores.
    cv2.setNumThreads(0)
    # A cluster that wants its machine back tells every process of a job, and the one that trains is still to save its
    # last step: its workers end with it, not before.
    for number in set(LEAVE_SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_end, args=(os.getppid(),), daemon=True).start()


def _await_end(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _shape(sample: TensorSample) -> str:
    height, width = sample["mask"].shape
    return f"{width} x {height}"
