"""Tables of a comparison: on the terminal, in Markdown, CSV and LaTeX.

Only a difference that is significant at 5 % after Holm's correction is bold. The best score is not: one of many numbers
is always the best.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import PurePosixPath
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ema_seg.comparison.schema import SIZES, SLOWED, Claim, Comparison, Contrast, Evidence, Row, Summary
from ema_seg.reporting.tables import format_number
from ema_seg.runtime.escaping import for_csv, for_latex, for_markdown, for_terminal, printable
from ema_seg.sweeps import setting_text

__all__ = [
    "SIGNIFICANT",
    "comparison_as_csv",
    "comparison_as_latex",
    "comparison_as_markdown",
    "evidence_cells",
    "points_text",
    "print_comparison",
    "probability_text",
    "verdict_text",
]

SIGNIFICANT = 0.05
"""Significance level of a difference, after Holm's correction."""

_SCORE_COLUMNS = 3
_COST_COLUMNS = ("images/s", "latency, ms", "memory, MiB", "parameters, M", "GMACs")
_COST_SCALES = {"images_per_second": 1.0, "latency": 1e3, "memory": 2**-20, "parameters": 1e-6, "gmacs": 1.0}
# Terminal width, in columns, from which scores and costs are shown side by side.
_WIDE = 140
_NOTHING = "–"
_MINUS = "\N{MINUS SIGN}"  # as wide as the plus sign


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print the scores and costs of each configuration, how to read them, and the notes.

    Args:
        comparison: result of ``compare_runs``.
        console: where to print, standard output by default; if it is narrow, the costs follow below the scores.
    """
    console = console or Console()
    columns = (*_score_columns(comparison), *_COST_COLUMNS)
    cells = [(*_score_cells(row), *_cost_cells(row)) for row in comparison["rows"]]
    narrow = [slice(_SCORE_COLUMNS), slice(_SCORE_COLUMNS, None)]
    parts = [slice(None)] if console.width >= _WIDE else narrow
    for part in parts:
        title = Text(for_terminal(_title(comparison))) if part is parts[0] else None
        table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("configuration", overflow="fold")
        for name in columns[part]:
            table.add_column(Text(for_terminal(name)), justify="right", overflow="fold")
        for row, texts in zip(comparison["rows"], cells, strict=True):
            bold = [index == 1 and _is_significant(row["contrast"]) for index in range(len(texts))]
            styled = [Text(text, style="bold" * strong) for text, strong in zip(texts, bold, strict=True)]
            table.add_row(Text(for_terminal(row["label"])), *styled[part])
        console.print(table)
    main = [key for key, measure in comparison["measures"].items() if measure["main"]]
    for keys in _in_tables(main, 2 if console.width < _WIDE else 4):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("configuration", overflow="fold")
        for key in keys:
            table.add_column(Text(_measure_name(comparison, key)), justify="right", overflow="fold")
        for row in comparison["rows"]:
            table.add_row(
                Text(for_terminal(row["label"])),
                *(Text(text, style="bold" * strong) for text, strong in _further_cells(comparison, row, keys)),
            )
        console.print(table)
    claims = [f"{claim['claim']} {verdict_text(claim)}" for claim in comparison["claims"]]
    for line in (*claims, _explain(comparison), *comparison["notes"]):
        console.print(Text(for_terminal(line)))


def comparison_as_markdown(comparison: Comparison, figures: Sequence[str] = ()) -> str:
    """Render a comparison as Markdown.

    Args:
        comparison: result of ``compare_runs``.
        figures: paths of the figures to show, relative to the Markdown file.
    """
    return "\n".join(_markdown_lines(comparison, figures)) + "\n"


def comparison_as_csv(comparison: Comparison) -> str:
    """Render a comparison as CSV: a line for each configuration, in fractions, seconds and bytes; unknown is empty."""
    output = StringIO()
    rows = [_flat_row(comparison, row) for row in comparison["rows"]]
    writer = csv.writer(output, lineterminator="\n")
    for cells in (list(rows[0]), *(list(row.values()) for row in rows)):
        writer.writerow(for_csv(cell) if isinstance(cell, str) else cell for cell in cells)
    return output.getvalue()


def comparison_as_latex(comparison: Comparison) -> str:
    """Render a comparison as a LaTeX table with the rules of the package ``booktabs``."""
    header = ("configuration", *_score_columns(comparison), *_COST_COLUMNS)
    lines = [
        "% \\usepackage{booktabs}",
        f"% {printable(_title(comparison))}",
        *(f"% {printable(text)}" for text in (_explain(comparison), *comparison["notes"])),
        f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
        "  \\toprule",
        f"  {' & '.join(map(for_latex, header))} \\\\",
        "  \\midrule",
    ]
    for row in comparison["rows"]:
        cells = [for_latex(text) for text in (row["label"], *_score_cells(row), *_cost_cells(row))]
        if _is_significant(row["contrast"]):
            cells[2] = f"\\textbf{{{cells[2]}}}"
        lines.append(f"  {' & '.join(cells)} \\\\")
    return "\n".join([*lines, "  \\bottomrule", "\\end{tabular}"]) + "\n"


def _markdown_lines(comparison: Comparison, figures: Sequence[str]) -> Iterator[str]:
    data, rows = comparison["data"], comparison["rows"]
    yield f"# {for_markdown(_title(comparison))}\n"
    told = f"{data['name']}, split {data['split']}, {data['images']} images. {_explain(comparison)}"
    yield f"{for_markdown(told)}\n"
    header = ("configuration", *_score_columns(comparison), *_COST_COLUMNS)
    lines = [(row["label"], *_score_cells(row), *_cost_cells(row)) for row in rows]
    bold = [[index == 2 and _is_significant(row["contrast"]) for index in range(len(header))] for row in rows]
    yield from _markdown_table(header, lines, bold=bold)
    batches = {row["cost_batch_size"] for row in rows if row["seeds"]}
    if len(batches) == 1 and None not in batches:
        yield f"\nImages/s, latency and memory: of a forward pass of a batch of {batches.pop()}."
    yield from _claims(comparison)
    if comparison["strata"]:
        groups = " and by group of classes" if comparison["strata"].keys() - set(SIZES) else ""
        yield f"\n## By the size of objects{groups}\n"
        yield for_markdown("; ".join(f"{name}: {meaning}" for name, meaning in comparison["strata"].items())) + ".\n"
        header_of_strata = ("configuration", *(f"{comparison['metric']}, {name}, %" for name in comparison["strata"]))
        yield from _markdown_table(
            header_of_strata,
            [(row["label"], *(_scored(row, part) for part in row["strata"].values())) for row in rows],
        )
    if comparison["measures"]:
        yield "\n## Further scores\n"
        yield "Each with its difference to the baseline; bold where p is below 0.05 after Holm's correction.\n"
        for keys in _in_tables(list(comparison["measures"]), 4):
            names = ("configuration", *(_measure_name(comparison, key) for key in keys))
            cells = [(row["label"], _further_cells(comparison, row, keys)) for row in rows]
            texts = [(label, *(text for text, _ in found)) for label, found in cells]
            strong = [[False, *(significant for _, significant in found)] for _, found in cells]
            yield from _markdown_table(names, texts, bold=strong)
            yield ""
    compared = [row for row in rows if row["contrast"]]
    if compared:
        yield "\n## By class\n"
        yield "Difference to the baseline in points of IoU, not corrected for the number of classes.\n"
        lines = [
            (name, *(_part_difference(row, row["classes"][name]["contrast"]) for row in compared))
            for name in comparison["classes"]
        ]
        yield from _markdown_table(("class", *(row["label"] for row in compared)), lines)
    unfinished = [
        (row["label"], "?" if job["seed"] is None else str(job["seed"]), job["state"], job["reason"] or "")
        for row in rows
        for job in row["jobs"]
        if job["state"] != "finished"
    ]
    if unfinished:
        yield "\n## Not finished\n"
        yield from _markdown_table(("configuration", "seed", "state", "reason"), unfinished)
    if comparison["notes"]:
        yield "\n## Notes\n"
        yield from (f"- {for_markdown(note)}" for note in comparison["notes"])
    if figures:
        yield "\n## Figures\n"
        yield "\n\n".join(f"![{for_markdown(PurePosixPath(path).stem.replace('_', ' '))}]({path})" for path in figures)
    yield "\n## Environment\n"
    environment = comparison["environment"]
    yield f"- devices: {for_markdown(', '.join(environment['devices']))}"
    yield f"- Python {for_markdown(', '.join(environment['python']))}"
    packages = (f"{name} {' and '.join(versions)}" for name, versions in environment["packages"].items())
    yield f"- packages: {for_markdown(', '.join(packages))}"
    if environment["commits"]:
        yield f"- commit: {for_markdown(', '.join(environment['commits']))}"


def _claims(comparison: Comparison) -> Iterator[str]:
    """Yield the claims of the sweep with their verdicts and evidence."""
    if not comparison["claims"]:
        return
    yield "\n## Claims\n"
    yield (
        "A difference is positive where it supports the claim. A claim is supported if all that decides it does, at "
        "p < 0.05 with Holm's correction; contradicted if one part contradicts it."
    )
    header = ("contrast", "quantity", "difference", "seeds", "p (Holm)", "verdict")
    for claim in comparison["claims"]:
        yield f"\n**{for_markdown(claim['claim'])}** {verdict_text(claim)}\n"
        rows = [evidence_cells(evidence) for evidence in claim["evidence"]]
        if rows:
            yield from _markdown_table(header, rows)
        if claim["missing"]:
            yield f"\nMissing: {for_markdown('; '.join(claim['missing']))}."


def verdict_text(claim: Claim) -> str:
    """Return the verdict of a claim in a sentence."""
    if claim["verdict"] != "undecided":
        return f"{claim['verdict'].capitalize()}."
    more = claim["seeds_more"]
    return "Undecided." if more is None else f"Undecided; about {more} more seed{'s' * (more > 1)} would decide it."


def evidence_cells(evidence: Evidence) -> list[str]:
    """Return the cells of a row: contrast, quantity, difference with its interval, seeds, p and verdict."""
    bounds = [evidence[key] for key in ("difference", "low", "high")]
    scale, digits = (1.0, 4) if not evidence["unit"] else (100.0, 2 if evidence["unit"] == "points" else 1)
    texts = [f"{scale * value:+.{digits}f}".replace("-", _MINUS) for value in bounds]
    unit = f" {evidence['unit']}" if evidence["unit"] else ""
    text = f"{texts[0]}{unit}" if evidence["exact"] else f"{texts[0]} [{texts[1]}, {texts[2]}]{unit}"
    p = evidence["p_holm"] if evidence["p_holm"] is not None else evidence["p"]
    known = "exact" if evidence["exact"] else _NOTHING if p is None else probability_text(p)
    verdict = evidence["verdict"] if evidence["decides"] else f"({evidence['verdict']})"
    return [evidence["contrast"], evidence["quantity"], text, str(evidence["n"]), known, verdict]


def _markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], bold: Sequence[Sequence[bool]] | None = None
) -> Iterator[str]:
    """Yield the lines of a table; ``bold`` says of each row's cells which are bold."""
    yield f"| {' | '.join(map(for_markdown, header))} |"
    yield f"| {' | '.join(['---', *['---:'] * (len(header) - 1)])} |"
    for cells, strong in zip(rows, bold or [[False] * len(header)] * len(rows), strict=True):
        marked = zip(cells, strong, strict=True)
        texts = [f"**{for_markdown(cell)}**" if emphasised else for_markdown(cell) for cell, emphasised in marked]
        yield f"| {' | '.join(texts)} |"


