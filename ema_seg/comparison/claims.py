"""Claims of a sweep, judged by its comparison.

A claim says that some rows do better, or worse, than their baseline. Its evidence is differences with the sign turned
so that a positive one supports the claim. Each difference is judged by its two-sided p-value, after Holm's correction
over the claim's evidence, and the claim by all of them: it is *supported* if each supports it, *contradicted* if one
contradicts it, and otherwise *undecided*. Numbers that are given for the context decide nothing.

Evidence is of four kinds. Scores: the contrasts of the comparison. Costs and curves: the relative difference, of the
paired t-test of its logarithm over seeds; the number of parameters and of operations has no variance. Interventions:
what the trained model loses if its weights are changed, from the runs' ``analysis/analysis.json``, see
``ema_seg.analysis``.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from ema_seg.analysis.schema import load_analysis
from ema_seg.comparison.configurations import has_settings
from ema_seg.comparison.costs import COSTS
from ema_seg.comparison.power import seeds_needed
from ema_seg.comparison.schema import Claim, Contrast, Evidence, Measure, Row, Spread
from ema_seg.comparison.statistics import adjust_holm
from ema_seg.evaluation.intervals import estimate_difference
from ema_seg.runtime.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from ema_seg.comparison.compare import Match

__all__ = ["SIGNIFICANT", "judge_claims"]

SIGNIFICANT = 0.05
"""Significance level, after Holm's correction."""

_COSTS = {"parameters": "parameters", "gmacs": "GMACs", "latency": "latency", "memory": "peak memory"}
_EXACT = ("parameters", "gmacs")
_KINDS = ("scores", "costs", "curves", "interventions")


def judge_claims(
    claims: Sequence[Mapping[str, Any]],
    rows: Sequence[Row],
    matches: Sequence["Match"],
    measures: Mapping[str, Measure],
    metric: str,
) -> list[Claim]:
    """Judge the claims of a sweep.

    Args:
        claims: see ``ema_seg.config.SweepClaim``.
        rows: the rows of the comparison.
        matches: the runs of each row, in the same order.
        measures: the comparison's scores beyond the mIoU.
        metric: name of the comparison's score.

    Raises:
        ConfigError: a claim names a score, a cost or a column that does not exist.
    """
    return [_Judge(claim, rows, matches, measures, metric).judge() for claim in claims]


