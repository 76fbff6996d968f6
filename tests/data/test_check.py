import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ema_seg.data.check import main
from tests.conftest import silent
from tests.data.builders import (
    random_image,
    random_mask,
    save,
    truncate,
    write_cityscapes,
    write_split_folder,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_split_folder(tmp_path, "train", [f"t{index}" for index in range(5)], list(range(12)))
    return write_split_folder(tmp_path, "val", ["v0", "v1"], [0, 3, 11])


@pytest.mark.slow
def test_a_sound_data_set_passes_with_class_frequencies(root: Path) -> None:
    command = [sys.executable, "-m", "ema_seg.data.check", "camvid", str(root), "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train: 5 images" in done.stdout and "val: 2 images" in done.stdout
    assert "bicyclist" in done.stdout and "no defects" in done.stdout


def test_frequencies_leave_ignored_pixels_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "train/images/a.png", random_image(0, 4, 4))
    mask = random_mask([11], height=4, width=4)
    mask[0] = (0, 0, 0, 3)
    save(tmp_path / "train/masks/a.png", mask)
    assert main(["camvid", str(tmp_path), "--workers", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {line.split("│")[2].strip(): line.split("│")[3:5] for line in lines if line.count("│") == 5}
    assert [cell.strip() for cell in cells["sky"]] == ["75.000", "1"]
    assert [cell.strip() for cell in cells["road"]] == ["25.000", "1"]
    assert [cell.strip() for cell in cells["car"]] == ["0.000", "0"]
    assert any("ignored: 75.000 %" in line for line in lines)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_all_defects_are_listed(root: Path, capsys: pytest.CaptureFixture[str], workers: str) -> None:
    (root / "train/masks/t0.png").unlink()
    truncate(root / "train/images/t1.jpg")
    save(root / "train/masks/t1.png", random_mask([77]))
    save(root / "train/masks/t2.png", random_mask([0], height=5))
    (root / "train/masks/t3.png").write_bytes(b"")
    save(root / "val/masks/v1.png", random_image(0))
    assert main(["camvid", str(root), "--workers", workers]) == 1
    lines = capsys.readouterr().out.splitlines()
    expected = [
        "t0.jpg: the image has no mask",
        "t1.jpg: cannot be decoded as an image",
        "t1.png: mask value 77",
        "t2.png: the mask is 16 x 5 pixels",
        "t3.png: cannot be decoded as a mask",
        "v1.png: is a colour image",
    ]
    for sentence in expected:
        assert len([line for line in lines if sentence in line]) == 1, sentence
    assert lines[-1].endswith("6 defects")


def test_ways_of_reading_and_useless_labels_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, values in (("train", [0, 255]), ("val", [255])):
        write_split_folder(tmp_path, split, ["a", "b"], values)
    (tmp_path / "classes.yaml").write_text("[background, leaf]")
    assert main(["folder", str(tmp_path), "--workers", "0"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "train: 2 masks read as class values" in lines
    (train,) = (line for line in lines if "no training pixel is 'leaf' (mask value 1)" in line)
    assert "write {name: leaf, value: 255} if that is the class's value, or ignore: 255 beside classes:" in train
    assert any("the split 'val' has no labelled pixel" in line for line in lines)
    assert lines[-1].endswith("2 defects")

    (tmp_path / "classes.yaml").write_text("[background, {name: leaf, value: 255}]")
    assert main(["folder", str(tmp_path), "--workers", "0"]) == 0
    (tmp_path / "classes.yaml").write_text("{classes: [background, leaf], ignore: 255}")
    assert main(["folder", str(tmp_path), "--workers", "0", "--split", "train"]) == 0


def test_names_do_not_act_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_split_folder(tmp_path, "train", ["a"], [0, 1, 7])
    (tmp_path / "classes.yaml").write_text('["[red]ground", "\\e[31msky"]')
    assert main(["folder", str(tmp_path), "--workers", "0"]) == 1
    out = capsys.readouterr().out
    assert "[red]ground" in out and r"\x1b[31msky" in out and "\x1b[31m" not in out


def test_labels_that_are_withheld_are_no_defect(tmp_path: Path) -> None:
    write_cityscapes(tmp_path, "test", ["berlin_000000_000019"], [0])  # dummy labels, as in the published test split
    assert main(["cityscapes", str(tmp_path), "--workers", "0"]) == 0


def test_a_split_can_be_chosen(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "train/masks/t0.png").unlink()
    assert main(["camvid", str(root), "--split", "val", "--workers", "0"]) == 0
    assert main(["camvid", str(root), "--split", "test", "--workers", "0"]) == 1
    assert "no images in test/images/; splits with images: train, val" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_disk_that_gives_nothing_is_not_waited_for(
    root: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    with silent(root / "train/images/t1.jpg"):
        assert main(["camvid", str(root), "--workers", workers, "--timeout", "1"]) == 1
    said = f"{root}/train/images/t1.jpg or {root}/train/masks/t1.png: the disk did not respond for 1 seconds; check"
    assert capsys.readouterr().err.splitlines()[-1].startswith(said)


@pytest.mark.slow
def test_a_killed_worker_is_told_with_the_files_that_it_read(root: Path) -> None:
    image = root / "train/images/t1.jpg"
    image.unlink()
    os.mkfifo(image)
    command = [sys.executable, "-m", "ema_seg.data.check", "camvid", str(root), "--workers", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as check:
        writer = os.open(image, os.O_WRONLY)  # returns when the worker opens the pipe; the worker then blocks
        (worker,) = Path(f"/proc/{check.pid}/task/{check.pid}/children").read_text().split()
        os.kill(int(worker), signal.SIGKILL)
        _, err = check.communicate(timeout=60)
        os.close(writer)
    assert check.returncode == 1
    mask = root / "train/masks/t1.png"
    said = f"{image} or {mask}: the system killed a loader worker (Killed) while it read this, "
    assert err.splitlines()[-1].startswith(said)


def test_options_reach_the_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cityscapes(tmp_path, "train", ["aachen_000000_000019"], [7])
    write_cityscapes(tmp_path, "train_extra", ["erlangen_000000_000000"], [7], labels="gtCoarse")
    assert main(["cityscapes", str(tmp_path), "--workers", "0", "coarse=true"]) == 0
    assert "train: 2 images" in capsys.readouterr().out
    assert main(["cityscapes", str(tmp_path), "fine=true"]) == 1
    assert "data.fine=True is not an option" in capsys.readouterr().err


def test_labels_missing_from_a_split_are_a_defect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cityscapes(tmp_path, "val", ["munster_000000_000019"], [7])
    save(tmp_path / "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png", random_image(0))
    assert main(["cityscapes", str(tmp_path), "--workers", "0"]) == 1
    output = capsys.readouterr().out
    assert "val: 1 images" in output and "the split 'train' has images but no labels" in output


def test_a_wrong_root_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ade20k", str(tmp_path / "nowhere")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and "nowhere: no such file or folder" in captured.err


@pytest.mark.parametrize(
    "arguments", [["pascal", "root"], ["camvid", "root", "coarse"], ["camvid", "root", "--timeout", "nan"]]
)
def test_a_wrong_command_line_shows_the_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
