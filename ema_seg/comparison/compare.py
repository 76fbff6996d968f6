"""Comparison of runs: rows, differences with confidence intervals, costs, curves and notes.

Reading, statistics and tables need neither torch nor Matplotlib, so that a hundred reports are compared in seconds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ema_seg.comparison.claims import judge_claims
from ema_seg.comparison.configurations import Configuration, find_baselines, group_runs, has_settings
from ema_seg.comparison.costs import COSTS
from ema_seg.comparison.further import compare_further
from ema_seg.comparison.power import MOST_SEEDS, seeds_needed, split_variance
from ema_seg.comparison.runs import Result, Run, Runs
from ema_seg.comparison.schema import SIZES, SLOWED, Comparison, Contrast, Curve, Disagreement, Job, Row, Spread
from ema_seg.comparison.statistics import as_contrast, correct_contrasts, summarise
from ema_seg.evaluation.intervals import (
    add_groups,
    add_whole,
    draw_weights,
    estimate_difference,
    score_sums,
    weigh_counts,
)
from ema_seg.reporting.tables import mean_of_known
from ema_seg.runtime.errors import ConfigError, DataError
from ema_seg.sweeps import setting_text

__all__ = [
    "CONFIDENCE",
    "REPLICATES",
    "SCHEMA",
    "Match",
    "Matches",
    "compare_matches",
    "compare_runs",
    "match_runs",
]

SCHEMA = "ema-seg.comparison/2"
REPLICATES = 10_000
CONFIDENCE = 0.95

Array = NDArray[np.float64]

# Runs whose reference computation took so much longer than another's were not measured on the same machine.
_SAME_SPEED = 1.1
# Name at most this many rows in a note, such as the trials of a search; count the rest.
_MAX_NAMED_ROWS = 5
# Reserved group names: object sizes, and names whose CSV column would be one of the mIoU's, such as ``miou_sd``.
_TAKEN_NAMES = {*SIZES, "sd", "difference", "low", "high", "n", "covers", "p", "p_holm"}
# Settings that must agree for costs to be comparable, by their names in the notes.
_COST_SETTINGS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "device": lambda report: report["throughput"]["device"],
    "number of CPU threads": lambda report: report["environment"]["threads"],
    "precision": lambda report: report["throughput"]["precision"],
    "compilation": lambda report: report["throughput"].get("compiled"),
    "memory layout": lambda report: report["throughput"]["memory_format"],
    "image size": lambda report: report["throughput"]["size"],
    "batch size": lambda report: report["throughput"]["forward"][-1]["batch_size"],
}


@dataclass(frozen=True)
class Match:
    """A configuration with its results by seed, and its baseline.

    Attributes:
        configuration: settings, label and all runs.
        results: one result for each finished seed, in the order of the seeds.
        baseline: the configuration it is compared with; None for a baseline, or where no comparison is possible.
        is_baseline: whether it is the baseline of another configuration.
    """

    configuration: Configuration
    results: Mapping[int | None, Result]
    baseline: "Match | None"
    is_baseline: bool

    @property
    def label(self) -> str:
        """The configuration's label."""
        return self.configuration.label

    @property
    def common_seeds(self) -> list[int | None]:
        """Seeds that it and its baseline have both finished."""
        return [] if self.baseline is None else [seed for seed in self.results if seed in self.baseline.results]


class Matches(NamedTuple):
    """Runs as rows of a comparison.

    Attributes:
        settings: the keys that differ.
        baseline: the settings that name the baseline, or None.
        rows: the configurations, baselines first.
        notes: sentences for the reader.
    """

    settings: list[str]
    baseline: dict[str, str] | None
    rows: list[Match]
    notes: list[str]


