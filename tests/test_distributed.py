"""Several processes through the entry points, whoever starts them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from ema_seg.reporting import load_report
from ema_seg.sweeps import job_state, read_plan
from tests.conftest import QUICK, ROOT, write_camvid

TINY = (*QUICK, "data=camvid", "+model.decoder_segmentation_channels=32", "+model.decoder_pyramid_channels=32")
# Nothing that a process draws at random by itself; and double precision, because in float32 these steps, which
# normalise over a few pixels, blow a difference in the last digit up to one in the second within 20 of them.
EVEN = ("+model.decoder_dropout=0", "trainer.precision=64-true", "evaluation.precision=32-true", "optimizer=sgd")

pytestmark = pytest.mark.xdist_group("distributed")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Numbers of images that no number of processes divides."""
    return write_camvid(tmp_path_factory.mktemp("camvid") / "data", train=9, val=7)


def weights(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def scores(run):
    """What a report says of the predictions."""
    report = load_report(run / "report" / "report.json")
    return {key: report[key] for key in ("confusion_matrix", "images", "miou", "size_miou")}


def assert_same(run, other):
    """To the last bit."""
    expected = weights(other)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(run).items())
    assert scores(run) == scores(other)


@pytest.fixture(scope="module")
def together(root, tmp_path_factory):
    """Two processes that train.py has started itself, for 20 steps."""
    folder = tmp_path_factory.mktemp("together")
    done = train(folder, root, *EVEN, "trainer=ddp_cpu", "epochs=5")
    assert done.returncode == 0, done.stderr
    return folder, done


def train(folder, root, *overrides, flags=(), program=(sys.executable,)):
    return subprocess.run(
        [*program, str(ROOT / "train.py"), *flags, *TINY, f"data.root={root}", *overrides],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=200,
    )


def only_run(folder):
    """The folder of a run, beside which nothing else has been made."""
    assert [path.name for path in folder.iterdir()] == ["runs"]
    (run,) = (folder / "runs").iterdir()
    return run


