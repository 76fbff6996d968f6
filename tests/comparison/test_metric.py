"""Another score over runs that are there already."""

import csv
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from ema_seg.comparison.__main__ import main
from ema_seg.comparison.compare import compare_runs
from ema_seg.comparison.metric import with_metric
from ema_seg.comparison.plan import main as plan_main
from ema_seg.comparison.runs import read_folder, read_runs
from ema_seg.comparison.tables import comparison_as_csv, comparison_as_markdown
from ema_seg.evaluation.boundary import count_boundaries, score_boundaries
from ema_seg.runtime.errors import ConfigError, DataError
from tests.comparison.runs_on_disk import make_truth, write_run, write_sweep
from tests.reporting.test_report import CLASSES


@pytest.fixture
def sweep(tmp_path):
    folder = write_sweep(tmp_path / "sweep", seeds=2)
    plan = json.loads((folder / "sweep.json").read_text())
    plan["groups"] = {"few": [CLASSES[0], CLASSES[2]]}
    (folder / "sweep.json").write_text(json.dumps(plan))
    return folder


def rows_of(runs, metric):
    comparison = compare_runs(with_metric(runs, metric), replicates=200)
    return comparison, {row["label"]: row for row in comparison["rows"]}


def test_a_group_of_classes_is_the_score(sweep):
    plain, before = rows_of(read_folder(sweep), "miou")
    found, rows = rows_of(read_folder(sweep), "few")
    assert found["metric"] == "mIoU of few" and plain["metric"] == "mIoU"
    for label, row in rows.items():
        assert row["score"]["values"] == pytest.approx(before[label]["strata"]["few"]["score"]["values"])
        if row["contrast"]:
            expected = before[label]["strata"]["few"]["contrast"]
            assert {**row["contrast"], "p_holm": None} == pytest.approx(expected)
    assert "mIoU of few, % (seeds)" in comparison_as_markdown(found)


def test_a_list_of_classes_is_a_group_too(sweep):
    _, rows = rows_of(read_folder(sweep), "few")
    found, listed = rows_of(read_folder(sweep), f"[{CLASSES[2]}, {CLASSES[0]}]")
    assert found["metric"] == f"mIoU of {CLASSES[2]}, {CLASSES[0]}"
    assert listed["ema"]["score"] == rows["ema"]["score"] and listed["ema"]["contrast"] == rows["ema"]["contrast"]
    assert listed["ema"]["classes"][CLASSES[1]]["score"]["mean"] is None


class Truths:
    """Data set of the truths that the runs were scored on."""

    def __len__(self):
        return 8

    def name(self, index):
        return f"ride/{index:03d}"

    def read_mask(self, index):
        return make_truth()[index]


def test_boundaries_are_counted_from_the_predictions_of_runs_that_lack_them(tmp_path, monkeypatch):
    folders = [write_run(tmp_path / name, name, wrong=wrong) for name, wrong in (("none", 0.3), ("ema", 0.2))]
    monkeypatch.setattr("ema_seg.comparison.metric.open_dataset", lambda *_: Truths())
    comparison, rows = rows_of(read_runs(folders), "boundary_iou")
    for folder, row in zip(folders, rows.values(), strict=True):
        report = json.loads((folder / "report/report.json").read_text())
        counts = [
            count_boundaries(np.array(Image.open(folder / "report" / image["prediction"])), truth, len(CLASSES))
            for image, truth in zip(report["images"], make_truth(), strict=True)
        ]
        expected = score_boundaries(counts)
        assert row["score"]["mean"] == pytest.approx(expected["boundary_miou"])
        of_classes = [row["classes"][name]["score"]["mean"] for name in CLASSES]
        assert of_classes == pytest.approx([None if np.isnan(iou) else iou for iou in expected["boundary_iou"]])
    assert comparison["metric"] == "boundary mIoU" and comparison["strata"] == {}
    assert "By the size" not in comparison_as_markdown(comparison)
    assert rows["ema"]["contrast"]["difference"] > 0


def test_boundaries_of_a_report_need_neither_predictions_nor_data(tmp_path):
    folders = [write_run(tmp_path / name, name, further=True) for name in ("none", "ema")]
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    _, rows = rows_of(read_runs(folders), "boundary_iou")
    _, whole = rows_of(read_runs(folders), "miou")  # whose boundaries are the whole images
    assert rows["ema"]["score"]["values"] == pytest.approx(whole["ema"]["score"]["values"])
    assert rows["ema"]["contrast"] == pytest.approx(whole["ema"]["contrast"])


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("mio", r"metric=mio: must be one of miou, boundary_iou, few, or a list of classes.*Did you mean 'miou'"),
        ("[skyy]", r"metric=\[skyy\]: must list classes of the data, got 'skyy'"),
    ],
)
def test_an_unknown_metric_is_named(metric, message, sweep):
    with pytest.raises(ConfigError, match=message):
        with_metric(read_folder(sweep), metric)


def test_a_group_of_which_the_data_has_no_class_is_named(sweep):
    plan = json.loads((sweep / "sweep.json").read_text())
    plan["groups"] = {"[odd] $x$": ["nothing"]}
    (sweep / "sweep.json").write_text(json.dumps(plan))
    with pytest.raises(ConfigError, match="the data has none of its classes"):
        with_metric(read_folder(sweep), "[odd] $x$")


def test_a_groups_name_is_text(sweep, blank_figures, capsys):
    plan = json.loads((sweep / "sweep.json").read_text())
    plan["groups"] = {"[/red] $^$": [CLASSES[0]]}
    (sweep / "sweep.json").write_text(json.dumps(plan))
    assert main([str(sweep), "metric=[/red] $^$"]) == 0
    assert "[/red] $^$" in capsys.readouterr().out
    assert plan_main([str(sweep), "metric=[/red] $^$", "difference=1"]) == 0


def test_what_is_missing_for_boundaries_is_named(tmp_path, monkeypatch):
    run = write_run(tmp_path / "none")
    with pytest.raises(
        DataError, match=r"has no boundary scores, and its data cannot be read .*evaluation.boundary=true"
    ):
        with_metric(read_runs([run]), "boundary_iou")
    monkeypatch.setattr("ema_seg.comparison.metric.open_dataset", lambda *_: Truths())
    first = next((run / "report/predictions").iterdir())
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(first)
    with pytest.raises(DataError, match=r"the mask has the shape \(3, 3\), expected \(24, 32\)"):
        with_metric(read_runs([run]), "boundary_iou")
    first.write_bytes(b"none")
    with pytest.raises(DataError, match=f"{first.name}: cannot be read"):
        with_metric(read_runs([run]), "boundary_iou")


def test_the_command_takes_it_as_a_setting(sweep, blank_figures, capsys):
    assert main([str(sweep), "metric=few", "baseline=attention=ema", f"output={sweep / 'out'}"]) == 0
    assert re.search(r"mIoU of few", " ".join(capsys.readouterr().out.split()))
    comparison = json.loads((sweep / "out/comparison.json").read_text())
    assert comparison["metric"] == "mIoU of few" and comparison["baseline"] == {"attention": "ema"}
    (row, *_) = csv.DictReader(io.StringIO(comparison_as_csv(comparison)))
    assert float(row["score"]) == comparison["rows"][0]["score"]["mean"]
