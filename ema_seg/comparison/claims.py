"""Claims of a sweep, judged by its comparison.

A claim says that some rows do better, or worse, than their baseline. Its evidence is differences with the sign turned
so that a positive one supports the claim. Each difference is judged by its two-sided p-value, after Holm's correction
over the claim's evidence, and the claim by all of them: it is *contradicted* if one contradicts it, *supported* if each
supports it and none is missing, and otherwise *undecided*. Numbers that are given for the context decide nothing.

Evidence is of four kinds. Scores: the contrasts of the comparison. Costs and curves: the relative difference, by the
paired t-test of its logarithm over seeds; the number of parameters and of operations has no variance. Interventions:
what the trained model loses if its weights are changed, from the runs' ``analysis/analysis.json``, see
``ema_seg.analysis``.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import stdtr, stdtrit

from ema_seg.analysis.schema import load_analysis
from ema_seg.comparison.configurations import has_settings
from ema_seg.comparison.costs import COSTS
from ema_seg.comparison.power import seeds_needed
from ema_seg.comparison.schema import Claim, Contrast, Evidence, Measure, Row, Spread
from ema_seg.comparison.statistics import adjust_holm
from ema_seg.comparison.tables import SIGNIFICANT
from ema_seg.evaluation.intervals import SEQUENTIAL, estimate_difference
from ema_seg.runtime.errors import DataError
from ema_seg.sweeps import setting_text

if TYPE_CHECKING:
    from ema_seg.comparison.compare import Match

__all__ = ["judge_claims"]

_COSTS = {"parameters": "parameters", "gmacs": "GMACs", "latency": "latency", "memory": "peak memory"}
_EXACT = ("parameters", "gmacs")
_KINDS = ("scores", "costs", "curves", "interventions")

# A piece of evidence, with the variances behind it if there are two seeds at least.
Piece = tuple[Evidence, Spread | None]


def judge_claims(
    claims: Sequence[Mapping[str, Any]],
    rows: Sequence[Row],
    matches: Sequence["Match"],
    measures: Mapping[str, Measure],
    metric: str,
    *,
    sequential: bool = False,
) -> list[Claim]:
    """Judge the claims of a sweep.

    Args:
        claims: see ``ema_seg.config.SweepClaim``.
        rows: the rows of the comparison, compared with the sweep's own baseline.
        matches: the runs of each row, in the same order.
        measures: the comparison's scores beyond the mIoU.
        metric: name of the comparison's score.
        sequential: see ``estimate_difference``.
    """
    return [_Judge(claim, rows, matches, measures, metric, sequential).judge() for claim in claims]


class _Judge:
    """Collects the evidence of one claim."""

    def __init__(
        self,
        claim: Mapping[str, Any],
        rows: Sequence[Row],
        matches: Sequence["Match"],
        measures: Mapping[str, Measure],
        metric: str,
        sequential: bool,
    ) -> None:
        self._claim = claim
        self._rows = list(zip(rows, matches, strict=True))
        self._by_label = {row["label"]: row for row in rows}
        self._measures = measures
        self._metric = metric
        self._sequential = sequential
        self._missing: list[str] = []

    def judge(self) -> Claim:
        """Return the claim with its evidence and verdict."""
        deciding = list(self._collect(self._claim, decides=True))
        complete = bool(deciding) and not self._missing
        given = {key: value for key, value in (self._claim.get("context") or {}).items() if value is not None}
        context = list(self._collect({**self._claim, **{kind: [] for kind in _KINDS}, **given}, decides=False))
        values = [evidence["p"] for evidence, _ in deciding]
        for (evidence, _), p in zip(deciding, adjust_holm(values), strict=True):
            evidence["p_holm"] = p
        tests = max(sum(p is not None for p in values), 1)
        for evidence, spread in (*deciding, *context):
            evidence["verdict"] = _verdict(evidence)
            evidence["seeds_more"] = self._seeds_more(evidence, spread, tests if evidence["decides"] else 1)
        evidences = [evidence for evidence, _ in deciding]
        verdicts = {evidence["verdict"] for evidence in evidences}
        if "contradicted" in verdicts:
            verdict = "contradicted"
        else:
            verdict = "supported" if complete and verdicts == {"supported"} else "undecided"
        wanted = [evidence["seeds_more"] for evidence in evidences if evidence["verdict"] == "undecided"]
        known = [seeds for seeds in wanted if seeds is not None]
        return Claim(
            claim=self._claim["claim"],
            verdict=verdict,
            seeds_more=max(known) if verdict == "undecided" and known and len(known) == len(wanted) else None,
            evidence=[*evidences, *(evidence for evidence, _ in context)],
            missing=list(dict.fromkeys(self._missing)),
        )

    def _seeds_more(self, evidence: Evidence, spread: Spread | None, tests: int) -> int | None:
        """Return how many more seeds would show an undecided difference with a power of 80 %, by Bonferroni's level."""
        if evidence["verdict"] != "undecided" or spread is None:
            return None
        level = SIGNIFICANT / tests * (SEQUENTIAL if self._sequential else 1)
        needed = seeds_needed(evidence["difference"], spread, confidence=1 - level)
        return None if needed is None else max(needed - spread["n"], 1)

    def _collect(self, given: Mapping[str, Any], decides: bool) -> Iterator[Piece]:
        sign = 1 if given["expect"] == "better" else -1
        chosen = [pair for pair in self._rows if _is_named(pair[1], given["rows"])]
        if any(given.get(kind) for kind in _KINDS) and not chosen:
            self._missing.append(f"a row with {_named(given['rows'])}")
        for row, match in chosen:
            base = None if match.baseline is None else self._by_label[match.baseline.label]
            if base is None or not match.common_seeds:
                self._missing.append(f"a seed in common of {row['label']} and its baseline")
                continue
            contrast = " over ".join([row["label"], base["label"]][::sign])
            common = {"contrast": contrast, "decides": decides}
            for name in given.get("scores", []):
                yield from self._score(name, row, base, sign, common)
            for name in given.get("costs", []):
                yield from self._cost(name, match, -sign, common)
            for name in given.get("curves", []):
                yield from self._curve(name, match, -sign, common)
        if given.get("interventions"):
            subjects = {match.label: match for _, match in chosen}
            subjects |= {match.baseline.label: match.baseline for _, match in chosen if match.baseline}
            for match in subjects.values():
                yield from self._interventions(given["interventions"], match, decides)

    def _score(self, name: str, row: Row, base: Row, sign: int, common: Mapping[str, Any]) -> Iterator[Piece]:
        quantity, part, base_part, better = self._find_score(name, row, base)
        if part is None or base_part is None or part["contrast"] is None:
            self._missing.append(f"{quantity} of {common['contrast']}")
            return
        found: Contrast = part["contrast"]
        sign *= better
        low, high = sorted((sign * found["low"], sign * found["high"]))
        values, theirs = (
            dict(zip(one["seeds"], scores["score"]["values"], strict=True))
            for one, scores in ((row, part), (base, base_part))
        )
        pairs = [(values[seed], theirs[seed]) for seed in values if seed in theirs]
        differences = [one - other for one, other in pairs if one is not None and other is not None]
        fraction = name not in self._measures or self._measures[name]["percent"]
        spread = row["spread"] if part is row else _spread(differences, found["of_images"])
        difference = (sign * found["difference"], low, high)
        yield _evidence(common, quantity, "points" if fraction else "", difference, found["n"], found["p"]), spread

    def _find_score(self, name: str, row: Row, base: Row) -> tuple[str, Any, Any, int]:
        """Return what to call a score, the row's and the baseline's values, and 1 if more is better, else -1."""
        if name == "miou":
            return self._metric, row, base, 1
        if name in self._measures:
            measure = self._measures[name]
            better = 1 if measure["higher_is_better"] else -1
            return measure["label"], row["further"].get(name), base["further"].get(name), better
        if name in row["strata"]:
            return f"{self._metric}, {name}", row["strata"][name], base["strata"][name], 1
        return f"IoU, {name}", row["classes"].get(name), base["classes"].get(name), 1

    def _cost(self, name: str, match: "Match", sign: int, common: Mapping[str, Any]) -> Iterator[Piece]:
        pairs = [tuple(COSTS[name](side.results[seed].report) for side in _sides(match)) for seed in match.common_seeds]
        yield from self._relative(pairs, sign, common, f"lower {_COSTS[name]}", exact=name in _EXACT)

    def _curve(self, name: str, match: "Match", sign: int, common: Mapping[str, Any]) -> Iterator[Piece]:
        """Yield the relative differences of the mean of a column over the epochs, and of its unsteadiness.

        The unsteadiness is the standard deviation from one epoch to the next, relative to the mean. A trend, which a
        standard deviation over all epochs would count, hardly adds to it.
        """
        means, steps = [], []
        for seed in match.common_seeds:
            columns = [np.array(_column(side.results[seed].report, name)) for side in _sides(match)]
            if all(len(values) > 2 for values in columns):
                means.append(tuple(float(values.mean()) for values in columns))
                steps.append(tuple(float(np.diff(values).std() / 2**0.5 / values.mean()) for values in columns))
        yield from self._relative(means, sign, common, f"lower {name}")
        yield from self._relative(steps, sign, common, f"steadier {name}")

    def _relative(
        self,
        pairs: Sequence[tuple[float | None, ...]],
        sign: int,
        common: Mapping[str, Any],
        quantity: str,
        *,
        exact: bool = False,
    ) -> Iterator[Piece]:
        """Yield the relative difference of pairs of positive numbers, by the paired t-test of the logarithms."""
        known = [(ours, theirs) for ours, theirs in pairs if ours and theirs and 0 < ours / theirs < math.inf]
        if not known:
            self._missing.append(f"{quantity} of {common['contrast']}")
            return
        logarithms = [sign * math.log(ours / theirs) for ours, theirs in known[: 1 if exact else None]]
        count, mean = len(logarithms), float(np.mean(logarithms))
        half, p = 0.0, None
        if count > 1:
            error = float(np.std(logarithms, ddof=1)) / count**0.5
            half = error * float(stdtrit(count - 1, 1 - SIGNIFICANT / 2))
            p = 2 * float(stdtr(count - 1, -abs(mean) / error)) if error > 0 else float(mean == 0)
        difference = (_share(mean), _share(mean - half), _share(mean + half))
        yield _evidence(common, quantity, "%", difference, count, p, exact=exact), _spread(logarithms, 0.0)

    def _interventions(self, names: Sequence[str], match: "Match", decides: bool) -> Iterator[Piece]:
        analyses = []
        for result in match.results.values():
            path = result.path.parent.parent / "analysis" / "analysis.json"
            if path.is_file():
                try:
                    analyses.append(load_analysis(path))
                except DataError as error:
                    self._missing.append(str(error).rstrip("."))
        for name in names:
            found = [difference for one in analyses if (difference := _lost(one, name)) is not None]
            if not found:
                self._missing.append(f"{name} on {match.label} (run ema-seg analyse run=<its run> first)")
                continue
            images = min(one["data"]["images"] for one in analyses)
            quantile = float(stdtrit(images - 1, 1 - SIGNIFICANT / 2))
            # The images are the same at each seed, so more seeds hardly average this out.
            of_images = float(np.mean([((one["high"] - one["low"]) / 2 / quantile) ** 2 for one in found]))
            values = [-one["difference"] for one in found]
            estimate = estimate_difference(values, of_images, images, sequential=self._sequential)
            common = {"contrast": f"{match.label} over itself, {name}", "decides": decides}
            bounds = (estimate.difference, estimate.low, estimate.high)
            yield _evidence(common, "mIoU", "points", bounds, len(values), estimate.p), _spread(values, of_images)


