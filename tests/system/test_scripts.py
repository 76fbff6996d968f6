"""The entry points, as a user runs them."""

import contextlib
import copy
import csv
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
import zipfile
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as cityscapes
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ema_seg
from ema_seg.analysis.schema import ALL_BLOCKS, INTERVENTIONS, load_analysis
from ema_seg.analysis.tables import FIGURES
from ema_seg.cli.command_line import quoted
from ema_seg.cli.resume import _unfinished_run
from ema_seg.cli.run_folder import _hold_unused
from ema_seg.comparison.configurations import group_runs
from ema_seg.comparison.runs import read_runs
from ema_seg.config import Demonstrating, Evaluating, Training, describe_settings
from ema_seg.data import find_dataset_class
from ema_seg.data.corruptions import CORRUPTIONS
from ema_seg.evaluation import ConfusionMatrix
from ema_seg.evaluation.boundary import count_boundaries, score_boundaries
from ema_seg.inference import video
from ema_seg.inference.prediction import pad_to_stride
from ema_seg.models import load_checkpoint, load_segmenter
from ema_seg.models.placement import attention_tensors, names_without_wrappers
from ema_seg.runtime.distributed.exit_handlers import PREEMPTION_SIGNALS, install_exit_handlers
from ema_seg.sweeps import is_running, lock_run
from ema_seg.training.checkpoints import require_same_model
from ema_seg.training.module import SegmentationModule
from tests.conftest import QUICK, ROOT, free_port, is_alive, made_once, write_camvid
from tests.inference.test_video import interrupt, write_video


@pytest.fixture(scope="module")
def finished(camvid_root, tmp_path_factory):
    """Train in a subprocess, with the default logger and pictures; return a folder with ``run``, ``out``, ``err``."""

    def make(folder):
        overrides = [
            *(text for text in QUICK if not text.startswith(("logger", "training.pictures"))),
            "data=camvid",
            f"data.root={camvid_root}",
            "training.pictures_every=1",
            "data.workers=1",
            f"hydra.run.dir={folder / 'run'}",
        ]
        with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
            command = [sys.executable, ROOT / "train.py", *overrides]
            status = subprocess.run(command, stdout=out, stderr=err, cwd=folder, timeout=300).returncode
        assert status == 0, (folder / "err").read_text()

    return made_once(tmp_path_factory, "finished", make)


@pytest.fixture(scope="module")
def finished_run(finished, tmp_path_factory):
    """Return a copy of the run for this test process, because commands hold the runs that they work on."""
    return shutil.copytree(finished / "run", tmp_path_factory.mktemp("runs") / "run")


def rows_of(run):
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_its_directory_as_promised(finished_run):
    files = {str(path.relative_to(finished_run)) for path in finished_run.rglob("*") if path.is_file()}

    assert {
        "config.yaml",
        "environment.json",
        "metrics.csv",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "report/report.json",
        "report/report.md",
        "report/figures/confusion_matrix.png",
        "report/figures/per_class_iou.png",
        "report/figures/panel.png",
        "pictures/epoch_001.png",
        "pictures/epoch_002.png",
    } <= files
    assert any(name.startswith("tensorboard/events") for name in files)


@pytest.mark.parametrize("source", [".", "checkpoints/best.ckpt"])
def test_a_loaded_run_predicts_the_masks_of_its_report(finished_run, camvid_root, source):
    segmenter = ema_seg.load(finished_run / source, device="cpu")
    report = json.loads((finished_run / "report/report.json").read_text())

    assert list(segmenter.classes) == report["classes"]
    assert [list(colour) for colour in segmenter.palette] == report["palette"]
    assert report["images"]
    for image in report["images"]:
        found = segmenter(camvid_root / "val" / "images" / f"{Path(image['name']).name}.jpg")
        assert np.array_equal(found.mask, np.array(Image.open(finished_run / "report" / image["prediction"])))


def test_predict_writes_the_masks_of_the_report_and_names_what_it_cannot_read(
    finished_run, camvid_root, tmp_path, run_script
):
    source = shutil.copytree(camvid_root / "val" / "images", tmp_path / "images")
    (source / "broken.jpg").write_bytes(b"no image")

    status, out, err = run_script("predict", f"run={finished_run}", f"source={source}", f"out={tmp_path / 'out'}")

    images = json.loads((finished_run / "report/report.json").read_text())["images"]
    assert status == 1
    assert out == f"{len(images)} of {len(images) + 1} images: {tmp_path / 'out'}\n"
    assert err.startswith(f"error: {source / 'broken.jpg'}: cannot be decoded as an image (")
    for image in images:
        own = tmp_path / "out" / "masks" / f"{Path(image['name']).name}.png"
        evaluated = finished_run / "report" / image["prediction"]
        assert np.array_equal(np.array(Image.open(own)), np.array(Image.open(evaluated)))


def test_a_pushed_run_is_predicted_and_evaluated_as_the_run(finished_run, camvid_root, tmp_path, run_script):
    shared = tmp_path / "shared"
    status, out, err = run_script("push", f"run={finished_run}", f"to={shared}", "license=mit")
    report = json.loads((finished_run / "report/report.json").read_text())
    assert status == 0, err
    assert out == f"mIoU: {report['miou']:.2%} on {len(report['images'])} images of camvid val\n{shared}\n"
    written = "".join((shared / name).read_text() for name in ("README.md", "config.json"))
    assert str(finished_run.parent) not in written
    assert str(camvid_root) not in written

    segmenter = ema_seg.load(shared, device="cpu")
    for image in report["images"]:
        found = segmenter(camvid_root / "val" / "images" / f"{Path(image['name']).name}.jpg")
        assert np.array_equal(found.mask, np.array(Image.open(finished_run / "report" / image["prediction"])))

    arguments = ("eval", f"ckpt={shared}", f"report.dir={tmp_path / 'report'}")
    assert "data.root is not set; give data.root=<value>" in run_script(*arguments)[2]
    status, _, err = run_script(*arguments, f"data.root={camvid_root}")
    assert status == 0, err
    again = json.loads((tmp_path / "report" / "report.json").read_text())
    assert again["confusion_matrix"] == report["confusion_matrix"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["to=a"], "run: must be set; give run=<the folder of a run or a checkpoint>."),
        (["run=a"], "to: must be set; give to=<a folder or hf://user/name>."),
        (["run=nowhere", "to=a"], "run=nowhere: no such folder or file; give the folder of a run"),
        (["run=a", "to=hf://user"], "hf://user: must be hf://user/name or hf://user/name@revision"),
        (["run=a", "to=b", "license='M I T'"], "license: must be the Hub's identifier of a licence, such as mit"),
    ],
)
def test_push_refuses_a_mistake_in_a_sentence(arguments, message, run_script):
    status, _, err = run_script("push", *arguments)
    assert status == 1
    assert message in err


