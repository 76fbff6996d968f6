import subprocess
import sys

import pytest

from ema_seg.runtime.errors import ConfigError, DataError, Preempted, TrainingError
from ema_seg.sweeps import Pruned, job_state, lock_run, read_job, run_job

JOB = {"identity": "1a", "overrides": {"attention": "ema"}}


def finish(folder):
    (folder / "report").mkdir()
    (folder / "report" / "report.json").write_text("{}")


def test_a_job_is_done_once(tmp_path):
    calls = []

    def work(resume):
        calls.append(resume)
        finish(tmp_path)

    assert run_job(tmp_path, JOB, work).name == "finished"
    assert run_job(tmp_path, JOB, work).name == "finished"
    assert calls == [False]
    assert read_job(tmp_path) == JOB


def test_a_job_with_a_checkpoint_goes_on_from_it(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    calls = []

    run_job(tmp_path, JOB, calls.append)

    assert calls == [True]


def test_a_failed_job_is_tried_once_more(tmp_path):
    calls = []

    def work(resume):
        calls.append(resume)
        raise TrainingError("the loss is nan")

    states = [run_job(tmp_path, JOB, work) for _ in range(3)]

    assert [(state.name, state.reason, state.attempts) for state in states] == [
        ("failed", "the loss is nan", 1),
        ("failed", "the loss is nan", 2),
        ("failed", "the loss is nan", 2),
    ]
    assert len(calls) == 2
    assert run_job(tmp_path, JOB, work, retry=True).attempts == 3


def test_a_job_that_is_held_is_not_run(tmp_path):
    with lock_run(tmp_path):
        assert job_state(tmp_path).name == "running"
        with pytest.raises(ConfigError, match="another process is training this run"), lock_run(tmp_path):
            pass
    assert job_state(tmp_path).name == "missing"


def test_a_job_that_succeeds_the_second_time_is_finished_without_a_trace(tmp_path):
    with_failure = iter([True, False])

    def work(resume):
        if next(with_failure):
            raise MemoryError
        finish(tmp_path)

    assert run_job(tmp_path, JOB, work).reason == "MemoryError: MemoryError"
    assert run_job(tmp_path, JOB, work).name == "finished"
    assert not (tmp_path / "failure.json").exists()


def test_a_pruned_job_is_not_tried_again(tmp_path):
    calls = []

    def work(resume):
        calls.append(resume)
        raise Pruned("below the median")

    assert [run_job(tmp_path, JOB, work).name for _ in range(2)] == ["pruned", "pruned"]
    assert len(calls) == 1


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit, Preempted])
def test_what_ends_the_process_is_no_failure_of_the_job(tmp_path, end):
    def work(resume):
        raise end

    with pytest.raises(end):
        run_job(tmp_path, JOB, work)
    assert job_state(tmp_path).name == "missing"


def test_a_job_that_another_process_runs_is_waited_for(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from ema_seg.sweeps.folder import run_lock\n"
        "folder = Path(sys.argv[1])\n"
        "with run_lock(folder):\n"
        "    print('held', flush=True); time.sleep(1)\n"
        "    (folder / 'report').mkdir(); (folder / 'report' / 'report.json').write_text('{}')"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        assert run_job(tmp_path, JOB, lambda resume: pytest.fail("the job was done twice")).name == "finished"


def test_a_run_that_is_no_job_has_no_job(tmp_path):
    assert read_job(tmp_path) is None
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(DataError, match=r"job\.json: is not a valid job of a sweep"):
        read_job(tmp_path)
