"""The evaluation, in the order in which it happens.

``ema_seg/cli`` leads from a command line to ``evaluate``, which runs on every rank. Each part is one call here and one
module of its own: scores and costs in ``ema_seg/evaluation``, the report in ``ema_seg/reporting``.
"""

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from ema_seg.config import Evaluation, check_settings
from ema_seg.data import SegmentationDataModule
from ema_seg.data.datamodule import SampleSelection
from ema_seg.evaluation import ConfusionMatrix, describe_environment, measure_cost, predict_examples, score_images
from ema_seg.evaluation.cost import complete_cost, cost_batch_size
from ema_seg.evaluation.evaluator import image_counter, require_labels
from ema_seg.inference.loading import load_model
from ema_seg.inference.masks import encode_mask
from ema_seg.models import model_stride, segmenter_from_config
from ema_seg.models.checkpoint import check_classes
from ema_seg.reporting.history import describe_data, read_curves
from ema_seg.reporting.predictions import PredictionWriter, lock_report
from ema_seg.reporting.report import FILES, build_report, report_manifest, write_report
from ema_seg.runtime.distributed.ranks import rank_info
from ema_seg.runtime.execution import deterministic_algorithms, set_execution, tf32

__all__ = ["evaluate"]


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
    check_settings(settings, Evaluation, "evaluation.")
    if rank_info().rank == 0:
        report_manifest(directory).check(FILES)
    precision, boundary = settings["precision"], settings.get("boundary", False)
    curves = read_curves(run)

    # Model: rebuilt from the checkpoint alone, or an exported one, which computes as its file says.
    model, device, saved, stride, normalise, exported = load_model(checkpoint, settings["device"])
    config = saved["config"]
    if exported:
        precision = "32-true"
        config = {**config, "export": {"format": exported.format, "precision": exported.precision}}

    # Data: its classes must be the model's. The normalisation belongs to the model, not to the data.
    data = {**data, **{key: data[key] or config["data"][key] for key in ("mean", "std")}}
    module = SegmentationDataModule(**data)
    module.pin_memory = device.type == "cuda"
    module.setup("test")
    dataset = module.test_dataset
    advice = "evaluate on data with the same classes"
    check_classes(saved["classes"], module.classes, module.dataset_name, checkpoint, advice)
    normalise = normalise if exported else module.normalise
    set_execution(model, channels_last=settings["channels_last"], compile=settings["compile"] and not exported)

    deterministic = deterministic_algorithms(bool(config["trainer"].get("deterministic")))
    with lock_report(directory), tf32(config.get("training", {}).get("tf32")):
        with module.worker_errors_converted(), deterministic:
            loader = module.test_dataloader()

            # Cost: before the scores, so that a compiled model is compiled for the timed size first.
            images = len(loader.sampler)  # type: ignore[arg-type]  # it has a length
            batch_size = cost_batch_size(settings["batch_size"], module.evaluation_batch_size, images)
            first_size = settings["size"] or module.read_first_readable(dataset, 0, dataset.read_image).shape[:2]
            encoding = image_counter(
                ConfusionMatrix(module.num_classes),
                lambda _, mask: encode_mask(mask, module.palette),
                boundary=boundary,
            )
            with closing(encoding):
                cost = measure_cost(
                    model,
                    size=tuple(first_size),
                    stride=stride,
                    normalise=normalise,
                    batch_size=batch_size,
                    device=device,
                    precision=precision,
                    loader=loader,
                    counter=encoding,
                    budget=settings["budget"],
                )
            if exported:
                original = segmenter_from_config(config, module.num_classes, pretrained=False).eval()
                cost = complete_cost(cost, original, model_stride(original), precision=exported.precision)
            if batch_size < settings["batch_size"]:
                cost["throughput"]["capped_batch_size"] = settings["batch_size"]

            # Scores: one confusion matrix over all ranks, and the predicted masks.
            names = [dataset.name(index) for index in range(len(dataset))]
            with PredictionWriter(directory, names, module.palette) as write_prediction:
                evaluation = score_images(
                    model,
                    loader,
                    module.classes,
                    stride=stride,
                    normalise=normalise,
                    device=device,
                    precision=precision,
                    boundary=boundary,
                    on_prediction=write_prediction,
                    progress=not quiet and rank_info().rank == 0,
                )
                require_labels(evaluation, dataset.root, module.evaluation_split)
        module.skipped.all_gather()
        if rank_info().rank:
            return {}

        # Examples: the best, median and worst images.
        positions = {name: index for index, name in enumerate(names)}
        evaluation.images.sort(key=lambda image: positions[image["name"]])
        examples = predict_examples(
            model,
            SampleSelection(module, [positions[image["name"]] for image in evaluation.images]),
            evaluation.images,
            normalise=normalise,
            stride=stride,
            device=device,
            precision=precision,
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
            run=run,
            checkpoint=checkpoint,
            job=job,
            curves=curves,
            predictions=[write_prediction.paths[image["name"]] for image in evaluation.images],
        )
        write_report(report, directory, examples)
        return report
