"""Machine-readable result of an evaluation, from which every table and figure is drawn.

``report.json`` is strict JSON: an undefined number (the IoU of an absent class) is null. Fractions are in
[0, 1], times in seconds, memory in bytes.

==================  ==================================================================================
``schema``          ``"ema-seg.report/2"``
``created``         time of writing, ISO 8601 in UTC
``run``             name of the run or its directory, or null
``checkpoint``      path of the checkpoint, or null
``seed``            the seed of the training, or null
``config``          the run's whole resolved configuration, as in its checkpoint
``job``             ``identity``, ``overrides`` (text by key) and, if the sweep itself wrote the report, its
                    ``launcher``; null for a run outside a sweep
``data``            ``name``, ``root``, ``split``, ``images`` (how many), ``skipped`` (by split, the names of those
                    that could not be read, in the training or here)
``model``           ``decoder``, ``encoder`` and the model's other settings
``attention``       ``name`` and the attention block's other settings
``protocol``        how images were predicted: ``window``, ``window_stride`` (height and width, or null), ``scales``,
                    ``flip``; null if whole, once, at their own size
``classes``         the K names
``palette``         K colours, [red, green, blue] from 0 to 255
``confusion_matrix``  K x K pixel counts, a row for each true class
``miou`` ...        ``iou`` (K values), ``mean_accuracy``, ``pixel_accuracy``, ``fw_iou``: see
                    ``ema_seg.evaluation.ConfusionMatrix.compute``
``absent_classes``  names of the classes in neither truth nor prediction, which the mean leaves out
``strata``          meaning of each stratum of object sizes, by its name: see ``ema_seg.evaluation.strata``
``size_iou``        by stratum, the IoU of each class
``size_miou``       by stratum, the mean IoU of the classes that the stratum has
``boundary_miou``   with ``evaluation.boundary=true`` alone: mean of ``boundary_iou`` (K values), the boundary IoU of
                    each class, see ``ema_seg.evaluation.boundary``
``trimap``          with it, too: ``miou`` of the pixels up to each of ``distances`` (pixels) from a true boundary
``ece``, ``nll``, ``brier``, ``reliability``  with ``evaluation.calibration=true`` alone: see
                    ``ema_seg.evaluation.calibration``; ``reliability`` has ``pixels``, mean ``confidence`` and
                    ``accuracy`` by bin of confidence
``corrupted_miou``, ``corruption_drop``, ``corruptions``  with ``evaluation.corruptions`` alone: see
                    ``ema_seg.evaluation.robustness.score_corruptions``
``parameters``      ``total``, ``trainable``
``gmacs``           10^9 multiply-accumulate operations for one image
``throughput``      speed and memory: see ``ema_seg.evaluation.measure_cost``; ``capped_batch_size`` is the requested
                    batch size, present if the split has fewer images and a smaller batch was measured
``environment``     see ``ema_seg.evaluation.describe_environment``
``curves``          columns of the run's ``metrics.csv`` by name, each epoch's value or null; null without that file
``images``          for each image ``name``, ``miou``, ``pixel_accuracy``, ``intersection``, ``union`` (K counts),
                    ``strata`` (by stratum ``intersection``, ``union``), ``boundary``, ``calibration`` and
                    ``corruptions`` if they were counted, and ``prediction``: the path of its predicted mask, a PNG of
                    class ids, relative to ``report.json``; null where none was kept
==================  ==================================================================================
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ema_seg.reporting.tables import describe_model, render_markdown
from ema_seg.runtime.errors import DataError
from ema_seg.runtime.files import Manifest, write_file
from ema_seg.runtime.texts import read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ema_seg.evaluation import Cost, Evaluation, Example

__all__ = [
    "FILES",
    "PANEL",
    "SCHEMA",
    "build_report",
    "load_report",
    "replace_figures",
    "report_manifest",
    "write_report",
]

SCHEMA = "ema-seg.report/2"
PANEL = "figures/panel.png"
_FIGURES = ("confusion_matrix", "per_class_iou", "trimap", "reliability", "corruptions", "panel")
FILES = ("report.json", "report.md", *(f"figures/{name}.png" for name in _FIGURES))
"""Files of a report's folder besides ``predictions/`` and the manifest; without a score there is no figure of it."""


