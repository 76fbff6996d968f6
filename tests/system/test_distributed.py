"""Runs in several processes through the entry points, with every launcher."""

import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch.testing import assert_close

from ema_seg.cli.command_line import plain_config
from ema_seg.reporting import load_report
from ema_seg.runtime.errors import ConfigError
from ema_seg.sweeps import job_state, read_plan
from ema_seg.training.checkpoints import load_last
from tests.conftest import FPN, QUICK, ROOT, free_port, is_alive, made_once, write_camvid

TINY = (*QUICK, *FPN, "data=camvid")
# No dropout, because its random numbers differ between ranks. Double precision, because in float32 these steps, with
# batch norm over a few pixels, amplify a difference in the last digit to one in the second digit within 20 steps.
EVEN = ("+model.decoder_dropout=0", "trainer.precision=64-true", "evaluation.precision=32-true", "optimizer=sgd")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Write a data set with odd numbers of images, 9 and 7, which two ranks cannot share equally."""
    return made_once(tmp_path_factory, "odd", lambda folder: write_camvid(folder / "data", train=9, val=7)) / "data"


def weights(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def scores(run):
    """Return the parts of a report that follow from the predictions."""
    report = load_report(run / "report" / "report.json")
    return {key: report[key] for key in ("confusion_matrix", "images", "miou", "size_miou")}


def assert_same(run, other):
    """Check that the weights and scores of two runs are equal bit by bit."""
    expected = weights(other)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(run).items())
    assert scores(run) == scores(other)


@pytest.fixture(scope="module")
def together(root, tmp_path_factory, entry):
    """Train 20 steps in two processes that train.py starts; return folder, standard output and standard error."""

    def make(folder):
        (folder / "cwd").mkdir()
        status, err = entry.run(*TINY, f"data.root={root}", *EVEN, "trainer=ddp_cpu", "epochs=5", cwd=folder / "cwd")
        assert status == 0, err
        for name in ("out", "err"):
            shutil.copy(entry.folder / name, folder)

    folder = made_once(tmp_path_factory, "together", make)
    return folder / "cwd", (folder / "out").read_text(), (folder / "err").read_text()


def only_run(folder):
    """Return the folder of the only run, and check that nothing else is beside it."""
    assert [path.name for path in folder.iterdir()] == ["runs"]
    (run,) = (folder / "runs").iterdir()
    return run


def test_one_command_makes_one_run_with_one_log_and_one_report(together):
    folder, out, err = together
    run = only_run(folder)

    assert out.count("mIoU   ") == out.count("run: ") == 1
    assert out.rstrip().endswith(str(run))
    assert [line.split()[1] for line in err.splitlines()] == [f"{epoch}/5" for epoch in range(1, 6)]
    assert {path.name for path in run.iterdir()} == {
        *("config.yaml", "environment.json", "metrics.csv", "checkpoints", "report", "run.lock"),
    }
    report = load_report(run / "report" / "report.json")
    assert len(report["images"]) == 7
    assert report["environment"]["processes"] == json.loads((run / "environment.json").read_text())["processes"] == 2
    assert report["throughput"]["end_to_end"]["devices"] == 2


def test_two_processes_learn_what_one_does_with_the_whole_batch(together, root, tmp_path, run_script):
    run = tmp_path / "alone"
    status, _, err = run_script("train", *TINY, *EVEN, f"data.root={root}", "epochs=5", f"hydra.run.dir={run}")
    assert status == 0, err

    alone, shared = weights(run), weights(only_run(together[0]))
    assert alone.keys() == shared.keys()
    for name, tensor in alone.items():
        assert_close(shared[name], tensor, atol=1e-8, rtol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
    assert scores(run) == scores(only_run(together[0]))


def test_two_processes_repeat_the_report_of_a_run(together, tmp_path, entry):
    run = only_run(together[0]).absolute()

    status, err = entry.run(f"run={run}", "devices=2", f"report.dir={tmp_path}", script="eval")

    assert status == 0, err
    again = load_report(tmp_path / "report.json")
    assert {key: again[key] for key in scores(run)} == scores(run)
    assert again["environment"]["processes"] == 2


def test_a_model_in_pieces_learns_the_same_and_goes_on_in_pieces_or_as_a_whole(together, root, tmp_path, entry):
    """FSDP shards the weights and the optimiser's momentum; the run is resumed with FSDP and in a single process."""
    runs = {name: tmp_path / name for name in ("pieces", "whole")}
    alone = {"pieces": (), "whole": ("trainer.strategy=auto", "trainer.devices=1")}
    overrides = ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "epochs=5")
    folder = f"hydra.run.dir={runs['pieces']}"
    status, err = entry.run(*TINY, *EVEN, f"data.root={root}", *overrides, folder)
    assert status == 0, err
    shutil.copytree(runs["pieces"], runs["whole"])

    assert_close_weights(runs["pieces"], only_run(together[0]))
    for name, run in runs.items():
        status, err = entry.run(f"resume={run}", "epochs=6", *alone[name])
        assert status == 0, err
    assert_close_weights(runs["pieces"], runs["whole"])


