"""Cost of a model: parameters, arithmetic, time and memory."""

import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from ema_seg.data.normalise import Normalise
from ema_seg.evaluation.counter import Counter
from ema_seg.evaluation.environment import describe_device
from ema_seg.evaluation.reference import Reference, time_call
from ema_seg.inference.prediction import autocast, memory_format_of, pad_to_stride
from ema_seg.inference.protocol import PLAIN, PredictionProtocol
from ema_seg.runtime.distributed.collectives import broadcast, gather
from ema_seg.runtime.distributed.ranks import barrier, rank_info
from ema_seg.runtime.errors import ConfigError, DataError
from ema_seg.runtime.execution import evaluation_mode
from ema_seg.runtime.limits import reraise_out_of_memory, reraise_size_errors

__all__ = [
    "Cost",
    "LiveBytes",
    "complete_cost",
    "cost_batch_size",
    "count_macs",
    "count_parameters",
    "forward_entry",
    "measure_cost",
    "measure_peak_memory",
    "random_images",
    "time_end_to_end",
    "time_forward",
]

_MEMORY_METHODS = {
    "cuda": "weights, buffers and input, plus the growth of torch.cuda.max_memory_allocated in a forward",
    "other": "weights, buffers and input, plus the peak of live tensors between the operations of a forward",
}


class Cost(TypedDict):
    """Result of ``measure_cost``."""

    parameters: dict[str, int]
    gmacs: float
    throughput: dict[str, Any]


def measure_cost(
    model: nn.Module,
    *,
    size: tuple[int, int],
    stride: int,
    batch_size: int,
    device: torch.device | str,
    precision: str | int = "32-true",
    loader: DataLoader | None = None,
    normalise: Normalise | None = None,
    counter: Counter[Any] | None = None,
    protocol: PredictionProtocol = PLAIN,
    warmup: int = 3,
    min_repeats: int = 3,
    budget: float = 10.0,
) -> Cost:
    """Measure the cost of a model at one image size, in evaluation mode.

    Forward passes are timed on random images, in the model's memory layout, for batches of 1 and of ``batch_size``.
    With a loader the end-to-end rate is measured too: read and decode the files, transform, pad, copy to the device,
    forward, and score as the counter does.

    With several ranks, each with a device, rank 0 times the forward passes while the
    others wait. The end-to-end rate is measured on all ranks at once, each with the images of its own loader, and the
    rates are summed. Every rank returns the same result.

    Args:
        model: maps float B x 3 x H x W to logits; it is moved to the device.
        size: height and width of the images, which are padded to the stride.
        stride: the model's stride; height and width are padded to multiples of it.
        batch_size: the second batch size to measure.
        device: device to run on.
        precision: see ``autocast``.
        loader: the evaluation's loader, as for ``score_images``; None skips the end-to-end measurement.
        normalise: the normalisation of the loader's images; must be given with a loader.
        counter: scores the images; must be given with a loader.
        protocol: how the loader's images are predicted; the forward passes are those of a whole image at any rate.
        warmup: forward passes before the timed ones; fewer, but at least one, if they take longer than the budget.
        min_repeats: minimum number of timed forward passes, however long they take.
        budget: seconds after which no further timed pass starts, divided equally between the measurements; warm-up
            passes are not part of it.

    Returns:
        A dict of plain values: ``parameters`` (``total``, ``trainable``), ``gmacs`` of one image (see
        ``count_macs``), and ``throughput``, which holds the settings (``device``, ``precision``,
        ``compiled``, ``memory_format``, ``size``, ``padded_size``, ``memory_method``), ``forward``, a list with an
        entry for each batch size (``images_per_second``, ``latency`` in seconds per batch as ``median`` and
        ``p95``, ``peak_memory`` in bytes, and ``reference``, the median seconds of the reference computation
        meanwhile), and ``end_to_end`` (see ``time_end_to_end``; None without a loader).
        ``devices`` in each entry is the number of devices that were measured.

    Raises:
        ConfigError: a number is not positive.
        DataError: the loader yields no image.
        ModelError: the images are too small for the model, or the batch does not fit into memory.
    """
    _check_positive(batch_size=batch_size, min_repeats=min_repeats, budget=budget)
    device = torch.device(device)
    model.to(device)
    batch_sizes = sorted({1, batch_size})
    source = None
    if loader is not None:
        if normalise is None or counter is None:
            raise TypeError("measure_cost: a loader needs a normalisation and a counter.")
        source = (loader, normalise, counter)
    share = budget / (len(batch_sizes) + (source is not None))

    def measure_forward(batch: int) -> dict[str, Any]:
        images = random_images(model, batch, size, stride, device)
        with reraise_out_of_memory(
            images, "measure with a smaller evaluation.batch_size, evaluation.size or precision"
        ):
            warmed, seconds, reference = time_forward(model, images, device, warmup, min_repeats, share)
            memory = measure_peak_memory(model, images)
        return forward_entry(batch, seconds, warmed, memory, reference)

    with evaluation_mode(model), autocast(device, precision):
        single = random_images(model, 1, size, stride, device)
        with reraise_size_errors(single):
            gmacs = count_macs(model, single) / 1e9
        forward = broadcast([measure_forward(batch) for batch in batch_sizes] if rank_info().rank == 0 else [])
        end_to_end = None if source is None else broadcast(time_end_to_end(model, *source, stride, share, protocol))
    return Cost(
        parameters=count_parameters(model),
        gmacs=gmacs,
        throughput={
            "device": describe_device(device)["name"],
            "precision": str(precision),
            "compiled": model._compiled_call_impl is not None,
            "memory_format": str(memory_format_of(model)).removeprefix("torch.").removesuffix("_format"),
            "size": list(size),
            "padded_size": list(single.shape[-2:]),
            "memory_method": _MEMORY_METHODS.get(device.type, _MEMORY_METHODS["other"]),
            "forward": forward,
            "end_to_end": end_to_end,
        },
    )


