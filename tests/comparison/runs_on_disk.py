"""Builders of runs and sweeps on disk, in the format of ``train.py``, without a training."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ema_seg.data.corruptions import CORRUPTIONS
from ema_seg.evaluation import ConfusionMatrix, Evaluation, count_strata
from ema_seg.evaluation.boundary import TRIMAP_DISTANCES
from ema_seg.evaluation.calibration import count_calibration
from ema_seg.reporting.predictions import PredictionWriter
from ema_seg.reporting.report import _to_json
from ema_seg.runtime.files import write_file
from tests.reporting.test_report import CLASSES, PALETTE, make_cost, make_report

IMAGES = 8
SIZE = (24, 32)


def make_truth() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    masks = []
    for _ in range(IMAGES):
        mask = np.kron(rng.integers(0, 3, (3, 4)), np.ones((8, 8), int)).astype(np.uint8)
        mask[:, :2] = 255
        masks.append(mask)
    return masks


def make_config(attention: str = "none", decoder: str = "unet", seed: int = 0, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "data": {"name": "street", "root": "/data/street", "batch_size": 4, "workers": 2},
        "model": {"decoder": decoder, "encoder": "resnet18"},
        "attention": {"name": attention} | ({"factor": 8} if attention == "ema" else {}),
        "placement": {"encoder": False, "decoder": True, "head": False},
        "loss": {"cross_entropy": {"weight": 1.0}, "dice": {"weight": 1.0}},
        "optimizer": {"name": "adamw", "lr": 0.001},
        "schedule": {"name": "poly", "power": 0.9},
        "trainer": {"accelerator": "cpu", "max_epochs": 4},
        "evaluation": {"device": "cpu"},
        "epochs": 4,
        "seed": seed,
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            config[section] = config[section] | {name: value}
        else:
            config[section] = value
    return config


def write_run(
    folder: Path,
    attention: str = "none",
    seed: int = 0,
    *,
    wrong: float = 0.3,
    report: dict[str, Any] | None = None,
    batch_sizes: tuple[int, ...] = (1, 8),
    protocol: dict[str, Any] | None = None,
    further: bool = False,
    **config: Any,
) -> Path:
    """Write a finished run that predicts a random class for a share ``wrong`` of the pixels.

    With ``further`` it has scores beyond the mIoU: boundaries that are the whole images, corruptions of which the
    strongest fog alone costs half of the right pixels, and a confidence of 0.8 everywhere.
    """
    rng = np.random.default_rng([seed, sum(map(ord, attention)), int(1000 * wrong)])
    total, records = ConfusionMatrix(len(CLASSES)), []
    names = [f"ride/{index:03d}" for index in range(IMAGES)]
    with PredictionWriter(folder / "report", names, PALETTE) as write:
        for name, truth in zip(names, make_truth(), strict=True):
            other = rng.integers(0, 3, truth.shape)
            prediction = np.where((rng.random(truth.shape) < wrong) | (truth == 255), other, truth).astype(np.uint8)
            confusion = ConfusionMatrix(len(CLASSES))
            confusion.update(prediction, truth)
            total.merge(confusion)
            scores = confusion.compute()
            records.append(
                {
                    "name": name,
                    "miou": scores["miou"],
                    "pixel_accuracy": scores["pixel_accuracy"],
                    "intersection": confusion.intersection.tolist(),
                    "union": confusion.union.tolist(),
                    "strata": count_strata(prediction, truth, len(CLASSES)),
                }
            )
            if further:
                records[-1] |= _further_counts(confusion, prediction, truth)
            write(name, prediction)
    settings = make_config(attention, seed=seed, **config)
    content = make_report(
        evaluation=Evaluation(total, records),
        cost=make_cost(batch_sizes),
        config=settings,
        protocol=protocol,
        model=settings["model"],
        attention=settings["attention"],
        run=str(folder),
        curves={"epoch": [0.0, 1.0], "train/loss": [2.0, 1.0 + seed], "val/miou": [None, 0.5 + 0.1 * seed]},
        predictions=[write.paths[name] for name in names],
    )
    write_file(folder / "report" / "report.json", _to_json(content | (report or {})).encode())
    return folder


def _further_counts(confusion: ConfusionMatrix, prediction: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    intersection, union = confusion.intersection, confusion.union
    labelled = truth != 255
    nll = -np.log(np.where(prediction == truth, 0.8, 0.1)[labelled]).sum()
    sums = np.array([[nll, 0.1 * labelled.sum()]], np.float32)
    (present,) = np.nonzero(union)
    clean = [present.tolist(), intersection[present].tolist(), union[present].tolist()]
    lost = [present.tolist(), (intersection[present] // 2).tolist(), union[present].tolist()]
    kinds: dict[str, list[Any]] = {kind: [clean] * 5 for kind in CORRUPTIONS}
    kinds["fog"] = [clean] * 4 + [lost]
    band = [intersection.tolist(), union.tolist()]
    confidence = np.full(truth.shape, 0.8, np.float32)
    return {
        "boundary": {"intersection": band[0], "union": band[1], "trimap": [band] * len(TRIMAP_DISTANCES)},
        "calibration": count_calibration(prediction, truth, confidence, sums),
        "corruptions": kinds,
    }


def plan_job(folder: str, impossible: str | None = None, **overrides: str) -> dict[str, Any]:
    return {
        "identity": folder,
        "folder": folder,
        "overrides": overrides,
        "epochs": 4,
        "impossible": impossible,
    }


def write_plan(folder: Path, jobs: list[dict[str, Any]], baseline: dict[str, str] | None = None) -> Path:
    plan = {"schema": "ema-seg.sweep/1", "name": "blocks", "command": ["train.py"], "baseline": baseline, "jobs": jobs}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(plan))
    return folder


def write_sweep(folder: Path, seeds: int = 3) -> Path:
    """Write a sweep of four blocks with ``seeds`` seeds each; seed 1 of "cbam" failed, and "se" never ran."""
    jobs = []
    for attention, wrong in {"none": 0.3, "ema": 0.2, "cbam": 0.29, "se": 0.3}.items():
        for seed in range(seeds):
            name = f"{attention}_seed{seed}"
            jobs.append(plan_job(name, attention=attention, seed=str(seed)))
            if attention == "cbam" and seed == 1:
                (folder / name).mkdir(parents=True)
                failure = {"state": "failed", "reason": "The loss was nan in epoch 2.", "attempts": 1}
                (folder / name / "failure.json").write_text(json.dumps(failure))
            elif attention != "se":
                write_run(folder / name, attention, seed, wrong=wrong)
    return write_plan(folder, jobs, {"attention": "none"})