def test_one_command_makes_one_run_with_one_log_and_one_report(together):
    folder, done = together
    run = only_run(folder)

    assert done.stdout.count("mIoU   ") == 1
    assert done.stdout.rstrip().endswith(f"run: {run.relative_to(folder)}") or str(run) in done.stdout
    assert [line.split()[1] for line in done.stderr.splitlines()] == [f"{epoch}/5" for epoch in range(1, 6)]
    assert {path.name for path in run.iterdir()} == {
        *("config.yaml", "environment.json", "metrics.csv", "checkpoints", "report", "train.log"),
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


def test_two_processes_repeat_the_report_of_a_run(together, tmp_path, run_script):
    run = only_run(together[0])

    status, _, err = run_script("eval", f"run={run}", "devices=2", f"report.dir={tmp_path}")

    assert status == 0, err
    again = load_report(tmp_path / "report.json")
    assert {key: again[key] for key in scores(run)} == scores(run)
    assert again["environment"]["processes"] == 2


def test_a_model_in_pieces_learns_the_same_and_leaves_one_checkpoint(together, root, tmp_path, run_script):
    run = tmp_path / "run"
    overrides = ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "epochs=5")

    status, _, err = run_script("train", *TINY, *EVEN, f"data.root={root}", *overrides, f"hydra.run.dir={run}")

    assert status == 0, err
    whole, pieces = weights(only_run(together[0])), weights(run)
    assert pieces.keys() == whole.keys()
    for name, tensor in whole.items():
        assert_close(pieces[name], tensor, atol=1e-8, rtol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
    status, _, err = run_script("eval", f"run={run}", f"report.dir={tmp_path / 'again'}")
    assert status == 0, err
    assert load_report(tmp_path / "again" / "report.json")["confusion_matrix"] == scores(run)["confusion_matrix"]


def test_a_run_in_pieces_goes_on_as_one_process(root, tmp_path, run_script):
    even = (*EVEN, "optimizer=adamw")  # whose state is in pieces, too
    trainers = {"alone": ("trainer=cpu",), "pieces": ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2")}
    for name, trainer in trainers.items():
        run = tmp_path / name
        overrides = (*TINY, *even, f"data.root={root}", *trainer, "epochs=1", f"hydra.run.dir={run}")
        status, _, err = run_script("train", *overrides)
        assert status == 0, err
        status, _, err = run_script("train", f"resume={run}", "epochs=2", "trainer.strategy=auto", "trainer.devices=1")
        assert status == 0, err

    expected = weights(tmp_path / "alone")
    for name, tensor in weights(tmp_path / "pieces").items():
        assert_close(tensor, expected[name], atol=1e-7, rtol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


def test_torchrun_on_two_machines_does_the_same(together, root, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={machine}"),
                *("--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"),
                *(str(ROOT / "train.py"), *TINY, *EVEN, f"data.root={root}"),
                *("trainer=ddp", "trainer.accelerator=cpu", "epochs=5"),
            ],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        for machine in range(2)
    ]
    for machine in machines:
        _, err = machine.communicate(timeout=200)
        assert machine.returncode == 0, err

    assert_same(only_run(tmp_path), only_run(together[0]))


def test_tasks_of_slurm_do_the_same(together, root, tmp_path):
    tasks = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *TINY, *EVEN, f"data.root={root}", "trainer=ddp_cpu", "epochs=5"],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={
                **os.environ,
                "SLURM_JOB_ID": str(os.getpid()),
                "SLURM_NTASKS": "2",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_STEP_NUM_NODES": "1",
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_PROCID": str(task),
                "SLURM_LOCALID": str(task),
            },
        )
        for task in range(2)
    ]
    outputs = [task.communicate(timeout=200) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs

    assert sum(out.count("run: ") for out, _ in outputs) == 1
    assert_same(only_run(tmp_path), only_run(together[0]))


RAY = ("+hydra.launcher.ray.init.num_cpus=2", "+hydra.launcher.ray.init.include_dashboard=false")


@pytest.mark.parametrize(
    ("launcher", "options"),
    [
        ("serial", ["attention=none,se"]),
        ("joblib", ["attention=none"]),
        ("submitit_local", ["attention=none", "hydra.launcher.tasks_per_node=2"]),
        ("ray", ["attention=none", *RAY]),
    ],
)
def test_every_job_of_every_launcher_trains_in_two_processes(launcher, options, root, tmp_path):
    sweep = tmp_path / "sweep"
    overrides = ("trainer=ddp_cpu", "epochs=1", f"launcher={launcher}", *options, f"hydra.sweep.dir={sweep}")

    done = train(tmp_path, root, *overrides, flags=["-m"])

    assert done.returncode == 0, done.stderr
    for job in read_plan(sweep).jobs:
        assert job_state(sweep / job.folder).name == "finished"
        report = load_report(sweep / job.folder / "report" / "report.json")
        assert report["environment"]["processes"] == 2
        assert report["job"]["launcher"] == launcher
        assert len(report["images"]) == 7


def test_a_job_whose_process_fails_is_told_by_its_reason(tmp_path):
    sweep, broken = tmp_path / "sweep", broken_for_the_second(tmp_path)
    launcher = ("launcher=submitit_local", "hydra.launcher.tasks_per_node=2")

    done = train(tmp_path, broken, "trainer=ddp_cpu", "epochs=1", *launcher, f"hydra.sweep.dir={sweep}", flags=["-m"])

    assert done.returncode == 1
    (job,) = read_plan(sweep).jobs
    state = job_state(sweep / job.folder)
    assert state.name == "failed"
    assert state.reason.startswith(f"{broken / 'val' / 'images' / 'val_1.jpg'}: ")


def broken_for_the_second(folder):
    """A data set of which the second process reads a file that is no image."""
    root = write_camvid(folder / "broken", val=3)
    (root / "val" / "images" / "val_1.jpg").write_bytes(b"no image")
    return root


def start(root, folder, *overrides):
    return subprocess.Popen(
        [
            *(sys.executable, str(ROOT / "train.py"), *TINY, f"data.root={root}", "trainer=ddp_cpu", "epochs=500"),
            *(f"hydra.run.dir={folder}", *overrides),
        ],
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder.parent,
    )


def members(process):
    """The processes that train, by their rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = {}
    for child in children:
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks = [text.partition(b"=")[2] for text in variables if text.startswith(b"RANK=")]
        found |= {int(rank): int(child) for rank in ranks}
    return found


def test_a_killed_process_ends_all_within_seconds(root, tmp_path):
    run = tmp_path / "run"
    process = start(root, run)
    while not (run / "metrics.csv").exists() and process.poll() is None:
        time.sleep(0.05)
    everyone = members(process)

    os.kill(everyone[0], signal.SIGKILL)
    _, err = process.communicate(timeout=20)

    assert process.returncode == 1
    assert err.splitlines()[-1].startswith("error: the process 0 of 2 was killed (SIGKILL)")
    assert "Traceback" not in err
    assert not any(Path(f"/proc/{member}").exists() for member in everyone.values())


def test_what_one_process_finds_is_said_once(tmp_path):
    broken = broken_for_the_second(tmp_path)
    process = start(broken, tmp_path / "run")

    _, err = process.communicate(timeout=60)

    assert process.returncode == 1
    assert err.startswith(f"error: {broken / 'val' / 'images' / 'val_1.jpg'}: ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["trainer.devices=4", "data.batch_size=6"],
            "data.batch_size=6 is of all processes together and does not divide into 4 equal parts; choose 4 or 8, or "
            "train in 1 or 2 or 3 processes.",
        ),
        (["trainer.devices=0"], "devices=0 is no number of devices"),
        (["trainer.strategy=ddq"], "trainer.strategy=ddq is none of auto, ddp, fsdp"),
        (
            ["trainer.devices=2", "trainer.num_nodes=2", "data.batch_size=4"],
            "needs a process started on each machine",
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


def test_processes_that_nobody_asked_for_are_refused(root, tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")

    done = train(tmp_path, root, program=torchrun)
    assert done.returncode == 1
    assert (
        done.stderr.count("error: 1 is the number of devices, but torchrun has started 2 processes on this machine")
        == 1
    )

    done = train(tmp_path, root, "attention=none,se", flags=["-m"], program=torchrun)
    assert done.returncode == 1
    assert done.stderr.count("error: torchrun has started several processes of a sweep") == 1
