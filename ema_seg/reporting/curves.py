"""Training curves of several runs in one figure.

``python -m ema_seg.reporting.curves curves.png none=runs/camvid_none ema=runs/camvid_ema``
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ema_seg.runtime.errors import ConfigError, DataError, EmaSegError
from ema_seg.runtime.escaping import for_terminal
from ema_seg.runtime.texts import read_rows

__all__ = ["draw_curves", "main", "read_metrics"]

_PANELS = {"train/loss": "training loss", "val/miou": "validation mIoU, %"}


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Read the rows of a run's ``metrics.csv``, one per epoch, without the values that were not measured.

    Raises:
        DataError: the file is missing or is not a table of numbers.
    """
    path = run / "metrics.csv"
    try:
        rows = read_rows(path, advice="give the folder of a run")
        return [{key: float(value) for key, value in row.items() if value != ""} for row in rows]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give the folder of a run.") from error
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: is not a table of numbers ({error}); give the folder of a run.") from error


def draw_curves(runs: Mapping[str, Path]) -> Figure:
    """Draw training loss and validation mIoU over the epochs.

    Args:
        runs: the folder of each run, by its name in the legend.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (column, label) in zip(figure.subplots(1, len(_PANELS)), _PANELS.items(), strict=True):
        for name, run in runs.items():
            points = [(row["epoch"] + 1, row[column]) for row in read_metrics(run) if column in row]
            scale = 100 if column == "val/miou" else 1
            axes.plot([epoch for epoch, _ in points], [scale * value for _, value in points], marker=".", label=name)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the curves of the runs that the command line names and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ema_seg.reporting.curves", description="Draw training curves.")
    parser.add_argument("figure", type=Path, help="where to write the figure: .png, .pdf or .svg")
    parser.add_argument("runs", nargs="+", metavar="name=folder", help="a run of train.py and its name in the legend")
    options = parser.parse_args(arguments)
    try:
        pairs = [text.partition("=") for text in options.runs]
        for name, separator, folder in pairs:
            if not (name and separator and folder):
                raise ConfigError(f"{name}{separator}{folder}: must be name=folder, such as ema=runs/my_run.")
        draw_curves({name: Path(folder) for name, _, folder in pairs}).savefig(options.figure, dpi=150)
    except EmaSegError as error:
        print(f"error: {for_terminal(str(error))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
