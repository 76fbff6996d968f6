"""Progress bar on standard error."""

from collections.abc import Iterable
from typing import TypeVar

from rich import progress
from rich.console import Console

__all__ = ["track"]

T = TypeVar("T")


def track(items: Iterable[T], description: str, *, shown: bool = True) -> Iterable[T]:
    """Show a progress bar while the items are read, if it is ``shown`` and standard error is a terminal."""
    console = Console(stderr=True)
    disable = not (shown and console.is_terminal)
    return progress.track(items, description=description, console=console, transient=True, disable=disable)
