"""Progress bar on standard error."""

from collections.abc import Iterable
from typing import TypeVar

from rich import progress
from rich.console import Console
from rich.text import Text

__all__ = ["CountedProgress", "track"]

T = TypeVar("T")


def track(items: Iterable[T], description: str, *, shown: bool = True, total: int | None = None) -> Iterable[T]:
    """Show a progress bar while the items are read, if it is ``shown`` and standard error is a terminal.

    ``total`` is the number of items that have no length.
    """
    console = Console(stderr=True)
    disable = not (shown and console.is_terminal)
    return progress.track(items, description, total, console=console, transient=True, disable=disable)


class CountedProgress(progress.Progress):
    """Progress bar with the number of images, images/s and the time to go, if standard error is a terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        super().__init__(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            _SpeedColumn(),
            progress.TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )


class _SpeedColumn(progress.ProgressColumn):
    def render(self, task: progress.Task) -> Text:
        """Show the images per second."""
        return Text("" if task.speed is None else f"{task.speed:.1f} images/s")
