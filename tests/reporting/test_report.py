"""Tests of reports: strict JSON that can be read again, Markdown, tables and figures."""

import json
import math
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from ema_seg.evaluation import ConfusionMatrix, Cost, Evaluation, Example
from ema_seg.reporting import build_report, load_report, print_report, render_markdown, write_report
from ema_seg.runtime.errors import DataError

CLASSES = ("road", "car", "traffic light | sign", "sky")
PALETTE = ((128, 64, 128), (0, 0, 142), (250, 170, 30), (70, 130, 180))


def make_cost(batch_sizes: tuple[int, ...] = (1, 8), end_to_end: bool = True) -> Cost:
    forward = [
        {
            "batch_size": batch,
            "images_per_second": 123.4,
            "latency": {"median": 0.00812 * batch, "p95": 0.00955 * batch},
            "peak_memory": 300 * 2**20,
            "repeats": 10,
            "warmup": 3,
        }
        for batch in batch_sizes
    ]
    return Cost(
        parameters={"total": 4_651_267, "trainable": 4_651_000},
        gmacs=3.14159,
        throughput={
            "device": "Some GPU",
            "precision": "bf16-mixed",
            "memory_format": "channels_last",
            "size": [360, 480],
            "padded_size": [384, 480],
            "memory_method": "counted",
            "forward": forward,
            "end_to_end": {
                "images_per_second": 45.67,
                "images": 90,
                "batch_size": 8,
                "workers": 2,
                "warmup_batches": 5,
            }
            if end_to_end
            else None,
        },
    )


ENVIRONMENT = {
    "python": "3.12.1",
    "os": "Linux",
    "packages": {"ema-seg": "0.1.0", "torch": "2.11.0", "timm": None},
    "device": {"type": "cuda", "name": "Some GPU"},
    "threads": 8,
    "cuda": "12.8",
    "cudnn": 91002,
    "git": {"commit": "a" * 40, "dirty": True},
    "command": ["eval.py", "checkpoint=best.ckpt"],
}


def make_evaluation(num_classes: int = 4, images: int = 3) -> Evaluation:
    rng = np.random.default_rng(0)
    confusion = ConfusionMatrix(num_classes)
    seen = max(num_classes - 1, 1)  # the last class never occurs
    confusion.update(rng.integers(0, seen, 500), rng.integers(0, seen, 500))
    records: list[Any] = [
        {
            "name": f"image_{index}",
            "miou": math.nan if index == 0 else 0.5,
            "pixel_accuracy": 0.5,
            "intersection": [1] * num_classes,
            "union": [2] * num_classes,
            "strata": {
                "small": {"intersection": [0] * num_classes, "union": [0] * num_classes},
                "medium": {"intersection": [0] * num_classes, "union": [1] * num_classes},
                "large": {"intersection": [1] * num_classes, "union": [1] * num_classes},
            },
        }
        for index in range(images)
    ]
    return Evaluation(confusion, records)


def make_report(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "classes": CLASSES,
        "palette": PALETTE,
        "data": {"name": "street", "root": "/data/street", "split": "val"},
        "model": {"decoder": "fpn", "encoder": "resnet18"},
        "attention": {"name": "ema", "factor": 8},
        "environment": ENVIRONMENT,
        "config": {"seed": 3, "epochs": 2, "model": {"decoder": "fpn"}},
        "run": "runs/first",
        "checkpoint": Path("runs/first/checkpoints/best.ckpt"),
    }
    evaluation, cost = changes.pop("evaluation", make_evaluation()), changes.pop("cost", make_cost())
    return build_report(evaluation, cost, **(arguments | changes))


def make_panel(sizes: tuple[tuple[int, int], ...] = ((30, 40), (50, 20), (1, 1))) -> list[Example]:
    rng = np.random.default_rng(1)
    return [
        Example(
            title="best: image, mIoU 50.0%",
            image=rng.integers(0, 256, (*size, 3), dtype=np.uint8),
            truth=np.where(rng.random(size) < 0.1, 255, rng.integers(0, 4, size)),
            prediction=rng.integers(0, 4, size),
        )
        for size in sizes
    ]


