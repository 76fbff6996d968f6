"""Functions that the tests run in several ranks; a bare interpreter can import them."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ema_seg.runtime.distributed.ranks import barrier, rank_info
from ema_seg.runtime.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

# Other imports are inside the functions that need them, because every process of every test imports this module.


def write(folder: Path, value: object) -> None:
    """Write this rank's result to a file for the test."""
    (folder / f"{rank_info().rank}.json").write_text(json.dumps(value))


def sleep() -> None:
    time.sleep(1000)


def leave(folder: Path) -> None:
    """Write the process ID, and sleep until a preemption signal arrives."""
    from ema_seg.runtime.distributed.preemption import Preemption

    with Preemption().watched():
        write(folder, os.getpid())
        time.sleep(1000)


def train(config: dict[str, object], run: Path, folder: Path) -> None:
    """Train, with SIGTERM to rank 0 before the first step; write the order of training steps and broadcasts."""
    from torch import distributed

    from ema_seg.cli.launch import produce_run
    from ema_seg.data import SegmentationDataModule
    from ema_seg.train import train
    from ema_seg.training.module import SegmentationModule

    load, broadcast, step = (
        SegmentationDataModule.train_dataloader,
        distributed.broadcast,
        SegmentationModule.training_step,
    )
    events: list[str] = []

    def note(event: str, function: Callable[..., object]) -> Callable[..., object]:
        def noted(*arguments: object, **keywords: object) -> object:
            events.append(event)
            return function(*arguments, **keywords)

        return noted

    def ask(data: SegmentationDataModule) -> object:
        if rank_info().rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return load(data)

    SegmentationDataModule.train_dataloader = ask
    SegmentationModule.training_step = note("step", step)
    distributed.broadcast = note("broadcast", broadcast)
    try:
        produce_run(train, config, run, quiet=True, started_by="a test")
    finally:
        write(folder, events)


def exchange(folder: Path) -> None:
    import torch

    from ema_seg.runtime.distributed.collectives import broadcast, gather, sum_in_place

    here = rank_info()
    written = shared(folder)
    write(
        folder,
        {
            "place": here,
            "agreed": broadcast(f"of {here.rank}"),
            "gathered": gather(here.rank),
            "sum": sum_in_place(torch.tensor(10**here.rank)).item(),
            "shared": written,
        },
    )


def shared(folder: Path) -> list[object]:
    """Check a folder that two machines share, one that each has for itself, and one on a single machine.

    Returns:
        For each folder, the error's message, or whether the folder exists after the check.
    """
    from ema_seg.runtime.distributed import collectives

    rank, found = rank_info().rank, []
    collectives._LATENCY = 0.5
    for machines, own in ((2, folder / "disk"), (2, folder / f"disk-{rank}"), (1, folder / "none")):
        os.environ["LOCAL_WORLD_SIZE"] = str(2 // machines)
        try:
            collectives.require_shared(own)
            found.append(own.exists())
        except ConfigError as error:
            found.append(str(error))
    return found


def fail(how: str) -> None:
    """Fail in one rank, in the way that ``how`` names, while the other one waits or sleeps."""
    if rank_info().rank == 1:
        if how == "mistake":
            raise ConfigError("seed=-1 is none.")
        if how == "error":
            raise KeyError("what was not foreseen")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hang":
            time.sleep(1000)
        if how == "first killed":
            barrier()
        sys.exit(how)
    if how == "hang":
        raise ConfigError("seed=-1 is none.")
    if how == "first killed":
        time.sleep(1)  # until rank 1 waits in the barrier
        os.kill(os.getpid(), signal.SIGKILL)
    barrier()


def share(root: Path, folder: Path, values: "Tensor") -> None:
    """Write all results that the tests compare, from one start: starting a process takes longer than any of them."""
    found = {"score": score(root, folder), "lose": lose(6), "normalise": normalise(values), "skip": skip()}
    write(folder, {**found, "repeats": step_twice() if rank_info().size == 3 else None})


def step_twice() -> bool:
    """Return whether the gradients of a model's first and second step are equal bit by bit."""
    import torch
    from torch import nn

    from ema_seg.training.parallel.strategy import replicated_strategy

    class Module(nn.Module):
        """Minimal module for the strategy, with a parameter that is not used."""

        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.Conv2d(40, 20, 3))
            self.unused = nn.Parameter(torch.zeros(3))

        def forward(self, x: "Tensor") -> "Tensor":
            return self.model(x)

    torch.manual_seed(0)
    strategy = replicated_strategy()
    strategy.parallel_devices = [torch.device("cpu")]
    model = strategy._setup_model(Module())
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(rank_info().rank))
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(image).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.module.model.parameters()])
    return all(map(torch.equal, *gradients))


