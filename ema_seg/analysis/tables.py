"""Markdown of an analysis."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ema_seg.analysis.effects import MEASURES, is_decided
from ema_seg.analysis.schema import INTERVENTIONS
from ema_seg.reporting.tables import describe_model
from ema_seg.runtime.escaping import for_markdown, for_markdown_code

__all__ = ["FIGURES", "format_difference", "render_markdown", "short_name"]

FIGURES = {
    "interventions": "Difference of the mIoU with each intervention, with 95 % intervals over images; scales differ",
    "classes": "Difference of the IoU of each class",
    "examples": "For each intervention the image where it matters most",
    "weight_maps": "Weight maps of the blocks: the mean over their groups",
    "weights_by_class": "Mean weight in each class, near boundaries and on small objects, compared with all pixels",
    "receptive_field": "Effective receptive field",
    "similarity": "Similarity of the features to those of the twin, stage by stage",
}
"""Captions of the figures by name."""

# Below it a standard deviation of a softmax is rounding.
_CONSTANT = 1e-5

Row = Sequence[str]


def render_markdown(report: Mapping[str, Any], figures: Sequence[str] = ()) -> str:
    """Render an analysis as Markdown.

    Args:
        report: the content of ``analysis.json``.
        figures: names of the figures in ``figures/`` beside the Markdown file.
    """
    return "\n".join(_lines(report, figures)) + "\n"


def format_difference(difference: Mapping[str, float] | None) -> str:
    """Format a difference in points with its interval; bold if the interval excludes zero."""
    if difference is None:
        return "–"
    text = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(100 * difference[key] for key in ("difference", "low", "high")))
    return f"**{text}**" if is_decided(difference) else text


def short_name(block: str) -> str:
    """Shorten the name of a block for a table or a figure."""
    return block.replace("segmentation_head", "head").removesuffix(".attention").replace(".attention.", ".")


def _lines(report: Mapping[str, Any], figures: Sequence[str]) -> Iterator[str]:
    def figure(name: str) -> Iterator[str]:
        if name in figures:
            yield f"\n![{FIGURES[name]}](figures/{name}.png)\n\n*{FIGURES[name]}.*"

    data, scores = report["data"], report["scores"]
    yield f"# What the attention does: {for_markdown(describe_model(report))}\n"
    yield (
        f"The trained model of {for_markdown_code(str(report['run'] or report['checkpoint']))}, analysed on "
        f"{data['images']} images of {for_markdown(data['name'])}, split {for_markdown(data['split'])}. Nothing was "
        "trained. All intervals are of 95 % and over images: they say how another sample of images would change the "
        "number, not how another training would."
    )
    yield "\n## Interventions\n"
    yield (
        "A block is changed, and all else stays as trained. The signal of a block is its weights, or what it adds to "
        "its input.\n"
    )
    yield from (f"- *{name}*: {meaning}" for name, meaning in INTERVENTIONS.items())
    yield (
        "\nDifferences to the model itself are in points; bold: the interval excludes zero. An intervention shows what "
        "the trained model relies on. A model that is trained without the block learns to do without it, as a twin "
        "shows. *Off* changes the scale of the features, too, which the other interventions keep."
    )
    header = ["block", "intervention", *MEASURES.values(), "pixels changed"]
    own = ["*none*", "", *(_percent(scores[key]) for key in MEASURES), ""]
    rows = [own, *(_intervention_row(row) for row in report["interventions"])]
    if twin := report["twin"]:
        rows.append(["*twin*", "trained without", *map(format_difference, twin["differences"].values()), ""])
    yield ""
    yield from _table(header, rows, texts=2)
    for name in ("interventions", "classes", "examples"):
        yield from figure(name)

    yield "\n## The maps\n"
    yield (
        "Spread is the mean standard deviation of the weights: over the positions of an image, over the images at one "
        "position, and over the groups of channels at one position."
    )
    if not all(block["multiplies"] for block in report["blocks"]):
        yield "The map of a block that adds is the root mean square over the channels of what it adds."
    yield ""
    header = ["block", "groups", "size", "mean", "from", "to", "over positions", "over images", "over groups"]
    yield from _table(header, [_block_row(block) for block in report["blocks"]], texts=1)
    yield from figure("weight_maps")
    regions = _region_rows(report)
    if len(regions) > 1:
        yield "\nMean weight less that of all labelled pixels, times 100:\n"
        yield from _table(regions[0], regions[1:], texts=1)
        yield from figure("weights_by_class")
    yield from _agreement(report)
    yield from _channel_weights(report["blocks"])

    field = report["receptive_field"]
    yield "\n## Receptive field\n"
    yield (
        f"Square around the centre that holds 50 % and 95 % of the gradient of the centre's logits, over "
        f"{field['images']} images; the first has {' x '.join(map(str, field['size']))} pixels.\n"
    )
    rows = [
        [
            name,
            *(f"{model['side'][share]} px, {_percent(model['area'][share])} of the image" for share in ("0.5", "0.95")),
        ]
        for name, model in field["models"].items()
    ]
    yield from _table(["model", "50 %", "95 %"], rows, texts=1)
    yield from figure("receptive_field")

    if twin:
        yield "\n## Similarity to the twin\n"
        yield (
            f"Linear CKA of the features with those of {for_markdown_code(twin['checkpoint'])}, over the positions of "
            "all images: 1 for the same features up to rotation and scale.\n"
        )
        pairs = [[stage, "–" if value is None else f"{value:.3f}"] for stage, value in twin["similarity"].items()]
        yield from _table(["stage", "CKA"], pairs, texts=1)
        yield from figure("similarity")

    environment = report["environment"]
    packages = environment["packages"]
    yield "\n## Origin\n"
    yield f"- checkpoint: {for_markdown_code(report['checkpoint'])}"
    yield f"- command: {for_markdown_code(' '.join(environment['command']))}"
    yield (
        f"- device: {for_markdown(environment['device']['name'])}, {environment['threads']} CPU threads; ema-seg "
        f"{packages['ema-seg']}, torch {packages['torch']}, Python {environment['python']}"
    )


def _intervention_row(row: Mapping[str, Any]) -> Row:
    differences = map(format_difference, row["differences"].values())
    return [short_name(row["block"]), row["intervention"], *differences, _percent(row["changed"])]


def _block_row(block: Mapping[str, Any]) -> Row:
    numbers = [block[key] for key in ("mean", "min", "max")]
    spread = [block["spread"][key] for key in ("positions", "images", "groups")]
    size = " x ".join(map(str, block["size"]))
    return [short_name(block["name"]), str(block["groups"]), size, *(f"{value:.4f}" for value in [*numbers, *spread])]


def _region_rows(report: Mapping[str, Any]) -> list[Row]:
    """Return a header with the blocks that have positions, then a row for each region that has pixels."""
    blocks = [block for block in report["blocks"] if block["classes"]]
    if not blocks:
        return []
    names = [*report["classes"], *blocks[0]["regions"]]
    columns = [[*block["classes"], *block["regions"].values()] for block in blocks]
    rows = [
        [name, *(format_difference(column[place]) for column in columns)]
        for place, name in enumerate(names)
        if any(column[place] for column in columns)
    ]
    return [["", *(short_name(block["name"]) for block in blocks)], *rows]


def _agreement(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the correlations of the maps, if there are any."""
    names = [block["name"] for block in report["blocks"] if block["classes"]]
    places = [place for place, block in enumerate(report["blocks"]) if block["classes"]]
    if len(names) < 2:
        return
    yield "\nAgreement: correlation of the maps of two blocks, the mean over images.\n"
    rows = []
    for name, row in zip(names, places, strict=True):
        values = [report["agreement"][row][column] for column in places]
        rows.append([short_name(name), *("–" if value is None else f"{value:+.2f}" for value in values)])
    yield from _table(["", *map(short_name, names)], rows, texts=1)


