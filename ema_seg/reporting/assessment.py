"""Assessment of a checkpoint: scores, costs and figures of one model, measured together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ema_seg.data import SegmentationDataModule
from ema_seg.data.loading import read_skipped
from ema_seg.evaluation import (
    Cost,
    Evaluation,
    describe_environment,
    evaluate,
    measure_cost,
    predict_examples,
)
from ema_seg.inference import autocast
from ema_seg.models import load_segmenter, model_stride
from ema_seg.reporting.curves import read_metrics
from ema_seg.reporting.predictions import PredictionWriter, lock_report
from ema_seg.reporting.report import FILES, build_report, report_manifest, write_report
from ema_seg.runtime.distributed.start import rank_info
from ema_seg.runtime.errors import ConfigError, DataError
from ema_seg.runtime.execution import deterministic_algorithms, set_execution
from ema_seg.settings import EVALUATION_SECTION, require_settings

__all__ = ["assess_checkpoint", "check_classes", "check_settings", "find_device"]


def assess_checkpoint(
    checkpoint: Path,
    data: Mapping[str, Any],
    settings: Mapping[str, Any],
    directory: Path,
    *,
    run: str | None = None,
    job: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Score a checkpoint on its evaluation split, measure the model's cost and write the report.

    With several ranks (see ``ema_seg.distributed``), each scores its share of the images and rank 0 writes. The folder
    is locked before anything is measured, so that evaluations that write to it run one after another.

    Args:
        checkpoint: a checkpoint that ``train.py`` wrote.
        data: arguments of ``SegmentationDataModule``; its ``evaluation_split`` is scored. A ``mean`` or ``std``
            of None takes the training's value.
        settings: ``device``, ``precision``, ``channels_last``, ``compile``, and for the cost ``batch_size``,
            ``size`` (height and width; None for that of the split's first readable image) and ``budget`` in seconds.
        directory: folder for ``report.json``, ``report.md``, ``figures/`` and ``predictions/``.
        run: the run's folder, recorded in the report; its ``metrics.csv``, if any, becomes the report's curves.
        job: ``identity`` and ``overrides`` (text by key) of a run inside a sweep, recorded in the report.
        quiet: show no progress bar.

    Returns:
        The report as in ``report.json`` on rank 0, an empty dict on the other ranks.

    Raises:
        EmaSegError: the settings, the checkpoint, the data or the folder have a fault that the user can correct.
    """
    check_settings(settings)
    if rank_info().rank == 0:
        report_manifest(directory).check(FILES)
    device = find_device(settings["device"])
    curves = _read_curves(run)
    model, saved = load_segmenter(checkpoint)
    # The normalisation belongs to the model, not to the data that it is evaluated on.
    trained_on = saved["config"]["data"]
    data = {**data, **{key: data[key] or trained_on[key] for key in ("mean", "std")}}
    module = SegmentationDataModule(**data)
    module.setup("test")
    check_classes(saved["classes"], module, checkpoint, "evaluate on data with the same classes")
    stride = model_stride(model)
    model.to(device)
    set_execution(model, channels_last=settings["channels_last"], compile=settings["compile"])

    wanted = bool(saved["config"]["trainer"].get("deterministic"))
    with lock_report(directory):
        with module.worker_errors_converted(), deterministic_algorithms(wanted):
            cost, evaluation, predictions = _measure(model, module, settings, directory, quiet=quiet)
        module.skipped.all_gather()
        skipped = sorted(name for _, name in module.skipped.samples)
        if rank_info().rank:
            return {}
        dataset = module.test_dataset
        positions = {dataset.name(index): index for index in range(len(dataset))}
        evaluation.images.sort(key=lambda image: positions[image["name"]])
        examples = predict_examples(
            model,
            _Scored(module, [positions[image["name"]] for image in evaluation.images]),
            evaluation.images,
            mean=data["mean"],
            std=data["std"],
            stride=stride,
            device=device,
            precision=settings["precision"],
        )
        config = saved["config"]
        report = build_report(
            evaluation,
            cost,
            classes=module.classes,
            palette=module.palette,
            data={
                "name": module.dataset_name,
                "root": str(dataset.root),
                "split": module.evaluation_split,
                "skipped": {**_skipped_in_training(run), module.evaluation_split: skipped},
            },
            model=config["model"],
            attention={**config["attention"], "placement": config["placement"]},
            environment=describe_environment(device),
            config=config,
            run=run,
            checkpoint=checkpoint,
            job=job,
            curves=curves,
            predictions=[predictions[image["name"]] for image in evaluation.images],
        )
        write_report(report, directory, examples)
        return report


