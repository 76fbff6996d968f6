"""Command line that plans the number of seeds: ``ema-seg plan <sweep folder> difference=0.5 power=0.8``.

The folder holds a pilot: a few seeds of the configurations that are to be compared.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ema_seg.comparison.__main__ import parse_baseline
from ema_seg.comparison.compare import CONFIDENCE, compare_runs
from ema_seg.comparison.metric import with_metric
from ema_seg.comparison.power import (
    MOST_SEEDS,
    find_power,
    pool_spreads,
    seeds_needed,
    seeds_range,
    smallest_difference,
)
from ema_seg.comparison.runs import read_folder
from ema_seg.comparison.schema import Spread
from ema_seg.comparison.tables import points_text
from ema_seg.runtime.errors import ConfigError, DataError, EmaSegError
from ema_seg.runtime.escaping import for_figure, for_markdown, for_terminal
from ema_seg.runtime.files import Manifest, write_file

__all__ = ["main", "plan_seeds"]

FILES = ("plan.json", "plan.md", "power.png")
SEEDS = (2, 3, 5, 8, 10, 15, 20, 30)
"""Numbers of seeds whose smallest difference is shown."""
_SETTING = re.compile(r"(difference|power|baseline|metric|output)=")
_ALL = "all rows together"


def plan_seeds(
    folder: Path, difference: float, power: float, baseline: dict[str, str] | None, metric: str
) -> dict[str, Any]:
    """Plan the number of seeds from a pilot.

    Args:
        folder: folder of a sweep or of runs.
        difference: the difference to show, as a fraction.
        power: probability of showing it, in (0, 1).
        baseline: see ``match_runs``.
        metric: see ``with_metric``.

    Returns:
        ``difference``, ``power``, ``confidence``, ``metric``, ``images`` and ``rows``. A row has its ``label``, the
        observed ``observed`` (null for all rows together), ``spread`` (see ``Spread``), the number of ``seeds`` with
        the 80 % range ``few`` to ``many`` that follows from the uncertainty of the variance between seeds (null: more
        than 1000), and the ``smallest`` difference by number of seeds.

    Raises:
        EmaSegError: the folder cannot be compared, or no row has two seeds in common with its baseline.
    """
    comparison = compare_runs(with_metric(read_folder(folder), metric), baseline=baseline)
    spreads: dict[str, tuple[float | None, Spread]] = {
        row["label"]: (row["contrast"]["difference"], row["spread"])
        for row in comparison["rows"]
        if row["contrast"] and row["spread"]
    }
    if not spreads:
        raise DataError(
            f"{folder}: a plan needs a baseline, and at least 2 seeds that a row and its baseline have both finished; "
            "run a pilot, such as seed=0,1,2, or name the baseline, such as baseline=attention=none."
        )
    if len(spreads) > 1:
        spreads[_ALL] = (None, pool_spreads(spread for _, spread in spreads.values()))
    rows = []
    for label, (observed, spread) in spreads.items():
        few, many = seeds_range(difference, spread, power, CONFIDENCE)
        rows.append(
            {
                "label": label,
                "observed": observed,
                "spread": spread,
                "seeds": seeds_needed(difference, spread, power, CONFIDENCE),
                "few": few,
                "many": many,
                "smallest": {str(seeds): smallest_difference(seeds, spread, power, CONFIDENCE) for seeds in SEEDS},
            }
        )
    return {
        "difference": difference,
        "power": power,
        "confidence": CONFIDENCE,
        "metric": comparison["metric"],
        "images": comparison["data"]["images"],
        "title": comparison["title"],
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan the number of seeds and return the exit status."""
    texts = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="ema-seg plan",
        description="From a pilot sweep to the number of seeds: ema-seg plan runs/sweep difference=0.5 power=0.8",
    )
    parser.add_argument("folder", type=Path, help="a sweep's folder, or one with runs in it: 2 seeds each at least")
    parser.add_argument("--difference", required=True, help="difference=<points>: the difference to show")
    parser.add_argument("--power", default="0.8", help="power=<from 0 to 1>: probability of showing it (0.8)")
    parser.add_argument("--metric", default="miou", help="see ema-seg compare")
    parser.add_argument("--baseline", help="see ema-seg compare")
    parser.add_argument("--output", type=Path, help="folder to write to; default: plan/ in the folder")
    options = parser.parse_args([f"--{text}" if _SETTING.match(text) else text for text in texts])
    try:
        difference, power = _number("difference", options.difference), _number("power", options.power)
        if not 0 < difference <= 100:
            raise ConfigError(
                f"difference={options.difference}: must be a number of points above 0 and at most 100, such as 0.5."
            )
        if not 1 - CONFIDENCE < power < 1:
            raise ConfigError(
                f"power={options.power}: must be a probability above {1 - CONFIDENCE:.2g} and below 1, such as 0.8."
            )
        baseline = parse_baseline(options.baseline)
        plan = plan_seeds(options.folder, difference / 100, power, baseline, options.metric)
        directory = options.output or options.folder / "plan"
        _write(plan, directory)
    except EmaSegError as error:
        print(f"error: {for_terminal(str(error))}", file=sys.stderr)
        return 1
    _print(plan)
    print(for_terminal(f"plan: {directory / 'plan.md'}"))
    return 0