def match_runs(runs: Runs, baseline: Mapping[str, str] | None = None) -> Matches:
    """Group runs into configurations and find their baselines.

    Args:
        runs: see ``ema_seg.comparison.runs``.
        baseline: settings that name the baseline. The default is the first of runs that were named one by one, else the
            sweep's baseline, else ``attention=none`` if a configuration has it.

    Raises:
        ConfigError: no configuration has the baseline's settings, or runs that were named one by one all have the same.
        DataError: the reports are not of the same images and classes.
    """
    _require_same_data([run.result for run in runs.runs if run.result is not None])
    notes = list(runs.notes)
    # Runs that were named one by one have no overrides to group by: they may come from several sweeps.
    settings, configurations = group_runs(runs.runs)
    if runs.folder is None and len(configurations) == 1 and len(runs.runs) > 1:
        named = " and ".join(str(run.folder) for run in runs.runs)
        raise ConfigError(
            f"{named}: these runs have the same settings; at most the seed and the evaluation differ; name runs of two "
            "configurations."
        )
    chosen = dict(baseline) if baseline else _default_baseline(runs, settings, configurations)
    if chosen is None:
        bases: list[Configuration | None] = [None] * len(configurations)
        if len(configurations) > 1:
            notes.append("No differences: no baseline is known; name one with --baseline key=value.")
    else:
        bases = find_baselines(configurations, chosen)
    results = [_results_by_seed(configuration, notes) for configuration in configurations]
    compared_with = {base.label for base in bases if base is not None}
    matches: dict[str, Match] = {}
    # Baselines first: the matches of the others refer to theirs.
    for index, configuration in sorted(enumerate(configurations), key=lambda item: item[1].label not in compared_with):
        base, label = bases[index], configuration.label
        # A configuration whose runs differ in more than the seed has no meaningful mean.
        comparable = base is not None and not base.mixed_keys and not configuration.mixed_keys
        baseline_match = matches[base.label] if base is not None and comparable else None
        matches[label] = Match(configuration, results[index], baseline_match, is_baseline=label in compared_with)
    matched = list(matches.values())
    notes += _notes_on_matches(matched, chosen)
    return Matches(settings, chosen, matched, notes)


