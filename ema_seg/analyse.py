"""The analysis of a trained model's attention blocks, in the order in which it happens.

``ema_seg/cli/analyse.py`` leads from a command line to ``analyse``. Each part is one module of ``ema_seg/analysis``.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ema_seg.analysis.effects import Effects, score_counts
from ema_seg.analysis.figures import Pictures
from ema_seg.analysis.interventions import Sample, count_masks, run_interventions
from ema_seg.analysis.maps import MapStudy
from ema_seg.analysis.receptive_field import SHARES, ReceptiveField, receptive_field
from ema_seg.analysis.report import FILES, write_analysis
from ema_seg.analysis.schema import ALL_BLOCKS, INTERVENTIONS, SCHEMA
from ema_seg.analysis.signals import hooked, neutral_values, replaced_signals
from ema_seg.analysis.similarity import FeatureSimilarity, recorded_features
from ema_seg.data import SegmentationDataModule
from ema_seg.data.datamodule import spread_evenly
from ema_seg.data.normalise import Normalise
from ema_seg.evaluation import describe_environment
from ema_seg.inference.classes import most_likely_classes
from ema_seg.inference.device import find_device
from ema_seg.inference.prediction import autocast, predict
from ema_seg.models import load_segmenter, model_stride
from ema_seg.models.checkpoint import check_classes
from ema_seg.models.placement import attention_blocks, feature_modules
from ema_seg.reporting.history import describe_data
from ema_seg.runtime.errors import ConfigError, DataError, ModelError
from ema_seg.runtime.execution import set_execution
from ema_seg.runtime.files import Manifest
from ema_seg.runtime.progress import track

__all__ = ["analyse"]

_REPLICATES = 2000
_SEED = 0
_SHOWN_MAPS = 3


def analyse(
    checkpoint: Path,
    data: Mapping[str, Any],
    directory: Path,
    *,
    run: str | None = None,
    twin: Path | None = None,
    images: int | None = None,
    field_images: int = 16,
    device: str = "auto",
    precision: str = "32-true",
) -> dict[str, Any]:
    """Analyse what the attention blocks of a trained model do, on its evaluation split, and write the report.

    Args:
        checkpoint: a checkpoint of ``train.py`` with attention blocks.
        data: arguments of ``SegmentationDataModule``; its ``evaluation_split`` is predicted.
        directory: folder for ``analysis.json``, ``analysis.md``, ``analysis.html`` and ``figures/``.
        run: the run's folder, recorded in the report.
        twin: checkpoint of the same model trained without attention, to compare with.
        images: number of images, spread evenly over the split; None for all.
        field_images: images for the effective receptive field, at most.
        device: see ``find_device``.
        precision: see ``autocast``. Rounded weights differ a little from those that a fused kernel applies, so that
            interventions show rounding in half precision, too. Gradients are computed in float32.

    Returns:
        The content of ``analysis.json``, see ``ema_seg.analysis.schema``.

    Raises:
        EmaSegError: the settings, a checkpoint, the data or the folder have a fault that the user can correct.
    """
    Manifest(directory).check(FILES)

    # Models and data.
    place = find_device(device, "device")
    ours = _open(checkpoint, place, precision)
    theirs = None if twin is None else _open_twin(twin, checkpoint, ours)
    blocks = attention_blocks(ours.model)
    if not blocks:
        raise ModelError(f"{checkpoint}: the model has no attention block to analyse; give a run with attention.")
    data = {**data, **{key: data[key] or ours.config["data"][key] for key in ("mean", "std")}}
    module = SegmentationDataModule(**data)
    module.setup("test")
    advice = "analyse on data with the same classes"
    check_classes(ours.classes, module.classes, module.dataset_name, checkpoint, advice)
    total = len(module.test_dataset)
    indices = spread_evenly(total, images or total)
    if len(indices) < 2:
        raise DataError(f"{module.test_dataset.root}: an interval needs at least 2 images, got {len(indices)}.")

    # The maps, and the mean of each block's signal.
    maps = MapStudy(module.num_classes)
    pictures = Pictures()
    shown = set(spread_evenly(len(indices), _SHOWN_MAPS))
    with hooked(blocks, maps.record):
        for number, sample in enumerate(track(_samples(module, indices), "Weight maps", total=len(indices))):
            ours.segment(sample.image)
            found = maps.finish_image(sample.mask, ours.stride)
            if number in shown:
                pictures.maps.append((sample, found))
    means = maps.means()

    # Effective receptive field: before the interventions, because gradients take the most memory.
    chosen = [
        sample.image for sample in _samples(module, [indices[at] for at in spread_evenly(len(indices), field_images)])
    ]
    pictures.fields["with attention"] = ours.receptive_field(chosen)
    with replaced_signals(blocks, lambda _, signal: neutral_values(signal)):
        pictures.fields["attention off"] = ours.receptive_field(chosen)
    if theirs is not None:
        pictures.fields["twin without attention"] = theirs.receptive_field(chosen)

    # Interventions: in a random order, because neighbours in a video are like each other.
    order = [indices[at] for at in np.random.default_rng(_SEED).permutation(len(indices))]
    (before,) = _samples(module, order[-1:])
    own, outcomes = run_interventions(
        ours.model,
        blocks,
        track(_samples(module, order), "Interventions", total=len(order)),
        ours.segment,
        means,
        module.num_classes,
        before,
    )
    effects = Effects(own.counts, _REPLICATES, _SEED)
    interventions = [
        {
            "block": block,
            "intervention": name,
            "changed": float(outcome.changed.mean()),
            **effects.of(outcome.counts),
        }
        for (block, name), outcome in outcomes.items()
    ]
    target = ALL_BLOCKS if len(blocks) > 1 else next(iter(blocks))
    for name in INTERVENTIONS:
        if example := outcomes[target, name].example:
            (sample,) = _samples(module, [order[example[0]]])
            pictures.examples[name] = sample, example[1], example[2]

    # The twin: its scores, and the similarity of the features.
    report_of_twin = None
    if theirs is not None:
        counts, similarity = _compare_with_twin(ours, theirs, module, order)
        report_of_twin = {
            "checkpoint": str(twin),
            "scores": score_counts(counts),
            **effects.of(counts),
            "similarity": similarity,
        }

    # Report: analysis.json, and from it the tables, the figures and the page.
    config = ours.config
    report = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": run,
        "checkpoint": str(checkpoint),
        "data": {**describe_data(module, run), "images": len(indices)},
        "model": config["model"],
        "attention": {**config["attention"], "placement": config["placement"]},
        "classes": list(module.classes),
        "palette": [list(colour) for colour in module.palette],
        "bootstrap": {"replicates": _REPLICATES, "seed": _SEED},
        "scores": score_counts(own.counts),
        "interventions": interventions,
        **maps.results(_REPLICATES, _SEED),
        "receptive_field": {
            "images": len(chosen),
            "size": list(chosen[0].shape[1:]),
            "models": {name: _describe_field(field) for name, field in pictures.fields.items()},
        },
        "twin": report_of_twin,
        "environment": describe_environment(place),
    }
    write_analysis(report, directory, pictures)
    return report


class _Opened(NamedTuple):
    """Model with what prediction needs."""

    model: nn.Module
    config: Mapping[str, Any]
    classes: Sequence[str]
    stride: int
    normalise: Normalise
    device: torch.device
    precision: str

    def segment(self, image: Tensor) -> NDArray[np.integer]:
        """Predict the classes of an image (uint8 RGB 3 x H x W): H x W."""
        with autocast(self.device, self.precision):
            (logits,) = predict(self.model, [image], self.stride, self.normalise)
            return most_likely_classes(logits).cpu().numpy()

    def receptive_field(self, images: Sequence[Tensor]) -> ReceptiveField:
        """Measure the effective receptive field on images."""
        return receptive_field(self.model, images, self.stride, self.normalise)


def _open(checkpoint: Path, device: torch.device, precision: str) -> _Opened:
    model, saved = load_segmenter(checkpoint)
    config = saved["config"]
    model = model.to(device).eval().requires_grad_(False)
    set_execution(model, channels_last=bool(config.get("evaluation", {}).get("channels_last")), compile=False)
    normalise = Normalise(config["data"]["mean"], config["data"]["std"])
    return _Opened(model, config, saved["classes"], model_stride(model), normalise, device, precision)


def _open_twin(twin: Path, checkpoint: Path, ours: _Opened) -> _Opened:
    """Open the twin.

    Raises:
        ConfigError: it is not the same model without attention, or was trained on other classes.
    """
    theirs = _open(twin, ours.device, ours.precision)
    if attention_blocks(theirs.model):
        raise ConfigError(f"twin={twin}: has attention blocks; give a run with attention=none.")
    for key in ("decoder", "encoder"):
        values = [opened.config["model"][key] for opened in (ours, theirs)]
        if values[0] != values[1]:
            raise ConfigError(f"twin={twin}: must have model.{key}={values[0]} as {checkpoint} has, got {values[1]}.")
    if list(theirs.classes) != list(ours.classes):
        raise ConfigError(f"twin={twin}: was trained on other classes than {checkpoint}; give a run on the same data.")
    return theirs


def _samples(module: SegmentationDataModule, indices: Sequence[int]) -> Iterator[Sample]:
    for index in indices:
        sample = module.read_first_readable(module.test_dataset, index)
        yield Sample(sample["name"], sample["image"], sample["mask"].numpy())


def _compare_with_twin(
    ours: _Opened, theirs: _Opened, module: SegmentationDataModule, order: Sequence[int]
) -> tuple[NDArray[np.int32], dict[str, float | None]]:
    """Predict the images with both models; return the twin's counts and the similarity of the features by stage."""
    decoder = ours.config["model"]["decoder"]
    similarity, counts = FeatureSimilarity(), []
    for sample in track(_samples(module, order), "Twin", total=len(order)):
        features: list[dict[str, Tensor]] = [{}, {}]
        for opened, found in zip((ours, theirs), features, strict=True):
            with recorded_features(feature_modules(opened.model, decoder), found):
                mask = opened.segment(sample.image)
        similarity.add(*features)
        counts.append(count_masks(mask, sample.mask, module.num_classes))
    return np.stack(counts), similarity.results()


def _describe_field(field: ReceptiveField) -> dict[str, Any]:
    return {
        "side": {f"{share:g}": field.side(share) for share in SHARES},
        "area": {f"{share:g}": field.area(share) for share in SHARES},
    }
