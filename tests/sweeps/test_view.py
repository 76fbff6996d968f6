import io
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from ema_seg.sweeps import JobState, Plan, PlannedJob, record_failure, write_plan
from ema_seg.sweeps.__main__ import main
from ema_seg.sweeps.view import Overview, SweepView, describe, render

JOBS = [
    PlannedJob(str(index), f"job_{index}", {"attention": name, "seed": "0"}, 4) for index, name in enumerate("abcde")
]
STATES = [
    JobState("finished", epoch=4, seconds=40, miou=0.5),
    JobState("running", epoch=2, seconds=20, miou=0.625),
    JobState("failed", "the loss is nan", 1, epoch=0),
    JobState("missing"),
    JobState("interrupted", epoch=1, seconds=10, miou=0.25),
]


def shown(renderable):
    console = Console(file=io.StringIO(), width=100)
    console.print(renderable)
    return console.file.getvalue()


def test_the_line_says_what_is_done_failed_and_left_and_the_best():
    # 2 + 4 + 3 epochs of 10 seconds, one job at a time.
    assert describe(Overview(JOBS, STATES)) == (
        "1 of 5 jobs finished, 1 running, 1 failed, 2 left, about 0:01:30 to go, "
        "best so far: val mIoU 0.6250, attention=b seed=0"
    )


def test_jobs_at_a_time_divide_the_time_to_go():
    states = [STATES[1], STATES[1], *STATES[2:]]

    assert Overview(JOBS, states).remaining.total_seconds() == (2 + 2 + 4 + 3) * 10 / 2


def test_nothing_is_promised_before_anything_is_known():
    assert describe(Overview(JOBS, [JobState("missing")] * 5)) == "0 of 5 jobs finished, 0 running, 5 left"


def test_the_table_has_every_job_and_every_reason():
    text = shown(render(Overview(JOBS, STATES)))

    assert "attention=b seed=0  running" in text
    assert "2/4    0.6250" in text
    assert "failed: attention=c seed=0: the loss is nan" in text


def test_names_with_brackets_are_shown_as_they_are():
    job = PlannedJob("1", "job", {"placement.encoder_stages": "[3,4]"}, 4)

    assert "placement.encoder_stages=[3,4]" in shown(render(Overview([job], [JobState("missing")])))


def test_a_failure_tells_how_it_is_tried_again():
    assert "(The same command tries it once more.)" in shown(render(Overview(JOBS, STATES)))
    again = render(Overview(JOBS[:1], [JobState("failed", "no data", 2)]))
    assert "no data (Tried 2 times; with sweep.retry=true the same command tries it again.)" in " ".join(
        shown(again).split()
    )


def test_without_a_terminal_a_change_is_a_line():
    file = io.StringIO()
    with SweepView(lambda: Overview(JOBS[:1], [JobState("missing")]), Console(file=file, width=20)):
        pass

    assert file.getvalue() == "0 of 1 jobs finished, 0 running, 1 left\n"


@pytest.mark.slow
def test_of_a_long_sweep_a_terminal_shows_what_matters():
    jobs = [PlannedJob(str(index), f"job_{index}", {"seed": str(index)}, 4) for index in range(60)]
    done, failed = JobState("finished", epoch=4, seconds=4, miou=0.5), JobState("failed", "so it is " * 30, 1)
    states = [done] * 20 + [failed] * 19 + [JobState("running", epoch=1, seconds=1)] + [JobState("missing")] * 20
    file = io.StringIO()
    with SweepView(lambda: Overview(jobs, states), Console(file=file, width=80, height=24, force_terminal=True)):
        time.sleep(1.5)

    frame = re.sub(r"\x1b\[[0-9;?]*\w", "", file.getvalue()).replace("\r", "")
    assert "seed=39  running" in frame
    assert re.search(r"… and \d\d more", frame)
    assert "seed=19  finished" not in frame
    first = frame[: frame.index("to go")].splitlines()
    assert any(line.startswith("20 of 60 jobs finished, 1 running, 19 failed") for line in first)
    assert len(first) <= 24


def test_a_sweep_can_be_looked_at_from_elsewhere(tmp_path, capsys):
    write_plan(tmp_path, Plan("grid", [], None, JOBS[:2]))
    (tmp_path / "job_0").mkdir()
    record_failure(tmp_path / "job_0", "out of memory")

    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "failed: attention=a seed=0: out of memory" in out
    assert main([str(tmp_path / "job_0")]) == 1
    assert "give the folder of a sweep" in capsys.readouterr().err


@pytest.mark.slow
def test_watching_ends_with_the_last_job_and_sees_those_that_come_later(tmp_path, capsys):
    write_plan(tmp_path, Plan("grid", [], None, JOBS[:1]))

    def finish(job):
        (tmp_path / job.folder / "report").mkdir(parents=True)
        (tmp_path / job.folder / "report" / "report.json").write_text("{}")

    def go_on():
        time.sleep(0.2)
        write_plan(tmp_path, Plan("grid", [], None, JOBS[:2]))
        for job in JOBS[:2]:
            time.sleep(1.1)
            finish(job)

    sweep = threading.Thread(target=go_on)
    sweep.start()
    assert main([str(tmp_path), "--watch"]) == 0
    sweep.join()

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "0 of 1 jobs finished, 0 running, 1 left"
    assert lines[-1] == "2 of 2 jobs finished, 0 running, 0 left"


def test_watching_ends_with_a_key(tmp_path):
    write_plan(tmp_path, Plan("grid", [], None, JOBS[:1]))
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "ema_seg.sweeps", str(tmp_path), "--watch"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "0 of 1 jobs finished, 0 running, 1 left\n"
        os.kill(process.pid, signal.SIGINT)
        assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == 130
