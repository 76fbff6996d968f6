"""Scores beyond the mIoU in a comparison."""

import csv
import io
import json

import numpy as np
import pytest

from ema_seg.comparison.compare import compare_runs
from ema_seg.comparison.files import write_comparison
from ema_seg.comparison.runs import read_folder, read_runs
from ema_seg.comparison.tables import comparison_as_csv, comparison_as_markdown, print_comparison
from tests.comparison.runs_on_disk import plan_job, write_plan, write_run

SEEDS = range(3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for attention, wrong in {"none": 0.3, "ema": 0.2, "se": 0.29}.items():
        for seed in SEEDS:
            write_run(folder / f"{attention}_{seed}", attention, seed, wrong=wrong, further=True)
    return folder


@pytest.fixture(scope="module")
def comparison(folder):
    return compare_runs(read_folder(folder), replicates=500)


@pytest.fixture(scope="module")
def rows(comparison):
    return {row["label"]: row for row in comparison["rows"]}


@pytest.fixture(scope="module")
def reports(folder):
    def read(name):
        return json.loads((folder / name / "report/report.json").read_text())

    return {name: [read(f"{name}_{seed}") for seed in SEEDS] for name in ("none", "ema", "se")}


def test_a_boundary_that_is_the_whole_image_has_the_intervals_of_the_miou(comparison, rows):
    assert list(comparison["measures"])[:7] == ["boundary_miou", *(f"trimap_{2**index}" for index in range(6))]
    for key in ("boundary_miou", "trimap_1", "trimap_32"):
        for row in rows.values():
            assert row["further"][key]["score"] == row["score"]
            assert (row["further"][key]["contrast"] is None) == (row["contrast"] is None)
            if row["contrast"]:
                assert row["further"][key]["contrast"] == pytest.approx(row["contrast"])


def test_scores_are_those_of_the_reports(rows, reports):
    for name, row in rows.items():
        for key in ("boundary_miou", "ece", "nll", "brier", "corrupted_miou", "corruption_drop"):
            assert row["further"][key]["score"]["values"] == pytest.approx([report[key] for report in reports[name]])
        fog = [np.mean(report["corruptions"]["fog"]["miou"]) for report in reports[name]]
        assert row["further"]["fog"]["score"]["values"] == pytest.approx(fog)


def test_differences_are_paired_by_seed_and_image(rows, reports):
    """The likelihood is a mean over images of equal size, whose variance is known without replicates."""
    contrast = rows["ema"]["further"]["nll"]["contrast"]
    images = np.array(
        [
            [
                one["calibration"]["nll"] / sum(one["calibration"]["pixels"])
                - other["calibration"]["nll"] / sum(other["calibration"]["pixels"])
                for one, other in zip(ours["images"], theirs["images"], strict=True)
            ]
            for ours, theirs in zip(reports["ema"], reports["none"], strict=True)
        ]
    )
    assert contrast["difference"] == pytest.approx(images.mean())
    assert contrast["n"] == 3 and contrast["covers"] == "seeds and images"
    own = images.mean(axis=1)
    of_images = images.mean(axis=0).var(ddof=1) / images.shape[1]
    assert (contrast["high"] - contrast["low"]) / 2 > 1.96 * np.sqrt(own.var(ddof=1) / 3 + 0.7 * of_images)
    assert (contrast["high"] - contrast["low"]) / 2 < 4.4 * np.sqrt(own.var(ddof=1) / 3 + 1.3 * of_images)
    assert contrast["low"] < contrast["difference"] < contrast["high"] < 0


def test_each_score_is_corrected_over_the_rows(rows):
    for key in ("boundary_miou", "ece", "corrupted_miou"):
        contrasts = [rows[name]["further"][key]["contrast"] for name in ("ema", "se")]
        smaller, larger = sorted(contrasts, key=lambda contrast: contrast["p"])
        assert smaller["p_holm"] == pytest.approx(min(1, 2 * smaller["p"]))
        assert larger["p_holm"] == pytest.approx(max(larger["p"], smaller["p_holm"]))


def test_tables_and_page_show_them(comparison, rows, tmp_path, blank_figures, capsys):
    text = comparison_as_markdown(comparison)
    assert "## Further scores" in text and "| boundary mIoU, % |" in text and "mIoU, pixelation, %" in text
    part = rows["ema"]["further"]["boundary_miou"]
    score, difference = part["score"], part["contrast"]["difference"]
    assert f"**{100 * score['mean']:.2f} ± {100 * score['sd']:.2f}, +{100 * difference:.2f} [" in text
    nll = rows["se"]["further"]["nll"]["score"]["mean"]
    assert f"| {nll:.4f} ± " in text or f"| **{nll:.4f} ± " in text
    print_comparison(comparison)
    assert "expected calibration error, %" in " ".join(capsys.readouterr().out.split())
    (first, *_) = csv.DictReader(io.StringIO(comparison_as_csv(comparison)))
    assert float(first["boundary_miou"]) == rows[first["label"]]["further"]["boundary_miou"]["score"]["mean"]
    write_comparison(comparison, tmp_path)
    assert (tmp_path / "figures/further.pdf").is_file()


def test_scores_that_some_runs_lack_are_left_out_and_named(folder, tmp_path):
    runs = [write_run(tmp_path / "none", further=True), write_run(tmp_path / "ema", "ema")]
    comparison = compare_runs(read_runs(runs), replicates=50)
    assert comparison["measures"] == {}
    notes = [note for note in comparison["notes"] if "only 1 of 2 runs have them" in note]
    assert len(notes) == 3 and "evaluation.boundary=true" in notes[0]


def test_without_them_nothing_is_said(tmp_path):
    runs = [write_run(tmp_path / "none"), write_run(tmp_path / "ema", "ema")]
    comparison = compare_runs(read_runs(runs), replicates=50)
    assert comparison["measures"] == {} and all(row["further"] == {} for row in comparison["rows"])
    assert not any("evaluation." in note for note in comparison["notes"])
    assert "Further" not in comparison_as_markdown(comparison)


def test_protocols_that_differ_are_rows_of_their_own(tmp_path):
    protocol = {"window": None, "window_stride": None, "scales": [1.0], "flip": True}
    plain, flipped = tmp_path / "plain", tmp_path / "flipped"
    write_run(plain, "ema")
    write_run(flipped, "ema", protocol=protocol, wrong=0.2)
    comparison = compare_runs(read_runs([plain, flipped]), replicates=50)
    assert comparison["settings"] == ["evaluation.flip"]
    assert [row["settings"]["evaluation.flip"] for row in comparison["rows"]] == [None, True]
    assert comparison["rows"][1]["contrast"]["difference"] > 0


def test_a_job_that_is_not_finished_stays_in_its_row(tmp_path):
    protocol = {"window": [16, 16], "window_stride": [8, 8], "scales": [1.0], "flip": False}
    sweep, jobs = tmp_path / "sweep", []
    for name in ("none", "ema"):
        for seed in (0, 1, 2):
            jobs.append(plan_job(f"{name}{seed}", attention=name, seed=str(seed)))
            if (name, seed) != ("ema", 2):
                write_run(sweep / f"{name}{seed}", name, seed, protocol=protocol if name == "ema" else None)
    write_plan(sweep, jobs, {"attention": "none"})
    rows = compare_runs(read_folder(sweep), replicates=50)["rows"]
    assert [(len(row["jobs"]), row["seeds"]) for row in rows] == [(3, [0, 1, 2]), (3, [0, 1])]


def test_a_score_of_a_single_image_has_no_interval(tmp_path):
    runs = [write_run(tmp_path / name, name, further=True) for name in ("none", "ema")]
    for run in runs:
        path = run / "report/report.json"
        report = json.loads(path.read_text())
        for image in report["images"][1:]:
            image["boundary"]["trimap"][0] = [[0] * 4, [0] * 4]
        path.write_text(json.dumps(report))
    row = compare_runs(read_runs(runs), replicates=50)["rows"][1]["further"]
    assert row["trimap_1"]["contrast"] is None and row["trimap_1"]["score"]["mean"] is not None
    assert row["trimap_2"]["contrast"] is not None


def test_scores_of_another_form_are_left_out_and_named(tmp_path):
    runs = [write_run(tmp_path / name, name, further=True) for name in ("none", "ema")]
    path = runs[0] / "report/report.json"
    report = json.loads(path.read_text())
    for owner in (report, *report["images"]):
        owner["corruptions"]["hail"] = owner["corruptions"].pop("fog")
    path.write_text(json.dumps(report))
    comparison = compare_runs(read_runs(runs), replicates=50)
    assert "corrupted_miou" not in comparison["measures"] and "boundary_miou" in comparison["measures"]
    named = "Corruptions: not compared, because the runs have them in different forms"
    assert any(named in note for note in comparison["notes"])


def test_protocols_that_agree_are_no_setting(tmp_path):
    protocol = {"window": [16, 16], "window_stride": [8, 8], "scales": [1.0], "flip": False}
    runs = [write_run(tmp_path / name, name, protocol=protocol) for name in ("none", "ema")]
    comparison = compare_runs(read_runs(runs), replicates=50)
    assert not any(key.startswith("evaluation") for key in comparison["settings"])


def test_a_sweep_whose_jobs_differ_in_protocol_compares_like_with_like(tmp_path):
    """Without the protocol as a setting, the windowed seed would be averaged with the others."""
    protocol = {"window": [16, 16], "window_stride": [8, 8], "scales": [1.0], "flip": False}
    for name in ("none", "ema"):
        for seed in (0, 1):
            write_run(tmp_path / f"{name}{seed}", name, seed, protocol=protocol if (name, seed) == ("ema", 1) else None)
    comparison = compare_runs(read_folder(tmp_path), replicates=50)
    seeds = {row["label"]: (row["seeds"], row["contrast"] and row["contrast"]["n"]) for row in comparison["rows"]}
    assert [value for label, value in seeds.items() if "window" in label] == [([1], None)]
    assert ([0], 1) in seeds.values()