class _Judge:
    def __init__(
        self,
        claim: Mapping[str, Any],
        rows: Sequence[Row],
        matches: Sequence["Match"],
        measures: Mapping[str, Measure],
        metric: str,
    ) -> None:
        self._claim = claim
        self._rows = list(zip(rows, matches, strict=True))
        self._by_label = {row["label"]: row for row in rows}
        self._measures = measures
        self._metric = metric
        self._missing: list[str] = []

    def judge(self) -> Claim:
        """Return the claim with its evidence and verdict."""
        claim = self._claim
        deciding = list(self._collect(claim, decides=True))
        further = {key: value for key, value in (claim.get("context") or {}).items() if value is not None}
        context = list(self._collect({**claim, **{kind: [] for kind in _KINDS}, **further}, decides=False))
        for evidence, p in zip(deciding, adjust_holm([one["p"] for one in deciding]), strict=True):
            evidence["p_holm"] = p
        for evidence in (*deciding, *context):
            evidence["verdict"] = _verdict(evidence)
        verdicts = [evidence["verdict"] for evidence in deciding]
        if "contradicted" in verdicts:
            verdict = "contradicted"
        else:
            verdict = "supported" if verdicts and set(verdicts) == {"supported"} else "undecided"
        undecided = [evidence["seeds_more"] for evidence in deciding if evidence["verdict"] == "undecided"]
        known = [seeds for seeds in undecided if seeds is not None]
        return Claim(
            claim=claim["claim"],
            verdict=verdict,
            seeds_more=max(known) if verdict == "undecided" and known and len(known) == len(undecided) else None,
            evidence=[*deciding, *context],
            missing=list(dict.fromkeys(self._missing)),
        )

    def _collect(self, given: Mapping[str, Any], decides: bool) -> Iterator[Evidence]:
        sign = 1 if given["expect"] == "better" else -1
        chosen = [pair for pair in self._rows if _is_named(pair[1], given["rows"])]
        if any(given.get(kind) for kind in _KINDS) and not chosen:
            self._missing.append(f"no row of the sweep has {_named(given['rows'])}")
        for row, match in chosen:
            base = None if match.baseline is None else self._by_label[match.baseline.label]
            if base is None or not match.common_seeds:
                self._missing.append(f"{row['label']}: no seed in common with a baseline")
                continue
            names = (row["label"], base["label"]) if sign > 0 else (base["label"], row["label"])
            contrast = f"{names[0]} over {names[1]}"
            for name in given.get("scores", []):
                yield from self._score(name, row, base, sign, contrast, decides)
            for name in given.get("costs", []):
                yield from self._cost(name, match, -sign, contrast, decides)
            for name in given.get("curves", []):
                yield from self._curve(name, match, -sign, contrast, decides)
        if given.get("interventions") and chosen:
            subjects = {match.label: match for _, match in chosen}
            subjects |= {match.baseline.label: match.baseline for _, match in chosen if match.baseline}
            for match in subjects.values():
                yield from self._interventions(given["interventions"], match, decides)

    def _score(self, name: str, row: Row, base: Row, sign: int, contrast: str, decides: bool) -> Iterator[Evidence]:
        quantity, part, base_part, better = self._find_score(name, row, base)
        if part is None or base_part is None or part["contrast"] is None:
            self._missing.append(f"{quantity} of {contrast}")
            return
        found: Contrast = part["contrast"]
        sign *= better
        low, high = sorted((sign * found["low"], sign * found["high"]))
        values = dict(zip(row["seeds"], part["score"]["values"], strict=True))
        theirs = dict(zip(base["seeds"], base_part["score"]["values"], strict=True))
        pairs = [(values[seed], theirs[seed]) for seed in values if seed in theirs]
        differences = [one - other for one, other in pairs if one is not None and other is not None]
        percent = name not in self._measures or self._measures[name]["percent"]
        yield Evidence(
            contrast=contrast,
            quantity=quantity,
            unit="points" if percent else "",
            difference=sign * found["difference"],
            low=low,
            high=high,
            n=found["n"],
            p=found["p"],
            p_holm=None,
            exact=False,
            decides=decides,
            verdict="",
            seeds_more=_more_seeds(
                differences, (high - low) / 2, row["spread"] if part["score"] is row["score"] else None
            ),
        )

    def _find_score(self, name: str, row: Row, base: Row) -> tuple[str, Any, Any, int]:
        """Return what to call a score, the row's and the baseline's values, and 1 if more is better, else -1."""
        if name == "miou":
            return self._metric, row, base, 1
        if name in self._measures:
            measure = self._measures[name]
            parts = (one["further"].get(name) for one in (row, base))
            return measure["label"], *parts, 1 if measure["higher_is_better"] else -1  # type: ignore[return-value]
        for kind, label in (("strata", f"{self._metric}, {name}"), ("classes", f"IoU, {name}")):
            if name in row[kind]:  # type: ignore[literal-required]
                return label, row[kind][name], base[kind][name], 1  # type: ignore[literal-required]
        return name, None, None, 1

    def _cost(self, name: str, match: "Match", sign: int, contrast: str, decides: bool) -> Iterator[Evidence]:
        if name not in _COSTS:
            raise ConfigError(
                f"sweep.claims: costs must be some of {', '.join(_COSTS)}, got {name!r}.{did_you_mean(name, _COSTS)}"
            )
        pairs = [tuple(COSTS[name](side.results[seed].report) for side in _sides(match)) for seed in match.common_seeds]
        known = [(ours, theirs) for ours, theirs in pairs if ours and theirs]
        if not known:
            self._missing.append(f"{_COSTS[name]} of {contrast}")
            return
        if name in _EXACT:
            known = known[:1]
        yield _relative(known, sign, contrast, f"lower {_COSTS[name]}", decides, exact=name in _EXACT)

    def _curve(self, name: str, match: "Match", sign: int, contrast: str, decides: bool) -> Iterator[Evidence]:
        """Yield the relative differences of the mean of a column over the epochs, and of its spread."""
        means, spreads = [], []
        for seed in match.common_seeds:
            columns = [_column(side.results[seed].report, name) for side in _sides(match)]
            if all(len(values) > 1 for values in columns):
                means.append(tuple(float(np.mean(values)) for values in columns))
                spreads.append(tuple(float(np.std(values) / abs(np.mean(values))) for values in columns))
        if not means:
            self._missing.append(f"{name} of {contrast} (metrics.csv)")
            return
        yield _relative(means, sign, contrast, f"lower {name}, mean over epochs", decides)
        yield _relative(spreads, sign, contrast, f"lower {name}, spread over epochs", decides)

    def _interventions(self, names: Sequence[str], match: "Match", decides: bool) -> Iterator[Evidence]:
        analyses = []
        for result in match.results.values():
            path = result.path.parent.parent / "analysis" / "analysis.json"
            if path.is_file():
                try:
                    analyses.append(load_analysis(path))
                except DataError as error:
                    self._missing.append(str(error).rstrip("."))
        if not analyses:
            self._missing.append(f"interventions on {match.label} (run ema-seg analyse run=<its run> first)")
            return
        for name in names:
            found = [difference for one in analyses if (difference := _lost(one, name)) is not None]
            if not found:
                self._missing.append(f"intervention {name} on {match.label}")
                continue
            images = analyses[0]["data"]["images"]
            freedom = float(stats.t.ppf(0.975, images - 1))
            # The same images at each seed, so that more seeds average out less than this.
            variance = float(np.mean([((one["high"] - one["low"]) / 2 / freedom) ** 2 for one in found]))
            values = [-one["difference"] for one in found]
            estimate = estimate_difference(values, variance, images)
            yield Evidence(
                contrast=f"{match.label} over itself, {name}",
                quantity="mIoU",
                unit="points",
                difference=estimate.difference,
                low=estimate.low,
                high=estimate.high,
                n=len(values),
                p=estimate.p,
                p_holm=None,
                exact=False,
                decides=decides,
                verdict="",
                seeds_more=_more_seeds(values, (estimate.high - estimate.low) / 2, None),
            )


