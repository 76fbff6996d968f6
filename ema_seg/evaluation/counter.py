"""Counting of predictions in a thread of its own, beside the model."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ema_seg.data.normalise import Normalise
from ema_seg.evaluation.calibration import Certainty, classify
from ema_seg.inference.classes import most_likely_classes
from ema_seg.inference.prediction import autocast
from ema_seg.inference.protocol import PredictionProtocol
from ema_seg.models.head import Logits
from ema_seg.runtime.errors import DataError, ModelError
from ema_seg.runtime.execution import evaluation_mode
from ema_seg.runtime.progress import track

__all__ = ["Counter", "count_predictions"]

# Images whose predictions wait to be counted; more would fill the memory where counting is slower than the model.
_MOST_WAITING = 16

Result = TypeVar("Result")


class Counter(Generic[Result]):
    """Counter of images in a thread of its own.

    The model's device computes the classes of an image and copies them to the host, and the thread counts them while
    the device goes on. Only the thread waits for the device.

    Args:
        num_classes: K.
        count: makes the result of an image's name, predicted class ids and train ids, both H x W; runs in the thread.
        certainty: also compute the model's ``Certainty``, the fourth argument of ``count``.
    """

    def __init__(self, num_classes: int, count: Callable[..., Result], *, certainty: bool = False) -> None:
        self.num_classes = num_classes
        self._count = count
        self._certainty = certainty
        self._thread = ThreadPoolExecutor(1, "counter")
        self._waiting: deque[Future[Result]] = deque()
        self._results: list[Result] = []

    def add(self, name: str, logits: Logits, target: Tensor) -> None:
        """Count an image.

        Args:
            name: the image's name.
            logits: its logits, 1 x K x H x W.
            target: its train ids, H x W.

        Raises:
            ModelError: the model predicts another number of classes.
            EmaSegError: an earlier image could not be counted.
        """
        if logits.shape[1] != self.num_classes:
            raise ModelError(
                f"model: predicts {logits.shape[1]} classes but the data set has {self.num_classes}; "
                "evaluate it on the data that it was trained on."
            )
        if self._certainty:
            classes, certainty = classify(logits, target)
            on_device = [classes, *certainty]
        else:
            on_device = [classes := most_likely_classes(logits)]
        copies = [_copy_to_host(tensor) for tensor in on_device]
        copied = None
        if classes.is_cuda:
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(classes.device))
        self._waiting.append(self._thread.submit(self._run, name, copies, copied, target))
        self._collect(_MOST_WAITING)

    def add_batch(self, batch: Mapping[str, Any], logits: Iterable[Logits]) -> None:
        """Count the images of a batch: lists ``name`` and ``mask``; see ``add``.

        The logits of all images share the features of the batch. A caller that keeps none of them frees the features
        before the next forward.
        """
        for name, own, target in zip(batch["name"], logits, batch["mask"], strict=True):
            self.add(name, own, target)

    def results(self) -> list[Result]:
        """Wait for all images and return the results since the last call, in order.

        Raises:
            EmaSegError: an image could not be counted.
        """
        self._collect(0)
        results, self._results = self._results, []
        return results

    def close(self) -> None:
        """End the thread; images that still wait are not counted."""
        self._thread.shutdown(cancel_futures=True)

    def _collect(self, most: int) -> None:
        """Wait for the oldest images until at most ``most`` wait."""
        while len(self._waiting) > most:
            self._results.append(self._waiting.popleft().result())

    def _run(self, name: str, copies: Sequence[Tensor], copied: torch.cuda.Event | None, target: Tensor) -> Result:
        if copied is not None:
            copied.synchronize()
        classes, *certainty = copies
        try:
            known = [Certainty(*certainty)] if certainty else []
            return self._count(name, classes.numpy(), target.cpu().numpy(), *known)
        except (DataError, ModelError) as error:
            raise type(error)(f"{name}: {error}") from error


def count_predictions(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    counter: Counter[Result],
    title: str,
    *,
    stride: int,
    normalise: Normalise,
    device: torch.device | str,
    precision: str | int,
    protocol: PredictionProtocol,
    progress: bool,
) -> list[Result]:
    """Predict the images of a loader and count them; the counter is closed afterwards.

    Args:
        model: see ``score_images``.
        loader: see ``score_images``.
        counter: counts the images.
        title: title of the progress bar.
        stride: see ``score_images``.
        normalise: see ``score_images``.
        device: see ``score_images``.
        precision: see ``score_images``.
        protocol: see ``score_images``.
        progress: see ``score_images``.

    Returns:
        The counter's results, in the loader's order.
    """
    with evaluation_mode(model), autocast(device, precision), closing(counter):
        for batch in track(loader, title, shown=progress):
            counter.add_batch(batch, protocol.predict(model, batch["image"], stride, normalise))
        return counter.results()


def _copy_to_host(tensor: Tensor) -> Tensor:
    """Copy a tensor to the host; from CUDA without waiting for it."""
    if not tensor.is_cuda:
        return tensor.cpu()
    on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return on_host.copy_(tensor, non_blocking=True)
