"""Sweeps whose jobs' processes die, with a launcher that fails every time."""

import subprocess
import sys

import pytest

from ema_seg.runtime.errors import ConfigError
from ema_seg.sweeps import job_state
from hydra_plugins.ema_seg_sweepers.grid import GridSweeper

# A job: takes its lock, prints a line, waits, and then writes a report or dies.
JOB = (
    "import os, sys, time; from pathlib import Path; from ema_seg.sweeps.folder import run_lock\n"
    "folder = Path(sys.argv[1]); folder.mkdir(exist_ok=True)\n"
    "with run_lock(folder):\n"
    "    (folder / 'job.json').write_text(str(time.time_ns())); (folder / 'metrics.csv').touch()\n"
    "    print('runs', flush=True); time.sleep(float(sys.argv[2]))\n"
    "    if sys.argv[3] == 'dies': os._exit(9)\n"
    "    (folder / 'report').mkdir(); (folder / 'report' / 'report.json').write_text('{}')"
)


class DyingLauncher:
    """Launcher that starts the jobs and raises, as submitit does at the first death, while other jobs still run."""

    def __init__(self, folder, deaths):
        self.folder, self.deaths, self.processes = folder, deaths, []
        self.launched = []
        self.finished = []  # names of the finished jobs at each launch

    def launch(self, batch, initial_job_idx):
        names = [next(text for text in overrides if text.startswith("sweep.job=")) for overrides in batch]
        names = [name.removeprefix("sweep.job=").strip("'") for name in names]
        self.launched.append(names)
        self.finished.append({path.parents[1].name for path in self.folder.glob("*/report/report.json")})
        for name in names:
            fate = "dies" if self.deaths.get(name, 0) else "lives"
            self.deaths[name] = self.deaths.get(name, 0) - 1
            arguments = [str(self.folder / name), "0" if fate == "dies" else "1", fate]
            process = subprocess.Popen([sys.executable, "-c", JOB, *arguments], stdout=subprocess.PIPE, text=True)
            assert process.stdout.readline() == "runs\n"
            self.processes.append(process)
            if fate == "dies":
                process.wait()
        raise RuntimeError("a process was killed")


@pytest.fixture
def sweep(tmp_path):
    launchers = []

    def run(deaths):
        sweeper = GridSweeper()
        sweeper.folder = tmp_path
        sweeper.launcher = DyingLauncher(tmp_path, deaths)
        launchers.append(sweeper.launcher)
        sweeper.launch({"a": [], "b": []}, [])
        return sweeper.launcher

    yield run
    for launcher in launchers:
        for process in launcher.processes:
            process.communicate()


@pytest.mark.slow
def test_jobs_that_outlive_their_launcher_are_waited_for(sweep):
    launcher = sweep({"a": 1})

    assert launcher.launched == [["a", "b"], ["a"]]
    assert launcher.finished == [set(), {"b"}]


@pytest.mark.slow
def test_a_job_that_dies_twice_has_failed(sweep, tmp_path):
    launcher = sweep({"a": 2})

    assert launcher.launched == [["a", "b"], ["a"]]
    assert job_state(tmp_path / "b").name == "finished"
    state = job_state(tmp_path / "a")
    assert (state.name, state.reason) == ("failed", "its process ended (RuntimeError: a process was killed)")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sweep.grid=3", "sweep.grid: must be a mapping, as in 'sweep.grid={attention: [se, ema]}', got 3"),
        ("sweep.variants=3", "sweep.variants: must be a mapping of names to overrides"),
        ("+sweep.variants.a=3", "sweep.variants: must be a mapping of names to overrides"),
    ],
)
def test_settings_of_another_form_are_named(override, message, run_script, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    status, _, err = run_script("train", "-m", override)

    assert status == 1
    assert f"error: {message}" in err


def test_a_launcher_that_starts_nothing_is_a_mistake(tmp_path):
    class Broken:
        def launch(self, batch, initial_job_idx):
            raise OSError("no such partition")

    sweeper = GridSweeper()
    sweeper.folder, sweeper.launcher = tmp_path, Broken()
    with pytest.raises(ConfigError, match=r"hydra\.launcher: no job started because .*no such partition"):
        sweeper.launch({"a": []}, [])
