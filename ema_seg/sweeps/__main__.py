"""Command line that shows a sweep from any terminal: ``python -m ema_seg.sweeps <sweep folder>``."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ema_seg.runtime.errors import EmaSegError
from ema_seg.runtime.escaping import for_terminal
from ema_seg.sweeps.folder import read_plan
from ema_seg.sweeps.view import Overview, SweepView, render, survey


def main(arguments: Sequence[str] | None = None) -> int:
    """Show the sweep that the command line names and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ema_seg.sweeps",
        description="Show the jobs of a sweep: done, running, failed and left, the time to go, and the best so far.",
    )
    parser.add_argument("folder", type=Path, help="the folder of a sweep")
    parser.add_argument("--watch", action="store_true", help="until no job is running or left; end it with Ctrl-C")
    options = parser.parse_args(arguments)

    def look() -> Overview:
        return survey(options.folder, read_plan(options.folder).jobs)

    try:
        if options.watch and look().is_open:
            with SweepView(look, Console()):
                while look().is_open:
                    time.sleep(1)
        Console().print(render(look()))
    except EmaSegError as error:
        print(f"error: {for_terminal(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
