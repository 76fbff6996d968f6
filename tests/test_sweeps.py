"""Sweeps through the entry point, as a user runs them."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from ema_seg.reporting import compare_runs, read_folder
from ema_seg.sweeps import job_state, read_plan
from tests.conftest import QUICK, ROOT

TINY = (*QUICK, "data=camvid", "+model.decoder_segmentation_channels=32", "+model.decoder_pyramid_channels=32")


def command(camvid_root, folder, *overrides):
    return ["-m", *TINY, f"data.root={camvid_root}", f"hydra.sweep.dir={folder}", *overrides]


def run(camvid_root, folder, *overrides, timeout=300):
    """The sweep in a process of its own."""
    return subprocess.run(
        [sys.executable, ROOT / "train.py", *command(camvid_root, folder, *overrides)],
        capture_output=True,
        text=True,
        cwd=folder.parent,
        timeout=timeout,
    )


def states(folder):
    return {
        " ".join(job.overrides.values()): job_state(folder / job.folder, job.impossible)
        for job in read_plan(folder).jobs
    }


def names(folder):
    return {label: state.name for label, state in states(folder).items()}


def reports(folder):
    return {
        " ".join(job.overrides.values()): json.loads((folder / job.folder / "report" / "report.json").read_text())
        for job in read_plan(folder).jobs
    }


def comparison_rows(folder):
    """What the comparison says of each configuration with the seeds 0 and 1, drawn up anew."""
    runs = read_folder(folder)
    chosen = [run for run in runs.runs if run.seed in (0, 1)]
    comparison = compare_runs(dataclasses.replace(runs, runs=chosen), replicates=100)
    return {row["label"]: row for row in comparison["rows"]}


@pytest.fixture(scope="module")
def undisturbed(camvid_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "sweep"
    done = run(camvid_root, folder, "attention=none,se", "seed=0,1", "epochs=3")
    assert done.returncode == 0, done.stderr
    return folder, done


def test_a_grid_leaves_a_plan_and_a_report_of_every_job(undisturbed):
    folder, done = undisturbed

    assert names(folder) == dict.fromkeys(("none 0", "se 0", "none 1", "se 1"), "finished")
    assert "4 of 4 jobs finished, 0 running, 0 left" in done.stderr
    assert done.stdout.rstrip().endswith(f"comparison: {folder}/comparison/comparison.html\nsweep: {folder}")
    assert {"comparison.html", "comparison.json", "comparison.md", "comparison.csv", "comparison.tex", "figures"} <= {
        path.name for path in (folder / "comparison").iterdir()
    }
    for label, report in reports(folder).items():
        assert " ".join(report["job"]["overrides"].values()) == label
        assert report["config"]["attention"]["name"] == report["job"]["overrides"]["attention"]


def test_the_same_command_again_does_nothing(undisturbed, camvid_root, run_script):
    folder, _ = undisturbed
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/report/report.json")}

    status, _, err = run_script("train", *command(camvid_root, folder, "attention=none,se", "seed=0,1", "epochs=3"))

    assert status == 0, err
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*/report/report.json")}


def test_more_seeds_add_to_a_sweep(undisturbed, camvid_root, run_script):
    folder, _ = undisturbed
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/report/report.json")}

    status, _, err = run_script("train", *command(camvid_root, folder, "attention=none", "seed=1,2", "epochs=3"))

    assert status == 0, err
    assert names(folder)["none 2"] == "finished"
    assert len(names(folder)) == 5
    assert before.items() <= {path: path.stat().st_mtime_ns for path in folder.glob("*/report/report.json")}.items()


@pytest.mark.parametrize("seed", range(2))
def test_kills_at_any_moment_change_nothing_in_the_result(undisturbed, camvid_root, tmp_path, seed):
    """Kill job and launcher, which are one process here, again and again; then let it finish."""
    folder = tmp_path / "sweep"
    overrides = ("attention=none,se", "seed=0,1", "epochs=3")
    moments = torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()
    for moment in moments:
        process = subprocess.Popen(
            [sys.executable, ROOT / "train.py", *command(camvid_root, folder, *overrides)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        # From within the start-up to within a later job, whatever the machine's speed: counted in files, then in time.
        known = len(list(folder.glob("*/metrics.csv")))
        deadline = time.monotonic() + 60
        while (
            len(list(folder.glob("*/metrics.csv"))) == known and process.poll() is None and time.monotonic() < deadline
        ):
            time.sleep(0.02)
        time.sleep(moment)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = run(camvid_root, folder, *overrides)

    assert done.returncode == 0, done.stderr
    expected = reports(undisturbed[0])
    for label, report in reports(folder).items():
        for key in ("confusion_matrix", "miou", "images", "size_miou"):
            assert report[key] == expected[label][key], (label, key)
    rows, expected_rows = (comparison_rows(sweep) for sweep in (folder, undisturbed[0]))
    for label, row in rows.items():
        for key in ("miou", "contrast", "classes", "strata"):
            assert row[key] == expected_rows[label][key], (label, key)
    for job in read_plan(folder).jobs:
        ours, theirs = (
            torch.load(sweep / job.folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
            for sweep in (folder, undisturbed[0])
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_failing_job_is_recorded_and_the_sweep_goes_on(camvid_root, tmp_path, run_script):
    folder = tmp_path / "sweep"
    arguments = command(camvid_root, folder, "optimizer.lr=1e-3,1e30", "epochs=1")

    status, _, err = run_script("train", *arguments)

    assert status == 1
    assert names(folder) == {"0.001": "finished", "1e+30": "failed"}
    failed = states(folder)["1e+30"]
    assert (failed.attempts, failed.reason[:11]) == (1, "the loss is")
    assert "failed: optimizer.lr=1e+30: the loss is" in err.replace("\n", " ")

    assert run_script("train", *arguments)[0] == 1
    assert states(folder)["1e+30"].attempts == 2
    assert run_script("train", *arguments)[0] == 1
    assert states(folder)["1e+30"].attempts == 2


def test_impossible_combinations_are_told_before_anything_trains(camvid_root, tmp_path, run_script):
    folder = tmp_path / "sweep"

    status, _, err = run_script("train", *command(camvid_root, folder, "attention.factor=auto,48", "epochs=1"))

    assert status == 1
    assert names(folder) == {"auto": "finished", "48": "impossible"}
    assert err.index("impossible: attention.factor=48: ") < err.index("finished")
    assert not (folder / next(job.folder for job in read_plan(folder).jobs if job.impossible)).exists()


def test_a_value_that_does_not_exist_is_impossible_and_the_others_run(camvid_root, tmp_path, run_script):
    folder = tmp_path / "sweep"

    status, _, err = run_script("train", *command(camvid_root, folder, "attention=none,emma", "epochs=1"))

    assert status == 1
    assert names(folder) == {"none": "finished", "emma": "impossible"}
    assert "Traceback" not in err


def test_variants_of_a_configured_sweep_are_jobs(camvid_root, tmp_path, run_script):
    folder = tmp_path / "sweep"

    status, _, err = run_script("train", *command(camvid_root, folder, "sweep=placement", "attention=se", "epochs=1"))

    assert status == 0, err
    assert names(folder) == dict.fromkeys(("none", "encoder", "decoder", "head", "everywhere"), "finished")
    report = reports(folder)["head"]
    assert report["config"]["placement"]["head"]
    assert not report["config"]["placement"]["decoder"]
    assert read_plan(folder).baseline == {"variant": "none"}


def test_the_command_line_goes_before_the_sweeps_own_values(camvid_root, tmp_path, run_script):
    folder = tmp_path / "sweep"

    status, _, err = run_script(
        "train", *command(camvid_root, folder, "sweep=attention", "attention=none,eca", "epochs=1")
    )

    assert status == 0, err
    assert names(folder) == {"none": "finished", "eca": "finished"}


def test_the_folder_is_named_by_the_sweep_but_its_seeds(camvid_root, tmp_path, run_script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = ["-m", *TINY, f"data.root={camvid_root}", "epochs=1"]
    for overrides in (["attention=none", "seed=0"], ["attention=none", "seed=1"], ["attention=se", "seed=0"]):
        assert run_script("train", *base, *overrides)[0] == 0

    folders = sorted((tmp_path / "runs").iterdir())
    assert sorted(len(list(folder.glob("*/report"))) for folder in folders) == [1, 2]
    assert all(folder.name.startswith("sweep_grid_camvid_") for folder in folders)


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "ray"])
def test_launchers_run_the_same_jobs(launcher, undisturbed, camvid_root, tmp_path):
    folder = tmp_path / "sweep"
    options = {"ray": ["+hydra.launcher.ray.init.num_cpus=2", "+hydra.launcher.ray.init.include_dashboard=false"]}

    # With a worker for the data, which each launcher's processes have to be able to start.
    overrides = ["attention=none,se", "epochs=3", f"launcher={launcher}", *options.get(launcher, []), "data.workers=1"]
    done = run(camvid_root, folder, *overrides)

    assert done.returncode == 0, done.stderr
    expected = reports(undisturbed[0])
    for label, report in reports(folder).items():
        assert report["miou"] == pytest.approx(expected[f"{label} 0"]["miou"], abs=1e-3)
        assert report["job"]["overrides"] == {"attention": label}
        assert report["job"]["launcher"] == launcher
    comparison = json.loads((folder / "comparison" / "comparison.json").read_text())
    assert any(f"launcher {launcher}" in note for note in comparison["notes"])


def test_a_killed_process_of_a_launcher_does_not_end_the_sweep(camvid_root, tmp_path):
    folder = tmp_path / "sweep"
    process = subprocess.Popen(
        [
            sys.executable,
            ROOT / "train.py",
            *command(camvid_root, folder, "attention=none,se", "epochs=3", "launcher=joblib"),
        ],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    while not list(folder.glob("*/metrics.csv")) and process.poll() is None:
        time.sleep(0.02)
    victim = json.loads(next(folder.glob("*/metrics.csv")).with_name("job.json").read_text())["process"]
    assert victim != process.pid
    os.kill(victim, signal.SIGKILL)
    _, err = process.communicate(timeout=200)

    assert process.returncode == 0, err
    assert set(names(folder).values()) == {"finished"}


def test_a_search_gives_up_what_is_hopeless_and_goes_on_where_it_was_left(camvid_root, tmp_path, run_script):
    folder = tmp_path / "sweep"
    arguments = command(
        camvid_root, folder, "sweep=search", "sweep.grace=1", "epochs=2", "optimizer.lr=1e-3,1e-9", "attention=none"
    )

    status, _, err = run_script("train", *arguments, "sweep.trials=3")
    assert status == 0, err
    first = read_plan(folder).jobs
    status, _, err = run_script("train", *arguments, "sweep.trials=6")
    assert status == 0, err

    plan = read_plan(folder).jobs
    assert [job for job in plan if job in first] == first
    assert {state.name for state in states(folder).values()} <= {"finished", "pruned"}
    assert (folder / "search.journal").exists()


def test_an_interval_is_no_grid(camvid_root, tmp_path, run_script):
    status, _, err = run_script("train", *command(camvid_root, tmp_path / "sweep", "optimizer.lr=interval(0.1,1)"))

    assert status == 1
    assert "search with sweep=search" in err
    assert "Traceback" not in err


def test_an_interrupted_sweep_says_how_it_goes_on(camvid_root, tmp_path):
    folder = tmp_path / "sweep"
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *command(camvid_root, folder, "attention=none,se", "epochs=200")],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    while not list(folder.glob("*/metrics.csv")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)

    assert process.returncode == 130
    assert err.rstrip().splitlines()[-2].startswith("interrupted; the same command goes on")
    assert names(folder)["none"] == "interrupted"
    assert "Traceback" not in err


def test_one_place_for_the_reports_of_all_jobs_is_refused(camvid_root, tmp_path, run_script):
    status, _, err = run_script("train", *command(camvid_root, tmp_path / "sweep", "report.dir=elsewhere"))

    assert status == 1
    assert "report.dir=elsewhere: the jobs of a sweep each keep their own" in err


def test_combinations_that_mean_the_same_are_one_job(camvid_root, tmp_path):
    folder = tmp_path / "sweep"
    done = run(camvid_root, folder, "attention=none", "epochs=1", "data.workers=0,1")
    assert done.returncode == 0, done.stderr
    (job,) = json.loads((folder / "sweep.json").read_text())["jobs"]
    assert [path.parents[1].name for path in folder.glob("*/report/report.json")] == [job["folder"]]