def _evidence(
    common: Mapping[str, Any],
    quantity: str,
    unit: str,
    difference: tuple[float, float, float],
    n: int,
    p: float | None,
    *,
    exact: bool = False,
) -> Evidence:
    """Return evidence without a verdict, of a difference and the bounds of its interval."""
    return Evidence(
        contrast=common["contrast"],
        quantity=quantity,
        unit=unit,
        difference=difference[0],
        low=difference[1],
        high=difference[2],
        n=n,
        p=p,
        p_holm=None,
        exact=exact,
        decides=common["decides"],
        verdict="",
        seeds_more=None,
    )


def _is_named(match: "Match", named: Sequence[Mapping[str, Any]]) -> bool:
    settings = match.configuration.settings
    return any(
        all(key in settings for key in one) and has_settings(match.configuration, _as_on_the_command_line(one))
        for one in named
    )


def _as_on_the_command_line(settings: Mapping[str, Any]) -> dict[str, str]:
    return {key: setting_text(value) for key, value in settings.items()}


def _named(rows: Sequence[Mapping[str, Any]]) -> str:
    pairs = (_as_on_the_command_line(one).items() for one in rows)
    return " or ".join(", ".join(f"{key}={value}" for key, value in one) for one in pairs)


def _sides(match: "Match") -> tuple["Match", "Match"]:
    assert match.baseline is not None
    return match, match.baseline


