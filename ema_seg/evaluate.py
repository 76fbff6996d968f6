"""The evaluation, in the order in which it happens.

``ema_seg/cli`` leads from a command line to ``evaluate``, which runs on every rank. Each part is one call here and one
module of its own: scores and costs in ``ema_seg/evaluation``, the report in ``ema_seg/reporting``.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ema_seg.config import Evaluation, check_settings
from ema_seg.data import SegmentationDataModule
from ema_seg.data.datamodule import SampleSelection
from ema_seg.data.normalise import Normalise
from ema_seg.evaluation import ConfusionMatrix, describe_environment, measure_cost, predict_examples, score_images
from ema_seg.evaluation.cost import complete_cost, cost_batch_size
from ema_seg.evaluation.counter import Counter, count_predictions
from ema_seg.evaluation.evaluator import image_counter, require_labels
from ema_seg.evaluation.robustness import count_corruptions
from ema_seg.inference.exported import Metadata
from ema_seg.inference.loading import load_model
from ema_seg.inference.masks import encode_mask
from ema_seg.inference.protocol import PredictionProtocol, check_protocol
from ema_seg.models import model_stride, segmenter_from_config
from ema_seg.models.checkpoint import check_classes
from ema_seg.reporting.history import describe_data, read_curves
from ema_seg.reporting.predictions import PredictionWriter, lock_report
from ema_seg.reporting.report import FILES, build_report, report_manifest, write_report
from ema_seg.reporting.submission import SubmissionWriter
from ema_seg.runtime.distributed.ranks import barrier, rank_info
from ema_seg.runtime.errors import ConfigError, DataError
from ema_seg.runtime.execution import deterministic_algorithms, set_execution, tf32

__all__ = ["evaluate", "write_submission"]


def evaluate(
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

    With several ranks, each scores its share of the images and rank 0 writes. The folder is locked before anything is
    measured, so that evaluations that write to it run one after another.

    Args:
        checkpoint: a checkpoint that ``train.py`` wrote, or an exported model.
        data: arguments of ``SegmentationDataModule``; its ``evaluation_split`` is scored. A ``mean`` or ``std``
            of None takes the training's value.
        settings: the section ``evaluation``, see ``ema_seg.config.Evaluation``; a missing setting that has a default
            has it.
        directory: folder for ``report.json``, ``report.md``, ``figures/`` and ``predictions/``.
        run: the run's folder, recorded in the report; its ``metrics.csv``, if any, becomes the report's curves.
        job: ``identity`` and ``overrides`` (text by key) of a run inside a sweep, recorded in the report.
        quiet: show no progress bar.

    Returns:
        The report as in ``report.json`` on rank 0, an empty dict on the other ranks.

    Raises:
        EmaSegError: the settings, the checkpoint, the data or the folder have a fault that the user can correct.
    """
    if rank_info().rank == 0:
        report_manifest(directory).check(FILES)
    curves = read_curves(run)
    opened = _open(checkpoint, data, settings)
    model, device, config, stride, normalise, exported, module, settings = opened
    precision, protocol = settings["precision"], PredictionProtocol.from_settings(settings)
    extras = {"boundary": settings["boundary"], "calibration": settings["calibration"]}
    predicting = {"stride": stride, "normalise": normalise, "device": device, "precision": precision}
    dataset, shown = module.test_dataset, not quiet and rank_info().rank == 0
    writers: list[Callable[[str, NDArray[np.integer]], None]] = []
    if settings["submission"] is not None:
        writers.append(SubmissionWriter(Path(settings["submission"]), dataset, module.dataset_name))

    with lock_report(directory), opened.computing():
        loader = module.test_dataloader()

        # Cost: before the scores, so that a compiled model is compiled for the timed size first.
        images = len(loader.sampler)  # type: ignore[arg-type]  # it has a length
        batch_size = cost_batch_size(settings["batch_size"], module.evaluation_batch_size, images)
        first_size = settings["size"] or module.read_first_readable(dataset, 0, dataset.read_image).shape[:2]
        encoding = image_counter(
            ConfusionMatrix(module.num_classes), lambda _, mask: encode_mask(mask, module.palette), **extras
        )
        with closing(encoding):
            cost = measure_cost(
                model,
                size=tuple(first_size),
                batch_size=batch_size,
                loader=loader,
                counter=encoding,
                protocol=protocol,
                budget=settings["budget"],
                **predicting,
            )
        if exported:
            original = segmenter_from_config(config, module.num_classes, pretrained=False).eval()
            cost = complete_cost(cost, original, model_stride(original), precision=exported.precision)
        if batch_size < settings["batch_size"]:
            cost["throughput"]["capped_batch_size"] = settings["batch_size"]

        # Scores: one confusion matrix over all ranks, and the predicted masks.
        names = [dataset.name(index) for index in range(len(dataset))]
        with PredictionWriter(directory, names, module.palette) as write_prediction:
            writers.append(write_prediction)
            evaluation = score_images(
                model,
                loader,
                module.classes,
                protocol=protocol,
                on_prediction=lambda name, mask: [write(name, mask) for write in writers],
                progress=shown,
                **extras,
                **predicting,
            )
            require_labels(evaluation, dataset.root, module.evaluation_split)

        # Robustness: the images that could be read, corrupted.
        positions = {name: index for index, name in enumerate(names)}
        if settings["corruptions"] is not None:
            counts = count_corruptions(
                model,
                module.corrupted_dataloader([positions[image["name"]] for image in evaluation.images]),
                module.num_classes,
                protocol=protocol,
                progress=shown,
                **predicting,
            )
            for image in evaluation.images:
                if image["name"] not in counts:
                    raise DataError(f"{dataset.root}: {image['name']} could be read once, and not again; try again.")
                image["corruptions"] = counts[image["name"]]
        module.skipped.all_gather()
        if rank_info().rank:
            return {}

        # Examples: the best, median and worst images.
        evaluation.images.sort(key=lambda image: positions[image["name"]])
        examples = predict_examples(
            model,
            SampleSelection(module, [positions[image["name"]] for image in evaluation.images]),
            evaluation.images,
            protocol=protocol,
            **predicting,
        )

        # Report: report.json, and from it the tables and figures.
        report = build_report(
            evaluation,
            cost,
            classes=module.classes,
            palette=module.palette,
            data=describe_data(module, run),
            model=config["model"],
            attention={**config["attention"], "placement": config["placement"]},
            environment=describe_environment(device),
            config=config,
            protocol=None if protocol.plain else protocol.settings(),
            run=run,
            checkpoint=checkpoint,
            job=job,
            curves=curves,
            predictions=[write_prediction.paths[image["name"]] for image in evaluation.images],
        )
        write_report(report, directory, examples)
        return report