def assert_close_weights(run, other):
    pieces, whole = weights(run), weights(other)
    assert pieces.keys() == whole.keys()
    for name, tensor in whole.items():
        assert_close(pieces[name], tensor, atol=1e-6, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def run_at_once(entry, folder, commands):
    """Run commands at the same time, check that all succeed, and return their standard outputs and standard errors."""
    status, err = entry.run(entry.folder, json.dumps(commands), script="tests/system/started", cwd=folder)
    files = [[entry.folder / f"{number}.{name}" for name in ("out", "err")] for number in range(len(commands))]
    outputs = [tuple(file.read_text() for file in pair) for pair in files]
    assert (status, err) == (0, ""), outputs
    assert json.loads(entry.out) == [0] * len(commands), outputs
    return outputs


def test_torchrun_on_two_machines_does_the_same(together, root, tmp_path, entry):
    port = free_port()
    machines = [
        [
            # torchrun finds the host by its address, but both machines have the same one here.
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--rdzv-conf=is_host={1 - machine}"),
            *("--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"),
            *(str(ROOT / "train.py"), *TINY, *EVEN, f"data.root={root}"),
            *("trainer=ddp", "trainer.accelerator=cpu", "epochs=5"),
        ]
        for machine in range(2)
    ]

    run_at_once(entry, tmp_path, [(machine, {}) for machine in machines])

    assert_same(only_run(tmp_path), only_run(together[0]))


def test_tasks_of_slurm_do_the_same(together, root, tmp_path, entry):
    command = [sys.executable, str(ROOT / "train.py"), *TINY, *EVEN, f"data.root={root}", "trainer=ddp_cpu", "epochs=5"]
    step = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NODELIST": "localhost",
    }
    tasks = [(command, {**step, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)}) for task in range(2)]

    outputs = run_at_once(entry, tmp_path, tasks)

    assert sum(out.count("run: ") for out, _ in outputs) == 1
    assert_same(only_run(tmp_path), only_run(together[0]))


@pytest.mark.parametrize(
    ("launcher", "options"),
    [
        ("serial", ["attention=none,se"]),
        ("joblib", ["attention=none"]),
        ("submitit_local", ["attention=none", "hydra.launcher.tasks_per_node=2"]),
    ],
)
def test_every_job_of_every_launcher_trains_in_two_processes(launcher, options, root, tmp_path, entry):
    sweep = tmp_path / "sweep"
    overrides = ("trainer=ddp_cpu", "epochs=1", f"launcher={launcher}", *options, f"hydra.sweep.dir={sweep}")

    status, err = entry.run("-m", *TINY, f"data.root={root}", *overrides)

    assert status == 0, err
    for job in read_plan(sweep).jobs:
        assert job_state(sweep / job.folder).name == "finished"
        report = load_report(sweep / job.folder / "report" / "report.json")
        assert report["environment"]["processes"] == 2
        assert report["job"]["launcher"] == launcher
        assert len(report["images"]) == 7


def test_a_job_whose_process_fails_is_told_by_its_reason(tmp_path, entry):
    sweep, broken = tmp_path / "sweep", broken_for_the_second(tmp_path)
    launcher = ("launcher=submitit_local", "hydra.launcher.tasks_per_node=2")

    overrides = (f"data.root={broken}", "trainer=ddp_cpu", "epochs=1", *launcher, f"hydra.sweep.dir={sweep}")

    status, _ = entry.run("-m", *TINY, *overrides)

    assert status == 1
    (job,) = read_plan(sweep).jobs
    state = job_state(sweep / job.folder)
    assert state.name == "failed"
    assert state.reason.startswith(f"{broken / 'val' / 'images' / 'val_1.jpg'}: ")


