"""Synthetic comparison of a finished sweep: most rows are complete, one lacks a seed, one has one seed, one has none.

Its names hold strings that break pages and figures without escaping: ``<``, ``&``, quotes, ``$``, ``__proto__``.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ema_seg.comparison.schema import (
    Claim,
    Comparison,
    Contrast,
    Curve,
    Disagreement,
    Evidence,
    Job,
    Measure,
    Row,
    Spread,
    Summary,
)
from ema_seg.evaluation.strata import STRATA
from ema_seg.inference.masks import colourise

CLASSES = (
    "sky", "building", "pole", "road", "side|walk", "tree", 'sign <pole> & "light"', "fence", "car", "__proto__",
    "bicyclist $x$", "never seen",
)  # fmt: skip
PALETTE = (
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0), (192, 128, 128),
    (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192), (0, 0, 0),
)  # fmt: skip
FAILURE = 'loss is <b>not</b> finite & training "stopped" at epoch 3.'
SEEDS = (0, 1, 2)
EPOCHS = 30

MEASURES = {
    "boundary_miou": Measure(label="boundary mIoU", percent=True, higher_is_better=True, main=True),
    "trimap_1": Measure(label="mIoU up to 1 px from a boundary", percent=True, higher_is_better=True, main=False),
    "ece": Measure(label="expected calibration error", percent=True, higher_is_better=False, main=True),
    "nll": Measure(label="negative log-likelihood", percent=False, higher_is_better=False, main=True),
}

# Attention, placement, effect on the mIoU in points, images/s, parameters in millions.
ROWS = (
    ("none", "decoder", 0.0, 61.2, 4.65),
    ("se", "decoder", 0.5, 60.3, 4.66),
    ("eca", "decoder", 0.3, 60.8, 4.65),
    ("cbam", "decoder", -1.4, 48.9, 4.66),
    ("ema", "decoder", 1.9, 55.0, 4.67),
    ("ema", "encoder", 2.3, 47.1, 4.72),
    ("coord", "decoder", 1.1, 57.4, 4.69),
    ("gam", "encoder", 0.0, 20.0, 9.1),
)


def make_claim(verdict: str, difference: float) -> Claim:
    evidence = Evidence(
        contrast="ema over none </script>",
        quantity="mIoU",
        unit="points",
        difference=difference,
        low=difference - 0.005,
        high=difference + 0.005,
        n=3,
        p=0.01,
        p_holm=0.02,
        exact=False,
        decides=True,
        verdict=verdict,
        seeds_more=7,
    )
    aside = {**evidence, "decides": False, "quantity": "GMACs", "unit": "%", "exact": True}
    return Claim(
        claim=f"This is <b>{verdict}</b>.",
        verdict=verdict,
        seeds_more=7 if verdict == "undecided" else None,
        evidence=[evidence, aside],
        missing=["fur of ema over none"],
    )


def make_comparison(directory: Path, *, rows: int = len(ROWS), classes: int = len(CLASSES)) -> Comparison:
    """Make the comparison, and write the pictures of its examples.

    Args:
        directory: the folder of the comparison, to which the pictures' paths are relative.
        rows: number of rows: the first of ``ROWS``, then random ones.
        classes: number of classes: the first of ``CLASSES``, then numbered ones.
    """
    generator = np.random.default_rng(7)
    names = [*CLASSES, *(f"thing number {index}" for index in range(len(CLASSES), classes))][:classes]
    colours = [*PALETTE, *generator.integers(0, 255, (classes, 3)).tolist()][:classes]
    plans = list(ROWS[:rows])
    for index in range(len(ROWS), rows):
        speed = float(generator.uniform(25, 62))
        plans.append((f"block{index}", "decoder", float(generator.normal(0.6, 1)), speed, 5.0 + index / 10))
    drawn = [_make_row(plan, names, generator) for plan in plans]
    return Comparison(
        schema="ema-seg.comparison/2",
        created="2026-11-20T12:00:00+00:00",
        title="attention & placement </script>",
        folder="runs/attention",
        data={"name": "camvid", "split": "val", "images": 101},
        classes=names,
        palette=[list(colour) for colour in colours],
        strata=dict(STRATA),
        metric="mIoU",
        measures=dict(MEASURES),
        settings=["attention", "placement"],
        baseline={"attention": "none"},
        bootstrap={"replicates": 10_000, "confidence": 0.95, "seed": 0},
        claims=[make_claim("supported", 0.012), make_claim("contradicted", -0.012), make_claim("undecided", 0.001)],
        rows=drawn,
        examples=_make_examples(drawn, directory, generator),
        environment={
            "devices": ["Some GPU"],
            "packages": {"ema-seg": ["0.2.0"], "torch": ["2.14.1"], "timm": ["1.0.30", "1.0.31"]},
            "python": ["3.12.1"],
            "commits": ["a" * 40 + " with changes"],
        },
        notes=[
            f"cbam, decoder: 2 of 3 seeds; seed 2 failed: {FAILURE}",
            "With one seed, the interval covers the images alone: it says nothing about training anew, and there is "
            "no p.",
        ],
    )


def _make_row(plan: tuple[str, str, float, float, float], classes: list[str], generator: np.random.Generator) -> Row:
    attention, placement, effect, speed, parameters = plan
    label = "none" if attention == "none" else f"{attention}, {placement}"
    baseline = attention == "none"
    jobs = [Job(seed=seed, state="finished", run=f"{label}/{seed}", reason=None) for seed in SEEDS]
    if attention == "cbam":
        jobs[2].update(state="failed", reason=FAILURE)
    elif attention == "coord":
        for job in jobs[1:]:
            job.update(state="missing", run=None)
    elif attention == "gam":
        for job in jobs:
            job.update(state="impossible", reason="attention.rate=4 does not divide 18 channels.")
    seeds = [job["seed"] for job in jobs if job["state"] == "finished"]
    base = 0.70 + effect / 100
    difference = None if baseline else effect
    return Row(
        label=label,
        settings={"attention": attention, "placement": placement},
        baseline=baseline,
        jobs=jobs,
        seeds=seeds,
        score=_summary(base + generator.normal(0, 0.004, len(seeds))),
        contrast=_contrast(difference, len(seeds), 0.6, generator, holm=True),
        spread=Spread(seeds=1e-5, images=1e-6, interaction=1e-6, n=3, degrees=2, of_images=101)
        if len(seeds) > 1 and not baseline else None,
        seeds_to_decide=14 if attention == "se" else None,
        classes={
            name: _score(name != "never seen", difference, base, len(seeds), 1.5, generator) for name in classes
        },
        strata={name: _score(True, difference, base + shift, len(seeds), 0.8, generator)
                for name, shift in zip(STRATA, (-0.3, -0.1, 0.1), strict=True)},
        further={name: _score(True, difference, base - 0.2, len(seeds), 0.6, generator) for name in MEASURES},
        cost={
            "images_per_second": _summary(speed + generator.normal(0, 0.6, len(seeds))),
            "latency": _summary(8 / speed + generator.normal(0, 0.001, len(seeds))),
            "memory": _summary(np.full(len(seeds), 300 * 2**20 + effect * 2**24)),
            "parameters": _summary(np.full(len(seeds), 1e6 * parameters)),
            "gmacs": _summary(np.full(len(seeds), 3.14 + parameters / 10)),
            "reference": _summary(np.full(len(seeds), 0.004)),
        },
        cost_batch_size=8 if seeds else None,
        slowed=attention == "cbam",
        curves=_curves(base, generator) if seeds else {},
    )  # fmt: skip


def _summary(values: NDArray[np.floating]) -> Summary:
    return Summary(
        mean=float(values.mean()) if values.size else None,
        sd=float(values.std(ddof=1)) if values.size > 1 else None,
        n=values.size,
        values=values.tolist(),
    )


def _contrast(
    effect: float | None, seeds: int, spread: float, generator: np.random.Generator, holm: bool = False
) -> Contrast | None:
    """Make a contrast of ``effect`` points; its half-width is about ``spread``, more for two seeds, less for one."""
    if effect is None or not seeds:
        return None
    half = (spread + abs(generator.normal(0, spread / 3))) * (1.5 if seeds == 2 else 0.8 if seeds == 1 else 1) / 100
    difference = effect / 100
    p = min(2 * float(np.exp(-2 * abs(difference) / half)), 1) if seeds > 1 else None
    return Contrast(
        baseline="none",
        difference=difference,
        of_images=1e-6,
        low=difference - half,
        high=difference + half,
        n=seeds,
        covers="seeds and images" if seeds > 1 else "images",
        p=p,
        p_holm=None if p is None or not holm else min(4 * p, 1),
    )


def _score(
    occurs: bool, effect: float | None, base: float, seeds: int, spread: float, generator: np.random.Generator
) -> dict[str, Any]:
    if not occurs:
        return {"score": Summary(mean=None, sd=None, n=0, values=[None] * seeds), "contrast": None}
    own = None if effect is None else effect + float(generator.normal(0, spread))
    values = np.clip(base + generator.normal(0, 0.01, seeds), 0, 1)
    return {"score": _summary(values), "contrast": _contrast(own, seeds, spread, generator)}


def _curves(base: float, generator: np.random.Generator) -> dict[str, Curve]:
    epochs = np.arange(EPOCHS)
    noise = np.abs(generator.normal(0, 0.01, (2, EPOCHS)))
    means = {"val/miou": base * (1 - np.exp(-(epochs + 2) / 6)), "train/loss": 0.2 + (1 - base) * 5 / (epochs + 3)}
    return {
        name: Curve(
            epoch=epochs.tolist(),
            mean=mean.tolist(),
            low=(mean - noise[0]).tolist(),
            high=(mean + noise[1]).tolist(),
        )
        for name, mean in means.items()
    }


def _make_examples(rows: list[Row], directory: Path, generator: np.random.Generator) -> list[Disagreement]:
    """Make the best and the worst example of each row with a difference; rows share the pictures of an image."""
    examples = []
    for kind, name, difference in (("best", "0016E5_07959", 0.123), ("worst", "night/<0001>&", -0.087)):
        truth = _street(generator)
        photograph = np.array(PALETTE, float)[truth] * 0.6 + 60 + generator.normal(0, 12, (*truth.shape, 1))
        folder = directory / "examples" / kind
        folder.mkdir(parents=True, exist_ok=True)
        pictures = {
            "image": photograph.clip(0, 255).astype(np.uint8),
            "truth": colourise(truth, PALETTE),
            "baseline": colourise(_err(truth, 9, generator), PALETTE),
        }
        for key, picture in pictures.items():
            Image.fromarray(picture).save(folder / f"{key}.png")
        for index, row in enumerate(rows):
            if row["contrast"] is None:
                continue
            Image.fromarray(colourise(_err(truth, 4, generator), PALETTE)).save(folder / f"{index}.png")
            files = {key: f"examples/{kind}/{key}.png" for key in pictures}
            examples.append(
                Disagreement(
                    row=row["label"],
                    baseline="none",
                    kind=kind,
                    name=name,
                    seed=0,
                    difference=difference,
                    files={**files, "prediction": f"examples/{kind}/{index}.png"},
                )
            )
    return examples


def _street(generator: np.random.Generator) -> NDArray[np.uint8]:
    """Draw the class ids of a street: sky above houses, a road with cars, poles and a tree."""
    mask = np.zeros((160, 240), np.uint8)
    for left in range(0, 240, 30):
        mask[int(generator.integers(25, 70)) :, left : left + 30] = 1
    rows, columns = np.mgrid[:160, :240]
    mask[100:] = 4
    mask[(rows > 95) & (abs(columns - 120) < 2.2 * (rows - 90))] = 3
    mask[(rows - 55) ** 2 + (columns - 205) ** 2 < 26**2] = 5
    for left in (40, 180):
        mask[40:125, left : left + 3] = 2
    for left in generator.integers(70, 150, 2):
        mask[98:122, left : left + 34] = 8
    return mask


def _err(mask: NDArray[np.uint8], patches: int, generator: np.random.Generator) -> NDArray[np.uint8]:
    """Return the mask with wrong patches and shifted outlines."""
    wrong = np.roll(mask, generator.integers(-2, 3, 2), (0, 1))
    for top, left in zip(generator.integers(20, 130, patches), generator.integers(0, 210, patches), strict=True):
        wrong[top : top + 18, left : left + 26] = generator.integers(0, 9)
    return wrong
