"""Tests of comparisons of runs on disk: rows, baselines, statistics, examples and notes."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from ema_seg.comparison.compare import compare_runs, match_runs
from ema_seg.comparison.files import report_comparison
from ema_seg.comparison.pictures import draw_examples
from ema_seg.comparison.runs import read_folder, read_runs
from ema_seg.comparison.tables import comparison_as_markdown
from ema_seg.runtime.errors import ConfigError, DataError
from tests.comparison.runs_on_disk import IMAGES, make_config, make_truth, plan_job, write_plan, write_run, write_sweep

QUICK = 200


def compare(runs, **arguments):
    return compare_runs(runs, replicates=QUICK, **arguments)


def rows_of(comparison):
    return {row["label"]: row for row in comparison["rows"]}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return write_sweep(tmp_path_factory.mktemp("sweep") / "blocks")


def test_jobs_become_rows_with_every_seed_accounted_for(sweep):
    comparison = compare(read_folder(sweep))
    rows = rows_of(comparison)
    assert list(rows) == ["none", "ema", "cbam", "se"]
    assert comparison["title"] == "blocks"
    assert comparison["settings"] == ["attention"]
    assert comparison["baseline"] == {"attention": "none"}
    assert [row["baseline"] for row in rows.values()] == [True, False, False, False]
    assert rows["cbam"]["seeds"] == [0, 2]
    assert [job["state"] for job in rows["cbam"]["jobs"]] == ["finished", "failed", "finished"]
    assert rows["cbam"]["jobs"][1] == {
        "seed": 1,
        "state": "failed",
        "run": "cbam_seed1",
        "reason": "The loss was nan in epoch 2.",
    }
    assert [job["state"] for job in rows["se"]["jobs"]] == ["missing"] * 3
    assert rows["se"]["score"] == {"mean": None, "sd": None, "n": 0, "values": []}
    assert rows["se"]["contrast"] is None
    assert "cbam: 2 of 3 seeds; seed 1 failed: The loss was nan in epoch 2." in comparison["notes"]
    assert "se: 0 of 3 seeds; seeds 0, 1, 2 missing." in comparison["notes"]
    assert any("without seed 1" in note for note in comparison["notes"])
    json.dumps(comparison, allow_nan=False)


def test_numbers_are_those_of_the_reports(sweep):
    comparison = compare(read_folder(sweep))
    row, base = rows_of(comparison)["ema"], rows_of(comparison)["none"]
    reports = {
        (attention, seed): json.loads((sweep / f"{attention}_seed{seed}" / "report" / "report.json").read_text())
        for attention, seed in itertools.product(("none", "ema"), range(3))
    }
    mious = [reports["ema", seed]["miou"] for seed in range(3)]
    assert row["score"]["values"] == mious
    assert row["score"]["mean"] == pytest.approx(np.mean(mious))
    assert row["score"]["sd"] == pytest.approx(np.std(mious, ddof=1))
    assert row["contrast"]["difference"] == pytest.approx(row["score"]["mean"] - base["score"]["mean"])
    assert row["contrast"]["n"] == 3
    assert row["contrast"]["covers"] == "seeds and images"
    assert row["contrast"]["low"] < row["contrast"]["difference"] < row["contrast"]["high"]
    assert row["contrast"]["p"] < 0.05
    assert row["contrast"]["p_holm"] == pytest.approx(2 * row["contrast"]["p"])
    car = row["classes"]["car"]
    assert car["score"]["values"] == [reports["ema", seed]["iou"][1] for seed in range(3)]
    assert car["contrast"]["difference"] == pytest.approx(
        np.mean([reports["ema", seed]["iou"][1] - reports["none", seed]["iou"][1] for seed in range(3)])
    )
    assert row["classes"]["sky"] == {
        "score": {"mean": None, "sd": None, "n": 0, "values": [None] * 3},
        "contrast": None,
    }
    assert row["strata"]["small"]["score"]["values"] == [reports["ema", s]["size_miou"]["small"] for s in range(3)]
    assert row["strata"]["large"]["contrast"] is None
    forward = reports["ema", 0]["throughput"]["forward"][-1]
    assert row["cost_batch_size"] == forward["batch_size"] == 8
    assert row["cost"]["latency"]["mean"] == pytest.approx(forward["latency"]["median"])
    assert row["cost"]["memory"]["mean"] == pytest.approx(forward["peak_memory"])
    assert row["curves"]["train/loss"] == {
        "epoch": [0, 1],
        "mean": [2.0, 2.0],
        "low": [2.0, 1.0],
        "high": [2.0, 3.0],
    }
    assert row["curves"]["val/miou"]["epoch"] == [1]


def test_the_same_files_give_the_same_numbers(sweep):
    once, again = (compare(read_folder(sweep)) for _ in range(2))
    assert once["rows"] == again["rows"]
    other = compare(read_folder(sweep), seed=1)
    assert rows_of(other)["ema"]["contrast"]["low"] != rows_of(once)["ema"]["contrast"]["low"]


def test_copies_of_a_run_do_not_differ(tmp_path):
    jobs = []
    for attention, seed in itertools.product(("none", "copy"), range(2)):
        write_run(tmp_path / f"{attention}{seed}", "none", seed)
        jobs.append(plan_job(f"{attention}{seed}", attention=attention, seed=str(seed)))
    row = rows_of(compare(read_folder(write_plan(tmp_path, jobs))))["copy"]
    assert (row["contrast"]["difference"], row["contrast"]["low"], row["contrast"]["high"]) == (0, 0, 0)
    assert row["contrast"]["p"] == 1
    assert compare(read_folder(tmp_path))["examples"] == []


def test_grids_compare_within_the_same_model(tmp_path):
    jobs = []
    for attention, decoder, seed in itertools.product(("none", "ema"), ("unet", "fpn"), range(2)):
        name = f"{attention}_{decoder}_{seed}"
        wrong = {"none": 0.3, "ema": 0.25}[attention] + {"unet": 0, "fpn": 0.2}[decoder]
        write_run(tmp_path / name, attention, seed, wrong=wrong, decoder=decoder)
        jobs.append(plan_job(name, attention=attention, model=decoder, seed=str(seed)))
    comparison = compare(read_folder(write_plan(tmp_path, jobs)))
    rows = rows_of(comparison)
    assert list(rows) == ["none, unet", "none, fpn", "ema, unet", "ema, fpn"]
    assert comparison["settings"] == ["attention", "model"]
    assert [rows[label]["contrast"]["baseline"] for label in ("ema, unet", "ema, fpn")] == ["none, unet", "none, fpn"]
    assert abs(rows["ema, fpn"]["contrast"]["difference"]) < 0.1

    other = rows_of(compare(read_folder(tmp_path), baseline={"model": "unet"}))
    assert other["ema, fpn"]["contrast"]["baseline"] == "ema, unet"
    exact = rows_of(compare(read_folder(tmp_path), baseline={"attention": "none", "model": "unet"}))
    assert exact["ema, fpn"]["contrast"]["baseline"] == "none, unet"
    for baseline, message in {
        ("attention", "nnoe"): "no configuration has it; choose attention from none, ema",
        ("atention", "none"): "Did you mean 'attention'",
    }.items():
        with pytest.raises(ConfigError, match=message):
            compare(read_folder(tmp_path), baseline=dict([baseline]))


def test_a_planned_configuration_that_cannot_be_trained_is_a_row(tmp_path):
    write_run(tmp_path / "a", "none", 0)
    jobs = [
        plan_job("a", attention="none", seed="0"),
        plan_job("b", "attention.rate=4 does not divide 18 channels.", attention="gam", seed="0"),
    ]
    comparison = compare(read_folder(write_plan(tmp_path, jobs)))
    assert rows_of(comparison)["gam"]["jobs"][0]["state"] == "impossible"
    assert "gam: 0 of 1 seeds; seed 0 impossible: attention.rate=4 does not divide 18 channels." in comparison["notes"]


def test_an_unreadable_report_is_a_failed_job_with_a_note(sweep, tmp_path):
    for seed in range(2):
        write_run(tmp_path / f"n{seed}", "none", seed)
        write_run(tmp_path / f"e{seed}", "ema", seed)
    (tmp_path / "e1" / "report" / "report.json").write_text("{")
    jobs = [plan_job(f"{a[0]}{s}", attention=a, seed=str(s)) for a in ("none", "ema") for s in range(2)]
    comparison = compare(read_folder(write_plan(tmp_path, jobs)))
    job = rows_of(comparison)["ema"]["jobs"][1]
    assert job["state"] == "failed"
    assert "is not JSON" in job["reason"]
    assert any(note.startswith("Left out: ") and "e1" in note for note in comparison["notes"])
    assert rows_of(comparison)["ema"]["contrast"]["covers"] == "images"
    assert any("says nothing about training anew" in note for note in comparison["notes"])
    with pytest.raises(DataError, match=r"e1.*is not JSON"):
        read_runs([tmp_path / "n0", tmp_path / "e1"])


def test_runs_in_a_folder_are_told_apart_by_their_configurations(tmp_path):
    write_run(tmp_path / "a", "none", 0)
    write_run(tmp_path / "b", "none", 1, data__root="/elsewhere", trainer__accelerator="gpu")
    write_run(tmp_path / "deep" / "c", "ema", 0)
    write_run(tmp_path / "deep" / "d", "ema", 0, attention__factor=16)
    write_run(tmp_path / "deep" / "e", "none", 0, epochs=8, trainer__max_epochs=8)
    comparison = compare(read_folder(tmp_path))
    assert comparison["settings"] == ["attention", "attention.factor", "epochs"]
    rows = rows_of(comparison)
    assert list(rows) == [
        "none, epochs=4",
        "ema, factor=8, epochs=4",
        "ema, factor=16, epochs=4",
        "none, epochs=8",
    ]
    assert rows["none, epochs=4"]["seeds"] == [0, 1]
    assert rows["ema, factor=16, epochs=4"]["contrast"]["baseline"] == "none, epochs=4"
    assert rows["none, epochs=8"]["baseline"] is False
    assert rows["none, epochs=8"]["contrast"] is None


def test_options_of_different_blocks_are_not_told_beside_their_names(tmp_path):
    write_run(tmp_path / "a", "none")
    write_run(tmp_path / "b", "cbam", attention__reduction=16)
    write_run(tmp_path / "c", "ema", attention__factor=8)
    assert compare(read_folder(tmp_path))["settings"] == ["attention"]


def test_where_no_block_sits_does_not_matter(tmp_path):
    place = {"encoder": True, "decoder": False, "head": False}
    write_run(tmp_path / "a", "none")
    write_run(tmp_path / "b", "ema")
    write_run(tmp_path / "c", "ema", placement=place)
    rows = rows_of(compare(read_folder(tmp_path)))
    assert rows["ema, encoder"]["contrast"]["baseline"] == "none, decoder"
    assert rows["ema, decoder"]["contrast"]["baseline"] == "none, decoder"


def test_named_runs_compare_with_the_first(tmp_path):
    write_run(tmp_path / "new", "ema", 0)
    write_run(tmp_path / "old", "none", 0)
    runs = read_runs([tmp_path / "new", tmp_path / "old" / "report" / "report.json"])
    comparison = compare(runs)
    assert comparison["baseline"] == {"attention": "ema"}
    assert rows_of(comparison)["none"]["contrast"]["baseline"] == "ema"
    assert rows_of(comparison)["none"]["contrast"]["p"] is None
    assert comparison["folder"] is None


def test_two_runs_of_one_seed_count_once(tmp_path):
    early, late = {"created": "2026-01-01T00:00:00+00:00"}, {"created": "2026-01-02T00:00:00+00:00", "miou": 0.123}
    write_run(tmp_path / "a", "ema", 0, report=late)
    write_run(tmp_path / "b", "ema", 0, report=early)
    comparison = compare(read_folder(tmp_path))
    assert comparison["rows"][0]["score"]["values"] == [0.123]
    assert any("seed 0 twice" in note for note in comparison["notes"])


def test_without_a_baseline_there_are_scores_but_no_differences(tmp_path):
    write_run(tmp_path / "a", "ema")
    write_run(tmp_path / "b", "se")
    comparison = compare(read_folder(tmp_path))
    assert comparison["baseline"] is None
    assert all(row["contrast"] is None for row in comparison["rows"])
    assert any("--baseline" in note for note in comparison["notes"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"name": "street", "root": "/", "split": "test", "images": IMAGES}}, "the split, got val and test;"),
        (
            {"data": {"name": "camvid", "root": "/", "split": "val", "images": IMAGES}},
            "must agree in the data set, got street and camvid",
        ),
        ({"classes": ["a", "b", "c", "d"]}, "the classes"),
        ({"confusion_matrix": [[1] * 4] * 4}, "the labels of the images"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(change, message, tmp_path):
    write_run(tmp_path / "a", "none")
    write_run(tmp_path / "b", "ema", report=change)
    with pytest.raises(DataError, match=message) as caught:
        compare(read_folder(tmp_path))
    assert str(tmp_path / "a") in str(caught.value)
    assert str(tmp_path / "b") in str(caught.value)


def test_costs_measured_otherwise_are_noted(tmp_path):
    write_run(tmp_path / "a", "none")
    write_run(tmp_path / "b", "ema", batch_sizes=(1, 4))
    comparison = compare(read_folder(tmp_path))
    assert any("same batch size (8, 4)" in note for note in comparison["notes"])
    assert [row["cost_batch_size"] for row in comparison["rows"]] == [8, 4]


def test_costs_measured_side_by_side_are_noted(tmp_path):
    for name, launcher in (("none", "serial"), ("ema", "joblib")):
        job = {"identity": name, "overrides": {"attention": name}, "launcher": launcher}
        write_run(tmp_path / name, name, report={"job": job})
    notes = compare(read_folder(tmp_path))["notes"]
    assert any("launcher joblib" in note and "measure them again" in note for note in notes)


def test_a_sweep_whose_jobs_changed_under_one_name_is_noted(tmp_path):
    write_run(tmp_path / "a", "none", 0)
    write_run(tmp_path / "b", "none", 1, optimizer={"name": "adamw", "lr": 0.01})
    write_run(tmp_path / "c", "ema", 0)
    jobs = [
        plan_job("a", attention="none", seed="0"),
        plan_job("b", attention="none", seed="1"),
        plan_job("c", attention="ema", seed="0"),
    ]
    comparison = compare(read_folder(write_plan(tmp_path, jobs, {"attention": "none"})))
    assert any("differ in more than the seed" in note and "optimizer.lr" in note for note in comparison["notes"])
    assert rows_of(comparison)["ema"]["contrast"] is None
    assert any(note.startswith("ema: no difference, because no baseline whose") for note in comparison["notes"])


@pytest.mark.parametrize("state", ["nothing", "empty", "no runs", "unfinished"])
def test_a_folder_with_nothing_to_compare_is_one_sentence(state, tmp_path):
    folder = tmp_path / "sweep"
    if state != "nothing":
        folder.mkdir()
    if state == "unfinished":
        write_plan(folder, [plan_job("a", attention="ema", seed="0")])
    messages = {"nothing": "no such folder", "unfinished": r"no job is finished \(1 missing\); run or resume"}
    with pytest.raises(DataError, match=messages.get(state, r"no \*/report/report\.json in it can be read")):
        read_folder(folder)


def test_a_report_that_lacks_something_is_named(tmp_path):
    run = write_run(tmp_path / "a", "none")
    path = run / "report" / "report.json"
    report = json.loads(path.read_text())
    for broken in (
        {key: value for key, value in report.items() if key != "config"},
        report | {"images": [{"name": "x"}]},
        report | {"images": [image | {"union": [1]} for image in report["images"]]},
        report | {"images": None},
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(DataError, match=r"is not a complete report.*write it again with eval\.py"):
            read_runs([run])


def write_street_like(root):
    """Write a data set in the layout of data=folder, with the images that ``write_run`` predicts."""
    from PIL import Image

    for kind in ("images", "masks"):
        (root / "val" / kind / "ride").mkdir(parents=True)
    (root / "classes.yaml").write_text("[road, car, 'traffic light | sign', sky]")
    for index, mask in enumerate(make_truth()):
        Image.fromarray(np.dstack([mask] * 3)).save(root / "val" / "images" / "ride" / f"{index:03d}.png")
        Image.fromarray(mask).save(root / "val" / "masks" / "ride" / f"{index:03d}.png")
    return root


def test_examples_are_the_images_of_most_gain_and_most_loss(tmp_path):
    from PIL import Image

    root = write_street_like(tmp_path / "data")
    data = {"data": {"name": "folder", "root": str(root), "split": "val", "images": IMAGES}}
    config = {"data": make_config()["data"] | {"name": "folder"}}
    for seed in range(2):
        write_run(tmp_path / "runs" / f"n{seed}", "none", seed, wrong=0.3, report=data, **config)
        write_run(tmp_path / "runs" / f"e{seed}", "ema", seed, wrong=0.31, report=data, **config)
    runs = read_folder(tmp_path / "runs")
    comparison = compare(runs)
    matches = match_runs(runs).rows
    base, row = matches
    gains = np.mean([row.results[seed].miou - base.results[seed].miou for seed in (0, 1)], axis=0)
    best, worst = comparison["examples"]
    assert (best["row"], best["baseline"], best["kind"], worst["kind"]) == ("ema", "none", "best", "worst")
    assert best["difference"] == pytest.approx(gains.max())
    assert best["name"] == f"ride/{gains.argmax():03d}"
    assert worst["difference"] == pytest.approx(gains.min())

    drawn, notes = draw_examples(comparison["examples"], matches, tmp_path / "out")
    assert notes == []
    palette = np.array(comparison["palette"], np.uint8)
    for example in drawn:
        pictures = {}
        for key, path in example["files"].items():
            with Image.open(tmp_path / "out" / path) as picture:
                pictures[key] = np.array(picture.convert("RGB"))
        assert len({picture.shape for picture in pictures.values()}) == 1
        truth = make_truth()[int(example["name"][-3:])]
        assert np.array_equal(pictures["truth"][truth != 255], palette[truth[truth != 255]])
        assert (pictures["truth"][truth == 255] == 0).all()
        kept = tmp_path / "runs" / "e0" / "report" / "predictions" / f"{example['name'].replace('/', '_')}.png"
        assert np.array_equal(pictures["prediction"], np.array(Image.open(kept).convert("RGB")))


@pytest.mark.slow
@pytest.mark.usefixtures("blank_figures")
def test_pictures_of_an_earlier_comparison_go_and_nothing_else(sweep, tmp_path):
    runs = read_folder(sweep)
    report_comparison(runs, tmp_path)
    own = [tmp_path / "examples" / "c++notes.txt", tmp_path / "figures" / "mine.png"]
    for path in own:
        path.write_text("mine")
    fewer = replace(runs, runs=[run for run in runs.runs if (run.overrides or {})["attention"] != "cbam"])
    report_comparison(fewer, tmp_path)
    pictures = {path.name.split("+")[1] for path in (tmp_path / "examples").glob("*.png")}
    assert pictures == {"ema", "none"}
    assert all(path.read_text() == "mine" for path in own)
    assert "mine.png" not in (tmp_path / "comparison.md").read_text()


@pytest.mark.parametrize("name", ["comparison.md", "figures/pareto.pdf"])
def test_a_file_that_no_comparison_has_written_is_not_replaced(name, sweep, tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / name).write_text("mine")
    with pytest.raises(DataError, match=f"{name}: exists, was not written by ema-seg"):
        report_comparison(read_folder(sweep), tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]
    assert (tmp_path / name).read_text() == "mine"


def test_pictures_that_cannot_be_had_are_noted(sweep, tmp_path):
    runs = read_folder(sweep)
    comparison, matches = compare(runs), match_runs(runs).rows
    drawn, notes = draw_examples(comparison["examples"], matches, tmp_path)
    assert all(example["files"]["image"] is None and example["files"]["truth"] is None for example in drawn)
    assert all(example["files"]["prediction"] for example in drawn)
    assert notes == ["No photographs and no truth: the data set is not in /data/street here."]


def test_photographs_are_found_wherever_one_of_the_runs_had_them(tmp_path):
    root = write_street_like(tmp_path / "data")
    config = {"data": make_config()["data"] | {"name": "folder"}}
    for attention, place in (("none", "/gone"), ("ema", str(root))):
        data = {"data": {"name": "folder", "root": place, "split": "val", "images": IMAGES}}
        write_run(tmp_path / "runs" / attention, attention, report=data, **config)
    runs = read_runs([tmp_path / "runs" / "none", tmp_path / "runs" / "ema"])
    drawn, notes = draw_examples(compare(runs)["examples"], match_runs(runs).rows, tmp_path / "out")
    assert notes == []
    assert all(all(example["files"].values()) for example in drawn)


def test_rows_without_a_baseline_share_a_note(tmp_path):
    jobs = [plan_job("base", attention="none", lr="1", seed="0")]
    write_run(tmp_path / "base", "none")
    for index in range(8):
        write_run(tmp_path / f"t{index}", "ema")
        jobs.append(plan_job(f"t{index}", attention="ema", lr=str(index + 2), seed="0"))
    comparison = compare(read_folder(write_plan(tmp_path, jobs)))
    (note,) = [note for note in comparison["notes"] if "no baseline" in note]
    assert note.startswith("ema, lr=2; ema, lr=3; ")
    assert note.endswith(" and 3 more: no difference, because no baseline has the same other settings.")


def test_one_job_for_many_values_is_the_baseline_of_all(tmp_path):
    jobs = [plan_job("shared", attention="*", variant="none", seed="0")]
    write_run(tmp_path / "shared", "none")
    for attention in ("se", "ema"):
        write_run(tmp_path / attention, attention)
        jobs.append(plan_job(attention, attention=attention, variant="head", seed="0"))
    rows = rows_of(compare(read_folder(write_plan(tmp_path, jobs, {"variant": "none"}))))
    assert [row["contrast"] and row["contrast"]["baseline"] for row in rows.values()] == [
        None,
        "none",
        "none",
    ]


@pytest.mark.parametrize(
    "baseline", [{"attention": "none"}, {"attention": "none", "placement": "encoder"}, {"placement": "encoder"}]
)
def test_one_job_for_all_places_is_a_baseline_by_any_of_its_names(baseline, tmp_path):
    jobs = [plan_job("none", attention="none", placement="*", seed="0")]
    write_run(tmp_path / "none", "none")
    for place in ("encoder", "decoder"):
        write_run(tmp_path / place, "se")
        jobs.append(plan_job(place, attention="se", placement=place, seed="0"))
    rows = rows_of(compare(read_folder(write_plan(tmp_path, jobs, baseline))))
    expected = {"placement": "se, encoder"} if "attention" not in baseline else {}
    assert rows["se, decoder"]["contrast"]["baseline"] == expected.get("placement", "none")


def test_a_job_for_all_values_of_all_keys_is_called_by_its_block(tmp_path):
    jobs = [
        plan_job("none", attention="*", variant="*", seed="0"),
        plan_job("se", attention="se", variant="head", seed="0"),
    ]
    write_run(tmp_path / "none", "none")
    write_run(tmp_path / "se", "se")
    rows = rows_of(compare(read_folder(write_plan(tmp_path, jobs, {"variant": "none"}))))
    assert rows["se, head"]["contrast"]["baseline"] == "none"


def test_sweeps_in_a_folder_are_compared_as_runs_with_a_note(tmp_path):
    write_sweep(tmp_path / "one")
    comparison = compare(read_folder(tmp_path))
    assert [row["label"] for row in comparison["rows"]] == ["none", "cbam", "ema"]
    assert any(note.startswith(f"{tmp_path / 'one'} is a sweep: its finished jobs") for note in comparison["notes"])


def test_variants_and_options_compare_with_the_baseline_of_their_sweep(tmp_path):
    for name in ("none", "ema", "factor_2"):
        write_run(tmp_path / "variants" / name, name)
    jobs = [plan_job(name, variant=name, seed="0") for name in ("none", "ema", "factor_2")]
    comparison = compare(read_folder(write_plan(tmp_path / "variants", jobs, {"variant": "ema"})))
    assert [(row["label"], row["baseline"]) for row in comparison["rows"]] == [
        ("ema", True),
        ("none", False),
        ("factor_2", False),
    ]

    jobs = []
    for attention, factor in (("none", None), ("ema", "auto"), ("ema", "2")):
        write_run(tmp_path / "options" / f"{attention}{factor}", attention)
        options = {} if factor is None else {"attention.factor": factor}
        jobs.append(plan_job(f"{attention}{factor}", attention=attention, seed="0", **options))
    folder = write_plan(tmp_path / "options", jobs)
    rows = rows_of(compare(read_folder(folder)))
    assert [rows[f"ema, factor={factor}"]["contrast"]["baseline"] for factor in ("auto", "2")] == ["none", "none"]
    rows = rows_of(compare(read_folder(folder), baseline={"attention.factor": "auto"}))
    assert rows["ema, factor=2"]["contrast"]["baseline"] == "ema, factor=auto"
    assert rows["none"]["contrast"] is None


def test_groups_of_classes_that_a_sweep_names_are_scored_apart(tmp_path):
    folder = write_sweep(tmp_path / "sweep")
    plan = json.loads((folder / "sweep.json").read_text())
    groups = {"movable": ["car", "tractor"], "elsewhere": ["yak"], "both": ["road", "car"]}
    (folder / "sweep.json").write_text(json.dumps({**plan, "groups": groups}))

    comparison = compare(read_folder(folder))

    row = rows_of(comparison)["ema"]
    assert comparison["strata"]["movable"] == "car"
    assert comparison["strata"]["both"] == "road, car"
    assert "elsewhere" not in comparison["strata"]
    assert "elsewhere: not scored, because the data has none of its classes (yak)." in comparison["notes"]
    assert "movable: without tractor, which the data does not have." in comparison["notes"]
    assert "## By the size of objects and by group of classes" in comparison_as_markdown(comparison)
    assert row["strata"]["movable"] == row["classes"]["car"]
    known = [row["classes"][name] for name in ("road", "car")]
    assert row["strata"]["both"]["score"]["mean"] == pytest.approx(np.mean([part["score"]["mean"] for part in known]))
    assert row["strata"]["both"]["contrast"]["difference"] == pytest.approx(
        np.mean([part["contrast"]["difference"] for part in known])
    )


def drawn_differences(sweep, seeds, replicates=2000):
    """Return the mIoU of "ema" minus that of "none" for each seed, and the variance of its mean over replicates."""
    counts = np.array(
        [
            [
                [[image["intersection"], image["union"]] for image in json.loads(path.read_text())["images"]]
                for path in (sweep / f"{name}_seed{seed}" / "report" / "report.json" for seed in seeds)
            ]
            for name in ("ema", "none")
        ],
        dtype=float,
    )  # (2, seeds, images, 2, K)

    def differences(chosen):
        intersection, union = np.moveaxis(counts[:, :, chosen].sum(axis=2), -2, 0)
        with np.errstate(invalid="ignore"):
            return -np.diff(np.nanmean(intersection / union, axis=-1), axis=0)[0]

    rng = np.random.default_rng(1)
    drawn = [differences(rng.integers(0, IMAGES, IMAGES - 1)).mean() for _ in range(replicates)]
    return differences(np.arange(IMAGES)), np.var(drawn, ddof=1)


@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
def test_the_interval_is_that_of_a_bootstrap_written_down(seeds, sweep):
    runs = read_folder(sweep)
    runs = replace(runs, runs=[run for run in runs.runs if run.seed in seeds])
    contrast = rows_of(compare_runs(runs, replicates=4000))["ema"]["contrast"]
    differences, of_images = drawn_differences(sweep, seeds)
    n = len(seeds)
    of_seeds = np.var(differences, ddof=1) / n if n > 1 else 0.0
    total = of_seeds + of_images
    freedom = total**2 / ((of_seeds**2 / (n - 1) if n > 1 else 0) + of_images**2 / (IMAGES - 1))
    half = stats.t.ppf(0.975, freedom) * np.sqrt(total)
    if n > 1:
        half = max(half, stats.t.ppf(0.975, n - 1) * np.sqrt(of_seeds))
    assert contrast["difference"] == pytest.approx(differences.mean())
    assert contrast["high"] - contrast["difference"] == pytest.approx(half, rel=0.1)
    assert contrast["difference"] - contrast["low"] == pytest.approx(half, rel=0.1)


@pytest.mark.parametrize("images", [1, 3])
def test_a_class_of_few_images_has_no_more_certainty_than_these_give(images, tmp_path):
    write_run(tmp_path / "none0", "none", 0)
    write_run(tmp_path / "ema0", "ema", 0, wrong=0.2)
    for path in tmp_path.glob("*/report/report.json"):
        report = json.loads(path.read_text())
        for image in report["images"][images:]:  # only the first images have "car"
            for counts in (image, *image["strata"].values()):
                counts["intersection"][1] = counts["union"][1] = 0
        path.write_text(json.dumps(report))
    contrast = rows_of(compare(read_folder(tmp_path)))["ema"]["classes"]["car"]["contrast"]
    if images == 1:
        assert contrast is None
        return
    differences = []
    for name in ("ema", "none"):
        held = json.loads((tmp_path / f"{name}0" / "report" / "report.json").read_text())["images"][:images]
        counts = np.array([[image["intersection"][1], image["union"][1]] for image in held])
        rng = np.random.default_rng(0)
        drawn = [rng.integers(0, IMAGES, IMAGES - 1) for _ in range(4000)]
        sums = np.array([counts[chosen[chosen < images]].sum(axis=0) for chosen in drawn])
        with np.errstate(invalid="ignore"):
            differences.append(sums[:, 0] / sums[:, 1])
    spread = np.nanstd(differences[0] - differences[1], ddof=1)
    half = stats.t.ppf(0.975, images - 1) * spread
    assert contrast["high"] - contrast["difference"] == pytest.approx(half, rel=0.25)


def test_a_setting_that_is_null_is_one_that_is_not_there(tmp_path):
    for attention, seed in itertools.product(("none", "ema"), range(3)):
        extra = {"training": {"early_stopping": None}} if seed == 2 else {}
        write_run(tmp_path / f"{attention}{seed}", attention, seed, **extra)
    rows = rows_of(compare(read_folder(tmp_path)))
    assert {label: row["seeds"] for label, row in rows.items()} == {"none": [0, 1, 2], "ema": [0, 1, 2]}


def test_an_override_to_null_is_a_row_of_its_own(tmp_path):
    jobs = []
    for seed, other in itertools.product(range(2), ({}, {"loss.dice": "null"})):
        name = f"{seed}{len(other)}"
        write_run(tmp_path / name, "none", seed, wrong=0.2 + 0.1 * len(other))
        jobs.append(plan_job(name, seed=str(seed), **other))
    rows = rows_of(compare(read_folder(write_plan(tmp_path, jobs))))
    assert {label: row["seeds"] for label, row in rows.items()} == {"none": [0, 1], "dice=null": [0, 1]}


def test_a_folder_of_data_names_its_data(tmp_path):
    for root, seed in itertools.product(("small", "full"), range(2)):
        data = {"name": "folder", "root": f"/data/{root}", "batch_size": 4, "workers": 2}
        write_run(tmp_path / f"{root}{seed}", "none", seed, data=data)
    rows = rows_of(compare(read_folder(tmp_path)))
    assert {label: row["seeds"] for label, row in rows.items()} == {
        "root=/data/full": [0, 1],
        "root=/data/small": [0, 1],
    }


def test_named_runs_of_one_configuration_are_nothing_to_compare(tmp_path):
    runs = [write_run(tmp_path / f"none{seed}", "none", seed) for seed in range(2)]
    with pytest.raises(ConfigError, match=r"none0 and .*none1: these runs have the same settings"):
        compare(read_runs(runs))


def test_curves_go_as_far_as_all_seeds(tmp_path):
    for seed, scores in enumerate(([0.25, 0.25, 0.25], [0.75])):
        curves = {"epoch": [float(epoch) for epoch in range(len(scores))], "val/miou": scores}
        write_run(tmp_path / f"none{seed}", "none", seed, report={"curves": curves})
    (row,) = compare(read_folder(tmp_path))["rows"]
    assert row["curves"]["val/miou"] == {"epoch": [0], "mean": [0.5], "low": [0.25], "high": [0.75]}


def test_a_group_cannot_take_the_name_of_a_size(sweep):
    runs = replace(read_folder(sweep), groups={"small": ["car"]})
    with pytest.raises(ConfigError, match=r"sweep\.groups\.small: the name is reserved"):
        compare(runs)


def test_a_sweep_whose_locks_cannot_be_taken_is_read(sweep, tmp_path):
    folder = write_sweep(tmp_path / "copied")
    job = folder / "se_seed0"
    (job / "run.lock").mkdir(parents=True)
    rows = rows_of(compare(read_folder(folder)))
    assert rows["se"]["jobs"][0]["state"] == "missing"


def test_why_no_report_can_be_read_is_said(tmp_path):
    path = write_run(tmp_path / "old") / "report" / "report.json"
    path.write_text(path.read_text().replace("ema-seg.report/", "ema-seg.report/0"))
    with pytest.raises(DataError, match=r"can be read; .*schema"):
        read_folder(tmp_path)
