"""Figures of an analysis."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from ema_seg.analysis.effects import is_decided
from ema_seg.analysis.interventions import Sample
from ema_seg.analysis.receptive_field import ReceptiveField
from ema_seg.analysis.schema import ALL_BLOCKS, INTERVENTIONS
from ema_seg.analysis.tables import short_name
from ema_seg.inference.masks import colourise
from ema_seg.runtime.escaping import for_figure

__all__ = ["Pictures", "draw_all"]

# Okabe and Ito's colour-blind-safe palette.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
_BECAME_RIGHT, _BECAME_WRONG, _STAYED_WRONG = (0, 114, 178), (213, 94, 0), (240, 200, 80)
_PICTURE_WIDTH = 2.7

Mask = NDArray[np.integer]


@dataclass
class Pictures:
    """Images, maps and fields that the figures show beside the report.

    Attributes:
        maps: some images with the maps of the blocks, (h, w) by name.
        examples: by intervention, the image where it matters most, the prediction with it and the model's own, H x W.
        fields: receptive fields by model.
    """

    maps: list[tuple[Sample, Mapping[str, NDArray[np.float32]]]] = field(default_factory=list)
    examples: dict[str, tuple[Sample, Mask, Mask]] = field(default_factory=dict)
    fields: dict[str, ReceptiveField] = field(default_factory=dict)


def draw_all(report: Mapping[str, Any], pictures: Pictures) -> dict[str, Figure]:
    """Draw the figures of an analysis by the names of ``ema_seg.analysis.tables.FIGURES``.

    Args:
        report: the content of ``analysis.json``.
        pictures: the images, maps and fields to show.
    """
    figures = {
        "interventions": _draw_interventions(report),
        "classes": _draw_class_effects(report),
        "receptive_field": _draw_fields(report, pictures),
    }
    if pictures.examples:
        figures["examples"] = _draw_examples(report, pictures)
    if any(np.size(values) > 1 for _, maps in pictures.maps for values in maps.values()):
        figures["weight_maps"] = _draw_maps(pictures)
    if any(block["classes"] for block in report["blocks"]):
        figures["weights_by_class"] = _draw_weights_by_class(report)
    if report["twin"]:
        figures["similarity"] = _draw_similarity(report["twin"]["similarity"])
    return figures


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _targets(report: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["block"] for row in report["interventions"]))


def _draw_interventions(report: Mapping[str, Any]) -> Figure:
    """Draw a panel for each intervention: the difference of the mIoU for each block."""
    targets = _targets(report)
    figure = _figure(2.4 * len(INTERVENTIONS) + 1.4, 0.32 * len(targets) + 1.3)
    panels = np.ravel(figure.subplots(1, len(INTERVENTIONS), sharey=True))
    found = {(row["block"], row["intervention"]): row["differences"]["miou"] for row in report["interventions"]}
    for axes, name in zip(panels, INTERVENTIONS, strict=True):
        for place, target in enumerate(targets):
            _draw_interval(axes, place, found[target, name])
        axes.axvline(0, color="0.5", linewidth=1, zorder=0)
        axes.set_title(name, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(targets)), [for_figure(short_name(target)) for target in targets], fontsize=8)
    panels[0].invert_yaxis()
    figure.supxlabel("difference of the mIoU, points", fontsize=9)
    return figure


def _draw_interval(axes: Axes, place: int, difference: Mapping[str, float] | None) -> None:
    if difference is None:
        return
    middle, low, high = (100 * difference[key] for key in ("difference", "low", "high"))
    colour = _COLOURS[0] if is_decided(difference) else "0.55"
    axes.plot([low, high], [place, place], color=colour, linewidth=2)
    axes.plot(middle, place, "o", color=colour, markersize=5)


def _draw_class_effects(report: Mapping[str, Any]) -> Figure:
    """Draw the differences of the IoU of each class: of all blocks, or of the only one."""
    target = _main_target(report)
    rows = {row["intervention"]: row["classes"] for row in report["interventions"] if row["block"] == target}
    if report["twin"]:
        rows["twin"] = report["twin"]["classes"]
    return _heat_map(rows, report["classes"], f"difference of the IoU, points ({for_figure(short_name(target))})", 1)


def _draw_weights_by_class(report: Mapping[str, Any]) -> Figure:
    blocks = [block for block in report["blocks"] if block["classes"]]
    rows = {short_name(block["name"]): [*block["classes"], *block["regions"].values()] for block in blocks}
    names = [*report["classes"], *blocks[0]["regions"]]
    return _heat_map(rows, names, "mean weight less that of all labelled pixels, times 100", 2)


def _heat_map(
    rows: Mapping[str, Sequence[Mapping[str, float] | None]], columns: Sequence[str], title: str, digits: int
) -> Figure:
    """Draw differences, times 100; bold where the interval excludes zero, grey where undefined."""
    values = np.array(
        [[math.nan if cell is None else 100 * cell["difference"] for cell in row] for row in rows.values()]
    )
    limit = float(np.nanmax(np.abs(values), initial=1e-6))
    figure = _figure(0.48 * len(columns) + 2.4, 0.36 * len(rows) + 1.9)
    axes = figure.add_subplot()
    axes.set_facecolor("0.88")
    axes.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    if len(columns) <= 40:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                sure = is_decided(list(rows.values())[row][column])
                colour = "white" if abs(value) > 0.6 * limit else "black"
                weight = "bold" if sure else "normal"
                axes.text(
                    column,
                    row,
                    f"{value:+.{digits}f}",
                    ha="center",
                    va="center",
                    fontsize=6,
                    color=colour,
                    weight=weight,
                )
    axes.set_xticks(range(len(columns)), [for_figure(name) for name in columns], rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), [for_figure(name) for name in rows], fontsize=8)
    axes.set_title(title, fontsize=9)
    return figure


def _draw_examples(report: Mapping[str, Any], pictures: Pictures) -> Figure:
    """Draw a row for each intervention: image, truth, predictions without and with it, and what it changes."""
    palette = report["palette"]
    columns = ("input", "truth", "prediction", "with the intervention", "what changes")
    shapes = [sample.mask.shape for sample, _, _ in pictures.examples.values()]
    heights = [_PICTURE_WIDTH * height / width for height, width in shapes]
    figure = _figure(_PICTURE_WIDTH * len(columns), sum(heights) + 0.3 * len(heights) + 0.6)
    grid = figure.subplots(len(heights), len(columns), squeeze=False, height_ratios=heights)
    for axes_row, (name, (sample, changed, own)) in zip(grid, pictures.examples.items(), strict=True):
        image = sample.image.permute(1, 2, 0).numpy()
        panels = [image, *(colourise(mask, palette) for mask in (sample.mask, own, changed))]
        panels.append(_paint_changes(image, sample.mask, own, changed))
        for axes, panel in zip(axes_row, panels, strict=True):
            axes.imshow(panel, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        axes_row[0].set_title(for_figure(f"{name}: {sample.name}"), loc="left", fontsize=8)
    for axes, title in zip(grid[0][1:], columns[1:], strict=True):
        axes.set_title(title, fontsize=9)
    meanings = {"became wrong": _BECAME_WRONG, "became right": _BECAME_RIGHT, "stayed wrong, changed": _STAYED_WRONG}
    handles = [Patch(color="#{:02x}{:02x}{:02x}".format(*colour), label=label) for label, colour in meanings.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _paint_changes(
    image: NDArray[np.uint8], truth: NDArray[np.integer], own: NDArray[np.integer], changed: NDArray[np.integer]
) -> NDArray[np.uint8]:
    painted = np.repeat(image.mean(axis=2, keepdims=True) * 0.4 + 150, 3, axis=2)
    differs = (own != changed) & (truth != 255)
    painted[differs] = _STAYED_WRONG
    painted[differs & (changed == truth)] = _BECAME_RIGHT
    painted[differs & (own == truth)] = _BECAME_WRONG
    return painted.astype(np.uint8)


def _draw_maps(pictures: Pictures) -> Figure:
    """Draw a column for each image: the image, and the map of each block that has positions."""
    names = [name for name, values in pictures.maps[0][1].items() if np.size(values) > 1]
    shapes = [sample.mask.shape for sample, _ in pictures.maps]
    height = _PICTURE_WIDTH * max(rows / columns for rows, columns in shapes)
    figure = _figure(_PICTURE_WIDTH * len(pictures.maps), (height + 0.3) * (1 + len(names)))
    grid = figure.subplots(1 + len(names), len(pictures.maps), squeeze=False)
    for column, (sample, maps) in enumerate(pictures.maps):
        grid[0][column].imshow(sample.image.permute(1, 2, 0).numpy())
        grid[0][column].set_title(for_figure(sample.name), fontsize=7)
        for axes, name in zip(grid[1:, column], names, strict=True):
            # A scale for each map: the weights of one map often lie close together.
            axes.imshow(maps[name], cmap="viridis")
            axes.set_title(
                f"{for_figure(short_name(name))}: {maps[name].min():.2f} to {maps[name].max():.2f}", fontsize=7
            )
    for axes in grid.ravel():
        axes.set(xticks=[], yticks=[])
    return figure


def _draw_fields(report: Mapping[str, Any], pictures: Pictures) -> Figure:
    """Draw the share of the gradient within each distance, and the gradient of each pixel."""
    fields = pictures.fields
    figure = _figure(4.2 + 2.9 * len(fields), 3.2)
    widths = [1.4, *([1] * len(fields))]
    panels = np.ravel(figure.subplots(1, 1 + len(fields), width_ratios=widths))
    brightest = max(found.picture.max() for found in fields.values())
    for (name, found), axes, colour in zip(fields.items(), panels[1:], _COLOURS, strict=False):
        sides = 2 * np.arange(len(found.profile)) + 1
        panels[0].plot(sides, np.cumsum(found.profile), color=colour, label=name)
        axes.imshow(np.sqrt(found.picture / max(brightest, 1e-30)), cmap="magma", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_title(name, fontsize=9)
    panels[0].set(xlabel="side of the square, pixels", ylabel="share of the gradient", ylim=(0, 1.02))
    panels[0].legend(fontsize=8, frameon=False, loc="lower right")
    panels[0].spines[["top", "right"]].set_visible(False)
    return figure


def _draw_similarity(similarity: Mapping[str, float | None]) -> Figure:
    known = {stage: value for stage, value in similarity.items() if value is not None}
    figure = _figure(5.5, 0.28 * len(known) + 0.9)
    axes = figure.add_subplot()
    axes.barh(range(len(known)), list(known.values()), color=_COLOURS[0])
    axes.set_yticks(range(len(known)), list(known), fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="linear CKA")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _main_target(report: Mapping[str, Any]) -> str:
    """Return all blocks, or the only one."""
    targets = _targets(report)
    return ALL_BLOCKS if ALL_BLOCKS in targets else targets[0]
