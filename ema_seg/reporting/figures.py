"""Figures: confusion matrix, IoU of each class, further scores, and images beside their masks.

They are drawn through Matplotlib's object interface, which needs no display and keeps no global state.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from ema_seg.data.base import IGNORE_INDEX
from ema_seg.evaluation import Example
from ema_seg.inference.masks import colourise
from ema_seg.reporting.tables import describe_model
from ema_seg.runtime.escaping import for_figure

__all__ = [
    "draw_class_iou",
    "draw_confusion_matrix",
    "draw_corruptions",
    "draw_reliability",
    "draw_samples",
    "draw_trimap",
]

_IGNORED_COLOUR = (0, 0, 0)
# Vermillion of Okabe and Ito's colour-blind-safe palette, distinct from grey.
_WRONG_COLOUR = (213, 94, 0)

_LINE_COLOUR, _BAR_COLOUR = "#0072b2", "#9ecae1"

_NUMBERED_CLASSES = 25
_LABELLED_CLASSES = 50
_BARS_PER_COLUMN = 50
_LEGEND_CLASSES = 32

Bar = tuple[str, float | None, Sequence[int]]


def draw_confusion_matrix(report: Mapping[str, Any]) -> Figure:
    """Draw the confusion matrix: each row is a true class and adds up to 100 %.

    Rows of classes that do not occur in the truth stay grey.
    """
    counts = np.array(report["confusion_matrix"], dtype=float)
    total = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)

    classes = report["classes"]
    side = float(np.clip(0.42 * len(classes), 4.5, 13))
    figure = _new_figure(side + 1.6, side + 0.9, layout="compressed")
    axes = figure.add_subplot()
    # A square-root scale shows the confusions, which are small beside the diagonal.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1), interpolation="nearest")
    axes.set_facecolor("0.88")
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(for_figure(describe_model(report)), fontsize=11, pad=10)

    every = math.ceil(len(classes) / _LABELLED_CLASSES)
    ticks, names = range(0, len(classes), every), [for_figure(name) for name in classes[::every]]
    size = 8 if every == 1 else 7
    axes.set_xticks(ticks, names, rotation=90, fontsize=size)
    axes.set_yticks(ticks, names, fontsize=size)
    if len(classes) <= _NUMBERED_CLASSES:
        _write_shares(axes, shares)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, aspect=30, pad=0.02, format=PercentFormatter(1))
    bar.set_label("share of the true class's pixels", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def draw_class_iou(report: Mapping[str, Any]) -> Figure:
    """Draw the IoU of each class, best first, with the mean as a line; absent classes come last."""
    bars = list(zip(report["classes"], report["iou"], report["palette"], strict=True))
    ranked = sorted(bars, key=lambda bar: -1.0 if bar[1] is None else bar[1], reverse=True)

    columns = math.ceil(len(ranked) / _BARS_PER_COLUMN)
    height = math.ceil(len(ranked) / columns)
    figure = _new_figure(1.5 + 5 * columns, 1.2 + 0.22 * height, layout="constrained")
    figure.suptitle(for_figure(describe_model(report)), fontsize=11)
    for index, axes in enumerate(np.ravel(figure.subplots(1, columns))):
        _draw_bars(axes, ranked[index * height : (index + 1) * height], report["miou"])
        axes.set_ylim(height - 0.4, -0.6)
    return figure


def draw_trimap(report: Mapping[str, Any]) -> Figure:
    """Draw the mIoU of the pixels up to each distance from a boundary, above the mIoU of all pixels."""
    figure = _new_figure(5, 3.6, layout="constrained")
    axes = figure.add_subplot()
    distances, miou = report["trimap"]["distances"], report["trimap"]["miou"]
    axes.plot(distances, _numbers(miou), marker="o", color=_LINE_COLOUR)
    if report["miou"] is not None:
        axes.axhline(report["miou"], color="black", linestyle="--", linewidth=1, zorder=0)
        axes.text(1, report["miou"], f"all pixels {100 * report['miou']:.2f}%", va="bottom", fontsize=9)
    axes.set_xscale("log", base=2)
    axes.set_xticks(distances, [str(distance) for distance in distances])
    axes.set(xlabel="pixels up to this distance from a boundary", ylabel="mIoU")
    axes.margins(y=0.12)
    return _finish(figure, axes, report)


def draw_reliability(report: Mapping[str, Any]) -> Figure:
    """Draw the accuracy of each bin of confidence, and the share of pixels in it below."""
    bins = report["reliability"]
    confidence, accuracy = _numbers(bins["confidence"]), _numbers(bins["accuracy"])
    edges = np.linspace(0, 1, len(confidence) + 1)
    figure = _new_figure(4.6, 5.2, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1)
    upper.bar(edges[:-1], accuracy, np.diff(edges), align="edge", color=_BAR_COLOUR, edgecolor="white")
    upper.plot(confidence, accuracy, "o", color=_LINE_COLOUR, markersize=4)
    upper.set(ylabel="correct pixels", xlim=(0, 1), ylim=(0, 1))
    ece = report["ece"]
    told = "undefined" if ece is None else f"{100 * ece:.2f}%"
    upper.text(0.03, 0.93, f"expected calibration error {told}", fontsize=9)
    pixels = np.array(bins["pixels"], dtype=float)
    lower.bar(edges[:-1], pixels / max(pixels.sum(), 1), np.diff(edges), align="edge", color="0.6", edgecolor="white")
    lower.set(xlabel="probability of the predicted class", ylabel="pixels")
    lower.xaxis.set_major_formatter(PercentFormatter(1))
    lower.spines[["top", "right"]].set_visible(False)
    lower.yaxis.set_major_formatter(PercentFormatter(1))
    return _finish(figure, upper, report)


def draw_corruptions(report: Mapping[str, Any]) -> Figure:
    """Draw the mIoU of each corruption against its severity, a panel for each group."""
    groups: dict[str, dict[str, Sequence[float | None]]] = {}
    for kind, found in report["corruptions"].items():
        groups.setdefault(found["group"], {})[kind] = found["miou"]
    figure = _new_figure(2.9 * len(groups), 3.4, layout="constrained")
    figure.suptitle(for_figure(describe_model(report)), fontsize=11)
    panels = np.ravel(figure.subplots(1, len(groups), sharey=True))
    for axes, (group, kinds) in zip(panels, groups.items(), strict=True):
        for kind, miou in kinds.items():
            axes.plot(range(len(miou) + 1), _numbers([report["miou"], *miou]), marker="o", markersize=3, label=kind)
        axes.set_title(group, fontsize=10)
        axes.set_xlabel("severity")
        axes.set_xticks(range(6), ["none", *"12345"])
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False, loc="lower left")
    panels[0].set(ylabel="mIoU", ylim=(0, None))
    return figure


def draw_samples(
    rows: Sequence[Example], classes: Sequence[str], palette: Sequence[Sequence[int]], title: str = ""
) -> Figure:
    """Draw images in rows: input, truth, prediction and errors, and the attention weights where given.

    Args:
        rows: at least one image with its masks.
        classes: names of the K classes.
        palette: their colours.
        title: heading of the figure.
    """
    weighted = any("weight_map" in row for row in rows)
    columns = ["input", "truth", "prediction", "errors"] + ["attention weight"] * weighted
    width = 2.8
    heights = [width * row["truth"].shape[0] / row["truth"].shape[1] for row in rows]
    legend = _legend_patches(rows, classes, palette)
    legend_height = 0.2 * math.ceil(len(legend) / (2 * len(columns))) + 0.1
    size = width * len(columns), sum(heights) + 0.3 * len(rows) + legend_height + (0.6 if title else 0.3)
    figure = _new_figure(*size, layout="compressed")
    grid = figure.subplots(len(rows), len(columns), squeeze=False, height_ratios=heights)
    for axes, name in zip(grid[0], columns, strict=True):
        axes.annotate(name, (0.5, 1), (0, 18), "axes fraction", textcoords="offset points", ha="center", fontsize=10)
    for axes_row, row in zip(grid, rows, strict=True):
        _draw_sample(axes_row, row, palette)
    if title:
        figure.suptitle(f"{for_figure(title)}\n", fontsize=11, linespacing=0.5)
    figure.legend(handles=legend, loc="outside lower center", ncols=2 * len(columns), fontsize=8, frameon=False)
    return figure


def _new_figure(width: float, height: float, layout: Literal["constrained", "compressed"]) -> Figure:
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _finish(figure: Figure, axes: Axes, report: Mapping[str, Any]) -> Figure:
    axes.set_title(for_figure(describe_model(report)), fontsize=10, pad=8)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    """Return values of a report as numbers, nan where undefined."""
    return np.array(values, dtype=float)


def _write_shares(axes: Axes, shares: np.ndarray) -> None:
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.005:  # would read 0
            colour = "white" if share > 0.4 else "black"
            text = axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=colour)
            text.set_in_layout(False)  # lies within the axes: measuring hundreds of them takes longer than drawing


def _draw_bars(axes: Axes, bars: Sequence[Bar], mean: float | None) -> None:
    for place, (_, iou, colour) in enumerate(bars):
        axes.barh(place, iou or 0, height=0.75, color=_rgb(colour), edgecolor="0.25", linewidth=0.6)
        text = "absent" if iou is None else f"{100 * iou:.1f}"
        label = axes.text((iou or 0) + 0.012, place, text, va="center", fontsize=8, color="0.25")
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})  # hides the mean's line behind the text
    axes.set_yticks(range(len(bars)), [for_figure(name) for name, _, _ in bars], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(0, 1.08), xlabel="IoU")
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.spines[["top", "right"]].set_visible(False)
    if mean is not None:
        axes.axvline(mean, color="black", linestyle="--", linewidth=1, zorder=0)
        above = axes.get_xaxis_transform()
        axes.text(mean, 1.01, f"mIoU {100 * mean:.2f}%", transform=above, ha="center", va="bottom", fontsize=9)


def _draw_sample(axes_row: Sequence[Axes], row: Example, palette: Sequence[Sequence[int]]) -> None:
    panels = [
        row["image"],
        colourise(row["truth"], palette),
        colourise(row["prediction"], palette),
        _paint_errors(row),
    ]
    for axes in axes_row:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color="0.7", linewidth=0.6)
    for axes, panel in zip(axes_row, panels, strict=False):
        axes.imshow(panel, interpolation="nearest")
    axes_row[0].set_title(for_figure(row["title"]), loc="left", fontsize=8, pad=3)
    if "weight_map" in row:
        # Each map has its own range, shown by its colour bar: on a scale from 0 to 1 most would look flat.
        image = axes_row[-1].imshow(row["weight_map"], cmap="viridis")
        bar = axes_row[-1].figure.colorbar(image, ax=axes_row[-1], ticks=image.get_clim(), fraction=0.04, pad=0.02)
        bar.ax.yaxis.set_major_formatter("{x:.2f}")
        bar.ax.tick_params(labelsize=8)


def _paint_errors(row: Example) -> np.ndarray:
    """Paint the input in pale grey, wrong pixels in vermillion, ignored ones in white."""
    grey = row["image"].mean(axis=2, keepdims=True) * 0.4 + 150
    painted = np.repeat(grey, 3, axis=2)
    labelled = row["truth"] != IGNORE_INDEX
    painted[labelled & (row["truth"] != row["prediction"])] = _WRONG_COLOUR
    painted[~labelled] = 255
    return painted.astype(np.uint8)


def _legend_patches(rows: Sequence[Example], classes: Sequence[str], palette: Sequence[Sequence[int]]) -> list[Patch]:
    """Return a patch for each class that occurs, in class order; of very many, for those with the most pixels."""
    masks = np.concatenate([row[key].ravel() for row in rows for key in ("truth", "prediction")])
    pixels = np.bincount(masks, minlength=IGNORE_INDEX + 1)[: len(classes)]
    shown = np.sort(np.argsort(-pixels, kind="stable")[: min(_LEGEND_CLASSES, np.count_nonzero(pixels))])
    patches = [_patch(classes[index], palette[index]) for index in shown]
    if (masks == IGNORE_INDEX).any():
        patches.append(_patch("ignored", _IGNORED_COLOUR))
    return [*patches, _patch("wrong", _WRONG_COLOUR)]


def _patch(label: str, colour: Sequence[int]) -> Patch:
    return Patch(facecolor=_rgb(colour), edgecolor="0.25", linewidth=0.6, label=for_figure(label))


def _rgb(colour: Sequence[int]) -> tuple[float, float, float]:
    red, green, blue = (channel / 255 for channel in colour)
    return red, green, blue
