"""Figures of a comparison: scores against speed, differences, curves, classes, and the images that differ most.

They are drawn from ``comparison.json`` and the pictures beside it alone, see ``ema_seg.comparison.schema``. The page's
plots are drawn by its own program: one Vega-Lite specification for both would place no labels, so that some of 25
overlap, and Vega's label transform does not run without a browser.
"""

import math
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.transforms import Bbox
from PIL import Image

from ema_seg.comparison.schema import SIZES, Comparison, Contrast, Disagreement, Row, comparison_manifest
from ema_seg.comparison.tables import SIGNIFICANT, points_text, probability_text
from ema_seg.data.source import IMAGE_FORMATS
from ema_seg.runtime.errors import DataError
from ema_seg.runtime.escaping import for_terminal
from ema_seg.runtime.files import write_file

__all__ = ["draw_comparison", "front_rows"]

# Okabe and Ito's colour-blind-safe palette: better is blue, worse is vermillion.
_BETTER, _WORSE, _UNDECIDED = "#0072B2", "#D55E00", "#6b6b6b"
_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8a6d00")
_GAINS = LinearSegmentedColormap.from_list(
    "gains", [_WORSE, "#e8935c", "#f7dac8", "white", "#c6dfee", "#5fa6d1", _BETTER]
).with_extremes(bad="0.9")

_SHOWN_CLASSES = 40
_NUMBERED_COLUMNS = 24
_ILLUSTRATED_ROWS = 3
_LEGEND_CLASSES = 32
_PICTURE_PIXELS = 640
# Right edges of the number columns beside the differences, in points (1/72 inch).
_NUMBER_OFFSETS = (48, 84, 138)
_SCALES = {"val/miou": 100.0, "train/loss": 1.0}
_POINTS = "percentage points"

Columns = list[tuple[str, list[Contrast | None]]]
Extent = tuple[float, float, float, float]


def draw_comparison(comparison: Comparison, directory: Path) -> list[str]:
    """Write the figures of a comparison as PNG and PDF.

    The same comparison gives byte-identical PDFs. A figure without data is left out, and its earlier files are removed.

    ======================  =====================================================================================
    ``pareto``              mIoU against images per second with their deviations over seeds, and the Pareto front
    ``differences``         each row's difference to its baseline with the interval, seeds and Holm's p
    ``curves``              validation mIoU, its last third enlarged, and training loss, with the range over seeds
    ``class_differences``   difference of each class, object size and group of classes
    ``further``             difference of each main score beyond the mIoU, see ``ema_seg.comparison.further``
    ``examples``            the images that differ most, for the rows that differ most
    ======================  =====================================================================================

    Args:
        comparison: content of ``comparison.json``.
        directory: the comparison's folder; the figures are written to its ``figures/``.

    Returns:
        The names of the figures, without suffix.

    Raises:
        DataError: a picture of an example cannot be read, or a figure cannot be written.
    """
    manifest = comparison_manifest(directory)
    comparison = _drawable(comparison)
    # TrueType fonts: text in a PDF can then be searched and edited, and publishers accept it.
    with rc_context({"pdf.fonttype": 42}):
        figures = {
            "pareto": _draw_pareto(comparison),
            "differences": _draw_differences(comparison),
            "curves": _draw_curves(comparison),
            "class_differences": _draw_class_differences(comparison),
            "further": _draw_further(comparison),
            "examples": _draw_examples(comparison, directory),
        }
        formats: dict[str, dict[str, Any]] = {"png": {"dpi": 150}, "pdf": {"metadata": {"CreationDate": None}}}
        for name, figure in figures.items():
            for suffix, options in formats.items():
                file = f"figures/{name}.{suffix}"
                if figure is None:
                    manifest.remove([file])
                    continue
                content = BytesIO()
                figure.savefig(content, format=suffix, bbox_inches="tight", **options)
                manifest.claim([file])
                write_file(directory / file, content.getvalue())
    return [name for name, figure in figures.items() if figure is not None]


