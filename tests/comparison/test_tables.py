"""Tests of the tables of a comparison, and of the command that writes them."""

import csv
import json
import re
from io import StringIO

import pytest
from rich.console import Console

from ema_seg.comparison.__main__ import main
from ema_seg.comparison.compare import compare_runs
from ema_seg.comparison.files import write_comparison
from ema_seg.comparison.runs import read_folder
from ema_seg.comparison.tables import (
    comparison_as_csv,
    comparison_as_latex,
    comparison_as_markdown,
    points_text,
    print_comparison,
)
from ema_seg.runtime.escaping import for_markdown
from tests.comparison.runs_on_disk import write_run, write_sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return write_sweep(tmp_path_factory.mktemp("sweep") / "blocks")


@pytest.fixture(scope="module")
def comparison(sweep):
    return compare_runs(read_folder(sweep), replicates=200)


def printed(comparison, width):
    output = StringIO()
    print_comparison(comparison, Console(file=output, width=width))
    return output.getvalue()


def row_of(text, label, sep="|"):
    return next(line for line in text.splitlines() if re.match(rf"\W*{label}\b", line))


def test_markdown_has_a_row_for_each_configuration(comparison):
    text = comparison_as_markdown(comparison, ["figures/pareto.png"])
    ema = {row["label"]: row for row in comparison["rows"]}["ema"]
    mean, difference = 100 * ema["score"]["mean"], 100 * ema["contrast"]["difference"]
    assert f"| ema | {mean:.2f} ± {100 * ema['score']['sd']:.2f} (3) | **+{difference:.2f} [" in text
    assert "| none | " in text and "| baseline | – | 123 | 65.0 | 300 | 4.65 | 3.14 |" in text
    assert "(2 of 3)" in row_of(text, "cbam")
    assert "– (0 of 3)" in row_of(text, "se")
    assert "| cbam | 1 | failed | The loss was nan in epoch 2. |" in text
    assert "traffic light \\| sign" in text
    assert "![pareto](figures/pareto.png)" in text
    for note in comparison["notes"]:
        assert f"- {for_markdown(note)}" in text


def test_only_what_holm_leaves_significant_is_bold(comparison):
    for p, bold in ((0.049, True), (0.051, False), (None, False)):
        changed = json.loads(json.dumps(comparison))
        contrast = changed["rows"][1]["contrast"]
        contrast["p"], contrast["p_holm"] = 0.001, p
        assert ("**" in comparison_as_markdown(changed)) is bold
        assert ("\\textbf" in comparison_as_latex(changed)) is bold


@pytest.mark.parametrize("width", [80, 200])
def test_the_terminal_shows_the_same_columns(comparison, width):
    text = printed(comparison, width)
    assert max(map(len, text.splitlines())) <= width
    for column in ("mIoU", "difference", "p (Holm)", "images/s", "latency", "memory", "parameters", "GMACs"):
        assert column in text, column
    assert "baseline" in row_of(text, "none")
    assert ("65.0" in row_of(text, "none")) is (width == 200)
    assert "seed 1 failed: The loss was nan in epoch 2." in " ".join(text.split())


def test_csv_holds_plain_numbers(comparison):
    rows = list(csv.DictReader(StringIO(comparison_as_csv(comparison))))
    assert [row["label"] for row in rows] == ["none", "ema", "cbam", "se"]
    assert float(rows[1]["miou"]) == comparison["rows"][1]["score"]["mean"]
    assert float(rows[1]["miou_low"]) == comparison["rows"][1]["contrast"]["low"]
    assert float(rows[1]["iou_car"]) == comparison["rows"][1]["classes"]["car"]["score"]["mean"]
    assert rows[1]["attention"] == "ema"
    assert rows[1]["seeds"] == "0 1 2"
    assert rows[0]["miou_difference"] == rows[3]["miou"] == ""
    assert (rows[1]["iou_car_n"], rows[1]["iou_car_covers"]) == ("3", "seeds and images")
    assert (rows[2]["miou_small_n"], rows[2]["miou_n"]) == ("2", "2")


def test_a_class_that_fewer_seeds_have_says_so(comparison):
    changed = json.loads(json.dumps(comparison))
    row = changed["rows"][1]
    stratum = next(part for part in row["strata"].values() if part["contrast"])
    row["classes"]["car"]["contrast"]["n"] = stratum["contrast"]["n"] = 2
    text = comparison_as_markdown(changed)
    assert [line.count("(n=2)") for line in text.splitlines() if "(n=" in line] == [1, 1]
    assert row_of(text, "car").split("|")[2].endswith("] (n=2) ")


def test_a_baseline_that_nothing_is_compared_with_is_not_told_of(comparison):
    changed = json.loads(json.dumps(comparison))
    for row in changed["rows"]:
        row["contrast"] = None
    text = comparison_as_markdown(changed)
    assert "Scores: mean ± standard deviation over seeds.\n" in text
    assert "Differences" not in text


@pytest.mark.parametrize(
    ("points", "text"), [(0.00004, "0.00"), (-0.00004, "0.00"), (0.0125, "+1.25"), (-0.5, "\N{MINUS SIGN}50.00")]
)
def test_what_rounds_to_zero_has_no_sign(points, text):
    assert points_text(points, signed=True) == text
    assert points_text(points) == text.lstrip("+")