def broken_for_the_second(folder):
    """Write a data set in which rank 1 reads a file that is not an image."""
    root = write_camvid(folder / "broken", val=3)
    (root / "val" / "images" / "val_1.jpg").write_bytes(b"no image")
    return root


def members(process):
    """Return the process IDs of the ranks, in rank order."""
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.fixture
def training(root, tmp_path, entry):
    """Start a long training in two processes, wait for its first epoch, and return its folder and process ID."""
    run = tmp_path / "run"
    process = entry.start(*TINY, f"data.root={root}", "trainer=ddp_cpu", "epochs=500", f"hydra.run.dir={run}")
    while not (run / "metrics.csv").exists() and is_alive(process):
        time.sleep(0.05)
    return run, process


def test_a_killed_process_ends_all_within_seconds(training, entry):
    everyone = members(training[1])

    os.kill(everyone[0], signal.SIGKILL)
    killed = time.monotonic()
    status, err = entry.wait()

    assert status == 1
    assert time.monotonic() - killed < 20
    assert err.splitlines()[-1].startswith("error: process 0 of 2 was killed (SIGKILL)")
    assert "Traceback" not in err
    assert len(everyone) == 2
    assert not any(map(is_alive, everyone))


def test_processes_that_are_asked_to_leave_end_with_one_checkpoint(training, entry):
    run, process = training

    os.kill(members(process)[1], signal.SIGUSR1)  # a signal to one rank is enough
    status, err = entry.wait()

    assert status == 75
    (said,) = [line for line in err.splitlines() if not line.startswith("epoch")]
    assert said.startswith("error: stopped by SIG")
    step = int(said.partition("at step ")[2].partition(",")[0])
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == step


def test_no_step_waits_for_a_word_of_the_first_process_and_yet_all_leave_with_it(root, tmp_path, entry):
    run, overrides = tmp_path / "run", ("trainer=ddp_cpu", "epochs=50", f"data.root={root}")
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = plain_config(compose("train", [*TINY, *overrides]))

    (tmp_path / "config.json").write_text(json.dumps(config))

    status, err = entry.run(tmp_path / "config.json", run, tmp_path, script="tests/system/preempted")

    assert status == 75
    assert re.match(r"error: stopped by SIGTERM at step \d, in epoch 1; continue with ", err)
    steps = load_last(run)[1]["global_step"]
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == ["step"] * steps


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["trainer.devices=4", "data.batch_size=6"],
            "data.batch_size: must be divisible by the number of processes that share it (4), got 6; set 4 or 8, or "
            "use 1 or 2 or 3 processes.",
        ),
        (["trainer.devices=0"], "devices=0: must be a number of devices"),
        (["trainer.devices=100000", "data.batch_size=100000"], "devices=100000: must be at most "),
        (["trainer.strategy=ddq"], "trainer.strategy=ddq: must be one of auto, ddp, fsdp"),
        (
            ["trainer.devices=2", "trainer.num_nodes=2", "data.batch_size=4"],
            "trainer.num_nodes=2: torchrun or srun must start processes on each machine",
        ),
    ],
)
def test_mistakes_are_named_before_anything_starts(overrides, message, root, tmp_path, run_script):
    run = tmp_path / "run"
    status, _, err = run_script("train", *TINY, f"data.root={root}", f"hydra.run.dir={run}", *overrides)

    assert status == 1
    assert err.startswith("error: ")
    assert message in err
    assert not (run / "config.yaml").exists()


def test_a_sweep_is_started_once(monkeypatch):
    from ema_seg.cli import train

    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "attention=none,se"])

    with pytest.raises(ConfigError, match="torchrun has started several processes"):
        train._broadcast_start_time("torchrun", None)


def test_two_processes_unfreeze_as_one_does(root, tmp_path, entry, run_script):
    """DDP reduces only the gradients of the parameters that could be trained when it wrapped the model."""
    options = (*TINY, *EVEN, f"data.root={root}", "epochs=2", "freeze.parts=[encoder,decoder.p5]", "freeze.until=1")
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    status, _, err = run_script("train", *options, f"hydra.run.dir={alone}")
    assert status == 0, err

    status, err = entry.run(*options, "trainer=ddp_cpu", f"hydra.run.dir={shared}")

    assert status == 0, err
    assert_close_weights(shared, alone)
