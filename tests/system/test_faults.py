"""Faults of runs: kills, signals, full or unresponsive disks, and damaged files."""

import csv
import os
import random
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml

from ema_seg.reporting import load_report
from ema_seg.runtime.errors import CheckpointError
from ema_seg.sweeps import lock_run
from ema_seg.training.checkpoints import load_last, replace_last
from tests.conftest import FPN, QUICK, is_alive, made_once, silent, write_camvid

TINY = (
    *QUICK,
    "data=camvid",
    *FPN,
    "epochs=4",
    "data.workers=1",
    # Every kind of state that a training keeps from step to step; the model has dropout, which adds random numbers.
    "training.weight_averaging=0.9",
    "training.early_stopping=5",
    "training.checkpoint_every=1",
    "trainer.deterministic=true",
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, entry):
    """Write a data set, and train on it without a fault; return the folders of both."""

    def make(folder):
        root = write_camvid(folder / "data", train=9, val=3)
        status, err = entry.run(*TINY, f"data.root={root}", f"hydra.run.dir={folder / 'run'}")
        assert status == 0, err

    folder = made_once(tmp_path_factory, "faults", make)
    return folder / "data", folder / "run"


def state(run, name="last"):
    """Return the content of a checkpoint without its configuration, timings and paths."""
    return _plain(torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True), run)


def _plain(value, run):
    if isinstance(value, dict):
        return {
            str(key): _plain(item, run)
            for key, item in value.items()
            if key not in ("config", "seconds") and not str(key).endswith(("path", "dirpath", "k_models"))
        }
    if isinstance(value, list | tuple):
        return [_plain(item, run) for item in value]
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().view(-1).numpy().tobytes()
    return value


def rows(run):
    with (run / "metrics.csv").open(newline="") as file:
        timings = ("images_per_second", "seconds")
        return [{key: value for key, value in row.items() if key not in timings} for row in csv.DictReader(file)]


def assert_same(run, other):
    """Check that checkpoints, metrics and scores of two runs are equal bit by bit."""
    for name in ("best", "last"):
        assert state(run, name) == state(other, name)
    assert rows(run) == rows(other)
    reports = [load_report(folder / "report" / "report.json") for folder in (run, other)]
    assert reports[0]["confusion_matrix"] == reports[1]["confusion_matrix"]
    assert reports[0]["images"] == reports[1]["images"]


def changed(path, since):
    try:
        return path.stat().st_mtime_ns != since
    except FileNotFoundError:
        return False


def disturb(entry, arguments, run, number, pause):
    """Start a command, send it a signal ``pause`` seconds after its next checkpoint, and wait for its end."""
    last = run / "checkpoints" / "last.ckpt"
    since = last.stat().st_mtime_ns if last.exists() else None
    process = entry.start(*arguments)
    while not changed(last, since) and is_alive(process):
        time.sleep(0.002)
    time.sleep(pause)
    with suppress(ProcessLookupError):
        os.kill(process, number)
    return entry.wait()


def test_kills_at_random_moments_change_no_bit(undisturbed, entry, tmp_path):
    root, expected = undisturbed
    run, moments = tmp_path / "run", random.Random(0)
    command = [*TINY, f"data.root={root}", f"hydra.run.dir={run}", "resume=auto"]

    statuses = [disturb(entry, command, run, signal.SIGKILL, moments.uniform(0, 0.15))[0] for _ in range(4)]
    status, err = entry.run(*command)

    assert status == 0, err
    assert statuses.count(-signal.SIGKILL) >= 3  # the last ones may find the run finished
    assert_same(run, expected)


@pytest.mark.parametrize("moment", ["in_validation:1", "in_checkpoint:6"])
def test_a_kill_at_a_delicate_moment_changes_no_bit(moment, undisturbed, entry, tmp_path):
    root, expected = undisturbed
    command = [*TINY, f"data.root={root}", f"hydra.run.dir={tmp_path / 'run'}", "resume=auto"]

    assert entry.run(moment, *command, script="tests/system/killed")[0] == -signal.SIGKILL
    status, err = entry.run(*command)

    assert status == 0, err
    assert_same(tmp_path / "run", expected)


