"""Tests of the verdicts on claims, on runs whose scores, costs and curves are known."""

import json

import pytest
import yaml

from ema_seg.analysis.schema import INTERVENTIONS, SCHEMA
from ema_seg.comparison.claims import _as_on_the_command_line
from ema_seg.comparison.compare import compare_runs
from ema_seg.comparison.page import write_page
from ema_seg.comparison.power import seeds_needed
from ema_seg.comparison.runs import read_folder
from ema_seg.comparison.tables import comparison_as_markdown, verdict_text
from ema_seg.config import SweepClaim, check_settings
from ema_seg.runtime.errors import ConfigError
from tests.comparison.runs_on_disk import plan_job, write_plan, write_run
from tests.conftest import ROOT

BASE = {"variant": "ema"}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Write three seeds of a baseline, of a clearly worse row, of an equal one and of one that costs more."""
    folder = tmp_path_factory.mktemp("sweep")
    jobs = []
    for variant, (wrong, gmacs, norm) in {
        "ema": (0.2, 1.0, 1.0),
        "none": (0.4, 0.9, 1.0),
        "same": (0.2001, 1.0, 1.0),
        "costly": (0.2, 1.5, 2.0),
    }.items():
        for seed in range(3):
            name = f"{variant}_{seed}"
            curves = {
                "epoch": [0.0, 1.0, 2.0, 3.0],
                "train/gradient_norm": [norm, 2 * norm + 0.01 * seed, norm, 2 * norm],
            }
            report = {"gmacs": gmacs, "curves": curves}
            write_run(
                folder / name, "ema" if variant != "none" else "none", seed, wrong=wrong, report=report, further=True
            )
            jobs.append(plan_job(name, variant=variant, seed=str(seed)))
    return write_plan(folder, jobs, BASE)


def judge(sweep, *claims):
    """Return the comparison of the sweep with these claims."""
    plan = json.loads((sweep / "sweep.json").read_text())
    for one in claims:
        check_settings(one, SweepClaim, "sweep.claims[0].")
    (sweep / "sweep.json").write_text(json.dumps({**plan, "claims": list(claims)}))
    return compare_runs(read_folder(sweep), replicates=200)


def claim(variant, expect, **evidence):
    return {"claim": "It is so.", "rows": [{"variant": variant}], "expect": expect, **evidence}


def test_scores_decide_in_both_directions(sweep):
    comparison = judge(
        sweep,
        claim("none", "worse", scores=["miou", "boundary_miou"]),
        claim("none", "better", scores=["miou"]),
        claim("same", "worse", scores=["miou"]),
    )
    right, wrong, open_ = comparison["claims"]

    assert right["verdict"] == "supported"
    assert [evidence["contrast"] for evidence in right["evidence"]] == ["ema over none"] * 2
    assert all(evidence["difference"] > 0 and evidence["low"] > 0 for evidence in right["evidence"])
    assert wrong["verdict"] == "contradicted"
    assert wrong["evidence"][0]["contrast"] == "none over ema"
    assert wrong["evidence"][0]["difference"] == -right["evidence"][0]["difference"]
    # Holm: the smaller of two p is doubled.
    p, p_holm = zip(*((evidence["p"], evidence["p_holm"]) for evidence in right["evidence"]), strict=True)
    assert min(p_holm) == pytest.approx(2 * min(p))
    assert open_["verdict"] == "undecided"
    (evidence,) = open_["evidence"]
    (spread,) = (row["spread"] for row in comparison["rows"] if row["label"] == "same")
    needed = seeds_needed(evidence["difference"], spread)
    assert open_["seeds_more"] == evidence["seeds_more"] == (needed and needed - 3)
    assert verdict_text(open_).startswith("Undecided")
    assert verdict_text({**open_, "seeds_more": 1}) == "Undecided; about 1 more seed would decide it."


def test_costs_are_shares_and_exact_where_they_have_no_variance(sweep):
    found, equal = judge(
        sweep,
        claim("costly", "worse", costs=["gmacs"], context={"costs": ["latency"]}),
        claim("costly", "worse", costs=["parameters"]),
    )["claims"]

    exact, measured = found["evidence"]
    assert found["verdict"] == "supported"
    assert (exact["difference"], exact["exact"], exact["p"]) == (pytest.approx(1 / 3), True, None)
    assert not measured["decides"]
    assert not measured["exact"]
    assert equal["verdict"] == "undecided"  # the same number of parameters


def test_curves_give_their_mean_and_their_unsteadiness(sweep):
    (found,) = judge(sweep, claim("costly", "worse", curves=["train/gradient_norm"]))["claims"]

    mean, steady = found["evidence"]
    assert [mean["quantity"], steady["quantity"]] == ["lower train/gradient_norm", "steadier train/gradient_norm"]
    assert mean["difference"] == pytest.approx(0.5, abs=0.01)
    assert mean["verdict"] == "supported"
    assert steady["difference"] == pytest.approx(0, abs=0.02)
    assert found["verdict"] == "undecided"


def test_a_trend_is_not_unsteady_and_what_is_not_defined_is_missing(sweep, tmp_path):
    shapes = {
        "ema": [3.0, 2.4, 2.0, 1.4, 1.0],
        "rough": [2.0, 1.0, 3.0, 1.0, 3.0],
        "zero": [1.0, -1.0, 1.0, -1.0, 0.0],
    }
    jobs = []
    for variant, shape in shapes.items():
        for seed in range(3):
            curve = [value * (1 + 0.01 * seed) for value in shape]
            curves = {"epoch": [float(epoch) for epoch in range(5)], "train/loss": curve}
            write_run(tmp_path / f"{variant}_{seed}", seed=seed, report={"curves": curves})
            jobs.append(plan_job(f"{variant}_{seed}", variant=variant, seed=str(seed)))
    write_plan(tmp_path, jobs, BASE)

    rough, zero = judge(
        tmp_path, claim("rough", "worse", curves=["train/loss"]), claim("zero", "worse", curves=["train/loss"])
    )["claims"]

    steady = rough["evidence"][-1]
    assert (steady["quantity"], steady["difference"] > 0) == ("steadier train/loss", True)
    assert zero["verdict"] == "undecided"
    assert any("train/loss of ema over zero" in text for text in zero["missing"])


def test_claims_are_about_the_sweeps_own_baseline(sweep):
    judge(sweep, claim("none", "worse", scores=["miou"]))

    comparison = compare_runs(read_folder(sweep), baseline={"variant": "none"}, replicates=100)

    assert comparison["claims"] == []
    assert any("claims are not judged" in note for note in comparison["notes"])


def test_interventions_come_from_the_analyses_of_the_runs(sweep):
    claims = (claim("same", "better", interventions=["static"]),)
    (found,) = judge(sweep, *claims)["claims"]
    assert (found["verdict"], found["evidence"]) == ("undecided", [])
    assert found["missing"] == [
        f"static on {label} (run ema-seg analyse run=<its run> first)" for label in ("same", "ema")
    ]

    for variant, lost in {"ema": 0.02, "same": 0.0}.items():
        for seed in range(3):
            row = {"difference": -lost - 1e-4 * seed, "low": -lost - 0.003, "high": -lost + 0.003}
            analysis = {
                "schema": SCHEMA,
                "data": {"images": 8},
                "interventions": [
                    {
                        "block": block,
                        "intervention": name,
                        "differences": {"miou": row if block == "all blocks" else None},
                    }
                    for block in ("one", "two", "all blocks")
                    for name in INTERVENTIONS
                ],
            }
            (sweep / f"{variant}_{seed}/analysis").mkdir()
            (sweep / f"{variant}_{seed}/analysis/analysis.json").write_text(json.dumps(analysis))
    (found,) = judge(sweep, *claims)["claims"]

    verdicts = {evidence["contrast"]: evidence["verdict"] for evidence in found["evidence"]}
    assert verdicts == {"same over itself, static": "undecided", "ema over itself, static": "supported"}
    evidence = found["evidence"][1]
    assert evidence["n"] == 3
    assert evidence["difference"] == pytest.approx(0.0201)
    assert evidence["low"] == pytest.approx(0.0201 - 0.003, abs=2e-4)  # the images' part does not shrink with the seeds


def test_what_is_missing_is_said(sweep):
    (found,) = judge(
        sweep,
        {**claim("nowhere", "worse", scores=["miou"]), "context": {"rows": [{"variant": "none"}], "scores": ["fur"]}},
    )["claims"]

    assert found["verdict"] == "undecided"
    assert found["missing"] == ["a row with variant=nowhere", "IoU, fur of ema over none"]
    (part,) = judge(sweep, claim("none", "worse", scores=["miou", "mIoU"]))["claims"]
    assert (part["verdict"], part["missing"]) == ("undecided", ["IoU, mIoU of ema over none"])


def test_settings_of_rows_are_those_of_the_command_line():
    assert _as_on_the_command_line({"placement.head": True, "attention.factor": 8, "variant": "none"}) == {
        "placement.head": "true",
        "attention.factor": "8",
        "variant": "none",
    }


def test_mistakes_are_refused_in_a_sentence(sweep):
    for wrong, message in (
        (claim("none", "worse", costs=["gmac"]), r"costs: must be some of parameters, gmacs, latency, memory, got"),
        (claim("none", "worse", interventions=["swaped"]), r"interventions: must be some of off, uniform, static"),
        (claim("none", "worse", curves=["val/miou"]), r"curves: must be some of train/gradient_norm"),
        ({"claim": "a", "rows": [], "expect": "worse"}, r"rows: must be a list of settings of rows"),
        ({"claim": "a", "rows": [{}], "expect": "worse"}, r"rows: must be a list of settings of rows"),
        ({"claim": "a", "rows": [{"a": "b"}], "expect": "good"}, r"expect: must be better or worse, got 'good'"),
        ({"claim": "a", "rows": [{"a": "b"}], "expect": "better", "score": ["miou"]}, r"sweep.claims\[0\].score"),
    ):
        with pytest.raises(ConfigError, match=message):
            judge(sweep, wrong)


def test_the_claims_are_in_markdown_and_on_the_page(sweep, tmp_path):
    comparison = judge(sweep, claim("none", "worse", scores=["miou"], context={"costs": ["gmacs"]}))

    text = comparison_as_markdown(comparison)
    assert "**It is so.** Supported." in text
    assert "| ema over none | mIoU | +" in text
    assert "| ema over none | lower GMACs | \N{MINUS SIGN}10.0 % | 1 | exact | (contradicted) |" in text
    page = write_page({**comparison, "examples": []}, tmp_path).read_text()
    assert '"text":"Supported."' in page


def test_the_sweep_of_the_five_claims_names_what_there_is():
    settings = yaml.safe_load((ROOT / "configs/sweep/claims.yaml").read_text())
    for one in settings["claims"]:
        check_settings(one, SweepClaim, "")

    assert len(settings["claims"]) == 5
    named = {
        row["variant"] for one in settings["claims"] for row in (*one["rows"], *one.get("context", {}).get("rows", []))
    }
    assert named | set(settings["baseline"].values()) == set(settings["variants"])