def skip() -> list[object]:
    """Skip one sample in each rank, and all-gather the skipped samples with two limits: the world size, and 1.

    Returns:
        For each limit, the names of the skipped samples, or the error's message.
    """
    from ema_seg.data.loading import SkippedSamples
    from ema_seg.runtime.errors import DataError

    rank, size = rank_info()[:2]
    found: list[object] = []
    for most in (size, 1):
        skipped = SkippedSamples(most)
        skipped.add("val", f"{rank}", f"{rank}.png: cannot be read.")
        try:
            skipped.all_gather()
            found.append(sorted(name for _, name in skipped.samples))
        except DataError as error:
            found.append(str(error))
    return found


def score(root: Path, folder: Path) -> dict[str, object]:
    """Score a model with random weights on the validation images, and measure its costs."""
    import torch

    from ema_seg.data import SegmentationDataModule
    from ema_seg.evaluation import ConfusionMatrix, measure_cost, score_images
    from ema_seg.evaluation.evaluator import image_counter
    from ema_seg.reporting.predictions import PredictionWriter

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Conv2d(3, 11, kernel_size=3, padding=1)
    data = SegmentationDataModule(
        name="camvid",
        root=root,
        batch_size=rank_info().size,
        evaluation_batch_size=2,
        workers=0,
        augmentation={},
        mean=[0.5] * 3,
        std=[0.25] * 3,
    )
    loader, dataset = data.val_dataloader(), data.val_dataset
    names = [dataset.name(index) for index in range(len(dataset))]
    with PredictionWriter(folder / "report", names, data.palette) as writer:
        found = score_images(
            model,
            loader,
            data.classes,
            stride=1,
            normalise=data.normalise,
            device="cpu",
            on_prediction=writer,
            progress=False,
        )
    cost = measure_cost(
        model,
        size=(64, 96),
        stride=1,
        batch_size=2,
        device="cpu",
        loader=loader,
        normalise=data.normalise,
        counter=image_counter(ConfusionMatrix(data.num_classes)),
        min_repeats=1,
        budget=0.01,
    )
    return {"matrix": found.confusion.matrix.tolist(), "images": found.images, "cost": cost}


def batch_of(size: int) -> "tuple[Tensor, Tensor]":
    """Return logits and labels; image i has i unlabelled rows, and the last two images have no labels."""
    import torch

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(size, 5, 6, 7, generator=generator)
    target = torch.randint(0, 5, (size, 6, 7), generator=generator)
    for index in range(size):
        target[index, :index] = 255
    target[-2:] = 255
    return logits, target


def lose(size: int) -> dict[str, object]:
    """Return value and gradient of every loss on this rank's part of a batch."""
    from ema_seg.training.losses import build_loss, loss_names

    here, found = rank_info(), {}
    for name in loss_names():
        parts = [part.chunk(here.size) for part in batch_of(size)]
        logits, target = (part[here.rank] for part in parts)
        logits.requires_grad_()
        options = {"class_weights": [1.0, 2.0, 0.5, 3.0, 1.0]} if name == "cross_entropy" else {}
        loss = build_loss({name: options}, 5)(logits, target)
        loss.backward()
        found[name] = (loss.item(), logits.grad.tolist())
    return found


def normalise(values: "Tensor") -> dict[str, object]:
    """Return outputs, gradients and running statistics of batch norm layers on this rank's part of the values."""
    import torch
    from timm.layers import BatchNormAct2d
    from torch import nn

    from ema_seg.runtime.distributed.collectives import sum_in_place
    from ema_seg.training.parallel.sync_batch_norm import SyncLayers

    here, found = rank_info(), {}
    for name, layer in {"plain": nn.BatchNorm2d(3), "timm": BatchNormAct2d(3)}.items():
        model = nn.Sequential(layer)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
        keys = list(model.state_dict())
        if here.size > 1:
            model = SyncLayers(cuda=False).apply(model)
        assert list(model.state_dict()) == keys
        x = values.chunk(here.size)[here.rank].clone().requires_grad_()
        y = model(x)
        (y * torch.linspace(-1, 2, y[0].numel()).view(y[0].shape)).square().sum().backward()
        weights = sum_in_place(layer.weight.grad.clone())
        found[name] = [y.tolist(), x.grad.tolist(), weights.tolist(), layer.running_mean.tolist()]
        found[name] += [layer.running_var.tolist(), model.eval()(values).tolist()]
    return found