@pytest.mark.parametrize(
    ("options", "moment"),
    [
        (("trainer.check_val_every_n_epoch=null", "+trainer.val_check_interval=3"), "after_step:0:2"),
        (("+trainer.limit_train_batches=3", "+trainer.max_steps=8"), "after_epoch:1"),
        (("+trainer.max_steps=10",), "after_step:2:0"),
    ],
)
def test_a_kill_changes_no_bit_whatever_lightning_is_to_do(options, moment, undisturbed, entry, tmp_path):
    command = [*TINY, *options, f"data.root={undisturbed[0]}", "resume=auto"]

    status, err = entry.run(*command, f"hydra.run.dir={tmp_path / 'expected'}")
    assert status == 0, err
    assert (
        entry.run(moment, *command, f"hydra.run.dir={tmp_path / 'run'}", script="tests/system/killed")[0]
        == -signal.SIGKILL
    )
    status, err = entry.run(*command, f"hydra.run.dir={tmp_path / 'run'}")

    assert status == 0, err
    assert_same(tmp_path / "run", tmp_path / "expected")


@pytest.mark.parametrize("change", ["seed=1", "data.batch_size=3"])
def test_what_the_order_of_an_unfinished_epoch_follows_from_cannot_change(change, undisturbed, entry, tmp_path):
    run = tmp_path / "run"
    command = [*TINY, f"data.root={undisturbed[0]}", f"hydra.run.dir={run}"]
    assert entry.run("after_step:0:1", *command, script="tests/system/killed")[0] == -signal.SIGKILL

    before = (run / "config.yaml").read_bytes()
    status, err = entry.run(f"resume={run}", change)

    assert status == 1
    key, _, value = change.partition("=")
    said = err.splitlines()[-1]
    assert said.startswith(f"error: {key}: must stay ") and f", got {value}; the order of its samples " in said
    assert (run / "config.yaml").read_bytes() == before


def test_an_interrupted_run_says_so(undisturbed, entry, tmp_path):
    run = tmp_path / "run"
    process = entry.start(*TINY, f"data.root={undisturbed[0]}", f"hydra.run.dir={run}", "epochs=50")
    while not (run / "metrics.csv").exists():
        time.sleep(0.002)
    os.kill(process, signal.SIGINT)
    status, err = entry.wait()

    assert status == 130, err
    assert err.splitlines()[-1] == "interrupted."
    assert load_last(run)[1]["global_step"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_asked_to_leave_keeps_its_last_step(number, undisturbed, entry, tmp_path):
    root, expected = undisturbed
    run = tmp_path / "run"
    command = [*TINY, f"data.root={root}", f"hydra.run.dir={run}", "training.checkpoint_every=null"]

    process = entry.start(*command)
    while not (run / "metrics.csv").exists():
        time.sleep(0.002)
    os.kill(process, number)
    status, err = entry.wait()

    assert status == 75
    assert err.splitlines()[-1].startswith(f"error: stopped by {number.name} at step ")
    assert err.splitlines()[-1].endswith(f"continue with resume={run}.")
    status, err = entry.run(f"resume={run}")
    assert status == 0, err
    assert rows(run) == rows(expected)
    assert state(run)["state_dict"] == state(expected)["state_dict"]


def test_a_run_that_is_asked_to_leave_during_its_test_leaves_at_once(undisturbed, entry, tmp_path):
    root, expected = undisturbed
    run = tmp_path / "run"
    process = entry.start(*TINY, f"data.root={root}", f"hydra.run.dir={run}", "evaluation.budget=60")
    while not (run / "metrics.csv").exists() or len(rows(run)) < 4:
        time.sleep(0.01)
    time.sleep(1)
    asked = time.monotonic()
    os.kill(process, signal.SIGTERM)
    status, err = entry.wait()

    assert status == 75
    assert time.monotonic() - asked < 30
    assert err.splitlines()[-1].startswith("error: stopped by SIGTERM; the run has not lost anything")
    assert not (run / "report" / "report.json").exists()
    status, err = entry.run(f"resume={run}", "evaluation.budget=0.1")
    assert status == 0, err
    assert_same(run, expected)


def copy_without_report(expected, run):
    return shutil.copytree(expected, run, ignore=shutil.ignore_patterns("report"))


def test_a_truncated_checkpoint_gives_way_to_the_one_before(undisturbed, entry, tmp_path):
    _, expected = undisturbed
    run = copy_without_report(expected, tmp_path / "run")
    last = run / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:5000])

    status, err = entry.run(f"resume={run}")

    assert status == 0, err
    assert err.startswith(f"warning: ckpt={last}: the file is truncated or not a checkpoint of plain data")
    assert "Resuming from previous.ckpt, step 15." in err
    assert_same(run, expected)