def _title(comparison: Comparison) -> str:
    return f"{comparison['title']}: {len(comparison['rows'])} configurations on {comparison['data']['name']}"


def _explain(comparison: Comparison) -> str:
    """Explain how to read the numbers of the main table."""
    if comparison["baseline"] is None or not any(row["contrast"] for row in comparison["rows"]):
        return "Scores: mean ± standard deviation over seeds."
    baseline = ", ".join(f"{key}={value}" for key, value in comparison["baseline"].items())
    bootstrap = comparison["bootstrap"]
    return (
        f"Scores: mean ± standard deviation over seeds. Differences: to {baseline} with the same seeds and else the "
        f"same settings, with the {100 * bootstrap['confidence']:g} % interval over seeds and images "
        f"({bootstrap['replicates']:,} replicates); bold where p is below {SIGNIFICANT:g} after Holm's correction."
    )


def _score_columns(comparison: Comparison) -> tuple[str, str, str]:
    return f"{comparison['metric']}, % (seeds)", "difference, points", "p (Holm)"


def _score_cells(row: Row) -> tuple[str, str, str]:
    # A seed that was run twice counts once.
    planned, finished = len({job["seed"] for job in row["jobs"]}), row["score"]["n"]
    seeds = str(finished) if finished == planned else f"{finished} of {planned}"
    contrast = row["contrast"]
    p = probability_text(contrast and contrast["p_holm"])
    difference = "baseline" if row["baseline"] else _difference(contrast)
    return f"{_mean_and_sd(row['score'])} ({seeds})", difference, p