def _channel_weights(blocks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield how much EMA's channel weights vary over images, if there are any."""
    known = [block for block in blocks if block["channel_weights"]]
    if not known:
        return
    yield (
        "\nEMA's cross-spatial learning weighs the channels of each branch by a softmax of the other. Standard "
        "deviation of those weights over images:\n"
    )
    rows = [
        [short_name(block["name"]), *(f"{block['channel_weights'][key]:.1e}" for key in ("pointwise", "spatial"))]
        for block in known
    ]
    yield from _table(["block", "of the 1×1 branch", "of the 3×3 branch"], rows, texts=1)
    if all(block["channel_weights"]["pointwise"] < _CONSTANT for block in known):
        yield (
            "\nThe 1×1 branch gives the same weights for every image: it is averaged right after its normalisation, "
            "and that average is the bias of the normalisation."
        )


def _table(header: Row, rows: Sequence[Row], texts: int) -> Iterator[str]:
    """Yield a table whose first columns, ``texts`` many, are left-aligned."""
    yield "| {} |".format(" | ".join(map(for_markdown, header)))
    yield "|{}|".format("|".join(["---"] * texts + ["---:"] * (len(header) - texts)))
    for row in rows:
        yield "| {} |".format(" | ".join(_cell(cell) for cell in row))


def _cell(text: str) -> str:
    """Escape a cell that is not our own markup."""
    return text if text.startswith("*") else for_markdown(text)


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.2f}%"