@pytest.fixture
def used(finished_run, camvid_root, hub, tmp_path, monkeypatch):
    """Return a folder with the files that docs/use.md names; Hub, camera and the wait of the demo are not real."""
    for name in ("my_run", "without_attention"):
        shutil.copytree(finished_run, tmp_path / "runs" / name)
    (tmp_path / "best.ckpt").symlink_to(finished_run / "checkpoints/best.ckpt")
    (tmp_path / "pictures").symlink_to(camvid_root / "val/images")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/camvid").symlink_to(camvid_root)
    street = Image.open(next((camvid_root / "val/images").iterdir()))
    street.save(tmp_path / "street.jpg")
    (tmp_path / "frames").mkdir()
    street.save(tmp_path / "frames/0.png")
    write_video(tmp_path / "drive.mp4", sound="aac")
    test_picture = ("lavfi", "testsrc=size=64x48:rate=25:duration=0.2,crop=64:48:{}")
    monkeypatch.setattr(video, "_CAMERAS", {sys.platform: test_picture})
    monkeypatch.setattr("ema_seg.demo.serve.threading", SimpleNamespace(Event=lambda: SimpleNamespace(wait=interrupt)))
    monkeypatch.setenv("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# On small data, and on a machine without a GPU.
SHORTER = {
    "demo": ["device=cpu", "port=null"],
    "export": ["budget=0.01"],
    "predict": ["device=cpu"],
    "train": [
        *QUICK,
        "data=camvid",
        "data.root=~/data/camvid",
        "epochs=1",
        "freeze.until=null",
        "schedule.warmup_steps=1",
    ],
}


def run_page(run_script, *, only=None, without=()):
    """Run the Python blocks and the commands of docs/use.md, or of one section; return the names of its Python."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {}
    for section in re.split(r"^## ", (ROOT / "docs/use.md").read_text(), flags=re.MULTILINE):
        title = section.partition("\n")[0]
        if title in without or only not in (None, title):
            continue
        for language, block in re.findall(r"```(python|console)\n(.*?)```", section, re.DOTALL):
            if language == "python":
                exec(block, names)  # noqa: S102
                continue
            for line in block.splitlines():
                start, *arguments = shlex.split(line)
                script = arguments.pop(0).removesuffix(".py")
                if start == "pip":
                    assert re.fullmatch(r"ema-seg\[(\w+)\]", arguments[0])[1] in extras
                    continue
                if "-m" in arguments:  # its nine jobs take as long as all else, and sweeps have tests of their own
                    continue
                os.environ.pop("GRADIO_TEMP_DIR", None)  # the demo sets it
                status, _, err = run_script(script, *arguments, *SHORTER.get(script, []))
                assert status == 0, (line, err)
    return names


def test_an_exported_run_is_verified_and_goes_where_a_checkpoint_goes(used, one_trace, run_script, monkeypatch):
    run, own = used / "runs/my_run", json.loads((used / "runs/my_run/report/report.json").read_text())

    run_page(run_script, only="Export")

    verified = {}
    for name, file in {"onnx_fp32": "model.onnx", "openvino_int8": "model.xml"}.items():
        assert (run / "exported" / name / file).is_file()
        verified[name] = json.loads((run / "exported" / name / "export.json").read_text())
        assert verified[name]["miou"]["model"] == own["miou"]
        assert verified[name]["images"] == len(own["images"])
    assert verified["onnx_fp32"]["equal_pixels"] > 0.999
    assert verified["onnx_fp32"]["miou"]["artefact"] == pytest.approx(own["miou"], abs=0.01)
    assert sorted(file.name for file in (used / "deployed").iterdir()) == ["export.json", "model.pt2"]
    assert str(used).encode() not in (run / "exported/onnx_fp32/model.onnx").read_bytes()

    report = json.loads((run / "exported/openvino_int8/report/report.json").read_text())
    assert report["miou"] == pytest.approx(verified["openvino_int8"]["miou"]["artefact"])
    assert report["config"]["export"] == {"format": "openvino", "precision": "int8"}
    assert (report["parameters"], report["gmacs"]) == (own["parameters"], own["gmacs"])
    differing, configurations = group_runs(read_runs([run, run / "exported/openvino_int8"]).runs)
    assert (differing, len(configurations)) == (["export.format", "export.precision"], 2)
    mask = np.array(Image.open(used / "from_onnx/masks/0.png"))
    assert np.mean(mask == ema_seg.load(run, device="cpu")(used / "frames/0.png").mask) > 0.999

    monkeypatch.setattr("ema_seg.export._LEAST_EQUAL", 1.1)
    status, _, err = run_script("export", f"run={run}", f"out={used / 'out'}", "budget=0.01")
    assert status == 1
    assert "of the artefact's pixels are those of the model; expected at least" in err
    assert list((used / "out").iterdir()) == []


def test_export_refuses_a_mistake_in_a_sentence(finished_run, run_script):
    for arguments, message in (
        (["format=onnx"], "run: must be set; give run=<the folder of a run or a checkpoint>."),
        ([f"run={finished_run}", "format=tflite"], "format: must be onnx, torch or openvino, got 'tflite'"),
        ([f"run={finished_run}", "format=torch", "precision=int8"], "precision=int8: format=torch has fp32, fp16;"),
    ):
        status, _, err = run_script("export", *arguments)
        assert status == 1
        assert message in err


def write_without_attention(run, path):
    """Write the checkpoint of a run without its attention blocks: the twin that "off" makes of it."""
    model, _ = load_segmenter(run / "checkpoints/best.ckpt")
    names, blocks = names_without_wrappers(model), attention_tensors(model)
    checkpoint = load_checkpoint(run / "checkpoints/best.ckpt")
    checkpoint["config"]["attention"] = {"name": "none"}
    checkpoint["state_dict"] = {
        f"model.{names[name]}": value for name, value in model.state_dict().items() if name not in blocks
    }
    torch.save(checkpoint, path)
    return path


def test_an_analysis_has_the_scores_of_the_report_and_a_twin_without_the_blocks_is_off(
    finished_run, tmp_path, run_script
):
    twin = write_without_attention(finished_run, tmp_path / "twin.ckpt")

    status, out, err = run_script("analyse", f"run={finished_run}", f"twin={twin}", f"out={tmp_path / 'analysis'}")

    assert status == 0, err
    assert out == f"{tmp_path / 'analysis/analysis.html'}\n"
    analysis = load_analysis(tmp_path / "analysis/analysis.json")
    report = json.loads((finished_run / "report/report.json").read_text())
    assert analysis["scores"]["miou"] == pytest.approx(report["miou"], abs=1e-12)
    assert analysis["scores"]["iou"] == pytest.approx(report["iou"], nan_ok=True)
    assert analysis["data"]["images"] == len(report["images"])
    blocks = [block["name"] for block in analysis["blocks"]]
    assert len(blocks) == len(analysis["agreement"]) == 5
    assert all(block["channel_weights"]["pointwise"] < 1e-6 for block in analysis["blocks"])
    rows = {(row["block"], row["intervention"]): row for row in analysis["interventions"]}
    assert set(rows) == {(block, name) for block in (*blocks, ALL_BLOCKS) for name in INTERVENTIONS}
    off = rows[ALL_BLOCKS, "off"]
    assert off["differences"]["miou"] == pytest.approx(analysis["twin"]["differences"]["miou"], abs=1e-6)
    assert analysis["twin"]["similarity"]["encoder 1"] == pytest.approx(1)
    fields = analysis["receptive_field"]["models"]
    assert fields["attention off"] == fields["twin without attention"]
    page = (tmp_path / "analysis/analysis.html").read_text()
    for name in ("interventions", "classes", "weight_maps", "weights_by_class", "receptive_field", "similarity"):
        assert (tmp_path / f"analysis/figures/{name}.png").exists()
        assert f'alt="{FIGURES[name]}"' in page
    assert 'src="figures' not in page

    # Another one replaces it, and leaves no figure of the twin.
    options = ["images=2", "field_images=1", "precision=bf16-mixed"]
    status, _, err = run_script("analyse", f"run={finished_run}", f"out={tmp_path / 'analysis'}", *options)
    assert status == 0, err
    assert load_analysis(tmp_path / "analysis/analysis.json")["twin"] is None
    assert not (tmp_path / "analysis/figures/similarity.png").exists()


def test_analyse_refuses_a_mistake_in_a_sentence(finished_run, tmp_path, run_script):
    plain = write_without_attention(finished_run, tmp_path / "plain.ckpt")
    (tmp_path / "own").mkdir()
    (tmp_path / "own/analysis.md").write_text("mine")
    for arguments, message in (
        ([], "run: must be set; give run=<the folder of a run or a checkpoint>."),
        ([f"run={finished_run}", "images=0"], "images: must be a whole number"),
        ([f"run={plain}"], "plain.ckpt: the model has no attention block to analyse; give a run with attention."),
        ([f"run={finished_run}", f"twin={finished_run}"], "has attention blocks; give a run with attention=none."),
        ([f"run={finished_run}", "images=1"], "an interval needs at least 2 images, got 1"),
        ([f"run={finished_run}", f"out={tmp_path / 'own'}"], "analysis.md: exists, was not written by ema-seg"),
    ):
        status, _, err = run_script("analyse", *arguments)
        assert status == 1, arguments
        assert message in err
    assert (tmp_path / "own/analysis.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["source=a.png", "out=b"], "run: must be set; give run=<the folder of a run or a checkpoint>."),
        (["run=nowhere", "source=.", "out=b"], "nowhere: no such folder or file; give the folder of a run"),
        (["run=a", "source=b", "out=c", "alpha=2"], "alpha: must be a number from 0 to 1, got 2"),
    ],
)
def test_predict_refuses_a_mistake_in_a_sentence(arguments, message, run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "picture.png").touch()
    status, _, err = run_script("predict", *arguments)
    assert status == 1
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run: must be set; give run=<the folder of a run or a checkpoint>."),
        (["run=nowhere"], "nowhere: no such folder or file; give the folder of a run"),
        (["run=a", "port=0"], "port: must be a port from 1 to 65535, or null for a free one, got 0"),
        (["run=a", "port=taken"], "Address already in use; choose another port, or port=null for a free one."),
        (["run={run}", "examples=nowhere"], "examples=nowhere: there is no such folder; give a folder of images."),
    ],
)
def test_demo_refuses_a_mistake_in_a_sentence(arguments, message, finished_run, run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        arguments = [text.format(run=finished_run).replace("taken", port) for text in arguments]
        status, out, err = run_script("demo", *arguments)
    assert (status, out) == (1, "")
    assert message in err
    assert "Traceback" not in err


def test_demo_names_the_command_that_installs_gradio(run_script, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    status, _, err = run_script("demo", "run=a")
    assert status == 1
    assert re.search(r"^error: ema-seg demo needs Gradio \(.*\); install it with pip install .*\[demo\]'\.$", err)


def test_the_demo_of_a_shared_model_uses_no_path_of_its_config(finished_run, run_script, tmp_path, monkeypatch):
    monkeypatch.setattr("ema_seg.demo.serve.threading", SimpleNamespace(Event=lambda: SimpleNamespace(wait=interrupt)))
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)  # the demo sets it
    assert run_script("push", f"run={finished_run}", f"to={tmp_path / 'shared'}")[0] == 0
    content = json.loads((tmp_path / "shared/config.json").read_text())
    content["config"]["data"] |= {"name": "street", "root": str(tmp_path / "new"), "height": 64, "width": 64}
    (tmp_path / "shared/config.json").write_text(json.dumps(content))

    status, _, err = run_script("demo", f"run={tmp_path / 'shared'}", "device=cpu", "port=null")

    assert (status, err) == (0, "")
    assert not (tmp_path / "new").exists()


def test_demo_serves_a_page_to_this_machine_until_it_is_interrupted(finished_run, entry, tmp_path):
    port = free_port()
    arguments = ("demo", f"run={finished_run}", f"other={finished_run / 'checkpoints/last.ckpt'}", f"port={port}")
    environment = {**os.environ, "http_proxy": "http://127.0.0.1:9", "GRADIO_TEMP_DIR": str(tmp_path)}
    process = entry.start(*arguments, script="ema_seg/__main__", env=environment)
    deadline = time.monotonic() + 60
    while "Ctrl-C" not in entry.out and time.monotonic() < deadline and is_alive(process):
        time.sleep(0.1)
    with contextlib.suppress(OSError):  # a server that has ended; the assertions below tell
        page = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://127.0.0.1:{port}/")
        text = page.read().decode()
    listening = Path(f"/proc/{process}/net/tcp").read_text()
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    os.kill(process, signal.SIGINT)
    status, err = entry.wait()

    assert (status, err) == (0, "")
    assert entry.out == f"http://127.0.0.1:{port}/  (Ctrl-C ends the demo)\n"
    assert re.search(rf" 0100007F:{port:04X} 00000000:0000 0A ", listening)  # 127.0.0.1 alone
    assert not re.search(rf" 00000000:{port:04X} ", listening)
    assert all(name in text for name in ("run and ", "Or choose an example"))
    assert kept  # the examples
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_the_page_on_using_a_model_does_what_it_says(used, run_script):
    names = run_page(run_script, without=("Export",))

    assert np.array_equal(np.array(Image.open("mask.png")), names["result"].mask)
    assert Image.open("overlay.jpg").size == Image.open("street.jpg").size
    assert names["details"].probabilities.shape[1:] == names["result"].mask.shape


def test_the_notebook_runs_from_its_folder(finished_run, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/my_run").symlink_to(finished_run)
    (tmp_path / "examples").mkdir()
    monkeypatch.chdir(tmp_path / "examples")
    names = {}

    for cell in json.loads((ROOT / "examples/first_steps.ipynb").read_text())["cells"]:
        assert "outputs" not in cell or not cell["outputs"]
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)  # noqa: S102

    assert sum(share for _, share in names["shares"]) == pytest.approx(1)
    assert len(names["figure"].axes) == len(names["maps"]) > 0


def test_a_run_prints_the_report_and_its_path(finished):
    out, err = ((finished / name).read_text() for name in ("out", "err"))

    assert "mIoU" in out
    assert "images/s" in out
    assert out.rstrip().endswith(f"run: {finished / 'run'}")
    assert "epoch 2/2" in err
    assert "Traceback" not in err


def test_metrics_have_a_full_row_per_epoch(finished_run):
    rows = rows_of(finished_run)

    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert all(value != "" for row in rows for value in row.values())


def test_tensorboard_shows_each_score_and_no_number_of_its_own(finished_run):
    events = EventAccumulator(str(finished_run / "tensorboard")).Reload()
    rows = rows_of(finished_run)

    assert {"epoch", *rows[0]} - {"step", "seconds"} <= {*events.Tags()["scalars"]}
    assert {"val_iou/sky", "val_iou/road"} <= {*events.Tags()["scalars"]}
    assert not any("hp_metric" in tag for tag in events.Tags()["scalars"])
    for name in ("learning_rate", "images_per_second", "val/loss", "val/miou"):
        assert [event.value for event in events.Scalars(name)] == pytest.approx(
            [float(row[name]) for row in rows], rel=1e-4
        )


def test_the_report_agrees_with_the_checkpoint_and_the_files(finished_run, camvid_root):
    """The reference rebuilds the model from the checkpoint alone and counts pixels without the evaluation code."""
    report = json.loads((finished_run / "report" / "report.json").read_text())
    model, checkpoint = load_segmenter(finished_run / "checkpoints" / "best.ckpt")
    mean, std = (np.array(checkpoint["config"]["data"][key]) for key in ("mean", "std"))
    counts, predictions = np.zeros((11, 11), np.int64), []
    for path in sorted((camvid_root / "val" / "images").iterdir()):
        image = (np.asarray(Image.open(path)) / 255 - mean) / std
        truth = np.asarray(Image.open(camvid_root / "val" / "masks" / f"{path.stem}.png"))
        with torch.inference_mode():
            logits = model(torch.from_numpy(image).permute(2, 0, 1)[None].float())
        prediction = logits[0].argmax(0).numpy()
        predictions.append(prediction)
        np.add.at(counts, (truth[truth != 11], prediction[truth != 11]), 1)

    assert report["confusion_matrix"] == counts.tolist()
    matrix = ConfusionMatrix(11)
    matrix.matrix += torch.from_numpy(counts)
    assert report["miou"] == pytest.approx(matrix.compute()["miou"])
    assert report["miou"] == pytest.approx(max(float(row["val/miou"]) for row in rows_of(finished_run)), rel=1e-5)
    assert report["throughput"]["forward"][0]["images_per_second"] > 0
    assert report["attention"]["name"] == "ema"
    assert report["config"] == checkpoint["config"]
    assert report["seed"] == checkpoint["config"]["seed"]
    assert report["curves"]["val/miou"] == [float(row["val/miou"]) for row in rows_of(finished_run)]
    kept = [np.asarray(Image.open(finished_run / "report" / image["prediction"])) for image in report["images"]]
    assert all(map(np.array_equal, kept, predictions))


def test_the_saved_configuration_is_resolved(finished_run):
    text = (finished_run / "config.yaml").read_text()

    assert "${" not in text
    assert yaml.safe_load(text)["data"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert "torch" in json.loads((finished_run / "environment.json").read_text())["packages"]


def test_a_checkpoint_is_plain_data(finished_run):
    for name in ("best", "last"):
        checkpoint = torch.load(finished_run / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert checkpoint["config"]["model"]["decoder"] == "linknet"
        assert len(checkpoint["classes"]) == 11


def test_a_checkpoint_is_rebuilt_as_lightning_users_do(finished_run):
    path = finished_run / "checkpoints" / "best.ckpt"

    module = SegmentationModule.load_from_checkpoint(path, map_location="cpu")

    assert module.training
    images = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(module.eval()(images), load_segmenter(path)[0](module.normalise(images)))
    assert (module.optimizer_settings["name"], len(module.classes)) == ("adamw", 11)


def test_eval_repeats_the_report_of_a_run(finished_run, run_script, tmp_path):
    before = json.loads((finished_run / "report" / "report.json").read_text())

    status, out, err = run_script("eval", f"run={finished_run}", f"report.dir={tmp_path / 'again'}")

    assert status == 0, err
    after = json.loads((tmp_path / "again" / "report.json").read_text())
    assert "mIoU" in out
    for key in ("confusion_matrix", "miou", "iou", "parameters", "gmacs", "classes", "data", "attention"):
        assert after[key] == before[key], key


def test_eval_takes_a_lone_checkpoint_and_other_data(finished_run, run_script, tmp_path):
    checkpoint = shutil.copy(finished_run / "checkpoints" / "best.ckpt", tmp_path / "copied.ckpt")
    root = write_camvid(tmp_path / "other", sizes=((50, 70), (64, 96)), train=1, val=4)

    status, _, err = run_script(
        "eval", f"ckpt={checkpoint}", f"data.root={root}", "evaluation.precision=bf16-mixed", "data.workers=1"
    )

    assert status == 0, err
    (path,) = tmp_path.glob("report_*/report.json")  # a new folder, because the evaluation was changed
    report = json.loads(path.read_text())
    assert sum(map(sum, report["confusion_matrix"])) == 2 * 50 * 68 + 2 * 64 * 94
    assert report["throughput"]["precision"] == "bf16-mixed"
    assert report["throughput"]["size"] == [50, 70]
    assert report["throughput"]["padded_size"] == [64, 96]


def test_a_run_is_resumed_with_its_own_configuration(camvid_root, run_script, tmp_path):
    run = tmp_path / "run"
    common = (*QUICK, "data=camvid", f"data.root={camvid_root}", "seed=3", "model.encoder_weights=null")
    assert run_script("train", *common, "schedule=constant", "epochs=1", f"hydra.run.dir={run}")[0] == 0
    first = rows_of(run)
    step = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]

    moved = tmp_path / "moved"
    run.rename(moved)
    run = moved

    status, out, err = run_script("train", f"resume={run}", "epochs=3")

    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert status == 0, err
    assert [row["epoch"] for row in rows_of(run)] == ["0", "1", "2"]
    assert rows_of(run)[0] == first[0]
    assert last["global_step"] == 3 * step
    assert out.rstrip().endswith(f"run: {run}")
    assert yaml.safe_load((run / "config.yaml").read_text())["schedule"]["name"] == "constant"
    assert (run / "report" / "report.json").is_file()
    keeper = next(state for name, state in last["callbacks"].items() if "val/miou" in name)
    assert keeper["best_model_path"] == str(run / "checkpoints" / "best.ckpt")
    assert f"{keeper['best_model_score'].item():.6g}" == max((row["val/miou"] for row in rows_of(run)), key=float)


def test_a_run_from_before_is_resumed_and_repeated_with_its_groups(camvid_root, run_script, tmp_path, monkeypatch):
    """In an earlier version, attention.factor=auto chose 16 groups for the decoder's 16 channels."""
    run, again = tmp_path / "run", tmp_path / "again"
    with monkeypatch.context() as before:
        before.setattr("ema_seg.attention.ema.module._SMALLEST_AUTO_WIDTH", 1)
        status, _, err = run_script(
            *("train", *QUICK, "data=camvid", f"data.root={camvid_root}", f"hydra.run.dir={run}"),
            *("epochs=1", "attention=ema", "placement=head"),
        )
        assert status == 0, err

    status, out, err = run_script("train", f"rerun={run}", f"hydra.run.dir={again}")
    assert status == 0, err
    assert "weights  identical" in out
    status, _, err = run_script("train", f"resume={run}", "epochs=2")
    assert status == 0, err
    model, _ = load_segmenter(run / "checkpoints" / "last.ckpt")
    assert model.segmentation_head.attention.gn.num_channels == 1
    assert not (run / "train.log").exists()


def files_of(folder):
    """Return content and modification time of each file, except locks and logs."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".lock", ".log")]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lr=1e-5"], "optimizer.lr=1e-05: must be 0.002, as in the checkpoint of resume="),
        (["optimizer={lr: 1e-5}"], "optimizer.lr=1e-05: must be 0.002"),
        (["+optimizer.amsgrad=true"], "optimizer.amsgrad=True: must be None"),
        (["attention.factor=2", "attention.implementation=reference"], "attention.factor=2: must be auto"),
        (["model.encoder=resnet18"], "model.encoder=resnet18: must be tu-test_efficientnet"),
        (["data.name=folder", "data.root={folder}"], "was trained on 11 classes .* has 2"),
        (["training.weight_averaging=0.9"], "training.weight_averaging=0.9: must be None, as in the checkpoint"),
        (["epochs=3", "schedule.warmup_steps=1000"], "schedule.warmup_steps must be from 0 to 6, .* got 1000"),
        (["epochs=3", "logger=nosuch"], "logger"),
        (["epochs=3", "+trainer.limit_train_batches=0.01"], "trainer: Lightning refuses these settings"),
    ],
)
def test_a_refused_resumption_leaves_the_run_as_it_was(overrides, message, finished_run, run_script, tmp_path):
    folder = make_folder(tmp_path / "folder") if "folder" in overrides[0] else None
    before = files_of(finished_run)

    filled = [text.replace("{folder}", str(folder)) for text in overrides]
    status, _, err = run_script("train", f"resume={finished_run}", *filled)

    assert status == 1
    assert re.search(message, err), err
    assert "Traceback" not in err
    assert files_of(finished_run) == before


def test_what_a_checkpoint_does_not_depend_on_can_change(finished_run):
    saved = {"config": yaml.safe_load((finished_run / "config.yaml").read_text())}
    config = copy.deepcopy(saved["config"])
    config["attention"]["implementation"] = "reference"
    config["model"]["encoder_weights"] = "imagenet"
    config["schedule"] = {"name": "constant", "warmup_steps": 0}

    require_same_model(saved, config, finished_run)


def test_a_state_that_is_none_is_one_sentence(finished_run, run_script, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    last = run / "checkpoints" / "last.ckpt"
    saved = torch.load(last, weights_only=True)
    saved["optimizer_states"][0]["param_groups"] = [3]
    torch.save(saved, last)
    before = files_of(run)

    status, _, err = run_script("train", f"resume={run}", "epochs=3")

    assert status == 1
    assert err.splitlines()[-1].startswith(f"error: ckpt={last}: its state does not fit a training with these settings")
    assert files_of(run) == before


@pytest.fixture
def idle(monkeypatch, tmp_path):
    """Replace each training by a record of its folder, at a fixed time; return a function that lists the records."""
    import ema_seg.cli.launch
    import ema_seg.reporting
    from ema_seg.cli import train

    class Noon(train.datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 1, 12)

    folders = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "datetime", Noon)
    monkeypatch.setattr(ema_seg.cli.launch, "produce_run", lambda train, config, run, **_: folders.append(run))
    monkeypatch.setattr(ema_seg.reporting, "print_report", lambda report: None, raising=False)
    return lambda: [str(folder.relative_to(tmp_path / "runs")) for folder in folders]


def test_commands_of_the_same_second_have_folders_of_their_own(idle, run_script, tmp_path):
    command = ("train", *QUICK, "data=camvid", f"data.root={tmp_path}")
    first = tmp_path / "runs" / "2026-01-01_12-00-00_camvid_linknet_ema"
    with lock_run(first):  # as the first command does
        assert run_script(*command)[0] == 0
    assert idle() == [f"{first.name}_2"]
    (first / "config.yaml").touch()
    with ExitStack() as stack:
        assert _hold_unused(first, stack) == first.with_name(f"{first.name}_2")
        assert is_running(first.with_name(f"{first.name}_2"))


@pytest.mark.parametrize("name", ["config.yaml", "metrics.csv"])
def test_a_folder_with_files_of_others_is_no_runs(name, idle, run_script, tmp_path):
    (tmp_path / name).write_text("mine: 3\n")

    status, _, err = run_script("train", *QUICK, "data=camvid", "data.root=/nowhere", "hydra.run.dir=.")

    assert status == 1
    assert f"{name}: was not written by train.py and would be replaced; choose another hydra.run.dir" in err
    assert (tmp_path / name).read_text() == "mine: 3\n"
    assert not idle()


def test_reports_of_the_same_second_have_folders_of_their_own(tmp_path):
    from ema_seg.cli import eval

    assert [eval._make_folder(tmp_path / "report").name for _ in range(3)] == ["report", "report_2", "report_3"]


def test_a_run_from_before_a_setting_is_evaluated_with_it(finished_run, camvid_root, run_script, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    for name in ("boundary", "calibration", "corruptions", "submission", "window", "window_stride", "scales", "flip"):
        del config["evaluation"][name]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    before = json.loads((run / "report/report.json").read_text())

    more = ["evaluation.boundary=true", "evaluation.corruptions=standard"]

    status, out, err = run_script("eval", f"run={run}", *more, f"report.dir={tmp_path / 'new'}")

    assert status == 0, err
    report = json.loads((tmp_path / "new/report.json").read_text())
    counts = []
    for image in report["images"]:
        prediction = np.array(Image.open(tmp_path / "new" / image["prediction"]))
        truth = np.array(Image.open(camvid_root / "val/masks" / f"{Path(image['name']).name}.png"))
        counts.append(count_boundaries(prediction, np.where(truth == 11, 255, truth), 11))
    expected = score_boundaries(counts)
    assert report["boundary_miou"] == pytest.approx(expected["boundary_miou"])
    assert report["trimap"] == expected["trimap"]
    assert [image["boundary"] for image in report["images"]] == counts
    assert f"boundary mIoU  {expected['boundary_miou']:.2%}" in re.sub(" {2,}", "  ", out)
    assert "boundary_miou" not in before and report["miou"] == before["miou"]
    kinds = report["corruptions"]
    assert list(kinds) == list(CORRUPTIONS)
    counted = report["images"][0]["corruptions"]["fog"]
    assert len(counted) == 5
    for severity in range(5):
        sums = np.zeros((2, 11))
        for image in report["images"]:
            classes, *counts = image["corruptions"]["fog"][severity]
            sums[:, classes] += counts
        expected = np.mean([intersection / union for intersection, union in sums.T if union])
        assert kinds["fog"]["miou"][severity] == pytest.approx(expected)
    assert report["corrupted_miou"] == pytest.approx(np.mean([kind["miou"] for kind in kinds.values()]))
    assert report["corruption_drop"] == pytest.approx(1 - report["corrupted_miou"] / report["miou"])


def test_a_run_is_evaluated_by_the_protocol_of_a_paper(finished_run, run_script, tmp_path):
    settings = ["evaluation.window=[64,64]", "evaluation.window_stride=[32,32]", "evaluation.scales=[0.5,1]"]
    more = ["evaluation.flip=true", "evaluation.calibration=true"]

    status, out, err = run_script("eval", f"run={finished_run}", *settings, *more, f"report.dir={tmp_path / 'new'}")

    assert status == 0, err
    report = json.loads((tmp_path / "new/report.json").read_text())
    assert report["protocol"] == {"window": [64, 64], "window_stride": [32, 32], "scales": [0.5, 1.0], "flip": True}
    named = "Scored with windows of 64 x 64 every 32 x 32 pixels; scales 0.5, 1; flipped, too."
    assert named in " ".join(out.split()) and named in (tmp_path / "new/report.md").read_text()
    assert f"expected calibration error  {report['ece']:.2%}" in re.sub(" {2,}", "  ", out)


def test_an_evaluation_does_not_finish_a_run_that_can_go_on(monkeypatch, tmp_path):
    from ema_seg.cli import eval

    settings = SimpleNamespace(overrides=SimpleNamespace(task=["run=x", "devices=2"]))
    monkeypatch.setattr(eval, "HydraConfig", SimpleNamespace(get=lambda: settings))
    assert eval._default_folder(tmp_path, False) == tmp_path / "report"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    assert eval._default_folder(tmp_path, False).name.startswith("report_")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").touch()
    assert eval._default_folder(tmp_path, False) == tmp_path / "report"


def test_an_epoch_without_validation_has_no_score(camvid_root, run_script, tmp_path):
    run = tmp_path / "run"
    options = ("epochs=3", "trainer.check_val_every_n_epoch=2", "training.progress_bar=true", "logger=tensorboard")

    status, out, err = run_script(
        "train", *QUICK, "data=camvid", f"data.root={camvid_root}", f"hydra.run.dir={run}", *options
    )

    assert status == 0, err
    assert [row["val/miou"] != "" for row in rows_of(run)] == [False, True, False]
    for quantity in ("loss=", "val_miou=", "images/s="):
        assert quantity in out  # from the progress bar


def test_a_training_without_an_end_is_refused(camvid_root, run_script, tmp_path):
    status, _, err = run_script(
        "train", *QUICK, "data=camvid", f"data.root={camvid_root}", f"hydra.run.dir={tmp_path / 'run'}", "epochs=-1"
    )

    assert status == 1
    assert "the training has no end" in err


def test_options_of_training_work_together(camvid_root, run_script, tmp_path):
    run = tmp_path / "run"

    status, _, err = run_script(
        "train",
        *QUICK,
        "data=camvid",
        f"data.root={camvid_root}",
        f"hydra.run.dir={run}",
        "epochs=5",
        "attention=scse",
        "placement=everywhere",
        "loss=cross_entropy_dice",
        "+loss.lovasz.weight=0.1",
        "optimizer=sgd",
        "schedule=cosine",
        "trainer.precision=bf16-mixed",
        "trainer.gradient_clip_val=1.0",
        "trainer.accumulate_grad_batches=2",
        "training.weight_averaging=0.9",
        "training.early_stopping=1",
        "optimizer.lr=1e-12",
        "data.augmentation.flip=null",
        "+data.augmentation.blur.transform=GaussianBlur",
    )

    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert status == 0, err
    assert len(rows_of(run)) < 5  # nothing is learned, so training stops early
    assert checkpoint["global_step"] == len(rows_of(run))  # two batches an epoch make one step
    assert "current_model_state" in checkpoint
    assert all(row["val/miou_unaveraged"] for row in rows_of(run))


def test_a_run_that_has_stopped_early_does_not_train_on(camvid_root, run_script, tmp_path):
    """A run that was killed between its last epoch and its report resumes with the report alone."""
    run = tmp_path / "run"
    status, _, err = run_script(
        "train",
        *(*QUICK, "data=camvid", f"data.root={camvid_root}", f"hydra.run.dir={run}"),
        *("epochs=9", "training.early_stopping=1", "optimizer.lr=1e-12"),
    )
    assert status == 0, err
    epochs, report = rows_of(run), json.loads((run / "report" / "report.json").read_text())
    assert len(epochs) < 9
    shutil.rmtree(run / "report")

    assert run_script("train", f"resume={run}")[0] == 0
    assert rows_of(run) == epochs
    assert json.loads((run / "report" / "report.json").read_text())["confusion_matrix"] == report["confusion_matrix"]

    assert run_script("train", f"resume={run}", "training.early_stopping=2")[0] == 0
    assert len(rows_of(run)) > len(epochs)


def test_a_resumed_run_reaches_its_least_number_of_epochs(camvid_root, run_script, tmp_path):
    run = tmp_path / "run"
    status, _, err = run_script(
        "train",
        *(*QUICK, "data=camvid", f"data.root={camvid_root}", f"hydra.run.dir={run}"),
        *("epochs=9", "training.early_stopping=1", "optimizer.lr=1e-12"),
    )
    assert status == 0, err
    epochs = len(rows_of(run))
    assert epochs < 8

    assert run_script("train", f"resume={run}", "+trainer.min_epochs=8")[0] == 0
    assert len(rows_of(run)) >= 8


def make_cityscapes(root):
    for split in ("train", "val"):
        for index in range(3):
            name = f"aachen_{index:06d}_000019"
            for kind, suffix in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
                path = root / kind / split / "aachen" / f"{name}_{suffix}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                array = (
                    np.full((64, 128, 3), 90, np.uint8) if kind == "leftImg8bit" else np.full((64, 128), 7, np.uint8)
                )
                array[:20] = 23
                Image.fromarray(array).save(path)
    return root


def make_cityscapes_zips(root):
    folders = make_cityscapes(root / "unpacked")
    for kind in ("leftImg8bit", "gtFine"):
        with zipfile.ZipFile(root / f"{kind}_trainvaltest.zip", "w") as archive:
            for path in sorted((folders / kind).rglob("*.png")):
                archive.write(path, path.relative_to(folders))
    shutil.rmtree(folders)
    return root


def make_ade20k(root):
    for split, prefix in (("training", "train"), ("validation", "val")):
        for index in range(1, 4):
            for kind, suffix in (("images", "jpg"), ("annotations", "png")):
                path = root / "ADEChallengeData2016" / kind / split / f"ADE_{prefix}_{index:08d}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                shape = (60 + index, 80) if kind == "annotations" else (60 + index, 80, 3)
                array = np.full(shape, 3, np.uint8)
                array[:30] = 0
                Image.fromarray(array).save(path)
    return root


def make_folder(root):
    (root / "classes.yaml").parent.mkdir(parents=True, exist_ok=True)
    (root / "classes.yaml").write_text("- background\n- thing\n")
    for split in ("train", "val"):
        for index in range(3):
            mask = np.zeros((70, 90), np.uint8)
            mask[20:50, 30:60] = 1
            for kind, array in (("images", mask[..., None].repeat(3, 2) * 200), ("masks", mask)):
                path = root / split / kind / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    return root


@pytest.mark.parametrize(
    ("data", "make", "classes"),
    [
        ("cityscapes", make_cityscapes, 19),
        ("cityscapes", make_cityscapes_zips, 19),
        ("ade20k", make_ade20k, 150),
        ("folder", make_folder, 2),
    ],
)
def test_the_same_entry_point_trains_on_every_data_set(data, make, classes, run_script, tmp_path):
    root = make(tmp_path / "data")

    overrides = [f"data={data}", f"data.root={root}", f"hydra.run.dir={tmp_path / 'run'}", "epochs=1"]

    status, _, err = run_script("train", *QUICK, *overrides)

    assert status == 0, err
    if data != "folder":
        submission = f"evaluation.submission={tmp_path / 'submission'}"
        arguments = [f"run={tmp_path / 'run'}", submission, f"report.dir={tmp_path / 'run/report'}"]
        status, out, err = run_script("eval", *arguments)
        assert status == 0 and f"submission: {tmp_path / 'submission'}" in out, err
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert len(report["classes"]) == classes
    assert report["data"]["name"] == data
    if make is make_cityscapes:
        masks = [str(path) for path in sorted((root / "gtFine/val/aachen").iterdir())]
        arguments = copy.copy(cityscapes.args)
        arguments.predictionPath, arguments.predictionWalk = str(tmp_path / "submission"), None
        found = [cityscapes.getPrediction(arguments, mask) for mask in masks]
        arguments.evalInstLevelScore, arguments.JSONOutput, arguments.quiet = False, False, True
        scores = cityscapes.evaluateImgLists(found, masks, arguments)
        assert scores["averageScoreClasses"] == pytest.approx(report["miou"])
    if make is make_ade20k:
        paths = sorted((tmp_path / "submission").iterdir())
        assert [path.name for path in paths] == [f"ADE_val_{index:08d}.png" for index in (1, 2, 3)]
        for path, image in zip(paths, report["images"], strict=True):
            ids = np.array(Image.open(tmp_path / "run/report" / image["prediction"]))
            assert np.array_equal(np.array(Image.open(path)), ids + 1)


@pytest.mark.parametrize("data", ["cityscapes", "ade20k"])
def test_a_split_without_labels_is_predicted_for_the_benchmarks_server(data, run_script, tmp_path):
    root = {"cityscapes": make_cityscapes, "ade20k": make_ade20k}[data](tmp_path / "data")
    folder = root / {"cityscapes": "leftImg8bit/test/bonn", "ade20k": "release_test/testing"}[data]
    suffix = {"cityscapes": "_leftImg8bit.png", "ade20k": ".jpg"}[data]
    folder.mkdir(parents=True)
    names = [f"bonn_{index:06d}_000019" for index in range(2)]
    for name in names:
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), np.uint8)).save(
            folder / f"{name}{suffix}"
        )
    run, submission = tmp_path / "run", tmp_path / "submission"
    common = [f"data={data}", f"data.root={root}"]
    assert run_script("train", *QUICK, *common, f"hydra.run.dir={run}", "epochs=1", "evaluation.flip=true")[0] == 0
    before = sorted(path for path in run.rglob("*"))
    arguments = [f"run={run}", "data.evaluation_split=test", f"evaluation.submission={submission}"]

    status, out, err = run_script("eval", *arguments)

    assert status == 0, err
    assert f"submission: {submission}; the split 'test' has no labels, so there are no scores" in out
    written = [f"{name}{'_leftImg8bit' if data == 'cityscapes' else ''}.png" for name in names]
    assert sorted(path.name for path in submission.iterdir()) == written
    segmenter = ema_seg.load(run)
    values = np.array(find_dataset_class(data).submission.values)
    for name, file in zip(names, written, strict=True):
        picture = np.array(Image.open(folder / f"{name}{suffix}"))
        tensors = [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in (picture, picture[:, ::-1])]
        logits = [
            segmenter.model(pad_to_stride(segmenter.normalise(image[None]), segmenter.stride))[0, :, :70, :90]
            for image in tensors
        ]
        mean = (logits[0].softmax(0) + logits[1].softmax(0).flip(2)) / 2
        same = np.array(Image.open(submission / file)) == values[mean.argmax(0).numpy()]
        assert same.mean() > 0.999
    assert sorted(path for path in run.rglob("*")) == before

    status, _, err = run_script("eval", *arguments)
    assert status == 1 and "is not empty" in err and "choose a new folder" in err


def test_the_default_data_are_generated_and_read(run_script, tmp_path):
    sizes = (
        "data.height=64",
        "data.width=128",
        "data.train_images=2",
        "data.val_images=1",
        "data.test_images=1",
    )

    status, _, err = run_script(
        "train",
        *QUICK,
        *sizes,
        f"data.root={tmp_path / 'cache'}",
        f"hydra.run.dir={tmp_path / 'run'}",
        "epochs=1",
    )

    assert status == 0, err
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert report["data"]["split"] == "test"
    assert report["absent_classes"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data=camvid",), "error: data.root is not set; give data.root=<value>"),
        (("data=camvid", "data.root=/nowhere"), "/nowhere"),
        (("model.encoder=resnet81",), "Did you mean"),
        (("attention=ema", "attention.factor=7"), "valid factors are"),
        (("attention=ema", "attention.implementation=fast"), "must be one of auto, reference, cpp, triton, factorised"),
        (
            ("loss.dise.weight=1",),
            "there is no setting loss.dise.weight. Did you mean 'loss.dice.weight'",
        ),
        (("+loss.dise.weight=1",), "loss.dise: there is no such loss"),
        (("trainer.precision=bf17", "evaluation.precision=32"), "trainer.precision: must be one of 32-true"),
        (("+trainer.max_epoch=3",), "trainer.max_epoch: .* no such option. Did you mean 'max_epochs'"),
        (("+trainer.callbacks=3",), "trainer: Lightning refuses"),
        (("launcher=joblib",), r"launcher=joblib: works only in a sweep \(python train.py -m launcher=joblib"),
        (("sweep=attention",), "sweep=attention: works only in a sweep"),
        (("sweep.id=mine",), "sweep.id=mine: works only in a sweep"),
        (("-m", "resume=runs/one"), "resume=runs/one: a sweep resumes its jobs when the same command"),
        (("model=pan",), "images of 64 x 64 pixels are too small: the model downsamples"),
        (("data.batch_size=auto",), "data.batch_size=auto: needs a CUDA GPU, got cpu"),
        (("data.batch_size=0",), "data.batch_size: must be a whole number of at least 1, or auto, got 0"),
        (("data.mean=0.5",), "data.mean: must be three numbers"),
        (("data.augmentation.crop.height=50",), "crops must be multiples of 32, .*, got 50 x 64 pixels"),
        (("placement.decoder=false",), "attention=ema is placed nowhere"),
        (("placement.encoder_stages=[3]",), "has no effect without placement.encoder=true"),
        (("+loss.lovasz=0.5",), "must be a section of settings; set loss.lovasz.weight=0.5"),
        (("optimizer.lr=fast",), "optimizer.lr: must be a number, got 'fast'"),
        (("schedule.warmup_steps=long",), "schedule.warmup_steps must be a finite number, got 'long'"),
        (("training.weight_averaging=2",), "training.weight_averaging: must be a decay between 0 and 1"),
        (
            ("model=deeplabv3plus", "model.encoder=tu-mobilenetv3_small_050", "data.batch_size=1"),
            "data.batch_size: must be at least 2 per process, got 1",
        ),
        (("attention=se", "attention.reduction=0"), "SE: reduction must be a whole number of at least 1, got 0"),
        (("seed=-1",), "seed: must be a whole number from 0 to 4294967295, got -1"),
        (("model.encoder=null",), "model.encoder: must be a name, got None"),
        (
            ("trainer.precision=bf16-true",),
            "evaluation.precision: must be 32-true, bf16-mixed or 16-mixed, got 'bf16-true'",
        ),
        (("evaluation.size=512",), r"evaluation.size: must be \[height,width\] in pixels"),
        (("evaluation.batch_size=0",), "evaluation.batch_size: must be a whole number of at least 1, got 0"),
        (("evaluation.device=tpu",), "evaluation.device=tpu: cannot be used here"),
        (("data.batch_size=64",), "data.batch_size=64 is more than the 4 training images"),
        (("schedule.warmup_steps=1000",), "schedule.warmup_steps must be from 0 to 4, .* got 1000"),
        (("resume=runs/missing",), "resume=runs/missing: there is no runs/missing/config.yaml"),
        (("model.encoder_weights=missing.pth",), "missing.pth: no such file"),
        (("evaluation.submission=out",), "evaluation.submission=out: must be null in a training"),
    ],
)
def test_a_mistake_ends_in_one_sentence(overrides, message, camvid_root, run_script, tmp_path):
    common = [*QUICK, f"hydra.run.dir={tmp_path / 'run'}"]
    if not any(text.startswith("data=") for text in overrides):
        common += ["data=camvid", f"data.root={camvid_root}"]

    status, _, err = run_script("train", *common, *overrides)

    assert status == 1
    assert re.search(message, err), err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "run, ckpt: exactly one must be set; give run="),
        (("run=runs/missing",), "run=runs/missing: there is no"),
        (("ckpt=missing.ckpt",), "ckpt=missing.ckpt: no such file"),
        (("run={run}", "data=folder", "data.root={folder}"), "was trained on 11 classes .* has 2"),
        (("run={run}", "evaluation.device=tpu"), "evaluation.device=tpu: cannot be used here"),
        (
            ("run={run}", "evaluation.precision=8"),
            "evaluation.precision: must be 32-true, bf16-mixed or 16-mixed, got 8",
        ),
        (("run={run}", "data.rooot=x"), "data.rooot"),
        (("run={run}", "evaluation.window=512"), r"evaluation.window: must be \[height,width\] in pixels"),
        (("run={run}", "evaluation.window_stride=[9,9]"), "must come with a window"),
        (("run={run}", "evaluation.scales=[0]"), "evaluation.scales: must be a list of factors above 0"),
        (("run={run}", "evaluation.corruptions=all"), "evaluation.corruptions: must be standard or null"),
        (("run={run}", "evaluation.submission=out"), "camvid has no benchmark's server"),
    ],
)
def test_a_mistake_in_an_evaluation_ends_in_one_sentence(overrides, message, finished_run, run_script, tmp_path):
    folder = make_folder(tmp_path / "folder")
    filled = [text.format(run=finished_run, folder=folder) for text in overrides]

    status, _, err = run_script("eval", *filled, f"report.dir={tmp_path / 'report'}")

    assert status == 1
    assert re.search(message, err), err
    assert "Traceback" not in err


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty"])
def test_a_damaged_checkpoint_is_named(damage, finished_run, run_script, tmp_path):
    path = tmp_path / "damaged.ckpt"
    content = (finished_run / "checkpoints" / "best.ckpt").read_bytes()
    if damage == "foreign":
        torch.save({"weights": torch.zeros(1)}, path)
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")

    status, _, err = run_script("eval", f"ckpt={path}")

    assert status == 1
    assert "damaged.ckpt" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("content", [b"data: 3", b"[1, 2]", b"\xff\x00binary", b"", b"hydra", b"report: {dir: 3}"])
@pytest.mark.parametrize("command", [("train", "resume"), ("train", "rerun"), ("eval", "run")])
def test_a_configuration_of_another_form_is_named(content, command, run_script, tmp_path):
    (tmp_path / "config.yaml").write_bytes(content)
    script, key = command

    status, _, err = run_script(script, f"{key}={tmp_path}")

    assert status == 1
    assert err.startswith("error: "), err
    assert len(err.splitlines()) == 1


def test_a_repetition_leaves_the_report_of_the_original(finished_run, run_script, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["report"]["dir"] = str(tmp_path / "elsewhere")
    (run / "config.yaml").write_text(yaml.safe_dump(config))

    status, out, err = run_script("train", f"rerun={run}", "--cfg", "job")

    assert status == 0, err
    assert yaml.safe_load(out)["report"] == {"dir": None}


@pytest.fixture
def unfinished(finished_run, monkeypatch, tmp_path):
    """Return two functions: one copies a run without its report, one finds the run that resume=auto continues."""
    monkeypatch.chdir(tmp_path)
    settings = yaml.safe_load((finished_run / "config.yaml").read_text())

    def copy(name, report=None):
        run = shutil.copytree(finished_run, tmp_path / "runs" / name)
        (run / "report").rename(report or run / "no_report")
        (run / "config.yaml").write_text(yaml.safe_dump({**settings, "report": {"dir": report and str(report)}}))
        return run

    def find():
        composed = OmegaConf.create({**settings, "hydra": {"run": {"dir": "runs/9"}}})
        return _unfinished_run(composed)

    return copy, find


def test_what_is_left_of_a_run_does_not_keep_others_from_going_on(unfinished):
    copy, find = unfinished
    copy("1")
    (copy("2") / "config.yaml").unlink()
    for name, content in {"3": "{", "4": "[1]", "5": "data: 3", "6": "attention: 3", "7": "report: {dir: 3}"}.items():
        (copy(name) / "config.yaml").write_text(content)

    assert find() == Path("runs/1")


def test_a_run_whose_report_is_elsewhere_is_finished(unfinished, tmp_path):
    copy, find = unfinished
    copy("1", report=tmp_path / "report")

    assert find() is None


@pytest.mark.parametrize("override", ["~model.encoder", "data.root=3", "++attention=3"])
def test_a_mistake_beside_an_unfinished_run_is_one_sentence(override, run_script, tmp_path):
    command = [*QUICK, "data=camvid", "data.root=/nowhere", "resume=auto", f"hydra.run.dir={tmp_path / 'run'}"]

    status, _, err = run_script("train", *command, override)

    assert status == 1
    assert err.startswith("error: "), err


@pytest.mark.parametrize("threads", [-1, 0, 10**12, 1.5, True, "two", None])
def test_a_number_of_threads_that_no_run_had_is_named(threads, finished_run, run_script, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "environment.json").write_text(json.dumps({"threads": threads}))

    status, _, err = run_script("train", f"rerun={run}", f"hydra.run.dir={tmp_path / 'again'}")

    assert status == 1
    assert f"{run / 'environment.json'} must hold threads, a whole number from 1 to 4096" in err


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_run_without_a_sound_last_checkpoint_is_not_resumed(damage, finished_run, run_script, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    last = run / "checkpoints" / "last.ckpt"
    (run / "checkpoints" / "previous.ckpt").unlink()
    if damage == "truncated":
        last.write_bytes(last.read_bytes()[:1000])
    else:
        last.unlink()

    status, _, err = run_script("train", f"resume={run}")

    assert status == 1
    assert f"error: ckpt={last}: " in err
    assert "Traceback" not in err


def test_a_home_directory_is_found_as_the_shell_would(finished_run, run_script, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(finished_run.parent))

    status, _, err = run_script("eval", f"run=~/{finished_run.name}", "report.dir=~/elsewhere")

    assert status == 0, err
    assert (finished_run.parent / "elsewhere" / "report.json").is_file()


@pytest.mark.parametrize("path", ["a b/c,d=[e]", "a'b", r"a\b", r"a\'b", r"a\\'b", "a\\", "a\\\\"])
def test_a_quoted_path_is_parsed_as_itself(path):
    assert OverridesParser.create().parse_override(f"resume={quoted(Path(path))}").value() == path


def test_a_finished_run_is_not_overwritten(finished_run, camvid_root, run_script):
    status, _, err = run_script(
        "train", *QUICK, "data=camvid", f"data.root={camvid_root}", f"hydra.run.dir={finished_run}"
    )

    assert status == 1
    assert f"{finished_run}: holds a run already; continue it with resume={finished_run}" in err


@pytest.mark.parametrize("arguments", [["train.py", "--help"], ["train.py", "--cfg", "job"], ["eval.py", "--help"]])
def test_help_needs_no_heavy_library(arguments):
    program = (
        "import runpy, sys\n"
        f"sys.argv = {arguments!r}\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n"
        "    heavy = {'torch', 'lightning', 'albumentations', 'cv2', 'matplotlib'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=60,
    )

    assert done.returncode == 0, done.stderr
    assert "data" in done.stdout


def test_help_names_every_group_and_every_option():
    help_text = (ROOT / "configs" / "hydra" / "help" / "train.yaml").read_text().split("\n  and change")[0]
    groups = [
        path for path in (ROOT / "configs").iterdir() if path.is_dir() and path.name not in ("hydra", "__pycache__")
    ]

    for group in groups:
        assert f"    {group.name} " in help_text, group.name
        for option in group.glob("*.yaml"):
            assert option.stem in re.findall(r"\w+", help_text), option


@pytest.mark.parametrize(("script", "schema"), [("train", Training), ("eval", Evaluating), ("demo", Demonstrating)])
def test_help_gives_the_meaning_of_every_setting(script, schema, run_script):
    lines = run_script(script, "--help")[1].splitlines()

    for name, meaning in describe_settings(schema):
        assert any(line.split(maxsplit=1) == [name, meaning] for line in lines), name


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("train", "--help", "resume=auto"), "data.root"),
        (("eval", "-m", "--help"), "data.root"),
        (("train", "-m", "--hydra-help"), "--hydra-help"),
    ],
)
def test_help_is_given_whatever_else_is_asked(command, said, run_script):
    status, out, err = run_script(*command)
    assert status == 0, err
    assert said in out


@pytest.mark.parametrize(
    ("line", "completed"),
    [("python train.py +hydra.job.env_set.MODE=a see", "seed="), ("python eval.py -m rep", "report.")],
)
def test_a_shell_completes_what_is_typed(line, completed, run_script, monkeypatch):
    monkeypatch.setenv("COMP_LINE", line)
    status, out, err = run_script(line.split()[1].removesuffix(".py"), "--shell-completion", "query=bash")
    assert status == 0, err
    assert completed in out.split()


def test_the_nearest_setting_of_an_evaluation_is_suggested(run_script):
    status, _, err = run_script("eval", "report.dirr=4")
    assert status == 1
    assert "Did you mean 'report.dir'?" in err


@pytest.mark.parametrize("number", PREEMPTION_SIGNALS)
def test_a_command_that_is_asked_to_leave_while_it_starts_does_so_with_a_word(number):
    process = subprocess.Popen([sys.executable, ROOT / "train.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not _catches(process.pid, number):
        time.sleep(0.001)
    libraries = Path(f"/proc/{process.pid}/maps").read_text()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)

    assert process.returncode == 75
    assert err.decode() == f"stopped by {number.name} while no training was running; run the same command again.\n"
    assert "_yaml" not in libraries  # Hydra is not even imported


def _catches(process, number):
    """Return whether a process has installed a handler for a signal."""
    caught = re.search(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)[1]
    return int(caught, 16) >> (number - 1) & 1


def test_a_command_that_is_asked_to_leave_after_its_report_ends_well(run_script, monkeypatch, camvid_root, tmp_path):
    monkeypatch.setattr("ema_seg.cli.launch.produce_run", lambda *arguments, **named: {})
    monkeypatch.setattr("ema_seg.reporting.print_report", lambda report: os.kill(os.getpid(), signal.SIGTERM))
    install_exit_handlers()
    try:
        status, out, err = run_script(
            "train", *QUICK, "data=camvid", f"data.root={camvid_root}", f"hydra.run.dir={tmp_path / 'run'}"
        )
    finally:
        for number in PREEMPTION_SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    assert (status, err) == (0, "")
    assert out.endswith(f"run: {tmp_path / 'run'}\n")


def test_what_hydra_cannot_work_with_is_told_and_what_is_wrong_here_is_shown(run_script, monkeypatch, tmp_path):
    status, _, err = run_script("train", "hydra.verbose=nan")
    assert status == 1
    assert err.splitlines()[-1].startswith("error: hydra.*: Hydra rejects these settings")

    monkeypatch.setattr("ema_seg.cli.train._train_run", lambda *arguments: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        run_script("train", "data=camvid", "data.root=/nowhere", f"hydra.run.dir={tmp_path / 'run'}")