def complete_cost(cost: Cost, original: nn.Module, stride: int, *, precision: str) -> Cost:
    """Complete the cost of an exported model with what PyTorch cannot see of it.

    Args:
        cost: cost of the exported model.
        original: the model that was exported, in evaluation mode, with any weights: its parameters and operations are
            counted.
        stride: its stride.
        precision: that of the exported model.

    Returns:
        The cost, without the peak memory, which is unknown.
    """
    throughput = cost["throughput"]
    images = pad_to_stride(torch.zeros(1, 3, *throughput["size"]), stride)
    forward = [{**entry, "peak_memory": None} for entry in throughput["forward"]]
    return Cost(
        parameters=count_parameters(original),
        gmacs=count_macs(original, images) / 1e9,
        throughput={**throughput, "precision": precision, "padded_size": list(images.shape[-2:]), "forward": forward},
    )


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Count the parameters: ``total`` and ``trainable``; a shared one counts once."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return {
        "total": sum(size for size, _ in sizes),
        "trainable": sum(size for size, trainable in sizes if trainable),
    }


def count_macs(model: nn.Module, images: Tensor) -> int:
    """Count the multiply-accumulate operations of a forward pass.

    ``torch.utils.flop_counter`` counts convolutions, matrix products and attention, but not element-wise
    operations, normalisation, pooling and interpolation.

    Args:
        model: the model; the caller sets its mode.
        images: its input, float B x 3 x H x W.
    """
    # Compiled code and, on some devices, fused attention hide their matrix products from the counter, so both are
    # disabled. ``no_grad``, because inference mode hides the parts of composite operations.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            model(images)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return counter.get_total_flops() // 2


def measure_peak_memory(model: nn.Module, images: Tensor) -> int:
    """Measure the peak memory, in bytes, of a forward pass without gradients.

    The peak includes the weights, the buffers, the input, and the memory that the pass allocates. On a CUDA device
    the caching allocator reports the latter, including workspaces of kernels. Elsewhere it is the size of all tensors
    alive between two operations: exact and independent of the number of threads, but without memory that an operation
    allocates and releases within itself. A compiled model is measured uncompiled there.

    Args:
        model: the model, on the images' device; the caller sets its mode.
        images: its input, float B x 3 x H x W.
    """
    resident = [*model.parameters(), *model.buffers(), images]
    torch.clear_autocast_cache()  # casts of the weights are part of the pass
    if images.device.type != "cuda":
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), LiveBytes(resident) as live:
            model(images)
        return live.peak
    torch.cuda.synchronize(images.device)
    torch.cuda.reset_peak_memory_stats(images.device)
    before = torch.cuda.memory_allocated(images.device)
    with torch.inference_mode():
        model(images)
    torch.cuda.synchronize(images.device)
    return _storage_bytes(resident) + torch.cuda.max_memory_allocated(images.device) - before


class LiveBytes(TorchDispatchMode):
    """Dispatch mode that tracks the bytes of live tensors, starting with some resident ones."""

    def __init__(self, resident: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: set[int] = set()
        for tensor in resident:
            self._follow(tensor)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf)
        return result

    def _follow(self, tensor: Tensor) -> None:
        # Views share a storage, which holds the bytes; its Python object lives as long as the storage.
        storage = tensor.untyped_storage()
        if id(storage) in self._storages:
            return
        self._storages.add(id(storage))
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, id(storage), storage.nbytes())

    def _release(self, storage: int, nbytes: int) -> None:
        self._storages.discard(storage)
        self.live -= nbytes


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def random_images(
    model: nn.Module, batch_size: int, size: tuple[int, int], stride: int, device: torch.device
) -> Tensor:
    """Return images as a model's input, B x 3 x H x W, padded to the stride, on the device in the model's layout."""
    # A normalised image has about zero mean and unit variance; the generator keeps the global seed untouched.
    images = torch.randn(batch_size, 3, *size, generator=torch.Generator().manual_seed(0))
    return pad_to_stride(images, stride).to(device, memory_format=memory_format_of(model))