def write_submission(checkpoint: Path, data: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Predict a split that is published without labels, and write its masks for the benchmark's server.

    Args:
        checkpoint: see ``evaluate``.
        data: see ``evaluate``.
        settings: see ``evaluate``; ``submission`` must be set.

    Raises:
        EmaSegError: see ``evaluate``.
    """
    # Without a file the server would refuse the others.
    opened = _open(checkpoint, {**data, "max_skipped": 0}, settings, without_labels=True)
    model, device, _, stride, normalise, _, module, settings = opened
    write = SubmissionWriter(Path(settings["submission"]), module.test_dataset, module.dataset_name)
    with opened.computing():
        count_predictions(
            model,
            module.test_dataloader(),
            Counter(module.num_classes, lambda name, mask, _: write(name, mask)),
            "Predicting",
            stride=stride,
            normalise=normalise,
            device=device,
            precision=settings["precision"],
            protocol=PredictionProtocol.from_settings(settings),
            progress=rank_info().rank == 0,
        )
    barrier()


class _Opened(NamedTuple):
    """Model and data of an evaluation; ``settings`` are complete."""

    model: nn.Module
    device: torch.device
    config: Mapping[str, Any]
    stride: int
    normalise: Normalise
    exported: Metadata | None
    module: SegmentationDataModule
    settings: dict[str, Any]

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute as the training did; convert errors of the workers that read the data."""
        deterministic = deterministic_algorithms(bool(self.config["trainer"].get("deterministic")))
        multiply_in_tf32 = tf32(self.config.get("training", {}).get("tf32"))
        with multiply_in_tf32, self.module.worker_errors_converted(), deterministic:
            yield


def _open(
    checkpoint: Path, data: Mapping[str, Any], settings: Mapping[str, Any], *, without_labels: bool = False
) -> _Opened:
    check_settings(settings, Evaluation, "evaluation.")
    settings = Evaluation(**settings).model_dump()
    check_protocol(settings)

    # Model: rebuilt from the checkpoint alone, or an exported one, which computes as its file says.
    model, device, saved, stride, normalise, exported = load_model(checkpoint, settings["device"])
    config = saved["config"]
    if exported:
        settings["precision"] = "32-true"
        config = {**config, "export": {"format": exported.format, "precision": exported.precision}}
        if exported.processing:
            _refuse_probabilities(settings, checkpoint)

    # Data: its classes must be the model's. The normalisation belongs to the model, not to the data.
    data = {**data, **{key: data[key] or config["data"][key] for key in ("mean", "std")}}
    module = SegmentationDataModule(**data)
    module.pin_memory = device.type == "cuda"
    module.without_labels = without_labels
    module.setup("test")
    advice = "evaluate on data with the same classes"
    check_classes(saved["classes"], module.classes, module.dataset_name, checkpoint, advice)
    set_execution(model, channels_last=settings["channels_last"], compile=settings["compile"] and not exported)
    normalise = normalise if exported else module.normalise
    return _Opened(model, device, config, stride, normalise, exported, module, settings)


def _refuse_probabilities(settings: Mapping[str, Any], checkpoint: Path) -> None:
    """Raise ConfigError if a setting needs probabilities, and the artefact returns classes."""
    if settings["calibration"] or not PredictionProtocol.from_settings(settings).plain:
        raise ConfigError(
            "evaluation.window, scales, flip and calibration: must not be set for an artefact that returns classes, "
            f"got {checkpoint}; export the run with processing=false."
        )