def test_latex_is_escaped(comparison):
    changed = json.loads(json.dumps(comparison))
    changed["rows"][1]["label"] = "a_b & 50% {x} \\ ~^#$"
    text = comparison_as_latex(changed)
    assert r"a\_b \& 50\% \{x\} \textbackslash{} \textasciitilde{}\textasciicircum{}\#\$ & " in text
    assert text.count("\\begin{tabular}{lrrrrrrrr}") == 1
    body = text[text.index("\\midrule") : text.index("\\bottomrule")].splitlines()[1:-1]
    assert all(line.count(" & ") == 8 and line.endswith("\\\\") for line in body)
    assert not re.search("[–\N{MINUS SIGN}±]", text[text.index("\\begin") :])


@pytest.mark.slow
@pytest.mark.usefixtures("blank_figures")
def test_hostile_names_stay_names_in_every_file(comparison, tmp_path):
    name = "=1+1</script><img src=x>[y](z)|\x1b[2J\udcff"
    changed = json.loads(json.dumps(comparison).replace("traffic light | sign", json.dumps(name)[1:-1]))
    changed["rows"][1]["label"], changed["title"] = name, name
    write_comparison(changed, tmp_path)
    texts = {suffix: (tmp_path / f"comparison.{suffix}").read_text() for suffix in ("json", "csv", "tex", "md", "html")}
    assert json.loads(texts["json"])["title"] == name
    assert list(csv.reader(StringIO(texts["csv"])))[2][0] == "'=1+1</script><img src=x>[y](z)|\\x1b[2J\\udcff"
    assert r"\</script>\<img src=x>[y\](z)\|\\x1b[2J\\udcff" in texts["md"]
    assert "<img" not in texts["html"]
    assert texts["html"].count("</script>") == 2
    assert "\x1b" not in "".join(texts.values()) + printed(changed, 80)


@pytest.mark.slow
def test_a_sweep_is_compared_by_one_command(sweep, tmp_path, capsys):
    assert main([str(sweep), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.rstrip().endswith(f"comparison: {tmp_path / 'out' / 'comparison.html'}")
    assert "ema" in printed.out
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert comparison["schema"] == "ema-seg.comparison/2"
    assert comparison["bootstrap"]["replicates"] == 10_000
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {f"comparison.{suffix}" for suffix in ("json", "md", "csv", "tex", "html")} <= files
    assert any(name.startswith("figures/") and name.endswith(".pdf") for name in files)
    assert not any(name.endswith(".partial") for name in files)
    for example in comparison["examples"]:
        assert example["files"]["prediction"] in files
    markdown = (tmp_path / "out" / "comparison.md").read_text()
    for path in re.findall(r"!\[.*?\]\((.*?)\)", markdown):
        assert path in files


@pytest.mark.slow
@pytest.mark.usefixtures("blank_figures")
def test_the_comparison_goes_into_the_folder_of_the_sweep_and_is_no_run_of_it(tmp_path, capsys):
    write_run(tmp_path / "a", "none")
    write_run(tmp_path / "b", "ema")
    for _ in range(2):
        assert main([str(tmp_path), "--baseline", "attention=ema"]) == 0
    comparison = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert [(row["label"], row["baseline"]) for row in comparison["rows"]] == [("ema", True), ("none", False)]


@pytest.mark.slow
@pytest.mark.usefixtures("blank_figures")
def test_two_runs_are_compared_by_one_command(sweep, tmp_path, capsys):
    runs = [str(sweep / "none_seed0"), str(sweep / "ema_seed0")]
    assert main(["compare", *runs, "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    assert [(row["label"], row["baseline"]) for row in rows] == [("none", True), ("ema", False)]
    assert rows[1]["contrast"]["covers"] == "images"
    assert "says nothing about training anew" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "no such folder"),
        (["{sweep}", "--baseline", "attention"], "must be key=value, such as attention=none, got 'attention'"),
        (["{sweep}", "--baseline", "attention=nnoe"], "no configuration has it"),
        (["compare", "{sweep}/none_seed0"], "at least 2 runs, got 1"),
        (["compare", "{sweep}/none_seed0", "{sweep}/se_seed0"], "cannot be read"),
        (["{sweep}", "--output", "{sweep}/sweep.json/x"], "cannot be written"),
        (["{sweep}", "--output", "{sweep}/sweep.json"], "must be a folder, got a file"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, message, sweep, capsys):
    assert main([text.replace("{sweep}", str(sweep)) for text in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_comparing_needs_no_torch():
    import subprocess
    import sys

    program = "import sys, ema_seg.comparison.__main__; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_a_note_stays_one_item_of_plain_text(tmp_path):
    comparison = compare_runs(read_folder(write_sweep(tmp_path / "blocks")), replicates=100)
    comparison["notes"] = ["ema: seed 1 failed: first line\nsecond <img src=x>"]
    assert "- ema: seed 1 failed: first line second \\<img src=x>\n" in comparison_as_markdown(comparison, [])