def _cost_cells(row: Row) -> list[str]:
    means = {name: row["cost"][name]["mean"] for name in _COST_SCALES}
    texts = {
        name: _NOTHING if mean is None else format_number(mean * _COST_SCALES[name]) for name, mean in means.items()
    }
    if row["slowed"]:
        texts |= {name: f"{texts[name]} {SLOWED}" for name in ("images_per_second", "latency")}
    return list(texts.values())


def _scored(row: Row, part: Mapping[str, Any]) -> str:
    text = _mean_and_sd(part["score"])
    return f"{text}, {_part_difference(row, part['contrast'])}" if part["contrast"] else text


def _in_tables(keys: Sequence[str], columns: int) -> list[Sequence[str]]:
    """Divide the keys of measures among tables with so many columns."""
    return [keys[first : first + columns] for first in range(0, len(keys), columns)]


def _measure_name(comparison: Comparison, key: str) -> str:
    measure = comparison["measures"][key]
    return f"{measure['label']}, %" if measure["percent"] else measure["label"]


def _further_cells(comparison: Comparison, row: Row, keys: Sequence[str]) -> list[tuple[str, bool]]:
    """Return the text of each measure with its difference, and whether that is significant."""
    cells = []
    for key in keys:
        part, factor = row["further"].get(key), 1.0 if comparison["measures"][key]["percent"] else 0.01
        if part is None or part["score"]["mean"] is None:
            cells.append((_NOTHING, False))
            continue
        digits, (summary, contrast) = 2 if factor == 1 else 4, (part["score"], part["contrast"])
        score = points_text(factor * summary["mean"], digits=digits)
        if summary["sd"] is not None:
            score += f" ± {points_text(factor * summary['sd'], digits=digits)}"
        if contrast:
            low, high = (points_text(factor * contrast[end], digits=digits) for end in ("low", "high"))
            score += f", {points_text(factor * contrast['difference'], digits=digits, signed=True)} [{low}, {high}]"
        cells.append((score, _is_significant(contrast)))
    return cells