@torch.inference_mode()
def time_forward(
    model: nn.Module, images: Tensor, device: torch.device, warmup: int, min_repeats: int, budget: float
) -> tuple[int, list[float], list[float]]:
    """Time forward passes, synchronised with the device; see ``measure_cost``.

    Returns:
        The number of warm-up passes, the seconds of each timed pass, and those of the reference computation, which
        takes turns with them for a tenth of the time.
    """
    deadline = time.perf_counter() + budget
    warmed = 0
    while warmed < warmup and (not warmed or time.perf_counter() < deadline):
        time_call(lambda: model(images), device)
        warmed += 1
    reference = Reference(device)
    seconds: list[float] = []
    deadline = time.perf_counter() + budget
    while len(seconds) < min_repeats or time.perf_counter() < deadline:
        seconds.append(time_call(lambda: model(images), device))
        if sum(reference.seconds) < 0.1 * sum(seconds):
            reference.time()
    return warmed, seconds, reference.seconds


def forward_entry(
    batch_size: int, seconds: list[float], warmup: int, memory: int | None, reference: list[float]
) -> dict[str, Any]:
    """Return the entry of a batch size in ``throughput.forward``, see ``measure_cost``."""
    median, p95 = np.percentile(seconds, [50, 95]).tolist()
    return {
        "batch_size": batch_size,
        "devices": 1,
        "images_per_second": batch_size / median,
        "latency": {"median": median, "p95": p95},
        "peak_memory": memory,
        "reference": float(np.median(reference)),
        "repeats": len(seconds),
        "warmup": warmup,
    }


def time_end_to_end(
    model: nn.Module,
    loader: DataLoader,
    normalise: Normalise,
    counter: Counter[Any],
    stride: int,
    budget: float,
    protocol: PredictionProtocol = PLAIN,
) -> dict[str, Any]:
    """Time the path from files to scores, over the data set or until the budget is spent.

    Args:
        model: see ``measure_cost``; the caller sets its device, mode and precision.
        loader: see ``measure_cost``.
        normalise: see ``measure_cost``.
        counter: see ``measure_cost``.
        stride: see ``measure_cost``.
        budget: seconds after which no further batch starts.
        protocol: see ``measure_cost``.

    Returns:
        A dict of ``images_per_second``, the number of timed ``images`` and the number of ``devices``, all three
        over all ranks; and, for each rank, the loader's ``batch_size`` and ``workers``, and the ``warmup_batches``
        that were not timed.

    Raises:
        DataError: the loader yields no image.
    """
    # Batches that workers prefetch before the timing starts would inflate the rate, so they are warm-up too.
    ahead = loader.num_workers * (loader.prefetch_factor or 0)
    warmup = min(1 + ahead, len(loader) // 2)
    barrier()
    images, start = 0, time.perf_counter()
    for index, batch in enumerate(loader):
        counter.add_batch(batch, protocol.predict(model, batch["image"], stride, normalise))
        if index < warmup:
            counter.results()
            start = time.perf_counter()
            continue
        images += len(batch["image"])
        if time.perf_counter() - start > budget:
            break
    counter.results()
    elapsed = time.perf_counter() - start
    parts = gather((images, images / elapsed if images else 0.0))
    if not any(count for count, _ in parts):
        raise DataError("data: the split has no image to measure the throughput with.")
    return {
        "images_per_second": sum(rate for _, rate in parts),
        "images": sum(count for count, _ in parts),
        "batch_size": loader.batch_size,
        "workers": loader.num_workers,
        "warmup_batches": warmup,
        "devices": len(parts),
    }


def _check_positive(**numbers: float) -> None:
    for name, value in numbers.items():
        if value <= 0:
            raise ConfigError(f"{name}={value}: measuring the cost needs a positive number.")


def cost_batch_size(batch_size: int, scored: int, images: int) -> int:
    """Return the larger batch size to measure: at most ``images``, unless it was set for the cost alone.

    Args:
        batch_size: ``evaluation.batch_size``.
        scored: ``data.evaluation_batch_size``, which it follows by default.
        images: number of images of the split on this rank.
    """
    return batch_size if batch_size != scored else max(1, min(batch_size, images))
