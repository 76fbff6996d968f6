"""Tests of ``push``: a run, its report and its command become a shared model with a card."""

import json
import shutil

import pytest
import torch
import yaml

import ema_seg
from ema_seg.reporting.push import push
from ema_seg.runtime.errors import ConfigError, DataError
from ema_seg.runtime.files import write_file
from tests.models.test_shared import CLASSES, CONFIG, write_checkpoint
from tests.reporting.test_report import make_evaluation, make_report


@pytest.fixture(scope="module")
def bare_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bare") / "run"
    write_checkpoint(folder / "checkpoints" / "best.ckpt")
    (folder / "environment.json").write_text(json.dumps({"command": ["train.py", "data=folder", "data.root=secret"]}))
    return folder


@pytest.fixture
def run(bare_run, tmp_path):
    return shutil.copytree(bare_run, tmp_path / "run")


def report_of(run, **changes):
    settings = {
        "evaluation": make_evaluation(2),
        "classes": CLASSES,
        "palette": [[1, 2, 3], [4, 5, 6]],
        "config": CONFIG,
        "run": str(run),
        "checkpoint": run / "checkpoints" / "best.ckpt",
        **changes,
    }
    report = make_report(**settings)
    write_file(run / "report" / "report.json", json.dumps(report).encode())
    write_file(run / "report" / "figures" / "panel.png", b"panel")
    return report


def front_matter(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_a_run_is_shared_with_its_scores_costs_machine_command_and_picture(run, tmp_path):
    report, out = report_of(run), tmp_path / "out"

    result = push(run, out, license="cc-by-4.0")

    card, matter = (out / "README.md").read_text(), front_matter(out)
    content = json.loads((out / "config.json").read_text())
    assert (result["place"], result["scores"]["miou"]) == (str(out), report["miou"])
    assert content["scores"]["iou"] == report["iou"]
    assert (content["scores"]["images"], content["scores"]["split"]) == (3, "val")
    assert content["stride"] == 32
    assert (out / "panel.png").read_bytes() == b"panel"
    assert (matter["license"], matter["pipeline_tag"], matter["library_name"]) == (
        *("cc-by-4.0", "image-segmentation", "ema-seg"),
    )
    (metric,) = matter["model-index"][0]["results"][0]["metrics"]
    assert metric["value"] == pytest.approx(report["miou"], abs=1e-4)
    for text in (
        f"| mIoU | {report['miou']:.2%} |",
        "Measured on 3 images of street, split val.",
        f"| road | {report['iou'][0]:.2%} |",
        r"| sky \| \<b> | absent |",
        "| parameters | 4,651,267 |",
        "| peak memory, batch 8 | 300.0 MiB |",
        "on Some GPU",
        "mIoU, large objects",
        "`python train.py data=folder data.root=…`",
        "![The images with the best, the median and the worst mIoU](panel.png)",
        "## Licence\n\ncc-by-4.0",
    ):
        assert text in card, text
    assert not any(word in card for word in ("secret", "someone", str(tmp_path)))
    assert ema_seg.load(out, device="cpu").classes == tuple(CLASSES)


@pytest.mark.parametrize(
    ("changes", "selected"),
    [({}, True), ({"split": "test"}, False), ({"root": "/other"}, False), ({"name": "street"}, False)],
)
def test_the_card_says_whether_the_scored_images_selected_the_epoch(changes, selected, run, tmp_path):
    report_of(run, data={"name": "folder", "root": CONFIG["data"]["root"], "split": "val", **changes})

    push(run, tmp_path / "out")

    card = (tmp_path / "out" / "README.md").read_text()
    assert ("The epoch was selected by the score on the same images" in card) is selected


def test_a_run_without_a_report_and_a_lone_checkpoint_have_no_scores(run, tmp_path):
    lone = shutil.copy(run / "checkpoints" / "best.ckpt", tmp_path / "lone.ckpt")

    for source, command in ((run, "python train.py"), (lone, "not recorded")):
        out = tmp_path / f"of_{source.name if source is run else 'lone'}"
        assert push(source, out)["scores"] is None
        card = (out / "README.md").read_text()
        assert "Scores were not measured for these weights." in card
        assert command in card
        assert not any(text in card for text in ("mIoU", "images/s", "panel.png"))
        assert {"license", "model-index"}.isdisjoint(front_matter(out))
        assert json.loads((out / "config.json").read_text())["scores"] is None


def test_the_report_of_another_model_is_refused(run, tmp_path):
    report_of(run, checkpoint=run / "checkpoints" / "last.ckpt")
    with pytest.raises(DataError, match=r"is the report of last\.ckpt, expected that of .*best\.ckpt; write it again"):
        push(run, tmp_path / "out")
    report_of(run, config={**CONFIG, "epochs": 9})
    with pytest.raises(DataError, match="is the report of another configuration"):
        push(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["miou", "environment", "throughput", "data"])
def test_a_damaged_report_is_named(key, run, tmp_path):
    report = report_of(run)
    del report[key]
    write_file(run / "report" / "report.json", json.dumps(report).encode())

    with pytest.raises(DataError, match=r"report\.json: is damaged \(.*\); write it again with ema-seg eval run="):
        push(run, tmp_path / "shared")


def test_a_damaged_record_of_the_command_is_named(run, tmp_path):
    (run / "environment.json").write_text('{"command": [3]}')
    with pytest.raises(DataError, match=r"environment\.json: must have the command line of the training"):
        push(run, tmp_path / "out")


def test_a_shared_model_is_not_shared_again(run, tmp_path):
    push(run, tmp_path / "out")

    with pytest.raises(ConfigError, match=r"out: is a shared model already; give the run"):
        push(tmp_path / "out", tmp_path / "again")
    with pytest.raises(ConfigError, match="run=hf://user/name: is on the Hub already"):
        push("hf://user/name", tmp_path / "again")


def test_a_model_goes_to_the_hub_and_back(run, hub):
    folder, calls = hub

    assert push(run, "hf://user/name", private=True)["place"] == "https://huggingface.co/user/name"
    segmenter = ema_seg.load("hf://user/name@v1", device="cpu")

    files = ["config.json", "model.safetensors"]
    assert calls == [("create", "user/name", True), ("download", "user/name", "v1", files)]
    assert {path.name for path in folder.iterdir()} == {*files, "README.md"}
    assert 'ema_seg.load("hf://user/name")' in (folder / "README.md").read_text()
    expected = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(expected[f"model.{name}"], value) for name, value in segmenter.model.state_dict().items())
    again = type(segmenter.model).from_pretrained("user/name", revision="v1")
    assert all(map(torch.equal, again.state_dict().values(), segmenter.model.state_dict().values()))