def _drawable(value: Any) -> Any:
    """Escape the unprintable characters in all texts: Matplotlib raises for some and draws others as empty boxes."""
    if isinstance(value, str):
        return for_terminal(value)
    if isinstance(value, dict):
        return {_drawable(key): _drawable(item) for key, item in value.items()}
    return [_drawable(item) for item in value] if isinstance(value, list) else value


def front_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows on the Pareto front of mIoU and images per second, from the slowest to the fastest."""
    best = -math.inf
    front: list[Row] = []
    for row in sorted(rows, key=_point, reverse=True):
        if _point(row)[1] > best:
            best = _point(row)[1]
            front.append(row)
    return front[::-1]


def _draw_pareto(comparison: Comparison) -> Figure | None:
    rows = [row for row in comparison["rows"] if _is_measured(row)]
    if not rows:
        return None
    figure = _new_figure(8.4, 5.4)
    axes = figure.add_subplot()
    _style(axes)
    axes.grid(alpha=0.25, linewidth=0.6)
    batches = {row["cost_batch_size"] for row in rows}
    batch = f", batch of {batches.pop()}" if len(batches) == 1 and None not in batches else ""
    axes.set_xlabel(f"throughput, images/s{batch}")
    axes.set_ylabel(_score_name(comparison) + ", %", parse_math=False)
    axes.margins(0.09, 0.12)

    front = front_rows(rows)
    bars: list[Extent] = []
    for row in rows:
        speed, score = _point(row)
        on_front = any(row is other for other in front)
        colour = "black" if row["baseline"] else _BETTER if on_front else _UNDECIDED
        across, up = row["cost"]["images_per_second"]["sd"] or 0, 100 * (row["score"]["sd"] or 0)
        bars += [(speed - across, 100 * score, speed + across, 100 * score)] if across else []
        bars += [(speed, 100 * score - up, speed, 100 * score + up)] if up else []
        axes.errorbar(
            speed,
            100 * score,
            xerr=across or None,
            yerr=up or None,
            fmt="D" if row["baseline"] else "o",
            markersize=7,
            color=colour,
            markerfacecolor=colour if row["score"]["n"] > 1 else "white",
            markeredgewidth=1.4,
            ecolor=colour,
            elinewidth=1,
            capsize=2,
            zorder=3,
        )
    bars_of_seeds = len(bars)
    left, bottom = axes.get_xlim()[0], axes.get_ylim()[0]
    points = [_point(row) for row in front]
    corners = [(left, points[0][1]), *points, (points[-1][0], bottom)]
    bars += [(left, 100 * up, right, 100 * up) for (left, _), (right, up) in pairwise(corners[:-1])]
    bars += [(across, 100 * down, across, 100 * up) for (across, up), (_, down) in pairwise(points)]
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    axes.plot(
        [speed for speed, _ in corners],
        [100 * score for _, score in corners[:-1]] + [bottom],
        drawstyle="steps-pre",
        color=_BETTER,
        linewidth=1.2,
        alpha=0.6,
        zorder=1,
    )
    handles = [_marker("o", _BETTER, "on the Pareto front")]
    if any(row["baseline"] for row in rows):
        handles.insert(0, _marker("D", "black", "baseline"))
    if len(front) < len(rows):
        handles.append(_marker("o", _UNDECIDED, "another is faster and better"))
    if any(row["score"]["n"] == 1 for row in rows):
        handles.append(_marker("o", _UNDECIDED, "one seed", hollow=True))
    if bars_of_seeds:
        handles.append(Line2D([], [], color="0.4", linewidth=1, marker="|", markersize=7, label="± sd over seeds"))
    _legend_below(figure, handles)
    # Baselines and the front come first: earlier labels get the better places.
    order = sorted(rows, key=lambda row: not (row["baseline"] or any(row is other for other in front)))
    _place_labels(figure, axes, [(_point(row)[0], 100 * _point(row)[1], row["label"]) for row in order], bars)
    return figure


def _draw_differences(comparison: Comparison) -> Figure | None:
    pairs = sorted(_contrasted(comparison), key=lambda pair: pair[1]["difference"])
    rows = [row for row, _ in pairs]
    if not rows:
        return None
    figure = _new_figure(8.4 + _extra_width(rows), 1.5 + 0.32 * len(rows))
    axes = figure.add_subplot()
    _style(axes)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.axvline(0, color="black", linewidth=1, zorder=1)
    for place, (_, contrast) in enumerate(pairs):
        colour = _verdict_colour(contrast)
        axes.plot([100 * contrast["low"], 100 * contrast["high"]], [place, place], color=colour, linewidth=2)
        axes.plot(
            100 * contrast["difference"],
            place,
            "o",
            markersize=7,
            color=colour,
            markerfacecolor="white" if contrast["covers"] == "images" else colour,
            markeredgewidth=1.6,
        )
        numbers = (
            points_text(contrast["difference"], digits=2, signed=True),
            str(contrast["n"]),
            probability_text(contrast["p_holm"]),
        )
        clear = contrast["p_holm"] is not None and contrast["p_holm"] < SIGNIFICANT
        _write_beside(axes, place, numbers, "black", weight="bold" if clear else "normal")
    _write_beside(axes, len(rows) - 0.2, ("points", "seeds", "p (Holm)"), "0.35")
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows], parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel(f"{_score_name(comparison)}, difference to {_baseline_name(rows)}, {_POINTS}", parse_math=False)
    handles = [
        _marker("o", _UNDECIDED, f"{_confidence(comparison)} {over}", hollow=covers == "images", line=True)
        for covers, over in {
            "seeds and images": "over seeds and images",
            "images": "over images only: one seed",
        }.items()
        if any(contrast["covers"] == covers for _, contrast in pairs)
    ]
    colours = {_verdict_colour(contrast) for _, contrast in pairs}
    texts = {_BETTER: "above 0", _WORSE: "below 0"}
    handles += [_marker("s", colour, text) for colour, text in texts.items() if colour in colours]
    if any(contrast["p_holm"] is not None and contrast["p_holm"] < SIGNIFICANT for _, contrast in pairs):
        handles.append(Line2D([], [], linestyle="", label=f"bold: p < {SIGNIFICANT:g}"))
    _legend_below(figure, handles)
    return figure


def _draw_further(comparison: Comparison) -> Figure | None:
    rows = [row for row in comparison["rows"] if any(part["contrast"] for part in row["further"].values())]
    main = {key: measure for key, measure in comparison["measures"].items() if measure["main"]}
    if not rows or not main:
        return None
    across = min(3, len(main))
    down = math.ceil(len(main) / across)
    figure = _new_figure(1.2 + 3.1 * across + _extra_width(rows), down * (1.2 + 0.26 * len(rows)))
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    for axes, (key, measure) in zip(grid.flat, main.items(), strict=False):
        _style(axes)
        axes.grid(axis="x", alpha=0.25, linewidth=0.6)
        axes.axvline(0, color="black", linewidth=1, zorder=1)
        factor = 100 if measure["percent"] else 1
        for place, row in enumerate(rows):
            contrast = row["further"][key]["contrast"]
            if contrast is None:
                continue
            colour = _verdict_colour(contrast, better=1 if measure["higher_is_better"] else -1)
            axes.plot([factor * contrast["low"], factor * contrast["high"]], [place, place], color=colour, linewidth=2)
            inside = "white" if contrast["covers"] == "images" else colour
            difference = factor * contrast["difference"]
            axes.plot(difference, place, "o", color=colour, markerfacecolor=inside, markersize=6, markeredgewidth=1.6)
        wanted = "higher" if measure["higher_is_better"] else "lower"
        axes.set_title(f"{measure['label']} ({wanted} is better)", fontsize=9)
        axes.set_xlabel("points" if measure["percent"] else "", fontsize=9)
        axes.set_yticks(range(len(rows)), [row["label"] for row in rows], parse_math=False)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-0.6, len(rows) - 0.4)
    for axes in list(grid.flat)[len(main) :]:
        axes.set_visible(False)
    handles = [_marker("s", _BETTER, "better"), _marker("s", _WORSE, "worse")]
    handles.append(_marker("o", _UNDECIDED, _confidence(comparison), line=True))
    contrasts = [part["contrast"] for row in rows for part in row["further"].values()]
    if any(contrast and contrast["covers"] == "images" for contrast in contrasts):
        handles.append(_marker("o", _UNDECIDED, "over images only: one seed", hollow=True, line=True))
    _legend_below(figure, handles)
    return figure


def _draw_curves(comparison: Comparison) -> Figure | None:
    rows = [row for row in comparison["rows"] if any(key in row["curves"] for key in _SCALES)]
    if not rows:
        return None
    panels = _curve_panels(rows)
    coloured = _coloured_rows(rows)
    figure = _new_figure(4.4 * len(panels), 4.4)
    ranges = False
    for axes, (key, first, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _style(axes)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set(xlabel="epoch", ylabel=label)
        for row in rows:
            if key not in row["curves"]:
                continue
            curve = row["curves"][key]
            shown = np.array(curve["epoch"]) >= first
            epochs = np.array(curve["epoch"])[shown] + 1
            low, mean, high = (_SCALES[key] * np.array(curve[name])[shown] for name in ("low", "mean", "high"))
            colour = coloured.get(row["label"], "0.8")
            front = 2 + (row["label"] in coloured)
            if row["label"] in coloured and (low < high).any():
                ranges = True
                axes.fill_between(epochs, low, high, color=colour, alpha=0.12, linewidth=0, zorder=front)
            marker = "." if len(epochs) == 1 else ""
            axes.plot(epochs, mean, color=colour, linewidth=1.5, marker=marker, zorder=front)
        axes.xaxis.get_major_locator().set_params(integer=True)
    handles: list[Line2D | Rectangle] = [
        Line2D([], [], color=colour, linewidth=2, label=label) for label, colour in coloured.items()
    ]
    if len(rows) > len(coloured):
        handles.append(Line2D([], [], color="0.8", linewidth=2, label=f"{len(rows) - len(coloured)} others"))
    if ranges:
        handles.append(Rectangle((0, 0), 1, 1, color="0.5", alpha=0.25, linewidth=0, label="lowest to highest seed"))
    _legend_below(figure, handles)
    return figure


def _curve_panels(rows: Sequence[Row]) -> list[tuple[str, int, str]]:
    """Return column, first epoch shown, and label of each panel."""
    scored = [epoch for row in rows if "val/miou" in row["curves"] for epoch in row["curves"]["val/miou"]["epoch"]]
    panels = [("val/miou", 0, "validation mIoU, %")] if scored else []
    # The final differences are too small to see beside the rise of the first epochs.
    late = math.ceil(2 / 3 * (max(scored, default=0) + 1))
    if len({epoch for epoch in scored if epoch >= late}) > 2:
        panels.append(("val/miou", late, "validation mIoU, %, last third"))
    if any("train/loss" in row["curves"] for row in rows):
        panels.append(("train/loss", 0, "training loss"))
    return panels


def _draw_class_differences(comparison: Comparison) -> Figure | None:
    rows = [row for row, _ in _contrasted(comparison)]
    classes = _contrast_columns(rows, comparison["classes"], "classes")
    if not classes:
        return None
    known = len(classes)
    # In the data set's order, where the reader expects a class.
    largest = sorted(range(known), key=lambda index: -_largest(classes[index]))[:_SHOWN_CLASSES]
    shown = [classes[index] for index in sorted(largest)]
    strata = _contrast_columns(rows, list(comparison["strata"]), "strata")
    groups = [group for group in (shown, strata) if group]
    columns = sum(map(len, groups))
    numbered = columns <= _NUMBERED_COLUMNS
    cell = 0.46 if numbered else 0.3
    figure = _new_figure(2.6 + cell * (columns + 1) + _extra_width(rows), 2.4 + 0.3 * len(rows))
    values = np.abs([100 * contrast["difference"] for _, cells in shown + strata for contrast in cells if contrast])
    # Not the maximum: a single extreme class would make all others pale.
    limit = max(float(np.percentile(values, 98)), 0.1)
    norm = Normalize(-limit, limit)
    grid = figure.subplots(1, len(groups), squeeze=False, width_ratios=[len(group) for group in groups])[0]
    for axes, group in zip(grid, groups, strict=True):
        _draw_cells(axes, group, norm, numbered)
    grid[0].set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=9, parse_math=False)
    some = "classes" if known == len(shown) else f"the {len(shown)} of {known} classes with the largest differences"
    grid[0].set_title(f"IoU of {some}", fontsize=10, pad=8, loc="left")
    if strata:
        sizes = all(name in SIZES for name, _ in strata)
        title = f"{comparison['metric']} by {'object size' if sizes else 'size, group'}"
        grid[1].set_title(title, fontsize=10, pad=8, loc="right", parse_math=False)
    for axes in grid[1:]:
        axes.set_yticks([])
    bar = figure.colorbar(
        ScalarMappable(norm, _GAINS),
        ax=list(grid),
        fraction=0.04,
        aspect=24,
        pad=0.02,
        extend="both" if values.max() > limit else "neither",
    )
    bar.set_label(f"difference to {_baseline_name(rows)},\n{_POINTS}", fontsize=9, parse_math=False)
    bar.ax.tick_params(labelsize=8)
    frame = Rectangle((0, 0), 1, 1, facecolor="none", edgecolor="black", linewidth=1.2)
    frame.set_label(f"{_confidence(comparison)} excludes 0 (not corrected for the number of cells)")
    handles = [frame]
    if not all(contrast for _, cells in shown + strata for contrast in cells):
        handles.append(Rectangle((0, 0), 1, 1, facecolor=_GAINS.get_bad(), label="no score"))
    _legend_below(figure, handles)
    return figure


def _draw_examples(comparison: Comparison, directory: Path) -> Figure | None:
    examples = _chosen_examples(comparison)
    if not examples:
        return None
    pictures = [{key: _read_picture(directory, path) for key, path in one["files"].items()} for one in examples]
    keys = {"image": "photograph", "truth": "truth", "baseline": "baseline's prediction", "prediction": "prediction"}
    # Manual layout: the rows differ in aspect ratio, and each spans the width without wasting height.
    width, gap, margin, caption, heading = 2.5, 0.06, 0.12, 0.3, 0.3
    heights = [
        next(width * picture.shape[0] / picture.shape[1] for picture in panels.values() if picture is not None)
        for panels in pictures
    ]
    across = len(keys) * (width + gap) - gap + 2 * margin
    legend = _class_patches(comparison, [panels[key] for panels in pictures for key in keys if key != "image"])
    down = heading + sum(heights) + caption * len(examples) + margin
    figure = Figure(figsize=(across, down))
    FigureCanvasAgg(figure)
    if legend:
        _legend_below(figure, legend, loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=0)
    for column, text in enumerate(keys.values()):
        centre = margin + column * (width + gap) + width / 2
        figure.text(centre / across, 1 - 0.6 * heading / down, text, ha="center", va="center", fontsize=10)
    top = heading
    for example, panels, height in zip(examples, pictures, heights, strict=True):
        text = (
            f"{example['row']} against {example['baseline']}, {example['kind']} image: "
            f"{points_text(example['difference'], digits=1, signed=True)} points of {comparison['metric']} · "
            f"{example['name']}"
        )
        baseline = 1 - (top + caption - 0.07) / down
        figure.text(margin / across, baseline, text, va="baseline", fontsize=8.5, parse_math=False)
        top += caption + height
        for column, key in enumerate(keys):
            left = margin + column * (width + gap)
            axes = figure.add_axes((left / across, 1 - top / down, width / across, height / down))
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(color="0.7", linewidth=0.6)
            picture = panels[key]
            if picture is None:
                axes.text(0.5, 0.5, "not kept", transform=axes.transAxes, ha="center", va="center", color="0.5")
            else:
                axes.imshow(picture, interpolation="nearest", aspect="auto")
    return figure


def _new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _write_beside(axes: Axes, height: float, texts: Sequence[str], colour: str, weight: str = "normal") -> None:
    """Write texts right of the axes, in columns whose width does not depend on that of the axes."""
    coordinates = axes.get_yaxis_transform()
    for offset, text in zip(_NUMBER_OFFSETS, texts, strict=True):
        axes.annotate(
            text,
            (1, height),
            (offset, 0),
            xycoords=coordinates,
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=9,
            color=colour,
            weight=weight,
            annotation_clip=False,
        )


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def _marker(shape: str, colour: str, label: str, *, hollow: bool = False, line: bool = False) -> Line2D:
    return Line2D(
        [],
        [],
        linestyle="-" if line else "",
        linewidth=2,
        marker=shape,
        markersize=7,
        color=colour,
        markerfacecolor="white" if hollow else colour,
        markeredgewidth=1.4,
        label=label,
    )


def _legend_below(figure: Figure, handles: Sequence[Line2D | Rectangle], **place: Any) -> None:
    widths = [0.075 * len(str(handle.get_label())) + 0.6 for handle in handles]  # letters and symbol, in inches
    columns = len(handles)
    while columns > 1 and sum(max(column) for column in np.array_split(widths, columns)) > figure.get_figwidth():
        columns -= 1
    # Texts are set afterwards: Matplotlib drops labels that begin with "_" and reads two dollar signs as mathematics.
    place = place or {"loc": "outside lower center"}
    legend = figure.legend(handles, ["."] * len(handles), ncols=columns, fontsize=9, frameon=False, **place)
    for text, handle in zip(legend.get_texts(), handles, strict=True):
        text.set_parse_math(False)
        text.set_text(str(handle.get_label()))


def _class_patches(comparison: Comparison, masks: Sequence[np.ndarray | None]) -> list[Rectangle]:
    """Return a patch for each class in the masks, in class order; of very many, for those with the most pixels."""
    pixels: Counter[tuple[int, ...]] = Counter()
    for mask in masks:
        if mask is not None:
            colours, counts = np.unique(mask.reshape(-1, 3), axis=0, return_counts=True)
            pixels.update(dict(zip(map(tuple, colours.tolist()), counts.tolist(), strict=True)))
    classes = list(zip(map(tuple, comparison["palette"]), comparison["classes"], strict=True))
    shown = sorted((each for each in classes if pixels[each[0]]), key=lambda each: -pixels[each[0]])[:_LEGEND_CLASSES]
    patches = [each for each in classes if each in shown]
    if pixels[(0, 0, 0)] and (0, 0, 0) not in dict(classes):
        patches.append(((0, 0, 0), "ignored"))
    return [
        Rectangle((0, 0), 1, 1, facecolor=np.divide(colour, 255), edgecolor="0.25", linewidth=0.6, label=name)
        for colour, name in patches
    ]


def _score_name(comparison: Comparison) -> str:
    return f"{comparison['metric']} on {comparison['data']['name']} ({comparison['data']['split']})"


def _confidence(comparison: Comparison) -> str:
    return f"{100 * comparison['bootstrap']['confidence']:g} % interval"


def _extra_width(rows: Sequence[Row]) -> float:
    """Return the width to add to the figure for long labels, in inches."""
    return 0.075 * max(max(len(row["label"]) for row in rows) - 18, 0)


def _is_measured(row: Row) -> bool:
    return row["score"]["mean"] is not None and row["cost"]["images_per_second"]["mean"] is not None


def _point(row: Row) -> tuple[float, float]:
    return row["cost"]["images_per_second"]["mean"] or 0, row["score"]["mean"] or 0


def _contrasted(comparison: Comparison) -> list[tuple[Row, Contrast]]:
    return [(row, row["contrast"]) for row in comparison["rows"] if row["contrast"] is not None]


def _baseline_name(rows: Sequence[Row]) -> str:
    names = {row["contrast"]["baseline"] for row in rows if row["contrast"]}
    return names.pop() if len(names) == 1 else "the baseline"


def _verdict_colour(contrast: Contrast, better: int = 1) -> str:
    """Return the colour of a contrast; ``better`` is -1 where a lower score is better."""
    low, high = sorted((better * contrast["low"], better * contrast["high"]))
    return _BETTER if low > 0 else _WORSE if high < 0 else _UNDECIDED


def _coloured_rows(rows: Sequence[Row]) -> dict[str, str]:
    """Return the colours of the first baseline (black) and the best other rows, by label; more would look alike."""
    bases = [row for row in rows if row["baseline"]][:1]
    others = [row for row in rows if not any(row is base for base in bases)]
    best = sorted(others, key=lambda row: -(row["score"]["mean"] or 0))[: len(_LINES)]
    colours = {row["label"]: "black" for row in bases}
    return colours | {row["label"]: colour for row, colour in zip(best, _LINES, strict=False)}


def _contrast_columns(rows: Sequence[Row], names: Sequence[str], part: str) -> Columns:
    """Return the contrasts of all rows for each name that has at least one."""
    columns = [(name, [row[part][name]["contrast"] for row in rows]) for name in names]  # type: ignore[literal-required]
    return [column for column in columns if any(column[1])]


def _largest(column: tuple[str, list[Contrast | None]]) -> float:
    return max(abs(contrast["difference"]) for contrast in column[1] if contrast)


def _draw_cells(axes: Axes, columns: Columns, norm: Normalize, numbered: bool) -> None:
    cells = [[100 * contrast["difference"] if contrast else np.nan for contrast in each] for _, each in columns]
    values = np.ma.masked_invalid(np.array(cells).T)
    axes.imshow(values, cmap=_GAINS, norm=norm, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(columns)), [name for name, _ in columns], rotation=90, fontsize=8.5, parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    # White gaps separate neighbouring cells of any colours.
    axes.set_xticks(np.arange(len(columns) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(values) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    for column, (_, contrasts) in enumerate(columns):
        for row, contrast in enumerate(contrasts):
            if contrast is None:
                continue
            if contrast["low"] > 0 or contrast["high"] < 0:
                corner = (column - 0.44, row - 0.42)
                axes.add_patch(Rectangle(corner, 0.88, 0.84, facecolor="none", edgecolor="black", linewidth=1.2))
            if numbered:
                colour = "white" if norm(100 * contrast["difference"]) > 0.85 else "black"  # blue is the darker end
                text = points_text(contrast["difference"], digits=1, signed=True)
                axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)


def _chosen_examples(comparison: Comparison) -> list[Disagreement]:
    """Return the examples with pictures, for the rows that differ most from their baseline, largest first."""
    ranked = sorted(_contrasted(comparison), key=lambda pair: -abs(pair[1]["difference"]))
    pictured = [example for example in comparison["examples"] if any(example["files"].values())]
    of_row = [[example for example in pictured if example["row"] == row["label"]] for row, _ in ranked]
    return [example for examples in list(filter(None, of_row))[:_ILLUSTRATED_ROWS] for example in examples]


def _read_picture(directory: Path, path: str | None) -> np.ndarray | None:
    """Read a picture, subsampled to the size that is shown, so that the PDF stays small."""
    if path is None:
        return None
    try:
        with Image.open(directory / path, formats=IMAGE_FORMATS) as file:
            picture = file.convert("RGB")
    except OSError as error:
        raise DataError(f"{directory / path}: cannot be read ({error}); run the comparison again.") from error
    step = math.ceil(max(picture.size) / _PICTURE_PIXELS)
    return np.asarray(picture)[::step, ::step]


def _place_labels(
    figure: Figure, axes: Axes, labels: Sequence[tuple[float, float, str]], bars: Sequence[Extent]
) -> None:
    """Write each label near its point, clear of points, bars and other labels; connect distant ones with a line.

    Places around the point are tried by distance, then by angle. No other point is on the way from a label to its
    point, because the label would be taken for that one's. A label without such a place is written just right of its
    point.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the axes must not move any more: places are in pixels
    renderer = FigureCanvasAgg(figure).get_renderer()
    pixel = figure.dpi / 72
    frame = axes.get_window_extent(renderer).expanded(1.02, 1.02)
    points = axes.transData.transform([(x, y) for x, y, _ in labels])
    taken = [Bbox.from_bounds(x - 5 * pixel, y - 5 * pixel, 10 * pixel, 10 * pixel) for x, y in points]
    taken += [axes.transData.transform_bbox(Bbox.from_extents(*bar)).padded(pixel) for bar in bars]
    for (x, y), (_, _, label) in zip(points, labels, strict=True):
        text = axes.text(0, 0, label, fontsize=9, ha="center", va="center", transform=None, zorder=4, parse_math=False)
        size = text.get_window_extent(renderer)
        others = points[np.any(points != (x, y), axis=1)]
        box = _free_place(x, y, size.width, size.height, pixel, frame, taken, others)
        taken.append(box)
        centre = ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
        text.set_transform(axes.transData)
        across, up = axes.transData.inverted().transform(centre)
        text.set_position((float(across), float(up)))
        nearest = _nearest_in(box, x, y)
        if math.dist(nearest, (x, y)) > 12 * pixel:
            ends = axes.transData.inverted().transform([(x, y), nearest])
            axes.plot(*ends.T, color="0.6", linewidth=0.7, zorder=2)


