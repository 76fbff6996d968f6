"""Command line that compares runs.

``python -m ema_seg.comparison <sweep folder>`` or ``python -m ema_seg.comparison compare RUN RUN``; options may be
written as settings, such as ``metric=boundary_iou``.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ema_seg.comparison.compare import match_runs
from ema_seg.comparison.files import report_comparison
from ema_seg.comparison.metric import with_metric
from ema_seg.comparison.runs import read_folder, read_runs
from ema_seg.runtime.errors import ConfigError, EmaSegError
from ema_seg.runtime.escaping import for_terminal

__all__ = ["main", "parse_baseline"]

_SETTING = re.compile(r"(baseline|output|metric|remeasure)=")
_DESCRIPTION = "Compare the runs of a sweep, or single runs: differences with intervals, costs, figures, a page."


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the runs that the command line names and return the exit status."""
    texts = list(sys.argv[1:] if arguments is None else arguments)
    if texts[:1] == ["compare"]:
        parser = argparse.ArgumentParser(prog="python -m ema_seg.comparison compare", description=_DESCRIPTION)
        parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder; first the baseline")
        texts = texts[1:]
    else:
        parser = argparse.ArgumentParser(
            prog="python -m ema_seg.comparison",
            description=_DESCRIPTION,
            epilog="Of single runs: python -m ema_seg.comparison compare RUN RUN ...",
        )
        parser.add_argument("folder", type=Path, help="a sweep's folder, or one with runs in it")
    parser.add_argument(
        "--baseline",
        metavar="key=value[,key=value]",
        help="what to compare with; default: what the sweep names, the first run, or attention=none",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where to write; default: comparison/ in the folder, or here"
    )
    parser.add_argument(
        "--metric",
        default="miou",
        metavar="METRIC",
        help="metric=boundary_iou, metric=<group of the sweep> or metric=[class,class]: the IoU to compare",
    )
    parser.add_argument(
        "--remeasure",
        choices=("true", "false"),
        default="false",
        help="remeasure=true: measure the speed of all configurations again, on this machine and in turns",
    )
    options = parser.parse_args([f"--{text}" if _SETTING.match(text) else text for text in texts])
    try:
        baseline = parse_baseline(options.baseline)
        if "runs" in options:
            if len(options.runs) < 2:
                raise ConfigError(
                    f"compare {options.runs[0]}: must name at least 2 runs, got 1; name the baseline first."
                )
            runs = read_runs(options.runs)
            directory = options.output or Path("comparison")
        else:
            runs = read_folder(options.folder)
            directory = options.output or options.folder / "comparison"
        match_runs(runs, baseline)  # a mistake is named before anything is counted or measured
        if options.remeasure == "true":
            from ema_seg.comparison.remeasure import with_costs  # imports torch, which a comparison does not need

            runs = with_costs(runs)
        path = report_comparison(with_metric(runs, options.metric), directory, baseline)
    except EmaSegError as error:
        print(f"error: {for_terminal(str(error))}", file=sys.stderr)
        return 1
    Console(soft_wrap=True).print(
        for_terminal(f"comparison: {path.with_suffix('.html')}"), markup=False, highlight=False
    )
    return 0


def parse_baseline(text: str | None) -> dict[str, str] | None:
    """Parse ``key=value,key=value``.

    Raises:
        ConfigError: it has another form.
    """
    if text is None:
        return None
    # A comma within brackets belongs to a value.
    pairs = [part.partition("=") for part in re.split(r",(?![^\[{(]*[\])}])", text)]
    if not all(key and separator and value for key, separator, value in pairs):
        raise ConfigError(f"--baseline: must be key=value, such as attention=none, got {text!r}.")
    return {key: value for key, _, value in pairs}


if __name__ == "__main__":
    sys.exit(main())
