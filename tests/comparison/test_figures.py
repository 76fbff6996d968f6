import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from ema_seg.comparison import figures
from ema_seg.comparison.figures import draw_comparison, front_rows
from ema_seg.comparison.schema import FIGURES, comparison_manifest
from ema_seg.runtime.errors import DataError
from tests.comparison.comparisons import make_comparison
from tests.forks import leave_blank

NAMES = ["pareto", "differences", "curves", "class_differences", "further", "examples"]


@pytest.fixture
def blank_pdfs(monkeypatch):
    """Save blank PDFs, which draw what the PNGs draw."""
    save = Figure.savefig

    def save_png(figure, target, **options):
        (leave_blank if options["format"] == "pdf" else save)(figure, target, **options)

    monkeypatch.setattr(Figure, "savefig", save_png)


def summary(mean):
    return {"mean": mean, "sd": None, "n": 1, "values": [mean]}


def row(label, speed, score):
    return {"label": label, "score": summary(score), "cost": {"images_per_second": summary(speed)}}


@pytest.mark.slow
def test_every_figure_is_a_png_and_a_pdf(tmp_path):
    assert draw_comparison(make_comparison(tmp_path), tmp_path) == NAMES

    for name in NAMES:
        with Image.open(tmp_path / "figures" / f"{name}.png") as picture:
            assert min(picture.size) > 300
        assert (tmp_path / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.slow
def test_the_same_comparison_gives_the_same_pdf(tmp_path):
    comparison = make_comparison(tmp_path, rows=2, classes=3)
    comparison["examples"] = []
    draw_comparison(comparison, tmp_path)
    first = {path.name: path.read_bytes() for path in (tmp_path / "figures").glob("*.pdf")}

    draw_comparison(comparison, tmp_path)

    assert len(first) == 5
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "figures").glob("*.pdf")}


def test_a_figure_without_data_is_left_out_and_an_earlier_one_removed(tmp_path):
    comparison = make_comparison(tmp_path, rows=2)
    (tmp_path / "figures").mkdir()
    comparison_manifest(tmp_path).claim(FIGURES)
    for name in NAMES:
        (tmp_path / "figures" / f"{name}.png").write_bytes(b"earlier")
    (tmp_path / "figures" / "mine.png").write_bytes(b"of the user")
    comparison["examples"] = []
    for each in comparison["rows"]:
        each.update(contrast=None, curves={})
        for part in ("classes", "strata", "further"):
            for scored in each[part].values():
                scored["contrast"] = None

    assert draw_comparison(comparison, tmp_path) == ["pareto"]
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["mine.png", "pareto.pdf", "pareto.png"]


def test_a_comparison_without_a_finished_run_has_no_figures(tmp_path):
    comparison = make_comparison(tmp_path)
    comparison["rows"] = [each for each in comparison["rows"] if not each["seeds"]]
    comparison["examples"] = []

    assert draw_comparison(comparison, tmp_path) == []


@pytest.mark.slow
@pytest.mark.usefixtures("blank_pdfs")
def test_many_rows_and_classes_are_drawn(tmp_path):
    comparison = make_comparison(tmp_path, rows=25, classes=150)
    comparison["examples"] = []

    assert draw_comparison(comparison, tmp_path) == NAMES[:-1]


def test_one_configuration_has_no_differences(tmp_path):
    comparison = make_comparison(tmp_path, rows=1)
    comparison["baseline"] = None
    comparison["rows"][0]["baseline"] = False

    assert draw_comparison(comparison, tmp_path) == ["pareto", "curves"]


@pytest.mark.slow
@pytest.mark.usefixtures("blank_pdfs")
def test_one_seed_each_is_drawn_and_what_has_none_left_out(tmp_path):
    comparison = make_comparison(tmp_path)
    comparison["examples"] = []
    # "coord" has one seed, "gam" none.
    comparison["rows"] = [each for each in comparison["rows"] if len(each["seeds"]) < 2]

    assert draw_comparison(comparison, tmp_path) == NAMES[:-1]


@pytest.mark.slow
@pytest.mark.usefixtures("blank_pdfs")
def test_names_are_written_as_they_are(tmp_path, monkeypatch):
    odd = r"_<a> $\nosuch$ b_1^ & %"  # matplotlib's mathtext cannot parse it
    comparison = make_comparison(tmp_path, rows=2, classes=9)
    comparison["data"]["name"] = odd
    comparison["classes"][0] = odd
    comparison["rows"][1]["label"] = odd
    for each in comparison["rows"]:
        each["classes"] = {odd if name == "sky" else name: scored for name, scored in each["classes"].items()}
    comparison["rows"][1]["contrast"]["baseline"] = odd
    for example in comparison["examples"]:
        example.update(row=odd, baseline=odd, name=odd)
    texts = {}
    save = Figure.savefig

    def spy(figure, target, **options):
        save(figure, target, **options)
        texts[figure] = [text.get_text() for text in figure.findobj(Text)]

    monkeypatch.setattr(Figure, "savefig", spy)

    assert draw_comparison(comparison, tmp_path) == NAMES
    assert [odd in written for written in texts.values()] == [True] * len(NAMES)


@pytest.mark.slow
@pytest.mark.usefixtures("blank_pdfs")
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


def test_no_other_point_is_between_a_point_and_its_label():
    points = np.array([(100.0, 100.0), (112.0, 106.0), (114.0, 94.0)])
    frame, taken = Bbox.from_extents(0, 0, 300, 200), [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in points]
    for place, (x, y) in enumerate(points):
        others = np.delete(points, place, axis=0)
        box = figures._free_place(x, y, 60, 12, 1, frame, taken, others)
        taken.append(box)

        assert figures._clearance(figures._nearest_in(box, x, y), (x, y), others) > 6
    assert figures._clearance((0, 0), (10, 0), np.array([(5.0, 2.0), (20.0, 0.0)])) == 2
    assert figures._clearance((0, 0), (10, 0), np.array([(12.0, 0.0)])) == 2
