import copy

import pytest

from ema_seg.sweeps import hash_config, job_name

CONFIG = {
    "seed": 0,
    "epochs": 4,
    "data": {"name": "camvid", "root": "/a", "workers": 2, "batch_size": 4},
    "model": {"decoder": "unet"},
    "attention": {"name": "ema", "factor": "auto"},
    "optimizer": {"name": "adamw"},
    "trainer": {"accelerator": "cpu", "precision": "32-true"},
    "training": {"progress_bar": "auto", "compile": False},
    "evaluation": {"device": "auto", "budget": 10.0, "precision": "32-true"},
    "report": {"dir": None},
    "logger": {},
    "resume": None,
}


def with_change(key, value):
    config = copy.deepcopy(CONFIG)
    node = config
    *path, last = key.split(".")
    for part in path:
        node = node[part]
    node[last] = value
    return config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.root", "/b"),
        ("data.workers", 0),
        ("trainer.accelerator", "gpu"),
        ("training.progress_bar", False),
        ("training.pictures_every", 3),
        ("training.loss_strips", "off"),
        ("training.tf32", None),
        ("model.auxiliary", None),
        ("optimizer.layer_decay", None),
        ("init_from", None),
        ("freeze", {"parts": None, "until": None}),
        ("evaluation.device", "cuda:1"),
        ("evaluation.budget", 1.0),
        ("report.dir", "elsewhere"),
        ("logger.wandb", {}),
    ],
)
def test_where_and_how_a_job_runs_is_no_part_of_it(key, value):
    assert hash_config(with_change(key, value)) == hash_config(CONFIG)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1),
        ("epochs", 5),
        ("attention.factor", 8),
        ("data.batch_size", 8),
        ("trainer.precision", "bf16-mixed"),
        ("training.tf32", True),
        ("model.auxiliary", 0.4),
        ("optimizer.layer_decay", 0.7),
        ("init_from", "/runs/one"),
        ("freeze", {"parts": ["encoder"], "until": None}),
    ],
)
def test_what_changes_the_result_is_part_of_it(key, value):
    assert hash_config(with_change(key, value)) != hash_config(CONFIG)


def test_the_folder_of_data_folder_names_the_data():
    folder = with_change("data.name", "folder")
    other = copy.deepcopy(folder)
    other["data"]["root"] = "/b"

    assert hash_config(folder) != hash_config(other)


def test_where_no_block_sits_is_no_part_of_a_job():
    def identity_of(attention, place):
        changed = with_change("attention.name", attention)
        return hash_config({**changed, "placement": {"decoder": place == "decoder", "head": place == "head"}})

    assert identity_of("none", "head") == identity_of("none", "decoder")
    assert identity_of("ema", "head") != identity_of("ema", "decoder")


def test_the_order_of_keys_does_not_matter():
    assert hash_config(dict(reversed(CONFIG.items()))) == hash_config(CONFIG)


def test_a_jobs_folder_can_be_read_and_typed():
    name = job_name(
        {"attention": "ema", "placement.encoder_stages": "[3, 4]", "model.encoder": "tu-a/b", "seed": "0"}, "1f"
    )

    assert name == "attention-ema_encoder_stages-3-4-_encoder-tu-a-b_seed-0_1f"
    assert job_name({}, "1f") == "1f"
    assert len(job_name({"key": "x" * 500}, "1f")) < 100
