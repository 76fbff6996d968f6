import json
import os
import signal
import subprocess
import sys

import pytest

from ema_seg.runtime.errors import DataError, TrainingError
from ema_seg.sweeps import Plan, PlannedJob, job_state, read_plan, record_failure, write_plan

ONE = PlannedJob("1a", "one_1a", {"attention": "ema"}, 4)
TWO = PlannedJob("2b", "two_2b", {"attention": "se"}, 4, "does not fit")

METRICS = "epoch,val/miou,seconds\n0,0.25,2.0\n1,,3.0\n2,0.5,3.5\n"


def write_metrics(folder):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.csv").write_text(METRICS)


def test_a_plan_is_read_as_it_was_written(tmp_path):
    plan = Plan("attention", ["train.py", "-m"], {"attention": "none"}, [ONE, TWO])

    assert write_plan(tmp_path / "new", plan) == plan
    assert read_plan(tmp_path / "new") == plan


def test_a_plan_keeps_the_jobs_of_an_earlier_one_in_its_folder(tmp_path):
    write_plan(tmp_path, Plan("grid", [], None, [ONE]))
    write_plan(tmp_path, Plan("grid", [], None, [TWO]))

    assert read_plan(tmp_path).jobs == [TWO, ONE]


def test_a_job_keeps_the_folder_that_an_earlier_plan_gave_it(tmp_path):
    """Two commands that are started at the same time may choose different folders for a job."""
    write_plan(tmp_path, Plan("grid", [], None, [ONE]))
    again = PlannedJob(ONE.identity, "one_seed-0_1a", {"attention": "ema", "seed": "0"}, 4)

    plan = write_plan(tmp_path, Plan("grid", [], None, [again]))

    assert [(job.folder, job.overrides) for job in plan.jobs] == [(ONE.folder, again.overrides)]


def test_a_plan_forgets_what_could_not_be_tried(tmp_path):
    write_plan(tmp_path, Plan("grid", [], None, [TWO]))
    write_plan(tmp_path, Plan("grid", [], None, [ONE]))

    assert read_plan(tmp_path).jobs == [ONE]


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": "other"}', '{"schema": "ema-seg.sweep/1", "jobs": [1]}'])
def test_what_is_no_plan_is_named(tmp_path, content):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(DataError, match=r"sweep\.json: is not a sweep plan of this version"):
        read_plan(tmp_path)
    with pytest.raises(DataError, match="give the folder of a sweep"):
        read_plan(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["../../victim/x", "/victim", "..", ".", "", "a/b"])
def test_a_plan_names_folders_of_its_own(tmp_path, name):
    write_plan(tmp_path, Plan("grid", [], None, [ONE]))
    content = json.loads((tmp_path / "sweep.json").read_text())
    content["jobs"][0]["folder"] = name
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"sweep\.json: .*a job's folder must be a plain name, got"):
        read_plan(tmp_path)


def test_the_state_follows_from_the_files(tmp_path):
    folder = tmp_path / "job"
    assert job_state(folder).name == "missing"
    folder.mkdir()
    assert job_state(folder).name == "missing"
    assert job_state(folder, impossible="no").reason == "no"

    write_metrics(folder)
    state = job_state(folder)
    assert (state.name, state.epoch, state.seconds, state.miou) == ("interrupted", 3, 8.5, 0.5)

    record_failure(folder, TrainingError("the loss is nan"))
    assert (job_state(folder).name, job_state(folder).reason, job_state(folder).attempts) == (
        "failed",
        "the loss is nan",
        1,
    )
    record_failure(folder, "given up", state="pruned")
    assert (job_state(folder).name, job_state(folder).attempts) == ("pruned", 2)

    (folder / "report").mkdir()
    (folder / "report" / "report.json").write_text("{}")
    assert job_state(folder).name == "finished"


def test_a_failure_keeps_the_traceback_of_what_is_no_users_mistake(tmp_path):
    try:
        raise RuntimeError("shapes\ndo not fit")
    except RuntimeError as error:
        reason = record_failure(tmp_path, error)

    failure = json.loads((tmp_path / "failure.json").read_text())
    assert reason == failure["reason"] == "RuntimeError: shapes do not fit"
    assert "test_folder.py" in failure["traceback"]
    record_failure(tmp_path, TrainingError("a sentence"))
    assert json.loads((tmp_path / "failure.json").read_text())["traceback"] is None


def test_an_unreadable_failure_is_one(tmp_path):
    (tmp_path / "failure.json").write_text("{")
    assert job_state(tmp_path).name == "failed"
    assert "unreadable" in job_state(tmp_path).reason


def test_a_killed_job_no_longer_runs(tmp_path):
    write_metrics(tmp_path)
    program = (
        "import sys, time; from pathlib import Path; from ema_seg.sweeps.folder import run_lock\n"
        "with run_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        assert job_state(tmp_path).name == "running"
        assert job_state(tmp_path, locked_by_us=True).name == "interrupted"
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    assert job_state(tmp_path).name == "interrupted"


def test_who_looks_is_not_taken_for_a_job(tmp_path):
    write_metrics(tmp_path)
    (tmp_path / "run.lock").touch()
    program = (
        "import fcntl, sys, time\n"
        "with open(sys.argv[1]) as file:\n"
        "    fcntl.flock(file, fcntl.LOCK_SH); print('looks', flush=True); time.sleep(60)"
    )
    lock = str(tmp_path / "run.lock")
    with subprocess.Popen([sys.executable, "-c", program, lock], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "looks\n"
        assert job_state(tmp_path).name == "interrupted"
        other.kill()