def strict(text: str) -> Any:
    """Parse JSON strictly: NaN and infinities fail the test."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def printed(report: dict[str, Any], width: int = 80) -> str:
    output = StringIO()
    print_report(report, Console(file=output, width=width))
    return output.getvalue()


def test_report_holds_the_counts_and_what_follows_from_them() -> None:
    evaluation = make_evaluation()
    report, scores = make_report(evaluation=evaluation), evaluation.confusion.compute()
    assert report["confusion_matrix"] == evaluation.confusion.matrix.tolist()
    for name in ("miou", "mean_accuracy", "pixel_accuracy", "fw_iou"):
        assert report[name] == scores[name]
    assert report["iou"] == [*scores["iou"][:3], None]
    assert report["absent_classes"] == ["sky"]
    assert report["data"]["images"] == 3
    assert report["images"][0]["miou"] is None
    assert report["images"][0]["prediction"] is None
    assert report["seed"] == 3
    assert report["config"]["epochs"] == 2
    assert report["size_iou"]["medium"] == [0, 0, 0, 0]
    assert report["size_miou"] == {"small": None, "medium": 0, "large": 1}
    assert list(report["strata"]) == ["small", "medium", "large"]
    assert report["throughput"]["forward"][1]["batch_size"] == 8
    assert report["parameters"]["total"] == 4_651_267
    assert report["checkpoint"] == "runs/first/checkpoints/best.ckpt"


def test_report_holds_what_a_comparison_needs() -> None:
    job = {"identity": "ema-1", "overrides": {"attention": "ema", "seed": "1"}}
    curves = {"epoch": [0.0, 1.0], "val/miou": [None, math.nan]}
    report = make_report(job=job, curves=curves, predictions=["predictions/a.png", "b.png", "c.png"])
    assert report["job"] == job
    assert report["curves"] == {"epoch": [0.0, 1.0], "val/miou": [None, None]}
    assert [image["prediction"] for image in report["images"]] == ["predictions/a.png", "b.png", "c.png"]


def test_written_report_comes_back_as_it_was(tmp_path: Path) -> None:
    report = make_report()
    path = write_report(report, tmp_path / "deep" / "report", make_panel())
    assert path == tmp_path / "deep" / "report" / "report.json"
    assert strict(path.read_text()) == report
    assert load_report(path) == report
    assert {file.name for file in path.parent.rglob("*") if file.is_file()} == {
        "report.json",
        "report.md",
        "confusion_matrix.png",
        "per_class_iou.png",
        "panel.png",
        "written_files.json",
    }
    for figure in (path.parent / "figures").iterdir():
        with Image.open(figure) as image:
            image.verify()
    for name in ("confusion_matrix", "per_class_iou", "panel"):
        assert f"(figures/{name}.png)" in (path.parent / "report.md").read_text()


def test_json_has_a_line_for_each_row_and_image(tmp_path: Path) -> None:
    report = make_report()
    lines = write_report(report, tmp_path).read_text().splitlines()
    assert f"    {report['confusion_matrix'][0]}," in lines
    assert sum('"name": "image_' in line for line in lines) == 3


def test_a_report_without_panel_removes_an_older_one(tmp_path: Path) -> None:
    write_report(make_report(), tmp_path, make_panel())
    (tmp_path / "written_files.json").unlink()  # earlier versions wrote none
    write_report(make_report(), tmp_path)
    assert not (tmp_path / "figures" / "panel.png").exists()
    assert "panel" not in (tmp_path / "report.md").read_text()


def test_a_report_can_be_drawn_again_from_its_file(tmp_path: Path) -> None:
    first = write_report(make_report(), tmp_path / "first")
    second = write_report(load_report(first), tmp_path / "second")
    for name in ("report.json", "report.md", "figures/confusion_matrix.png", "figures/per_class_iou.png"):
        assert (second.parent / name).read_bytes() == (first.parent / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [1, 2, 19, 150])
def test_any_number_of_classes_can_be_reported(num_classes: int, tmp_path: Path) -> None:
    names = [f"class with a rather long name {index}" for index in range(num_classes)]
    palette = [(index, 255 - index, 128) for index in range(num_classes)]
    report = make_report(
        evaluation=make_evaluation(num_classes), classes=names, palette=palette, cost=make_cost((1,), False)
    )
    write_report(report, tmp_path)
    text = printed(report)
    assert max(map(len, text.splitlines())) <= 80
    assert "end to end" not in text


def test_nothing_labelled_is_reported_as_undefined(tmp_path: Path) -> None:
    report = make_report(evaluation=Evaluation(ConfusionMatrix(4), []))
    assert strict(write_report(report, tmp_path).read_text())["miou"] is None
    assert "undefined" in printed(report)
    assert "undefined" in render_markdown(report)


@pytest.mark.parametrize("width", [80, 60, 200])
def test_one_table_shows_scores_beside_costs(width: int) -> None:
    report = make_report()
    text = printed(report, width)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    flat = " ".join(text.split())
    for fact in (
        "fpn / resnet18 / ema on street val",
        f"mIoU {100 * report['miou']:.2f}%",
        "4,651,267",
        "3.14",
        "8.12 ms",
        "9.55 ms",
        "65.0 ms",
        "300.0 MiB",
        "45.7",
        "absent",
        "Some GPU",
        "bf16-mixed",
        "torch 2.11.0",
        "left out of the mean: sky.",
    ):
        assert fact in flat, fact
    if width >= 80:
        assert "mIoU, small objects undefined" in flat
        assert "mIoU, large objects 100.00%" in flat
        assert any("mIoU" in line and "parameters" in line for line in text.splitlines())


def test_class_names_are_no_markup() -> None:
    report = make_report(classes=("[red]road", "car [old]", "x", "[/]y"))
    assert "[red]road" in printed(report)
    assert "[/]y" in printed(report)


def test_hostile_names_lose_no_report_and_stay_names(tmp_path: Path) -> None:
    # A lone surrogate, as from a file name that is not UTF-8; escape sequences; HTML; and invalid mathematics.
    name = "\udcff\x1b[2J<img src=x>$\\nothing$"
    report = make_report(
        classes=(name, "*x*", "[y](z)", "_"),
        environment=ENVIRONMENT | {"command": ["eval.py", f"ckpt=`{name}"]},
        evaluation=Evaluation(make_evaluation().confusion, [{**make_evaluation().images[0], "name": name}]),
        run=name,
    )
    panel = [row | {"title": name} for row in make_panel()]
    assert load_report(write_report(report, tmp_path, panel)) == report  # type: ignore[arg-type]
    text = (tmp_path / "report.md").read_text()
    shown = r"\\udcff\\x1b[2J\<img src=x>\$\\nothing\$"
    assert f"- run: {shown}\n" in text
    assert f"| {shown} | " in text
    assert "| \\*x\\* | " in text
    assert "| [y\\](z) | " in text
    assert "- command: `` eval.py ckpt=`\\udcff\\x1b[2J<img src=x>$\\nothing$ ``\n" in text
    output = printed(report)
    assert "\\udcff\\x1b[2J<img" in output
    assert "\x1b" not in output


def test_what_is_captured_is_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(make_report())
    output = capsys.readouterr().out
    assert "mIoU" in output
    assert "\x1b" not in output


def test_markdown_escapes_what_would_break_its_tables() -> None:
    text = render_markdown(make_report())
    assert "| traffic light \\| sign | " in text
    assert "with changes" in text
    assert "timm None" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[1, 2]", "must be a report with the schema 'ema-seg.report/2', got None"),
        ('{"miou": 0.5}', "must be a report with the schema"),
        ('{"schema": "ema-seg.report/99"}', "got 'ema-seg.report/99'"),
        ('{"schema": "ema-seg.report/1"}', r"write the report again with eval\.py"),
    ],
)
def test_a_foreign_file_is_named(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load_report(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["report.json", "report.md", "figures/panel.png"])
def test_a_file_that_no_report_has_written_is_not_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / name).write_text("months of work")
    with pytest.raises(DataError, match=f"{name}: exists, was not written by ema-seg and would be overwritten"):
        write_report(make_report(), tmp_path, make_panel())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]
    assert (tmp_path / name).read_text() == "months of work"