def _free_place(
    x: float,
    y: float,
    width: float,
    height: float,
    pixel: float,
    frame: Bbox,
    taken: Sequence[Bbox],
    others: np.ndarray,
) -> Bbox:
    for distance in (4, 7, 11, 16, 22, 30, 40, 52, 66, 82, 100):
        for angle in np.deg2rad((45, -45, 135, -135, 90, -90, 0, 180, 67, 113, 22, 158, -67, -113, -22, -158)):
            across, up = math.cos(angle), math.sin(angle)
            left = x + across * distance * pixel + (np.sign(round(across, 1)) - 1) * width / 2
            bottom = y + up * (distance * pixel + height / 2) - height / 2
            box = Bbox.from_bounds(left, bottom, width, height)
            inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
            if not inside or any(box.overlaps(other) for other in taken):
                continue
            if _clearance(_nearest_in(box, x, y), (x, y), others) > 6 * pixel:
                return box
    return Bbox.from_bounds(x + 7 * pixel, y, width, height)


def _nearest_in(box: Bbox, x: float, y: float) -> tuple[float, float]:
    return float(np.clip(x, box.x0, box.x1)), float(np.clip(y, box.y0, box.y1))


def _clearance(start: tuple[float, float], end: tuple[float, float], points: np.ndarray) -> float:
    """Return the distance from the line between two places to the nearest of these points, (N, 2)."""
    way = np.subtract(end, start)
    along = np.clip((points - start) @ way / max(float(way @ way), 1e-9), 0, 1)
    return float(np.linalg.norm(start + along[:, None] * way - points, axis=1).min(initial=math.inf))