def test_a_run_without_a_readable_checkpoint_is_refused_by_name(undisturbed, entry, tmp_path):
    run = copy_without_report(undisturbed[1], tmp_path / "run")
    for name in ("last", "previous"):
        (run / "checkpoints" / f"{name}.ckpt").write_bytes(b"")

    status, err = entry.run(f"resume={run}")

    assert status == 1
    assert err.startswith(f"error: ckpt={run / 'checkpoints' / 'previous.ckpt'}: the file is truncated")


def test_an_unreadable_checkpoint_does_not_become_the_one_before(undisturbed, tmp_path, capsys):
    run = copy_without_report(undisturbed[1], tmp_path / "run")
    last, previous = (run / "checkpoints" / f"{name}.ckpt" for name in ("last", "previous"))
    last.write_bytes(last.read_bytes()[:5000])

    path, saved = load_last(run)
    step = saved["global_step"]
    assert len(last.read_bytes()) == 5000  # load_last changes no file
    replace_last(path)
    previous.unlink()

    assert load_last(run)[1]["global_step"] == step == 15
    assert capsys.readouterr().err.count("Resuming from previous.ckpt") == 1


def test_weights_alone_are_nothing_to_go_on_from(undisturbed, tmp_path):
    run = copy_without_report(undisturbed[1], tmp_path / "run")
    saved = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    torch.save({key: saved[key] for key in ("state_dict", "config", "classes")}, run / "checkpoints" / "last.ckpt")
    (run / "checkpoints" / "previous.ckpt").unlink()

    with pytest.raises(CheckpointError, match=r"last\.ckpt: holds no optimizer_states, so no training can resume"):
        load_last(run)


def test_a_checkpoint_that_would_run_code_is_refused(undisturbed, entry, tmp_path):
    run = copy_without_report(undisturbed[1], tmp_path / "run")
    mark = tmp_path / "mark"

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {mark}",)

    for name in ("last", "previous", "best"):
        torch.save({"state_dict": Hostile(), "config": {}, "classes": []}, run / "checkpoints" / f"{name}.ckpt")

    for script, arguments in {"train": [f"resume={run}"], "eval": [f"run={run}"]}.items():
        status, err = entry.run(*arguments, script=script)
        assert status == 1
        assert "not a checkpoint of plain data" in err
        assert "Traceback" not in err
    assert not mark.exists()


def test_a_disk_without_room_leaves_the_checkpoint_before(undisturbed, entry, tmp_path):
    root, _ = undisturbed
    run = tmp_path / "run"
    status, err = entry.run(*TINY, f"data.root={root}", f"hydra.run.dir={run}", "epochs=1")
    assert status == 0, err
    shutil.rmtree(run / "report")
    before = (run / "checkpoints" / "last.ckpt").read_bytes()

    status, err = entry.run(f"resume={run}", "epochs=2", RLIMIT_FSIZE=100_000)

    assert status == 1
    assert err.splitlines()[-1].startswith(f"error: {run / 'checkpoints' / 'last.ckpt'}: the checkpoint cannot be ")
    assert "Traceback" not in err
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before
    assert load_last(run)[1]["global_step"] == 4


