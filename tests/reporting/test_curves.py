import pytest
from PIL import Image

from ema_seg.reporting.curves import draw_curves, main, read_metrics
from ema_seg.runtime.errors import DataError


def make_run(folder, rows):
    folder.mkdir()
    (folder / "metrics.csv").write_text("epoch,train/loss,val/miou\n" + "\n".join(rows) + "\n")
    return folder


def test_curves_show_the_measured_values(tmp_path):
    runs = {
        "none": make_run(tmp_path / "a", ["0,2.0,0.25", "1,1.5,", "2,1.0,0.5"]),
        "ema": make_run(tmp_path / "b", ["0,1.0,0.75"]),
    }

    loss, miou = draw_curves(runs).axes

    assert loss.lines[0].get_xydata().tolist() == [[1, 2.0], [2, 1.5], [3, 1.0]]
    assert miou.lines[0].get_xydata().tolist() == [[1, 25.0], [3, 50.0]]
    assert [line.get_label() for line in miou.lines] == ["none", "ema"]


def test_the_command_writes_the_figure(tmp_path):
    run = make_run(tmp_path / "a", ["0,2.0,0.25"])

    assert main([str(tmp_path / "curves.png"), f"mine={run}"]) == 0
    assert Image.open(tmp_path / "curves.png").width > 1000


@pytest.mark.parametrize("argument", ["runs/missing", "mine=runs/missing", "=x"])
def test_a_wrong_run_is_one_sentence(argument, tmp_path, capsys):
    assert main([str(tmp_path / "curves.png"), argument]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_foreign_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"metrics\.csv: is not a table of numbers"):
        read_metrics(make_run(tmp_path / "a", ["zero,2.0,0.25"]))
