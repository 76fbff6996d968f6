"""Sharing of a trained model: from a run or a checkpoint to a folder or the Hub, with a model card."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ema_seg.models import load_segmenter, model_stride
from ema_seg.models.card import render_card
from ema_seg.models.checkpoint import checkpoint_path
from ema_seg.models.shared import WEIGHTS, write_shared
from ema_seg.reporting.report import PANEL, load_report
from ema_seg.reporting.tables import render_sections
from ema_seg.runtime.errors import ConfigError, DataError, one_line
from ema_seg.runtime.hub import hub_address, upload_model
from ema_seg.runtime.texts import read_json

__all__ = ["push"]

_SCORES = ("miou", "mean_accuracy", "pixel_accuracy", "fw_iou", "iou")


def push(
    source: str | Path, to: str | Path, *, license: str | None = None, private: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """Write the model of a run or a checkpoint with its card into a folder, or upload it to the Hub.

    Args:
        source: the folder of a run, whose best checkpoint and report are taken, or a checkpoint. The best checkpoint
            within a run's folder is that of the run; any other has no report.
        to: a folder, or ``hf://user/name``.
        license: identifier of the model's licence on the Hub; None if it is not stated.
        private: whether a new model on the Hub is private.
        overwrite: replace an earlier model.

    Returns:
        ``place`` (the folder or the URL), ``scores`` (see ``ema_seg.models.shared``) and ``classes``.

    Raises:
        EmaSegError: the source has no model, its report is that of another model, or see ``write_shared`` and
            ``upload_model``.
    """
    if hub_address(source) is not None:
        raise ConfigError(f"run={source}: is on the Hub already; give the folder of a run, or a checkpoint.")
    address = hub_address(to)
    checkpoint = checkpoint_path(source)
    if checkpoint.name == WEIGHTS:
        raise ConfigError(
            f"run={source}: is a shared model already; give the run or the checkpoint that it was made from, or upload "
            "the folder with `hf upload`."
        )
    model, saved = load_segmenter(checkpoint)
    best = checkpoint.name == "best.ckpt" and checkpoint.parent.name == "checkpoints"
    run = checkpoint.parent.parent if best else None
    report = _report(run, checkpoint, saved["config"]) if run else None
    try:
        scores = _scores(report) if report else None
        tables = render_sections(report) if report else None
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{run}/report/report.json: is damaged ({one_line(error)}); write it again with ema-seg eval run={run}."
        ) from error
    panel = run / "report" / PANEL if run and report else None
    image = panel.read_bytes() if panel and panel.is_file() else None
    card = render_card(
        config=saved["config"],
        classes=saved["classes"],
        address=None if address is None else str(address),
        license=license,
        scores=scores,
        tables=tables,
        command=_training_command(run) if run else None,
        selected=report is not None and _selected_it(report),
        panel=image is not None,
    )
    content = {
        "classes": saved["classes"],
        "palette": saved.get("palette"),
        "stride": model_stride(model),
        "config": saved["config"],
        "card": card,
        "scores": scores,
        "panel": image,
    }
    result = {"scores": scores, "classes": saved["classes"]}
    if address is None:
        write_shared(Path(to), model.state_dict(), **content, overwrite=overwrite)
        return {"place": str(to), **result}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_shared(folder, model.state_dict(), **content)
        return {"place": upload_model(folder, address, private=private, overwrite=overwrite), **result}


def _report(run: Path, checkpoint: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the report of a run; return None if it has none.

    Raises:
        DataError: the report is damaged, or is that of another checkpoint or configuration.
    """
    path = run / "report" / "report.json"
    if not path.exists():
        return None
    report = load_report(path)
    other = Path(str(report.get("checkpoint"))).name
    if other != checkpoint.name or report.get("config") != config:
        what = f"of {other}" if other != checkpoint.name else "of another configuration"
        raise DataError(
            f"{path}: is the report {what}, expected that of {checkpoint}; write it again with ema-seg eval run={run}."
        )
    return report


def _scores(report: Mapping[str, Any]) -> dict[str, Any]:
    data = report["data"]
    return {
        "data": data["name"],
        "split": data["split"],
        "images": data["images"],
        **{key: report[key] for key in _SCORES},
    }


def _selected_it(report: Mapping[str, Any]) -> bool:
    """Return whether a report of a best checkpoint is of the images whose score selected that checkpoint."""
    scored, trained = report["data"], report["config"]["data"]
    same_root = trained.get("root") in (None, scored["root"])
    return scored["split"] == "val" and scored["name"] == trained["name"] and same_root


def _training_command(run: Path) -> list[str] | None:
    """Read the command line of a run's training; return None if it was not recorded.

    Raises:
        DataError: ``environment.json`` is damaged.
    """
    path = run / "environment.json"
    try:
        command = read_json(path)["command"]
        if isinstance(command, list) and command and all(isinstance(text, str) for text in command):
            return command
    except FileNotFoundError:
        return None
    except (KeyError, TypeError):
        pass
    raise DataError(f"{path}: must have the command line of the training as a list of texts; restore the file.")