def test_a_command_goes_on_with_its_own_unfinished_run(undisturbed, entry, tmp_path):
    root, expected = undisturbed
    command = [*TINY, f"data.root={root}", "resume=auto"]
    parent = tmp_path / "runs"
    run = parent / "2_same"
    assert disturb(entry, [*command, f"hydra.run.dir={run}"], run, signal.SIGTERM, 0.0)[0] == 75
    for name, key, value in (("1_other", "seed", 1), ("3_longer", "epochs", 5)):
        config = shutil.copytree(run, parent / name) / "config.yaml"
        config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {key: value}))
    shutil.copytree(expected, parent / "4_finished")

    # Without hydra.run.dir, resume=auto searches the siblings of a new run's folder, which is named by the time.
    from omegaconf import OmegaConf

    from ema_seg.cli.composition import CONFIGS, compose
    from ema_seg.cli.resume import _unfinished_run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *command])
        patch.chdir(tmp_path)
        OmegaConf.register_new_resolver("started", lambda pattern: "9", replace=True)
        OmegaConf.register_new_resolver("parallel_jobs", lambda devices: 1, replace=True)
        found = _unfinished_run(compose(CONFIGS, "train"))
        with lock_run(parent / "2_same"):  # as if another process trained it
            other = _unfinished_run(compose(CONFIGS, "train"))
            status, err = entry.run(*command, f"hydra.run.dir={parent / '2_same'}")

    assert (found, other) == (Path("runs/2_same"), None)
    assert status == 1
    assert err.splitlines()[-1].startswith(f"error: {parent / '2_same'}: another process is training this run; ")
    status, err = entry.run(*command, f"hydra.run.dir={parent / '2_same'}")
    assert status == 0, err
    assert_same(parent / "2_same", expected)


