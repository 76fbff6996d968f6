"""The machine-readable result of an evaluation, from which every table and figure is drawn.

``report.json`` is strict JSON: an undefined number (the IoU of an absent class) is null. Fractions are in
[0, 1], times in seconds, memory in bytes.

==================  ==================================================================================
``schema``          ``"ema-seg.report/1"``
``created``         time of writing, ISO 8601 in UTC
``run``             name of the run or its directory, or null
``checkpoint``      path of the checkpoint, or null
``data``            ``name``, ``root``, ``split``, ``images`` (how many)
``model``           ``decoder``, ``encoder``, and whatever else the model was built with
``attention``       ``name``, and whatever else the attention block was built with
``classes``         the K names
``palette``         K colours, [red, green, blue] from 0 to 255
``confusion_matrix``  K x K pixel counts, a row for each true class
``miou`` ...        ``iou`` (K values), ``mean_accuracy``, ``pixel_accuracy``, ``fw_iou``: see
                    ``ema_seg.evaluation.ConfusionMatrix.compute``
``absent_classes``  names of the classes in neither truth nor prediction, which the mean leaves out
``parameters``      ``total``, ``trainable``
``gmacs``           10^9 multiply-accumulate operations for one image
``throughput``      speed and memory: see ``ema_seg.evaluation.measure_cost``
``environment``     see ``ema_seg.evaluation.describe_environment``
``images``          for each image ``name``, ``miou``, ``pixel_accuracy``, ``intersection``, ``union``
==================  ==================================================================================
"""

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

from ema_seg.errors import DataError
from ema_seg.evaluation import Cost, Evaluation, Example
from ema_seg.reporting.figures import draw_class_iou, draw_confusion_matrix, draw_samples
from ema_seg.reporting.tables import describe_model, render_markdown

__all__ = ["SCHEMA", "build_report", "load_report", "write_report"]

SCHEMA = "ema-seg.report/1"


def build_report(
    evaluation: Evaluation,
    cost: Cost,
    *,
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    data: Mapping[str, Any],
    model: Mapping[str, Any],
    attention: Mapping[str, Any],
    environment: Mapping[str, Any],
    run: str | None = None,
    checkpoint: str | Path | None = None,
) -> dict[str, Any]:
    """Assemble the report of one model on one split.

    Args:
        evaluation: the scores.
        cost: what the same model costs, measured in the same process.
        classes: names of the K classes.
        palette: their colours.
        data: ``name``, ``root`` and ``split``.
        model: ``decoder``, ``encoder`` and further settings.
        attention: ``name`` and further settings.
        environment: versions, device, code and command line.
        run: name of the run or its directory.
        checkpoint: the file that the weights came from.

    Returns:
        The dict that ``report.json`` holds, of plain values only; see this module's text for its keys.
    """
    confusion = evaluation.confusion
    report = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": run,
        "checkpoint": checkpoint,
        "data": {**data, "images": len(evaluation.images)},
        "model": model,
        "attention": attention,
        "classes": classes,
        "palette": palette,
        "confusion_matrix": confusion.matrix.tolist(),
        **confusion.compute(),
        "absent_classes": [classes[index] for index in confusion.absent],
        **cost,
        "environment": environment,
        "images": evaluation.images,
    }
    return _plain(report)


def write_report(report: Mapping[str, Any], directory: str | Path, panel: Sequence[Example] = ()) -> Path:
    """Write ``report.json``, ``report.md`` and ``figures/*.png``; each file appears whole or not at all.

    Args:
        report: what ``build_report`` or ``load_report`` returned.
        directory: made if missing; an earlier report in it is replaced.
        panel: the images of the panel, see ``ema_seg.evaluation.predict_examples``; none leaves it out.

    Returns:
        The path of ``report.json``, which is written last.
    """
    directory = Path(directory)
    figures = {
        "confusion_matrix": draw_confusion_matrix(report),
        "per_class_iou": draw_class_iou(report),
    }
    if panel:
        figures["panel"] = draw_samples(panel, report["classes"], report["palette"], describe_model(report))
    else:
        # An earlier report's panel would show another model's predictions.
        (directory / "figures" / "panel.png").unlink(missing_ok=True)
    for name, figure in figures.items():
        content = BytesIO()
        figure.savefig(content, format="png", dpi=150)
        _write(directory / "figures" / f"{name}.png", content.getvalue())
    _write(directory / "report.md", render_markdown(report, tuple(figures)).encode())
    path = directory / "report.json"
    _write(path, _to_json(report).encode())
    return path


def load_report(path: str | Path) -> dict[str, Any]:
    """Read a ``report.json``.

    Raises:
        DataError: the file is missing, or no report of this schema.
    """
    path = Path(path)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); give the path of a report.json that eval.py wrote."
        ) from error
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({error}); write the report again with eval.py.") from error
    schema = report.get("schema") if isinstance(report, dict) else None
    if schema != SCHEMA:
        raise DataError(
            f"{path}: is no report of this version (schema {schema!r} instead of {SCHEMA!r}); "
            "write the report again with eval.py."
        )
    return report


def _plain(value: Any) -> Any:
    """The same value made of what strict JSON knows."""
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
    """JSON with a line for each key and each item of the long lists, so that it can be read and compared."""
    lines = []
    for key, value in report.items():
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        if key in ("confusion_matrix", "images") and value:
            items = (json.dumps(item, allow_nan=False, ensure_ascii=False) for item in value)
            text = "[\n    " + ",\n    ".join(items) + "\n  ]"
        lines.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)
