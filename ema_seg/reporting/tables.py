"""Tables of a report: on the terminal and in Markdown."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ema_seg.runtime.escaping import for_markdown, for_markdown_code, for_terminal

__all__ = [
    "describe_model",
    "describe_protocol",
    "format_number",
    "mean_of_known",
    "print_report",
    "render_markdown",
    "render_sections",
]

_SCORES = {
    "miou": "mIoU",
    "mean_accuracy": "mean accuracy",
    "pixel_accuracy": "pixel accuracy",
    "fw_iou": "frequency-weighted IoU",
}
_FIGURES = {
    "confusion_matrix": "Confusion matrix",
    "per_class_iou": "IoU of each class",
    "trimap": "mIoU by the distance to a boundary",
    "reliability": "Accuracy by confidence",
    "corruptions": "mIoU of corrupted images",
    "panel": "The images with the best, the median and the worst mIoU",
}

Row = tuple[str, str]


def print_report(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a report as one table: the scores beside the cost, then the IoU of each class.

    Args:
        report: result of ``build_report`` or ``load_report``.
        console: where to print; standard output by default, 80 columns wide if it is not a terminal.
    """
    table = Table(
        title=_text(describe_model(report)),
        caption=_text("\n".join(_captions(report))),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in ("score", "cost"):
        table.add_column(name, overflow="fold")
        table.add_column("", justify="right", overflow="fold")
    _add_rows(table, _score_rows(report), _cost_rows(report))
    table.add_section()
    table.add_row(Text("IoU of each class", style="bold"))
    rows = _class_rows(report)
    half = (len(rows) + 1) // 2
    _add_rows(table, rows[:half], rows[half:])
    (console or Console()).print(table)


def render_markdown(report: Mapping[str, Any], figures: Sequence[str] = ()) -> str:
    """Render a report as Markdown.

    Args:
        report: result of ``build_report`` or ``load_report``.
        figures: names of the figures in ``figures/`` beside the Markdown file.
    """
    return "\n".join(_markdown_lines(report, figures)) + "\n"


def render_sections(report: Mapping[str, Any]) -> dict[str, str]:
    """Render scores and costs of a report as Markdown by title, without paths and names of runs.

    Args:
        report: result of ``build_report`` or ``load_report``.
    """
    data, environment = report["data"], report["environment"]
    protocol = describe_protocol(report.get("protocol"))
    of_data = f"Measured on {data['images']} images of {data['name']}, split {data['split']}"
    of_data += f", with {protocol}." if protocol else "."
    classes = [
        *_markdown_table(("score", ""), _score_rows(report)),
        "",
        *_markdown_table(("class", "IoU"), _class_rows(report)),
    ]
    if report["absent_classes"]:
        classes += ["", for_markdown(_absent_sentence(report))]
    packages = environment["packages"]
    machine = (
        f"{environment['threads']} CPU threads; ema-seg {packages['ema-seg']}, torch {packages['torch']}, Python "
        f"{environment['python']}."
    )
    cost = [*_markdown_table(("cost", ""), _cost_rows(report)), "", for_markdown(f"{_cost_sentence(report)} {machine}")]
    return {"Scores": "\n".join([for_markdown(of_data), "", *classes]), "Cost": "\n".join(cost)}


def describe_model(report: Mapping[str, Any]) -> str:
    """Describe model, attention block and data in a few words: the title of every table and figure."""
    model, attention, data = report["model"], report["attention"], report["data"]
    return f"{model['decoder']} / {model['encoder']} / {attention['name']} on {data['name']} {data['split']}"


def describe_protocol(protocol: Mapping[str, Any] | None) -> str:
    """Describe how images were predicted, in a few words; empty if whole, once, at their own size."""
    parts = []
    if protocol and protocol["window"]:
        sizes = [" x ".join(map(str, protocol[key])) for key in ("window", "window_stride")]
        parts.append(f"windows of {sizes[0]} every {sizes[1]} pixels")
    if protocol and list(protocol["scales"]) != [1]:
        parts.append(f"scales {', '.join(f'{scale:g}' for scale in protocol['scales'])}")
    if protocol and protocol["flip"]:
        parts.append("flipped, too")
    return "; ".join(parts)


def format_number(value: float) -> str:
    """Format a number with three significant digits or more, without an exponent."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(digits, 0)}f}"


def _add_rows(table: Table, left: Sequence[Row], right: Sequence[Row]) -> None:
    for cells in zip_longest(left, right, fillvalue=("", "")):
        # As ``Text``: rich would take brackets in the name of a class for markup.
        table.add_row(*(_text(cell) for pair in cells for cell in pair))


def _text(cell: str) -> Text:
    return Text(for_terminal(cell))


def _markdown_lines(report: Mapping[str, Any], figures: Sequence[str]) -> Iterator[str]:
    yield f"# {for_markdown(describe_model(report))}\n"
    yield from (f"- {label}: {for_markdown(value)}" for label, value in _origin_rows(report))
    yield "\n## Scores\n"
    yield from _markdown_table(("score", ""), _score_rows(report))
    if protocol := describe_protocol(report.get("protocol")):
        yield f"\nScored with {protocol}."
    if report["absent_classes"]:
        yield f"\n{for_markdown(_absent_sentence(report))}"
    yield "\n## Cost\n"
    yield from _markdown_table(("cost", ""), _cost_rows(report))
    yield f"\n{for_markdown(_cost_sentence(report))}"
    yield "\n## Classes\n"
    yield from _markdown_table(("class", "IoU"), _class_rows(report))
    if figures:
        yield "\n## Figures\n"
        yield "\n\n".join(f"![{_FIGURES[name]}](figures/{name}.png)" for name in figures)
    yield "\n## Environment\n"
    yield from (f"- {label}: {for_markdown(value)}" for label, value in _environment_rows(report["environment"]))
    yield f"- command: {for_markdown_code(' '.join(report['environment']['command']))}"


def _markdown_table(header: Row, rows: Sequence[Row]) -> Iterator[str]:
    yield "| {} | {} |".format(*header)
    yield "|---|---:|"
    yield from ("| {} | {} |".format(*map(for_markdown, row)) for row in rows)


def _score_rows(report: Mapping[str, Any]) -> list[Row]:
    rows = [(label, _percent(report[key])) for key, label in _SCORES.items()]
    skipped = report["data"].get("skipped", {})  # missing in reports of earlier versions
    scored = len(report["classes"]) - len(report["absent_classes"])
    return [
        *rows,
        ("classes scored", f"{scored} of {len(report['classes'])}"),
        ("images", str(report["data"]["images"])),
        *((f"unreadable in {split}, skipped", str(len(names))) for split, names in skipped.items() if names),
        *((f"mIoU, {name} objects", _percent(miou)) for name, miou in report["size_miou"].items()),
        *_boundary_rows(report),
        *_calibration_rows(report),
        *_corruption_rows(report),
    ]


def _boundary_rows(report: Mapping[str, Any]) -> list[Row]:
    """Return the scores near boundaries, if they were counted."""
    if "boundary_miou" not in report:
        return []
    trimap = zip(*report["trimap"].values(), strict=True)
    return [
        ("boundary mIoU", _percent(report["boundary_miou"])),
        *((f"mIoU up to {distance} px from a boundary", _percent(miou)) for distance, miou in trimap),
    ]


def _calibration_rows(report: Mapping[str, Any]) -> list[Row]:
    """Return the scores of the probabilities, if they were counted."""
    if "ece" not in report:
        return []
    return [
        ("expected calibration error", _percent(report["ece"])),
        ("negative log-likelihood", _number(report["nll"])),
        ("Brier score", _number(report["brier"])),
    ]


def _corruption_rows(report: Mapping[str, Any]) -> list[Row]:
    """Return the scores of corrupted images, if they were predicted."""
    if "corruptions" not in report:
        return []
    kinds = report["corruptions"].items()
    return [
        ("mIoU, corrupted", _percent(report["corrupted_miou"])),
        ("lost by corruption", _percent(report["corruption_drop"])),
        *((f"mIoU, {kind}", _percent(mean_of_known(found["miou"]))) for kind, found in kinds),
    ]


def _cost_rows(report: Mapping[str, Any]) -> list[Row]:
    throughput = report["throughput"]
    rows = [
        ("parameters", f"{report['parameters']['total']:,}"),
        ("GMACs per image", format_number(report["gmacs"])),
    ]
    for entry in throughput["forward"]:
        batch = f"batch {entry['batch_size']}"
        latency = entry["latency"]
        rows += [
            (f"images/s, {batch}", format_number(entry["images_per_second"])),
            (f"latency, {batch}", f"{format_number(1e3 * latency['median'])} ms"),
            (f"latency p95, {batch}", f"{format_number(1e3 * latency['p95'])} ms"),
        ]
        if entry["peak_memory"] is not None:  # of an exported model it is unknown
            rows.append((f"peak memory, {batch}", f"{entry['peak_memory'] / 2**20:.1f} MiB"))
    if throughput["end_to_end"]:
        rows.append(("images/s, end to end", format_number(throughput["end_to_end"]["images_per_second"])))
    return rows


def _class_rows(report: Mapping[str, Any]) -> list[Row]:
    """Return each class with its IoU, or "absent" if it is in neither truth nor prediction."""
    pairs = zip(report["classes"], report["iou"], strict=True)
    return [(name, "absent" if iou is None else _percent(iou)) for name, iou in pairs]


def _origin_rows(report: Mapping[str, Any]) -> list[Row]:
    data = report["data"]
    rows = [
        ("run", report["run"]),
        ("checkpoint", report["checkpoint"]),
        ("data", f"{data['name']}, split {data['split']}, {data['images']} images from {data['root']}"),
        ("created", report["created"]),
    ]
    return [(label, value) for label, value in rows if value]


def _environment_rows(environment: Mapping[str, Any]) -> list[Row]:
    git = environment["git"]
    packages = [f"{name} {version}" for name, version in environment["packages"].items() if version]
    processes = f" in each of {environment['processes']} processes" if environment.get("processes", 1) > 1 else ""
    rows = [
        ("device", f"{environment['device']['name']}, {environment['threads']} CPU threads{processes}"),
        ("CUDA", environment["cuda"] and f"{environment['cuda']}, cuDNN {environment['cudnn']}"),
        ("system", f"{environment['os']}, Python {environment['python']}"),
        ("packages", ", ".join(packages)),
        ("commit", git and git["commit"] + (" with changes" if git["dirty"] else "")),
    ]
    return [(label, value) for label, value in rows if value]


def _captions(report: Mapping[str, Any]) -> Iterator[str]:
    environment = report["environment"]
    packages = environment["packages"]
    if protocol := describe_protocol(report.get("protocol")):
        yield f"Scored with {protocol}."
    yield _cost_sentence(report)
    yield f"ema-seg {packages['ema-seg']}, torch {packages['torch']}, Python {environment['python']}"
    if report["absent_classes"]:
        yield _absent_sentence(report)


def _cost_sentence(report: Mapping[str, Any]) -> str:
    throughput = report["throughput"]
    height, width = throughput["size"]
    sentence = (
        f"Measured at {height} x {width} in {throughput['precision']}, {throughput['memory_format']} layout, "
        f"on {throughput['device']}."
    )
    if capped := throughput.get("capped_batch_size"):
        sentence += f" No batch of the split has {capped} images: the largest was measured."
    if entire := throughput["end_to_end"]:
        sentence += (
            f" End to end is from the files to the scores: batch {entire['batch_size']}, "
            f"{entire['workers']} workers, {entire['images']} images"
        )
        devices = entire.get("devices", 1)
        sentence += f", on {devices} devices together; all else is of one." if devices > 1 else "."
    return sentence


def _absent_sentence(report: Mapping[str, Any]) -> str:
    return f"In neither truth nor prediction, left out of the mean: {', '.join(report['absent_classes'])}."


def mean_of_known(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def _percent(fraction: float | None) -> str:
    return "undefined" if fraction is None else f"{100 * fraction:.2f}%"