def _column(report: Mapping[str, Any], name: str) -> list[float]:
    return [value for value in (report["curves"] or {}).get(name, []) if value is not None]


def _share(logarithm: float) -> float:
    """Return by what share the smaller of two numbers is below the larger, with the sign of the log of their ratio."""
    return math.copysign(-math.expm1(-abs(logarithm)), logarithm)


def _lost(analysis: Mapping[str, Any], name: str) -> Mapping[str, float] | None:
    """Return the difference of the mIoU for an intervention on all blocks, or on the only one; None without it."""
    rows = [row for row in analysis["interventions"] if row["intervention"] == name]
    return rows[-1]["differences"]["miou"] if rows else None


def _spread(differences: Sequence[float], of_images: float) -> Spread | None:
    """Return the variances behind a mean difference; None for fewer than two seeds.

    The variance over images is taken for one that more seeds do not average out, which asks for too many seeds rather
    than for too few.
    """
    count = len(differences)
    if count < 2:
        return None
    of_seeds = float(np.var(differences, ddof=1))
    return Spread(seeds=of_seeds, images=of_images, interaction=0.0, n=count, degrees=count - 1, of_images=1000)


def _verdict(evidence: Evidence) -> str:
    p = evidence["p_holm"] if evidence["p_holm"] is not None else evidence["p"]
    if evidence["difference"] == 0 or (not evidence["exact"] and (p is None or p >= SIGNIFICANT)):
        return "undecided"
    return "supported" if evidence["difference"] > 0 else "contradicted"