def children(process):
    """Return the process IDs of a process's children, such as its loader workers."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if stat.read_text().rpartition(") ")[2].split()[1] == str(process):
                found.append(int(stat.parent.name))
    return found


def has_open(process, file):
    return file in [link.readlink() for link in Path(f"/proc/{process}/fd").iterdir()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_to_all_processes_of_a_job_lets_the_last_step_be_saved(number, undisturbed, entry, tmp_path):
    root, _ = undisturbed
    run = tmp_path / "run"
    process = entry.start(*TINY, f"data.root={root}", f"hydra.run.dir={run}")
    while not (run / "metrics.csv").exists():
        time.sleep(0.002)
    workers = children(process)
    for each in [*workers, process]:
        os.kill(each, number)
    status, err = entry.wait()

    assert workers
    assert status == 75, err
    assert err.splitlines()[-1].startswith(f"error: stopped by {number.name} at step ")
    assert not any(map(is_alive, workers))


@pytest.fixture
def damaged(undisturbed, tmp_path):
    """Copy the data set, for the test to damage; return its folder, a training image and a validation mask."""
    root = shutil.copytree(undisturbed[0], tmp_path / "data")
    return root, root / "train" / "images" / "train_1.jpg", root / "val" / "masks" / "val_1.png"


def test_a_file_that_vanishes_during_the_training_is_named(damaged, entry, tmp_path):
    root, image, _ = damaged
    run = tmp_path / "run"
    entry.start(*TINY, f"data.root={root}", f"hydra.run.dir={run}", "epochs=50")
    while not (run / "metrics.csv").exists():
        time.sleep(0.002)
    image.unlink()
    status, err = entry.wait()

    assert status == 1
    assert err.splitlines()[-1] == f"error: {image}: cannot be read (No such file or directory)."
    assert "Traceback" not in err


def mask_of(image):
    return image.parents[1] / "masks" / f"{image.stem}.png"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_gives_nothing_is_not_waited_for(workers, damaged, entry, tmp_path):
    root, image, _ = damaged

    options = ("data.timeout=2", f"data.workers={workers}", f"hydra.run.dir={tmp_path / 'run'}")
    with silent(image):
        status, err = entry.run(*TINY, f"data.root={root}", *options)

    assert status == 1
    said = f"{image} or {mask_of(image)}: the disk did not respond for 2 seconds; check it, "
    assert err.splitlines()[-1] == f"error: {said}or raise data.timeout (--timeout of the data check)."


def test_a_killed_worker_that_has_read_nothing_is_told(undisturbed, entry, tmp_path):
    run = tmp_path / "run"
    options = ("data.workers=3", "epochs=200", f"hydra.run.dir={run}")  # a validation has two batches
    process = entry.start(*TINY, f"data.root={undisturbed[0]}", *options)
    while not (run / "metrics.csv").exists():
        time.sleep(0.01)
    os.kill(max(children(process)), signal.SIGKILL)
    status, err = entry.wait()

    assert status == 1
    said = "error: data.workers: the system killed a loader worker (Killed), often because memory ran out; "
    assert err.splitlines()[-1] == f"{said}lower data.workers or data.batch_size."
    assert "Traceback" not in err


def test_a_killed_worker_is_told_with_the_file_that_it_read(damaged, entry, tmp_path):
    root, image, _ = damaged
    image.unlink()
    os.mkfifo(image)
    process = entry.start(*TINY, f"data.root={root}", f"hydra.run.dir={tmp_path / 'run'}")
    writer = None
    while writer is None and is_alive(process):
        time.sleep(0.01)
        with suppress(OSError):  # until a worker opens the pipe; its read then waits forever
            writer = os.open(image, os.O_WRONLY | os.O_NONBLOCK)
    readers = []
    while not readers and is_alive(process):  # the worker may still be opening it
        readers = [worker for worker in children(process) if has_open(worker, image)]
    (reading,) = readers
    os.kill(reading, signal.SIGKILL)
    status, err = entry.wait()
    os.close(writer)

    assert status == 1
    said = f"error: {image} or {mask_of(image)}: the system killed a loader worker (Killed) while it read this, "
    assert err.splitlines()[-1].startswith(said)
    assert "Traceback" not in err


def test_unreadable_samples_are_skipped_up_to_a_number_and_counted(damaged, entry, tmp_path):
    root, image, mask = damaged
    run = tmp_path / "run"
    for file in (image, mask):
        file.write_bytes(file.read_bytes()[:100])
    command = (*TINY, f"data.root={root}", f"hydra.run.dir={run}", "epochs=2", "training.pictures_every=1")

    status, err = entry.run(*command, "data.max_skipped=1")
    assert status == 1
    said = "; data.max_skipped=1 is reached (samples skipped so far: 1); repair the files, or raise it."
    assert err.splitlines()[-1].endswith(said)
    shutil.rmtree(run)
    status, err = entry.run(*command, "data.max_skipped=2")

    assert status == 0, err
    assert f"warning: {image}: cannot be decoded as an image" in err
    report = load_report(run / "report" / "report.json")
    assert report["data"]["skipped"] == {"train": ["train_1"], "val": ["val_1"]}
    assert report["data"]["images"] == 2
    assert [record["name"] for record in report["images"]] == ["val_0", "val_2"]
    for record in report["images"]:
        assert (run / "report" / record["prediction"]).name == f"{record['name']}.png"
    assert "| unreadable in train, skipped | 1 |" in (run / "report" / "report.md").read_text()
    assert (run / "skipped.csv").read_text().count("train_1.jpg") == 1
    status, err = entry.run(f"run={run}", f"report.dir={tmp_path / 'again'}", script="eval")
    assert status == 0, err
    assert load_report(tmp_path / "again" / "report.json")["data"]["skipped"] == report["data"]["skipped"]


def test_memory_that_does_not_suffice_is_told_with_what_to_change(undisturbed, entry, tmp_path):
    crops = ("data.batch_size=8", "data.augmentation.crop.height=1024", "data.augmentation.crop.width=1024")
    command = (*TINY, f"data.root={undisturbed[0]}", f"hydra.run.dir={tmp_path / 'run'}", "data.workers=0", *crops)

    status, err = entry.run(*command, RLIMIT_AS=2**30)

    assert status == 1
    said = err.splitlines()[-1]
    assert said.startswith("error: data.batch_size=8: out of memory with batches of 1024 x 1024 pixels (cpu has ")
    for change in ("lower it", "data.augmentation.crop.height", "trainer.precision=bf16-mixed"):
        assert change in said
    assert "Traceback" not in err