def _number(key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{key}={text}: must be a number.") from None


def _explain(plan: dict[str, Any]) -> str:
    difference, images = points_text(plan["difference"]), plan["images"]
    return (
        f"Seeds that show a difference of {difference} points of {plan['metric']} with a probability of "
        f"{100 * plan['power']:g} % at p < {1 - plan['confidence']:.2g}, on {images} images like these, without Holm's "
        "correction. In brackets the 80 % range that follows from the uncertainty of the standard deviation between "
        "seeds; the images' part does not shrink with more seeds."
    )


def _columns(plan: dict[str, Any]) -> list[str]:
    shown = [f"{seeds} seeds show" for seeds in SEEDS[1:6]]
    return ["configuration", "observed", "sd of seeds", "sd of images", "seeds needed", *shown]


def _cells(plan: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the table: differences and deviations in points."""
    rows = []
    for row in plan["rows"]:
        spread = row["spread"]
        rows.append(
            [
                row["label"],
                "" if row["observed"] is None else points_text(row["observed"], signed=True),
                f"{points_text(spread['seeds'] ** 0.5)} (n={spread['n']})",
                points_text(spread["images"] ** 0.5),
                f"{_count_text(row['seeds'])} ({_count_text(row['few'])} to {_count_text(row['many'])})",
                *(points_text(row["smallest"][str(seeds)]) for seeds in SEEDS[1:6]),
            ]
        )
    return rows


def _count_text(seeds: int | None) -> str:
    return f"> {MOST_SEEDS}" if seeds is None else str(seeds)


def _print(plan: dict[str, Any]) -> None:
    console = Console()
    table = Table(title=Text(for_terminal(plan["title"])), box=box.SIMPLE_HEAD, pad_edge=False)
    shown = [0, 1, 4, 5, 6, 8]  # as many as fit 80 columns
    for index in shown:
        table.add_column(_columns(plan)[index], justify="right" if index else "left", overflow="fold")
    for cells in _cells(plan):
        table.add_row(*(Text(for_terminal(cells[index])) for index in shown))
    console.print(table)
    console.print(Text(for_terminal(_explain(plan))))


def _write(plan: dict[str, Any], directory: Path) -> None:
    picture = _draw(plan)
    manifest = Manifest(directory, lambda _: iter(()))
    manifest.claim(FILES)
    header = _columns(plan)
    lines = [
        f"# {for_markdown(plan['title'])}: how many seeds\n",
        f"{for_markdown(_explain(plan))}\n",
        f"| {' | '.join(header)} |",
        f"|{'|'.join(['---', *['---:'] * (len(header) - 1)])}|",
        *(f"| {' | '.join(map(for_markdown, cells))} |" for cells in _cells(plan)),
        "\nObserved and smallest differences and standard deviations in points.\n",
        "![Power by the number of seeds](power.png)",
    ]
    write_file(directory / "plan.md", ("\n".join(lines) + "\n").encode())
    write_file(directory / "power.png", picture)
    write_file(directory / "plan.json", f"{json.dumps(plan, indent=1, allow_nan=False)}\n".encode())


def _draw(plan: dict[str, Any]) -> bytes:
    """Draw the power of each row for the difference, and the smallest difference, by the number of seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    needed = max(row["seeds"] or SEEDS[-1] for row in plan["rows"])
    last = min(max(SEEDS[-1], 5 * needed // 4), 200)
    numbers = list(range(2, last + 1))
    for row in plan["rows"]:
        style = {"color": "black", "linewidth": 2} if row["label"] == _ALL else {"linewidth": 1}
        powers = [find_power(plan["difference"], seeds, row["spread"], plan["confidence"]) for seeds in numbers]
        left.plot(numbers, powers, label=for_figure(row["label"]), **style)
        right.plot(SEEDS, [100 * row["smallest"][str(seeds)] for seeds in SEEDS], marker=".", **style)
    left.axhline(plan["power"], color="0.6", linestyle="--", linewidth=1)
    left.set(xlabel="seeds", ylabel=f"power for {points_text(plan['difference'])} points", ylim=(0, 1.02))
    right.set(xlabel="seeds", ylabel=f"smallest difference of {for_figure(plan['metric'])} shown, points", yscale="log")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    if len(plan["rows"]) <= 12:
        left.legend(fontsize=8, frameon=False, loc="upper left")
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter("")
    content = BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()


if __name__ == "__main__":
    sys.exit(main())