def _is_named(match: "Match", named: Sequence[Mapping[str, str]]) -> bool:
    settings = match.configuration.settings
    return any(
        all(key in settings for key in one) and has_settings(match.configuration, {k: str(v) for k, v in one.items()})
        for one in named
    )


def _named(rows: Sequence[Mapping[str, str]]) -> str:
    return " or ".join(", ".join(f"{key}={value}" for key, value in one.items()) for one in rows)


def _sides(match: "Match") -> tuple["Match", "Match"]:
    assert match.baseline is not None
    return match, match.baseline


def _column(report: Mapping[str, Any], name: str) -> list[float]:
    return [value for value in (report["curves"] or {}).get(name, []) if value is not None]


def _relative(
    pairs: Sequence[tuple[Any, ...]], sign: int, contrast: str, quantity: str, decides: bool, exact: bool = False
) -> Evidence:
    """Return the relative difference of pairs of positive numbers, by the paired t-test of the logarithms."""
    logarithms = [sign * math.log(ours / theirs) if ours > 0 and theirs > 0 else 0.0 for ours, theirs in pairs]
    mean = float(np.mean(logarithms))
    half, p = 0.0, None
    if len(logarithms) > 1:
        error = float(np.std(logarithms, ddof=1)) / len(logarithms) ** 0.5
        half = error * float(stats.t.ppf(0.975, len(logarithms) - 1))
        p = 2 * float(stats.t.sf(abs(mean) / error, len(logarithms) - 1)) if error > 0 else float(mean == 0)
    # Of the ratio's excess over 1, so that a cost of 1.5 times is 50 %.
    difference, low, high = (math.expm1(value) for value in (mean, mean - half, mean + half))
    return Evidence(
        contrast=contrast,
        quantity=quantity,
        unit="%",
        difference=difference,
        low=low,
        high=high,
        n=len(logarithms),
        p=p,
        p_holm=None,
        exact=exact,
        decides=decides,
        verdict="",
        seeds_more=None if exact else _more_seeds(logarithms, half, None),
    )


def _lost(analysis: Mapping[str, Any], name: str) -> Mapping[str, float] | None:
    """Return the difference of the mIoU for an intervention on all blocks, or on the only one; None without it."""
    rows = [row for row in analysis["interventions"] if row["intervention"] == name]
    return rows[-1]["differences"]["miou"] if rows else None


def _more_seeds(differences: Sequence[float], half: float, spread: Spread | None) -> int | None:
    """Return how many more seeds would show the mean difference with a power of 80 %; None if that is not known.

    Args:
        differences: the difference at each seed.
        half: half the width of the interval of the mean.
        spread: the variances, if they are known; else the part of the interval that the seeds do not explain is taken
            for the images', which does not shrink.
    """
    count = len(differences)
    if count < 2:
        return None
    if spread is None:
        of_seeds = float(np.var(differences, ddof=1))
        whole = (half / float(stats.t.ppf(0.975, count - 1))) ** 2
        images = max(whole - of_seeds / count, 0.0)
        spread = Spread(
            seeds=of_seeds, images=images, interaction=0.0, n=count, degrees=count - 1, of_images=max(count, 100)
        )
    needed = seeds_needed(float(np.mean(differences)), spread)
    return None if needed is None else max(needed - count, 1)


def _verdict(evidence: Evidence) -> str:
    p = evidence["p_holm"] if evidence["p_holm"] is not None else evidence["p"]
    if not evidence["exact"] and (p is None or p >= SIGNIFICANT):
        return "undecided"
    return "supported" if evidence["difference"] > 0 else "contradicted"
