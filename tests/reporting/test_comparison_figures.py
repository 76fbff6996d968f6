import pytest
from PIL import Image

from ema_seg.errors import DataError
from ema_seg.reporting.comparison_figures import draw_comparison, front_rows
from tests.reporting.comparisons import make_comparison

NAMES = ["pareto", "differences", "curves", "class_differences", "examples"]


def summary(mean):
    return {"mean": mean, "sd": None, "n": 1, "values": [mean]}


def row(label, speed, score):
    return {"label": label, "miou": summary(score), "cost": {"images_per_second": summary(speed)}}


def test_every_figure_is_a_png_and_a_pdf(tmp_path):
    assert draw_comparison(make_comparison(tmp_path), tmp_path) == NAMES

    for name in NAMES:
        with Image.open(tmp_path / "figures" / f"{name}.png") as picture:
            assert min(picture.size) > 300
        assert (tmp_path / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_the_same_comparison_gives_the_same_pdf(tmp_path):
    comparison = make_comparison(tmp_path, rows=3, classes=4)
    comparison["examples"] = []
    draw_comparison(comparison, tmp_path)
    first = {path.name: path.read_bytes() for path in (tmp_path / "figures").glob("*.pdf")}

    draw_comparison(comparison, tmp_path)

    assert len(first) == 4
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "figures").glob("*.pdf")}


def test_a_figure_without_data_is_left_out_and_an_earlier_one_removed(tmp_path):
    comparison = make_comparison(tmp_path, rows=2)
    draw_comparison(comparison, tmp_path)
    comparison["examples"] = []
    for each in comparison["rows"]:
        each.update(contrast=None, curves={})
        for part in ("classes", "strata"):
            for scored in each[part].values():
                scored["contrast"] = None

    assert draw_comparison(comparison, tmp_path) == ["pareto"]
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["pareto.pdf", "pareto.png"]


def test_a_comparison_without_a_finished_run_has_no_figures(tmp_path):
    comparison = make_comparison(tmp_path)
    comparison["rows"] = [each for each in comparison["rows"] if not each["seeds"]]
    comparison["examples"] = []

    assert draw_comparison(comparison, tmp_path) == []


def test_many_rows_and_classes_are_drawn(tmp_path):
    comparison = make_comparison(tmp_path, rows=25, classes=150)
    comparison["examples"] = []

    assert draw_comparison(comparison, tmp_path) == NAMES[:-1]


def test_examples_without_a_photograph_are_drawn_and_unreadable_ones_named(tmp_path):
    comparison = make_comparison(tmp_path, rows=2)
    for example in comparison["examples"]:
        example["files"] |= {"image": None, "truth": None}
    assert "examples" in draw_comparison(comparison, tmp_path)

    picture = tmp_path / comparison["examples"][0]["files"]["prediction"]
    picture.write_bytes(b"broken")
    with pytest.raises(DataError, match=f"{picture.name}: cannot be read"):
        draw_comparison(comparison, tmp_path)


def test_the_front_is_what_nothing_beats_in_both():
    rows = [row("slow", 10, 0.6), row("beaten", 15, 0.5), row("best", 20, 0.7), row("fast", 30, 0.65)]

    assert [each["label"] for each in front_rows(rows)] == ["best", "fast"]
    assert [each["label"] for each in front_rows([row("twin", 10, 0.6), row("twin", 10, 0.6)])] == ["twin"]