def _measure(
    model: nn.Module, module: SegmentationDataModule, settings: Mapping[str, Any], directory: Path, *, quiet: bool
) -> tuple[Cost, Evaluation, dict[str, str]]:
    """Measure the model's cost and scores; return them with the path of each image's predicted mask."""
    loader, dataset = module.test_dataloader(), module.test_dataset
    stride, device, precision = model_stride(model), find_device(settings["device"]), settings["precision"]
    batch_size = _cost_batch_size(settings, module, len(loader.sampler))  # type: ignore[arg-type]  # it has a length
    # The cost first, so that a compiled model is compiled for the timed size before it sees others.
    cost = measure_cost(
        model,
        size=tuple(settings["size"] or module.read_first_readable(dataset, 0, dataset.read_image).shape[:2]),
        stride=stride,
        batch_size=batch_size,
        device=device,
        precision=precision,
        loader=loader,
        budget=settings["budget"],
    )
    if batch_size < settings["batch_size"]:
        cost["throughput"]["capped_batch_size"] = settings["batch_size"]
    names = [dataset.name(index) for index in range(len(dataset))]
    with PredictionWriter(directory, names, module.palette) as write_prediction:
        evaluation = evaluate(
            model,
            loader,
            module.classes,
            stride=stride,
            device=device,
            precision=precision,
            on_prediction=write_prediction,
            progress=not quiet and rank_info().rank == 0,
        )
        if not evaluation.confusion.matrix.any():
            raise DataError(
                f"{dataset.root}: the split {module.evaluation_split!r} has no labelled pixel (the labels of a test "
                "split are often withheld); choose another with data.evaluation_split."
            )
    return cost, evaluation, write_prediction.paths


def _cost_batch_size(settings: Mapping[str, Any], module: SegmentationDataModule, images: int) -> int:
    """Return the second batch size to measure: at most ``images``, unless it was set for the cost alone."""
    batch_size: int = settings["batch_size"]
    if batch_size != module.evaluation_batch_size:
        return batch_size
    return max(1, min(batch_size, images))


class _Scored:
    """Scored samples in the order of their records."""

    def __init__(self, module: SegmentationDataModule, indices: Sequence[int]) -> None:
        self.module = module
        self.indices = indices

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        sample: Mapping[str, Any] = self.module.read_first_readable(self.module.test_dataset, self.indices[index])
        return sample


def _skipped_in_training(run: str | None) -> dict[str, list[str]]:
    """Read the names of the samples that a run skipped, by split."""
    names: dict[str, list[str]] = {}
    for split, name in read_skipped(Path(run) / "skipped.csv") if run is not None else ():
        names.setdefault(split, []).append(name)
    return names


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check the settings of an evaluation, as far as that is possible without its machine.

    A training calls this before it starts, so that its evaluation does not fail for an invalid setting.

    Raises:
        ConfigError: a setting is missing, unknown or invalid.
    """
    require_settings(settings, EVALUATION_SECTION, "evaluation.")
    autocast("cpu", settings["precision"])  # raises for an unknown precision


def _read_curves(run: str | None) -> dict[str, list[float | None]] | None:
    """Read the columns of a run's ``metrics.csv``; return None without a run or without the file."""
    if run is None or not (Path(run) / "metrics.csv").is_file():
        return None
    rows = read_metrics(Path(run))
    columns = dict.fromkeys(key for row in rows for key in row)
    return {column: [row.get(column) for row in rows] for column in columns}


def find_device(name: str) -> torch.device:
    """Return the device for a value of ``evaluation.device``.

    Raises:
        ConfigError: this machine does not have the device, or several ranks would share it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu")
    try:
        device = torch.device("cuda" if name == "gpu" else name)
        if device.type != "cpu" and device.index is not None and rank_info().size > 1:
            raise ConfigError(
                f"evaluation.device: must have no device number for {rank_info().size} processes, got {name}; set "
                f"evaluation.device={device.type}, and each process uses its own."
            )
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"evaluation.device={name}: cannot be used here ({reason}); use cpu or auto.") from error
    return device


def check_classes(trained: Sequence[str], data: SegmentationDataModule, checkpoint: Path, advice: str) -> None:
    """Check that a checkpoint's classes are those of the data, in the same order.

    Args:
        trained: the class names in the checkpoint.
        data: the data to use the checkpoint on.
        checkpoint: path of the checkpoint, for the message.
        advice: end of the message.

    Raises:
        DataError: the classes differ.
    """
    found = data.classes
    if tuple(trained) == tuple(found):
        return
    first, other = (f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''}" for names in (trained, found))
    pairs = enumerate(zip(trained, found, strict=False))
    differing = next(
        (f"; class {index} is {now!r} instead of {before!r}" for index, (before, now) in pairs if before != now), ""
    )
    raise DataError(
        f"{checkpoint}: was trained on {len(trained)} classes ({first}), but data={data.dataset_name} has "
        f"{len(found)} ({other}){differing}; {advice}."
    )