def build_report(
    evaluation: "Evaluation",
    cost: "Cost",
    *,
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    data: Mapping[str, Any],
    model: Mapping[str, Any],
    attention: Mapping[str, Any],
    environment: Mapping[str, Any],
    config: Mapping[str, Any],
    protocol: Mapping[str, Any] | None = None,
    run: str | None = None,
    checkpoint: str | Path | None = None,
    job: Mapping[str, Any] | None = None,
    curves: Mapping[str, Sequence[float | None]] | None = None,
    predictions: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Assemble the report of one model on one split.

    Args:
        evaluation: the scores.
        cost: cost of the same model, measured in the same process.
        classes: names of the K classes.
        palette: their colours.
        data: ``name``, ``root``, ``split`` and ``skipped``.
        model: ``decoder``, ``encoder`` and further settings.
        attention: ``name`` and further settings.
        environment: versions, device, code and command line.
        config: the run's whole resolved configuration; its ``seed`` is the report's.
        protocol: settings of ``PredictionProtocol``; None for the plain one.
        run: name of the run or its directory.
        checkpoint: file of the weights.
        job: ``identity`` and ``overrides`` of a run inside a sweep.
        curves: the columns of the run's ``metrics.csv``.
        predictions: path of each image's predicted mask, relative to the report's folder.

    Returns:
        The content of ``report.json``, of plain values only; see this module's docstring for its keys.
    """
    # Imports torch, which reading a report does not need.
    from ema_seg.evaluation.boundary import score_boundaries
    from ema_seg.evaluation.calibration import score_calibration
    from ema_seg.evaluation.robustness import score_corruptions
    from ema_seg.evaluation.strata import STRATA, score_strata

    confusion, images = evaluation.confusion, evaluation.images
    size_iou = score_strata([image["strata"] for image in images], len(classes))
    kept = [None] * len(images) if predictions is None else predictions
    scores = confusion.compute()
    further: dict[str, Any] = {}
    if images and "boundary" in images[0]:
        further |= score_boundaries([image["boundary"] for image in images])
    if images and "calibration" in images[0]:
        further |= score_calibration([image["calibration"] for image in images])
    if images and "corruptions" in images[0]:
        further |= score_corruptions([image["corruptions"] for image in images], len(classes), scores["miou"])
    report = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": run,
        "checkpoint": checkpoint,
        "seed": config.get("seed"),
        "config": config,
        "job": job,
        "data": {**data, "images": len(images)},
        "model": model,
        "attention": attention,
        "protocol": protocol,
        "classes": classes,
        "palette": palette,
        "confusion_matrix": confusion.matrix.tolist(),
        **scores,
        "absent_classes": [classes[index] for index in confusion.absent],
        "strata": STRATA,
        "size_iou": size_iou,
        "size_miou": {name: _mean(values) for name, values in size_iou.items()},
        **further,
        **cost,
        "environment": environment,
        "curves": curves,
        "images": [{**image, "prediction": path} for image, path in zip(images, kept, strict=True)],
    }
    return _plain(report)


def write_report(report: Mapping[str, Any], directory: str | Path, panel: "Sequence[Example]" = ()) -> Path:
    """Write ``report.json``, ``report.md`` and ``figures/*.png``; each file appears whole or not at all.

    Args:
        report: result of ``build_report`` or ``load_report``.
        directory: created if missing; an earlier report in it is replaced, but no other file.
        panel: images of the panel, see ``ema_seg.evaluation.predict_examples``; without images there is no panel.

    Returns:
        The path of ``report.json``, which is written last.

    Raises:
        DataError: a file cannot be written, or would replace one that no report has written.
    """
    # Imports Matplotlib, which reading a hundred reports does not need.
    from ema_seg.reporting import figures as draw

    directory = Path(directory)
    figures = {"confusion_matrix": draw.draw_confusion_matrix(report), "per_class_iou": draw.draw_class_iou(report)}
    for name, draw_scores in {
        "trimap": draw.draw_trimap,
        "reliability": draw.draw_reliability,
        "corruptions": draw.draw_corruptions,
    }.items():
        if name in report:
            figures[name] = draw_scores(report)
    if panel:
        figures["panel"] = draw.draw_samples(panel, report["classes"], report["palette"], describe_model(report))
    replace_figures(report_manifest(directory), FILES, figures, dpi=150)
    write_file(directory / "report.md", render_markdown(report, tuple(figures)).encode())
    path = directory / "report.json"
    # File names may have bytes that are not UTF-8, which JSON's escapes preserve.
    write_file(path, _to_json(report).encode(errors="backslashreplace"))
    return path


def replace_figures(manifest: Manifest, files: Sequence[str], figures: "Mapping[str, Figure]", *, dpi: int) -> None:
    """Claim the files of a report, and write its figures to ``figures/<name>.png``.

    Args:
        manifest: of the report's folder.
        files: all files that such a report may have; figures among them that this one has not are removed, because
            those of an earlier report would show another model.
        figures: the figures by name.
        dpi: their resolution.
    """
    drawn = {f"figures/{name}.png": figure for name, figure in figures.items()}
    absent = {file for file in files if file.startswith("figures/") and file not in drawn}
    manifest.claim(file for file in files if file not in absent)
    manifest.remove(absent)
    for file, figure in drawn.items():
        content = BytesIO()
        figure.savefig(content, format="png", dpi=dpi)
        write_file(manifest.directory / file, content.getvalue())


def report_manifest(directory: Path) -> Manifest:
    """Return the manifest of the files that evaluations have written into a report's folder."""
    return Manifest(directory, _files_without_manifest)


def _files_without_manifest(directory: Path) -> Iterator[str]:
    """Yield the files of a report that was written before there were manifests."""
    try:
        report = read_json(directory / "report.json")
        if not str(report["schema"]).startswith("ema-seg.report/"):
            return
        masks = [str(image.get("prediction")) for image in report["images"]]
    except (OSError, AttributeError, KeyError, TypeError, DataError):
        return
    yield from FILES
    yield from (mask for mask in masks if mask.startswith("predictions/"))


def load_report(path: str | Path) -> dict[str, Any]:
    """Read a ``report.json``.

    Raises:
        DataError: the file is missing, or is not a report of this schema.
    """
    path = Path(path)
    try:
        report = read_json(path, advice="write the report again with eval.py")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); give the path of a report.json that eval.py wrote."
        ) from error
    schema = report.get("schema") if isinstance(report, dict) else None
    if schema != SCHEMA:
        raise DataError(
            f"{path}: must be a report with the schema {SCHEMA!r}, got {schema!r}; write the report again with eval.py."
        )
    return report


def _mean(values: Sequence[float]) -> float:
    """Return the mean of the defined values, as ``ConfusionMatrix.compute`` does; ``nan`` if there are none."""
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def _plain(value: Any) -> Any:
    """Convert a value to the types of strict JSON; numbers that are not finite become None."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case Path():
            return str(value)
        case Sequence():
            return [_plain(item) for item in value]
    raise TypeError(f"A report cannot hold {value!r} of type {type(value).__name__}.")


def _to_json(report: Mapping[str, Any]) -> str:
    """Format a report as JSON with a line for each key and each item of the long lists, to be readable in a diff."""
    lines = []
    for key, value in report.items():
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        if key in ("confusion_matrix", "images") and value:
            items = (json.dumps(item, allow_nan=False, ensure_ascii=False) for item in value)
            text = "[\n    " + ",\n    ".join(items) + "\n  ]"
        lines.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