def _mean_and_sd(summary: Summary) -> str:
    if summary["mean"] is None:
        return _NOTHING
    mean = f"{100 * summary['mean']:.2f}"
    return mean if summary["sd"] is None else f"{mean} ± {100 * summary['sd']:.2f}"


def _difference(contrast: Contrast | None) -> str:
    if contrast is None:
        return _NOTHING
    difference = points_text(contrast["difference"], signed=True)
    return f"{difference} [{points_text(contrast['low'])}, {points_text(contrast['high'])}]"


def _part_difference(row: Row, contrast: Contrast | None) -> str:
    """Format the difference in a class or stratum, with its number of seeds if that is not the whole row's."""
    text = _difference(contrast)
    whole = row["contrast"]
    return text if contrast is None or whole is None or contrast["n"] == whole["n"] else f"{text} (n={contrast['n']})"


def points_text(fraction: float, *, digits: int = 2, signed: bool = False) -> str:
    """Format a fraction in percentage points, with a true minus sign, and no sign if it rounds to zero."""
    text = f"{100 * fraction:{'+' if signed else '-'}.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", _MINUS)


def probability_text(p: float | None) -> str:
    """Format a p-value for tables and figures; None is a dash."""
    return _NOTHING if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _is_significant(contrast: Contrast | None) -> bool:
    return contrast is not None and contrast["p_holm"] is not None and contrast["p_holm"] < SIGNIFICANT


def _flat_row(comparison: Comparison, row: Row) -> dict[str, Any]:
    flat: dict[str, Any] = {"label": row["label"]}
    flat |= {key: None if value is None else setting_text(value) for key, value in row["settings"].items()}
    flat |= {"jobs": len(row["jobs"]), "seeds": " ".join(map(str, row["seeds"]))}
    score = "miou" if comparison["metric"] == "mIoU" else "score"
    flat |= _flat_score(score, row["score"], row["contrast"], ("p",))
    flat["p_holm"] = row["contrast"] and row["contrast"]["p_holm"]
    flat["cost_batch_size"] = row["cost_batch_size"]
    flat |= {name: row["cost"][name]["mean"] for name in _COST_SCALES}
    for kind, prefix in (("strata", "miou_"), ("classes", "iou_")):
        for name in comparison[kind]:  # type: ignore[literal-required]
            part = row[kind][name]  # type: ignore[literal-required]
            flat |= _flat_score(f"{prefix}{name}", part["score"], part["contrast"])
    for key in comparison["measures"]:
        part = row["further"].get(key) or {"score": {"mean": None, "sd": None}, "contrast": None}
        flat |= _flat_score(key, part["score"], part["contrast"], ("p", "p_holm"))
    return flat


def _flat_score(name: str, score: Summary, contrast: Contrast | None, corrected: Sequence[str] = ()) -> dict[str, Any]:
    # No p for classes and strata: it would have to be corrected for their number.
    keys = ("difference", "low", "high", "n", "covers", *corrected)
    return {name: score["mean"], f"{name}_sd": score["sd"]} | {
        f"{name}_{key}": contrast and contrast[key]  # type: ignore[literal-required]
        for key in keys
    }