def compare_runs(
    runs: Runs,
    *,
    baseline: Mapping[str, str] | None = None,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Comparison:
    """Compare runs: ``match_runs`` and ``compare_matches`` in one."""
    return compare_matches(runs, match_runs(runs, baseline), replicates=replicates, seed=seed)


def compare_matches(runs: Runs, matches: Matches, *, replicates: int = REPLICATES, seed: int = 0) -> Comparison:
    """Compute the scores, differences, costs and notes of a comparison.

    Args:
        runs: see ``ema_seg.comparison.runs``.
        matches: result of ``match_runs`` for these runs.
        replicates: number of bootstrap replicates over images, see ``ema_seg.evaluation.intervals``.
        seed: seed of the bootstrap.

    Returns:
        The content of ``comparison.json``, whose ``examples`` have no files yet: see ``ema_seg.comparison.pictures``.

    Raises:
        ConfigError: a group of classes has a reserved name.
        DataError: the reports are of a single image.
    """
    settings, baseline, rows_matched, notes = matches
    results = [result for match in rows_matched for result in match.results.values()]
    first = results[0]
    if len(first.names) < 2:
        raise DataError(f"{first.path}: a confidence interval needs at least 2 images, got 1; use a larger split.")
    groups = _groups(runs.groups, first.report["classes"])
    sequential = runs.until is not None
    contrasts = _contrasts(rows_matched, list(groups.values()), replicates, seed, sequential)
    measures, further, further_notes = compare_further(
        rows_matched, replicates, seed, CONFIDENCE, sequential=sequential
    )
    rows = [
        _row(match, contrasts.get(match.label), further[match.label], first, runs.folder, groups)
        for match in rows_matched
    ]
    correct_contrasts([row["contrast"] for row in rows])
    for row in rows:
        row["seeds_to_decide"] = _seeds_to_decide(row)
    if len({result.report["throughput"]["device"] for result in results}) == 1:
        _mark_slowed(rows)
    claims = []
    if runs.claims and baseline == runs.baseline:
        claims = judge_claims(runs.claims, rows, rows_matched, measures, runs.metric, sequential=sequential)
    elif runs.claims:
        notes = [*notes, "The sweep's claims are not judged, because they are about another baseline."]
    notes = [
        *notes,
        *_notes_on_stopping(runs.until),
        *further_notes,
        *_notes_on_groups(runs.groups, first.report["classes"]),
        *_notes_on_undecided(rows),
        *_notes_on_costs(results),
        *_notes_on_speed(rows),
        *_notes_on_code(results),
    ]
    return Comparison(
        schema=SCHEMA,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        title=runs.title,
        folder=None if runs.folder is None else str(runs.folder),
        data={"name": first.report["data"]["name"], "split": first.report["data"]["split"], "images": len(first.names)},
        classes=list(first.report["classes"]),
        palette=[list(colour) for colour in first.report["palette"]],
        metric=runs.metric,
        strata={
            **first.report["strata"],
            **{name: ", ".join(first.report["classes"][index] for index in group) for name, group in groups.items()},
        },
        measures=measures,
        settings=settings,
        baseline=baseline,
        bootstrap={"replicates": replicates, "confidence": CONFIDENCE, "seed": seed},
        claims=claims,
        rows=rows,
        examples=[example for match in rows_matched for example in _disagreements(match)],
        environment=_environment(results),
        notes=notes,
    )


def _seeds_to_decide(row: Row) -> int | None:
    contrast, spread = row["contrast"], row["spread"]
    if contrast is None or spread is None or _is_decided(contrast):
        return None
    return seeds_needed(contrast["difference"], spread, confidence=CONFIDENCE)


def _default_baseline(
    runs: Runs, settings: Sequence[str], configurations: Sequence[Configuration]
) -> dict[str, str] | None:
    if runs.folder is None:
        return {key: setting_text(value) for key, value in configurations[0].settings.items()} or None
    for candidate in (runs.baseline, {"attention": "none"}):
        if (
            candidate
            and all(key in settings for key in candidate)
            and any(has_settings(configuration, candidate) for configuration in configurations)
        ):
            return dict(candidate)
    return None


def _require_same_data(results: Sequence[Result]) -> None:
    """Raise a DataError that names two reports and their difference if the reports are not of the same data."""
    aspects: dict[str, Callable[[Result], Any]] = {
        "the data set": lambda result: result.report["data"]["name"],
        "the split": lambda result: result.report["data"]["split"],
        "the classes": lambda result: result.report["classes"],
        "the number of images": lambda result: len(result.names),
        "the names of the images": lambda result: result.names,
        "the limits of the object sizes": lambda result: result.report["strata"],
        # Row sums of the confusion matrix: the true pixels of each class.
        "the labels of the images": lambda result: [sum(row) for row in result.report["confusion_matrix"]],
    }
    for one, other in pairwise(results):
        for name, aspect in aspects.items():
            values = [aspect(result) for result in (one, other)]
            if values[0] != values[1]:
                found = f", got {values[0]} and {values[1]}" if isinstance(values[0], str | int) else ""
                raise DataError(
                    f"{one.path} and {other.path}: must agree in {name}{found}; evaluate both on the same data."
                )


def _results_by_seed(configuration: Configuration, notes: list[str]) -> dict[int | None, Result]:
    """Return a configuration's results by seed; keep the latest of several with one seed and add a note."""
    results: dict[int | None, Result] = {}
    for run in configuration.runs:
        if run.result is None:
            continue
        earlier = results.get(run.seed)
        if earlier is not None:
            kept, left = sorted((earlier, run.result), key=lambda result: result.report["created"], reverse=True)
            notes.append(
                f"{configuration.label}: seed {run.seed} twice; used {kept.path}, not the earlier {left.path}."
            )
            results[run.seed] = kept
        else:
            results[run.seed] = run.result
    return results


def _groups(named: Mapping[str, Sequence[str]], classes: Sequence[str]) -> dict[str, list[int]]:
    """Return the class indices of each group, without groups that have no class in the data."""
    for group in named:
        if group in _TAKEN_NAMES:
            raise ConfigError(f"sweep.groups.{group}: the name is reserved; choose another.")
    places = {name: index for index, name in enumerate(classes)}
    groups = {group: [places[name] for name in names if name in places] for group, names in named.items()}
    return {group: members for group, members in groups.items() if members}


def _contrasts(
    matches: Sequence[Match], groups: Sequence[Sequence[int]], replicates: int, seed: int, sequential: bool
) -> dict[str, tuple[list[list[Contrast | None]], Spread | None]]:
    """Compute the contrasts of every configuration that shares a seed with its baseline.

    Returns:
        By label: a list for the whole image and one for each stratum, of the contrasts of the mean, of each class and
        of each group of classes; and the variances of the first of them.
    """
    pairs = [match for match in matches if match.common_seeds]
    if not pairs:
        return {}
    needed: dict[int, Result] = {}
    for match in pairs:
        for side in (match, match.baseline):
            needed |= {id(side.results[key]): side.results[key] for key in match.common_seeds} if side else {}
    # All runs in one matrix product: many small ones take several times as long on a busy machine.
    counts = np.stack([result.counts for result in needed.values()], axis=1).astype(float)
    full = add_groups(score_sums(add_whole(counts.sum(axis=0))), groups)
    places = {key: place for place, key in enumerate(needed)}
    spreads = {match.label: _DifferenceVariance(match, places, full, sequential) for match in pairs}
    for weights in draw_weights(len(counts), replicates, seed):
        scores = add_groups(score_sums(add_whole(weigh_counts(weights, counts))), groups)
        for spread in spreads.values():
            spread.add(scores)
    union = counts[:, :, :, 1] > 0  # (images, runs, strata, K)
    return {
        label: (spread.contrasts(_count_images(union[:, spread.runs], groups)), spread.split(len(counts)))
        for label, spread in spreads.items()
    }


def _count_images(union: NDArray[np.bool_], groups: Sequence[Sequence[int]]) -> NDArray[np.intp]:
    """Count the images behind each score: those with a pixel of its classes in the truth or a prediction.

    Args:
        union: whether a class has such a pixel, (images, runs, strata, K).
        groups: class indices of each group.

    Returns:
        The counts (1 + strata, 1 + K + groups): for the whole and each stratum, of the mean, each class and each group.
    """
    any_of = np.logical_or.reduce
    strata = any_of(union, axis=1)
    parts = np.concatenate([any_of(strata, axis=1, keepdims=True), strata], axis=1)  # (images, 1 + strata, K)
    columns = [any_of(parts, axis=-1), *np.moveaxis(parts, -1, 0)]
    columns += [any_of(parts[..., list(group)], axis=-1) for group in groups]
    return np.stack(columns, axis=-1).sum(axis=0)


class _DifferenceVariance:
    """Accumulator of the variance over replicates of the difference between a configuration and its baseline."""

    def __init__(self, match: Match, places: Mapping[int, int], full: Array, sequential: bool) -> None:
        """Start from the scores of all images, (runs, 1 + strata, 1 + K + groups), and each result's index there."""
        assert match.baseline is not None
        self._baseline = match.baseline.label
        self._sequential = sequential
        self._ours = [places[id(match.results[key])] for key in match.common_seeds]
        self._theirs = [places[id(match.baseline.results[key])] for key in match.common_seeds]
        self.runs = [*self._ours, *self._theirs]
        self._differences = self._subtract(full)  # (n, 1 + strata, 1 + K + groups)
        # A class without a score at one seed is averaged over the other seeds.
        self._valid = np.isfinite(self._differences)
        self._count = self._valid.sum(axis=0)
        self._mean = self._over_seeds(self._differences)
        self._replicates = np.zeros(self._mean.shape)
        self._sum = np.zeros(self._mean.shape)
        self._squares = np.zeros(self._mean.shape)
        self._own: list[Array] = []  # the score of the whole at each seed, (r, n)

    def add(self, scores: Array) -> None:
        """Add the scores of r replicates, (r, runs, 1 + strata, 1 + K + groups)."""
        # Centred at the difference over all images, so that the variance below does not suffer from cancellation.
        differences = self._subtract(scores)
        self._own.append(differences[:, :, 0, 0])
        deviation = self._over_seeds(differences) - self._mean
        defined = np.isfinite(deviation)  # a replicate may lack a rare class
        deviation[~defined] = 0
        self._replicates += defined.sum(axis=0)
        self._sum += deviation.sum(axis=0)
        self._squares += (deviation**2).sum(axis=0)

    def contrasts(self, images: NDArray[np.intp]) -> list[list[Contrast | None]]:
        """Return the contrasts of the whole and each stratum: of the mean, each class and each group.

        Args:
            images: number of images behind each score. Below two there is no interval, and the contrast is None.
        """
        used = np.maximum(self._replicates, 2)
        variance = np.maximum(self._squares - self._sum**2 / used, 0) / (used - 1)
        groups, scores = self._mean.shape
        return [
            [self._contrast((group, score), variance, images) for score in range(scores)] for group in range(groups)
        ]

    def split(self, images: int) -> Spread | None:
        """Return the variances of the difference of the mean over the whole; None for fewer than two seeds."""
        seeds = len(self._ours)
        own = np.concatenate(self._own)
        own = own[np.isfinite(own).all(axis=1)]
        if seeds < 2 or len(own) < 2 or not self._valid[:, 0, 0].all():
            return None
        between = float(np.var(self._differences[:, 0, 0], ddof=1))
        of_mean, of_seeds = float(np.var(own.mean(axis=1), ddof=1)), float(np.var(own, axis=0, ddof=1).mean())
        return split_variance(between, of_mean, of_seeds, seeds, images)

    def _contrast(self, place: tuple[int, int], variance: Array, images: NDArray[np.intp]) -> Contrast | None:
        if not self._count[place] or images[place] < 2:
            return None
        values = self._differences[:, *place][self._valid[:, *place]]
        of_images = float(variance[place])
        estimate = estimate_difference(values, of_images, int(images[place]), CONFIDENCE, sequential=self._sequential)
        return as_contrast(estimate, self._baseline, len(values), of_images)

    def _subtract(self, scores: Array) -> Array:
        return scores[..., self._ours, :, :] - scores[..., self._theirs, :, :]

    def _over_seeds(self, differences: Array) -> Array:
        with np.errstate(invalid="ignore"):
            return np.where(self._valid, differences, 0).sum(axis=-3) / self._count


def _row(
    match: Match,
    compared: tuple[list[list[Contrast | None]], Spread | None] | None,
    further: dict[str, dict[str, Any]],
    first: Result,
    folder: Path | None,
    groups: Mapping[str, Sequence[int]],
) -> Row:
    contrasts, spread = compared or (None, None)
    contrast = contrasts[0][0] if contrasts else None
    results = list(match.results.values())
    reports = [result.report for result in results]
    classes, strata = first.report["classes"], list(first.report["strata"])
    batches = {report["throughput"]["forward"][-1]["batch_size"] for report in reports}
    return Row(
        label=match.label,
        settings=match.configuration.settings,
        baseline=match.is_baseline,
        jobs=[_job(run, folder) for run in match.configuration.runs],
        seeds=list(match.results),
        score=summarise(report["miou"] for report in reports),
        contrast=contrast,
        spread=spread,
        seeds_to_decide=None,
        classes={
            name: {
                "score": summarise(report["iou"][index] for report in reports),
                "contrast": contrasts[0][1 + index] if contrasts else None,
            }
            for index, name in enumerate(classes)
        },
        strata={
            name: {
                "score": summarise(report["size_miou"][name] for report in reports),
                "contrast": contrasts[1 + index][0] if contrasts else None,
            }
            for index, name in enumerate(strata)
        }
        | {
            name: {
                "score": summarise(mean_of_known([report["iou"][index] for index in group]) for report in reports),
                "contrast": contrasts[0][1 + len(classes) + place] if contrasts else None,
            }
            for place, (name, group) in enumerate(groups.items())
        },
        further=further,
        cost={name: summarise(cost(report) for report in reports) for name, cost in COSTS.items()},
        cost_batch_size=batches.pop() if len(batches) == 1 else None,
        slowed=False,
        curves=_curves([report["curves"] for report in reports if report["curves"]]),
    )


def _job(run: Run, folder: Path | None) -> Job:
    path = run.folder
    if folder is not None and path.is_relative_to(folder):
        path = path.relative_to(folder)
    return Job(seed=run.seed, state=run.state, run=str(path), reason=run.reason)


def _curves(runs: Sequence[Mapping[str, Sequence[float | None]]]) -> dict[str, Curve]:
    """Return the curve of each column but the epoch, at the epochs that all runs with the column have.

    Where some runs have ended, the mean over the others would jump for no reason in the training.
    """
    points: dict[str, dict[int, list[float]]] = {}
    for columns in runs:
        for name, values in columns.items():
            for epoch, value in zip(columns["epoch"], values, strict=True):
                if name != "epoch" and epoch is not None and value is not None:
                    points.setdefault(name, {}).setdefault(int(epoch), []).append(value)
    curves = {}
    for name, by_epoch in points.items():
        number = max(map(len, by_epoch.values()))
        epochs = sorted(epoch for epoch, values in by_epoch.items() if len(values) == number)
        curves[name] = Curve(
            epoch=epochs,
            mean=[float(np.mean(by_epoch[epoch])) for epoch in epochs],
            low=[min(by_epoch[epoch]) for epoch in epochs],
            high=[max(by_epoch[epoch]) for epoch in epochs],
        )
    return curves


def _disagreements(match: Match) -> list[Disagreement]:
    """Return the image on which a configuration gains most over its baseline and the one on which it loses most."""
    seeds = match.common_seeds
    if match.baseline is None or not seeds:
        return []
    gains = np.mean([match.results[seed].miou - match.baseline.results[seed].miou for seed in seeds], axis=0)
    defined = np.flatnonzero(np.isfinite(gains))
    if not len(defined):
        return []
    best, worst = defined[gains[defined].argmax()], defined[gains[defined].argmin()]
    return [
        Disagreement(
            row=match.label,
            baseline=match.baseline.label,
            kind=kind,
            name=match.results[seeds[0]].names[index],
            seed=seeds[0],
            difference=float(gains[index]),
            files=dict.fromkeys(("image", "truth", "prediction", "baseline")),
        )
        for kind, index, shows in (("best", best, gains[best] > 0), ("worst", worst, gains[worst] < 0))
        if shows
    ]


def _environment(results: Sequence[Result]) -> dict[str, Any]:
    environments = [result.report["environment"] for result in results]
    packages: dict[str, list[str]] = {}
    for environment in environments:
        for name, version in environment["packages"].items():
            if version is not None and version not in packages.setdefault(name, []):
                packages[name].append(version)
    return {
        "devices": list(dict.fromkeys(result.report["throughput"]["device"] for result in results)),
        "packages": {name: versions for name, versions in packages.items() if versions},
        "python": list(dict.fromkeys(environment["python"] for environment in environments)),
        "commits": list(dict.fromkeys(filter(None, map(_commit, environments)))),
    }


def _commit(environment: Mapping[str, Any]) -> str | None:
    git = environment["git"]
    return git and git["commit"] + (" with changes" if git["dirty"] else "")


def _notes_on_matches(matches: Sequence[Match], baseline: Mapping[str, str] | None) -> list[str]:
    notes: list[str] = []
    alone: list[str] = []
    mixed_bases = any(match.is_baseline and match.configuration.mixed_keys for match in matches)
    for match in matches:
        runs = match.configuration.runs
        unfinished = [run for run in runs if run.result is None]
        if unfinished:
            told = "; ".join(_tell(unfinished))
            notes.append(f"{match.label}: {len(runs) - len(unfinished)} of {len(runs)} seeds; {told}.")
        if match.configuration.mixed_keys:
            notes.append(
                f"{match.label}: its runs have the same overrides in the sweep, but differ in more than the seed: "
                f"{', '.join(match.configuration.mixed_keys)}. No difference is computed to it or from it."
            )
        elif match.baseline is None:
            if baseline and match.results and not has_settings(match.configuration, baseline):
                alone.append(match.label)
        elif match.results and not match.common_seeds:
            notes.append(f"{match.label}: no difference, because it and {match.baseline.label} share no finished seed.")
        else:
            apart = match.results.keys() ^ match.baseline.results.keys() if match.results else set()
            if apart:
                notes.append(
                    f"{match.label}: the difference to {match.baseline.label} is over the seeds that both have, "
                    f"without {_seeds([str(seed) for seed in sorted(apart, key=_order)])}."
                )
    if alone:
        shown = "; ".join(alone[:_MAX_NAMED_ROWS]) + (
            f" and {len(alone) - _MAX_NAMED_ROWS} more" if len(alone) > _MAX_NAMED_ROWS else ""
        )
        usable = " whose runs agree" if mixed_bases else ""
        notes.append(f"{shown}: no difference, because no baseline{usable} has the same other settings.")
    if any(len(match.common_seeds) == 1 for match in matches):
        notes.append(
            "With one seed, the interval covers the images alone: it says nothing about training anew, and there is "
            "no p."
        )
    return notes


def _tell(runs: Sequence[Run]) -> list[str]:
    """Describe unfinished runs, grouped by state and reason."""
    fates: dict[str, list[str]] = {}
    for run in runs:
        fate = run.state + (f": {run.reason.rstrip('.')}" if run.reason else "")
        fates.setdefault(fate, []).append("unknown" if run.seed is None else str(run.seed))
    return [f"{_seeds(seeds)} {fate}" for fate, seeds in fates.items()]


def _order(seed: int | None) -> int:
    return -1 if seed is None else seed


def _seeds(seeds: Sequence[str]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}"


def _notes_on_stopping(until: float | None) -> list[str]:
    if until is None:
        return []
    return [
        f"Seeds were added until a 95 % interval of the mIoU was at most {until:g} points to each side. Intervals of "
        "scores are computed at 98 % and their p-values multiplied by 2.5, so that they hold under this stopping."
    ]


def _notes_on_undecided(rows: Sequence[Row]) -> list[str]:
    undecided = [row for row in rows if row["spread"] and row["contrast"] and not _is_decided(row["contrast"])]
    if not undecided:
        return []
    parts = [f"{row['label']}: {row['seeds_to_decide'] or f'more than {MOST_SEEDS}'}" for row in undecided]
    named = "; ".join(parts[:_MAX_NAMED_ROWS])
    more = f"; {len(parts) - _MAX_NAMED_ROWS} more" if len(parts) > _MAX_NAMED_ROWS else ""
    return [
        "Undecided, with the number of seeds that would show the observed difference with a probability of 80 % if it "
        f"were the true one, without Holm's correction: {named}{more}. ema-seg plan has the details."
    ]


def _is_decided(contrast: Contrast) -> bool:
    return contrast["low"] > 0 or contrast["high"] < 0


def _notes_on_groups(named: Mapping[str, Sequence[str]], classes: Sequence[str]) -> list[str]:
    notes = []
    for group, names in named.items():
        absent = [name for name in names if name not in classes]
        if len(absent) == len(names):
            notes.append(f"{group}: not scored, because the data has none of its classes ({', '.join(absent)}).")
        elif absent:
            notes.append(f"{group}: without {', '.join(absent)}, which the data does not have.")
    return notes


def _notes_on_costs(results: Sequence[Result]) -> list[str]:
    notes = []
    for name, value in _COST_SETTINGS.items():
        found = list(dict.fromkeys(setting_text(value(result.report)) for result in results))
        if len(found) > 1:
            notes.append(f"Not all costs were measured with the same {name} ({', '.join(found)}): compare with care.")
    launchers = {(result.report["job"] or {}).get("launcher", "serial") for result in results} - {"serial"}
    if launchers:
        notes.append(
            f"Costs were measured while other jobs may have used the same machine (launcher {', '.join(launchers)}); "
            "measure them again with eval.py, one run after the other."
        )
    return notes


def _mark_slowed(rows: Sequence[Row]) -> None:
    """Mark the rows beside whose costs the reference computation was slower than beside others."""
    known = [value for row in rows for value in row["cost"]["reference"]["values"] if value is not None]
    for row in rows:
        own = [value for value in row["cost"]["reference"]["values"] if value is not None]
        row["slowed"] = any(value > _SAME_SPEED * min(known) for value in own)


def _notes_on_speed(rows: Sequence[Row]) -> list[str]:
    """Return a note if the machine was faster for some rows than for others."""
    known = [value for row in rows for value in row["cost"]["reference"]["values"] if value is not None]
    if not any(row["slowed"] for row in rows):
        return []
    return [
        f"The machine was not the same for all costs: beside them a reference computation took {1e3 * min(known):.3g} "
        f"to {1e3 * max(known):.3g} ms. Rows over {100 * (_SAME_SPEED - 1):.0f} % slower than the fastest are "
        f"marked with {SLOWED}; ema-seg compare … remeasure=true measures all costs again, in turns."
    ]


def _notes_on_code(results: Sequence[Result]) -> list[str]:
    commits = _environment(results)["commits"]
    if len(commits) > 1:
        return [f"The runs were evaluated by {len(commits)} states of the code: {', '.join(commits)}."]
    return []
