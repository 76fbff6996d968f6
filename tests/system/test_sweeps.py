"""Sweeps through the entry point, as a user runs them."""

import dataclasses
import json
import os
import re
import shutil
import signal
import time

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

from ema_seg.comparison import compare_runs, read_folder
from ema_seg.sweeps import job_state, read_plan, write_plan
from ema_seg.sweeps.search import OptunaStudy
from tests.comparison.runs_on_disk import write_run
from tests.conftest import QUICK, ROOT, is_alive, made_once

TINY = (*QUICK, "data=camvid")


def command(camvid_root, folder, *overrides):
    return ["-m", *TINY, f"data.root={camvid_root}", f"hydra.sweep.dir={folder}", *overrides]


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
    """Compare the runs with seeds 0 and 1 again; return the comparison's rows by label."""
    runs = read_folder(folder)
    chosen = [run for run in runs.runs if run.seed in (0, 1)]
    comparison = compare_runs(dataclasses.replace(runs, runs=chosen), replicates=100)
    return {row["label"]: row for row in comparison["rows"]}


@pytest.fixture(scope="module")
def undisturbed(camvid_root, tmp_path_factory, entry):
    """Run a sweep without a fault; return its folder, standard output and standard error."""

    def make(folder):
        status, err = entry.run(*command(camvid_root, folder / "sweep", "attention=none,se", "seed=0,1", "epochs=3"))
        assert status == 0, err
        for name in ("out", "err"):
            shutil.copy(entry.folder / name, folder)

    folder = made_once(tmp_path_factory, "undisturbed", make)
    return folder / "sweep", (folder / "out").read_text(), (folder / "err").read_text()


def test_a_grid_leaves_a_plan_and_a_report_of_every_job(undisturbed):
    folder, out, err = undisturbed

    assert names(folder) == dict.fromkeys(("none 0", "se 0", "none 1", "se 1"), "finished")
    assert "4 of 4 jobs finished, 0 running, 0 left" in err
    assert out.rstrip().endswith(f"comparison: {folder}/comparison/comparison.html\nsweep: {folder}")
    assert {"comparison.html", "comparison.json", "comparison.md", "comparison.csv", "comparison.tex", "figures"} <= {
        path.name for path in (folder / "comparison").iterdir()
    }
    for label, report in reports(folder).items():
        assert " ".join(report["job"]["overrides"].values()) == label
        assert report["config"]["attention"]["name"] == report["job"]["overrides"]["attention"]


def test_the_same_command_again_does_nothing(undisturbed, camvid_root, run_script, tmp_path):
    folder = shutil.copytree(undisturbed[0], tmp_path / "sweep")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/report/report.json")}

    status, _, err = run_script("train", *command(camvid_root, folder, "attention=none,se", "seed=0,1", "epochs=3"))

    assert status == 0, err
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*/report/report.json")}


def test_more_seeds_add_to_a_sweep(undisturbed, camvid_root, run_script, tmp_path):
    folder = shutil.copytree(undisturbed[0], tmp_path / "sweep")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/report/report.json")}

    status, _, err = run_script("train", *command(camvid_root, folder, "attention=none", "seed=1,2", "epochs=3"))

    assert status == 0, err
    assert names(folder)["none 2"] == "finished"
    assert len(names(folder)) == 5
    assert before.items() <= {path: path.stat().st_mtime_ns for path in folder.glob("*/report/report.json")}.items()


def test_kills_at_any_moment_change_nothing_in_the_result(undisturbed, camvid_root, tmp_path, entry):
    """Job and launcher, which are one process here, are killed twice before the sweep finishes."""
    folder = tmp_path / "sweep"
    arguments = command(camvid_root, folder, "attention=none,se", "seed=0,1", "epochs=3")
    moments = torch.rand(2, generator=torch.Generator().manual_seed(0)).tolist()
    for moment in moments:
        process = entry.start(*arguments)
        # Wait for a job's first epoch, then for a random time, so that the machine's speed matters little.
        known = len(list(folder.glob("*/metrics.csv")))
        while len(list(folder.glob("*/metrics.csv"))) == known and is_alive(process):
            time.sleep(0.02)
        time.sleep(moment)
        os.kill(process, signal.SIGKILL)
        entry.wait()
    status, err = entry.run(*arguments)

    assert status == 0, err
    expected = reports(undisturbed[0])
    assert reports(folder).keys() == {"none 0", "se 0", "none 1", "se 1"}
    for label, report in reports(folder).items():
        for key in ("confusion_matrix", "miou", "images", "size_miou"):
            assert report[key] == expected[label][key], (label, key)
    rows, expected_rows = (comparison_rows(sweep) for sweep in (folder, undisturbed[0]))
    assert rows.keys() == expected_rows.keys()
    for label, row in rows.items():
        for key in ("score", "contrast", "classes", "strata"):
            assert row[key] == expected_rows[label][key], (label, key)
    for job in read_plan(folder).jobs:
        ours, theirs = (
            torch.load(sweep / job.folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
            for sweep in (folder, undisturbed[0])
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_failing_job_is_recorded_and_the_sweep_goes_on(camvid_root, tmp_path, run_script):
    folder = tmp_path / "it's a sweep"
    arguments = command(camvid_root, f'"{folder}"', "optimizer.lr=1e-3,1e30", "epochs=1")

    status, _, err = run_script("train", *arguments)

    assert status == 1, err
    assert names(folder) == {"0.001": "finished", "1e+30": "failed"}
    failed = states(folder)["1e+30"]
    assert (failed.attempts, failed.reason[:11]) == (1, "the loss is")
    assert "failed: optimizer.lr=1e+30: the loss is" in err.replace("\n", " ")

    assert run_script("train", *arguments)[0] == 1
    assert states(folder)["1e+30"].attempts == 2
    status, _, err = run_script("train", *arguments)
    assert status == 1
    assert states(folder)["1e+30"].attempts == 2
    assert "with sweep.retry=true the same command tries it again" in " ".join(err.split())
    assert run_script("train", *arguments, "sweep.retry=true")[0] == 1
    assert states(folder)["1e+30"].attempts == 3


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


def assert_ran_the_same_jobs(folder, undisturbed, launcher):
    expected = reports(undisturbed[0])
    for label, report in reports(folder).items():
        assert report["miou"] == pytest.approx(expected[f"{label} 0"]["miou"], abs=1e-3)
        assert report["job"]["overrides"] == {"attention": label}
        assert report["job"]["launcher"] == launcher
    comparison = json.loads((folder / "comparison" / "comparison.json").read_text())
    assert any(f"launcher {launcher}" in note for note in comparison["notes"])


# With a loader worker, which the processes of every launcher must be able to start.
LAUNCHED = ("attention=none,se", "epochs=3", "data.workers=1")


def test_ray_runs_the_same_jobs(undisturbed, camvid_root, tmp_path, entry):
    folder = tmp_path / "sweep"
    options = ("+hydra.launcher.ray.init.num_cpus=1", "+hydra.launcher.ray.init.include_dashboard=false")

    # One job, because each worker of Ray imports everything anew.
    status, err = entry.run(*command(camvid_root, folder, *LAUNCHED, "attention=se", "launcher=ray", *options))

    assert status == 0, err
    assert_ran_the_same_jobs(folder, undisturbed, "ray")


def test_slurm_queues_a_job_again_that_reaches_its_time_limit():
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        settings = compose("train", ["launcher=submitit"], return_hydra_config=True).hydra.launcher

    assert settings._target_.endswith("SlurmLauncher")
    assert (settings.timeout_min, settings.max_num_timeout) == (24 * 60, 100)


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_killed_process_of_a_launcher_does_not_end_the_sweep(launcher, undisturbed, camvid_root, tmp_path, entry):
    folder = tmp_path / "sweep"
    process = entry.start(*command(camvid_root, folder, *LAUNCHED, f"launcher={launcher}"))
    while not list(folder.glob("*/metrics.csv")) and is_alive(process):
        time.sleep(0.02)
    victim = json.loads(next(folder.glob("*/metrics.csv")).with_name("job.json").read_text())["process"]
    assert victim != process
    os.kill(victim, signal.SIGKILL)
    status, err = entry.wait()

    assert status == 0, err
    assert set(names(folder).values()) == {"finished"}
    assert_ran_the_same_jobs(folder, undisturbed, launcher)


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
    # Six trials choose among two values: trials with the same value are one job.
    assert set(names(folder)) <= {"0.001", "1e-09"}
    assert set(names(folder).values()) <= {"finished", "pruned"}
    trials = OptunaStudy(folder, seed=0, grace=1).study.trials
    assert [trial.state.is_finished() for trial in trials] == [True] * 6
    assert run_script("train", *arguments, "sweep.trials=6")[0] == 0
    assert OptunaStudy(folder, seed=0, grace=1).study.trials == trials


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("sweep.trials=0",), "sweep.trials: must be a whole number of at least 1, got 0"),
        (("sweep.parallel=0",), "sweep.parallel: must be a whole number"),
        (("seed=0,1",), "seed=0,1: a search must have one seed"),
        (("+sweep.space.optimizer.weight_decay=1",), "sweep.space.optimizer.weight_decay=1: must have several"),
        (("sweep.space=null",), "sweep.space: must have at least one key"),
        (("optimizer.lr=interval(1,0)",), r"optimizer.lr=interval\(1,0\): cannot be searched"),
    ],
)
def test_a_search_that_cannot_be_is_refused(camvid_root, tmp_path, run_script, overrides, message):
    status, _, err = run_script("train", *command(camvid_root, tmp_path / "sweep", "sweep=search", *overrides))

    assert status == 1
    assert re.search(f"error: {message}", err), err


def test_trials_that_mean_the_same_are_one_job(camvid_root, tmp_path, run_script):
    """Without a block the placement makes no difference, so all trials, two in parallel, are the same job."""
    folder = tmp_path / "sweep"
    arguments = command(
        *(camvid_root, folder, "sweep=search", "sweep.space=null", "attention=none", "epochs=1"),
        *("placement=encoder,decoder,head", "sweep.parallel=2", "sweep.grace=9"),
    )

    status, _, err = run_script("train", *arguments, "sweep.trials=4")
    assert status == 0, err
    status, _, err = run_script("train", *arguments, "sweep.trials=6")

    assert status == 0, err
    (job,) = read_plan(folder).jobs
    assert [path.parents[1].name for path in folder.glob("*/report/report.json")] == [job.folder]
    assert all(trial.state.is_finished() for trial in OptunaStudy(folder, seed=0, grace=9).study.trials)


def test_a_search_takes_whole_numbers(camvid_root, tmp_path, run_script):
    status, _, err = run_script(
        "train",
        *command(camvid_root, tmp_path / "sweep", "sweep=search", "sweep.trials=1", "sweep.space=null"),
        *("data.batch_size=int(interval(1,4))", "attention=none", "epochs=1"),
    )

    assert status == 0, err
    (job,) = read_plan(tmp_path / "sweep").jobs
    assert job.overrides["data.batch_size"] in {"1", "2", "3", "4"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("sweep.baseline=none",), "sweep.baseline: must be a non-empty mapping of settings, .*, got 'none'"),
        (
            ("+sweep.groups.thin=pole",),
            r"sweep.groups: must be a mapping of names to lists of classes, .*, got \{'thin': 'pole'\}",
        ),
        (("sweep.retry=maybe",), "sweep.retry: must be true or false, got 'maybe'"),
        (("+sweep.grid.attention=[]",), "sweep.grid.attention: must have at least one value"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(camvid_root, tmp_path, run_script, overrides, message):
    status, _, err = run_script("train", *command(camvid_root, tmp_path / "sweep", *overrides))

    assert status == 1
    assert re.search(f"error: {message}", err), err


def test_an_interval_is_no_grid(camvid_root, tmp_path, run_script):
    status, _, err = run_script("train", *command(camvid_root, tmp_path / "sweep", "optimizer.lr=interval(0.1,1)"))

    assert status == 1
    assert "search with sweep=search" in err
    assert "Traceback" not in err


def test_an_interrupted_sweep_says_how_it_goes_on(camvid_root, tmp_path, entry):
    folder = tmp_path / "sweep"
    process = entry.start(*command(camvid_root, folder, "attention=none,se", "epochs=200"))
    while not list(folder.glob("*/metrics.csv")) and is_alive(process):
        time.sleep(0.02)
    os.kill(process, signal.SIGINT)
    status, err = entry.wait()

    assert status == 130, err
    assert err.rstrip().splitlines()[-1].startswith("interrupted; run the same command again")
    assert names(folder)["none"] == "interrupted"
    assert "Traceback" not in err


def test_one_place_for_the_reports_of_all_jobs_is_refused(camvid_root, tmp_path, run_script):
    status, _, err = run_script("train", *command(camvid_root, tmp_path / "sweep", "report.dir=here,there"))

    assert status == 1
    assert "report.dir=here,there: each job of a sweep writes its report into its own" in err


def test_combinations_that_mean_the_same_are_one_job_and_one_row(camvid_root, tmp_path, run_script):
    """The variant without a block is the same job for every block, and the baseline of all of them."""
    folder = tmp_path / "sweep"
    arguments = command(camvid_root, folder, "sweep=placement", "attention=se,eca", "epochs=1")
    variants = "+sweep.variants={none: 'attention=none', head: 'placement=head'}"

    status, _, err = run_script("train", *arguments, "~sweep.variants", variants)

    assert status == 0, err
    shared, *others = read_plan(folder).jobs
    assert (shared.overrides, shared.folder) == (
        {"attention": "*", "variant": "none"},
        f"variant-none_{shared.identity}",
    )
    assert len(list(folder.glob("*/report/report.json"))) == len(others) + 1 == 3
    rows = {row["label"]: row for row in json.loads((folder / "comparison" / "comparison.json").read_text())["rows"]}
    assert [row["contrast"]["baseline"] for row in rows.values() if row["contrast"]] == ["none"] * 2


def test_a_job_of_a_sweep_is_resumed_only_as_itself(camvid_root, tmp_path, run_script):
    folder = tmp_path / "sweep"
    assert run_script("train", *command(camvid_root, folder, "attention=none", "epochs=1"))[0] == 0
    (job,) = read_plan(folder).jobs
    shutil.rmtree(folder / job.folder / "report")

    status, _, err = run_script("train", f"resume={folder / job.folder}", "epochs=2")
    assert status == 1
    assert "the overrides would make this job of a sweep a different one" in err

    status, _, err = run_script("train", *TINY, f"data.root={camvid_root}", f"hydra.run.dir={folder / job.folder}")
    assert status == 1
    assert "holds a run already" in err

    assert run_script("train", f"resume={folder / job.folder}", "data.workers=1")[0] == 0
    assert names(folder) == {"": "finished"}


def test_the_final_view_is_of_the_commands_own_jobs(camvid_root, tmp_path, run_script):
    folder = tmp_path / "sweep"
    assert run_script("train", *command(camvid_root, folder, "attention=none,emma", "epochs=1"))[0] == 1

    status, _, err = run_script("train", *command(camvid_root, folder, "attention=none,se", "epochs=1"))
    assert status == 0, err
    assert "2 of 2 jobs finished" in err
    assert names(folder) == {"none": "finished", "se": "finished"}

    status, _, err = run_script("train", *command(camvid_root, folder, "attention=se", "epochs=1"))
    assert "1 of 1 jobs finished" in err
    assert "The folder has 1 more job of earlier commands" in err


@pytest.fixture
def written_jobs(monkeypatch):
    """Write the runs of jobs instead of training them; return block and seed of each launch, and those that never end.

    ``se`` differs from ``none`` by as much at every seed, and ``eca`` by more at some seeds than at others.
    """
    launches, interrupted = [], []

    def write(self, jobs, shown):
        chosen = {name: dict(text.split("=", 1) for text in overrides) for name, overrides in jobs.items()}
        pairs = {name: (overrides["attention"], int(overrides["seed"])) for name, overrides in chosen.items()}
        launches.append(sorted(pairs.values()))
        for name, (attention, seed) in pairs.items():
            if (attention, seed) in interrupted:
                interrupted.remove((attention, seed))
                continue
            shares = {"none": 0.3, "se": 0.2, "eca": 0.25 + (0.1 if seed % 2 else -0.1)}
            write_run(self.folder / name, attention, seed, wrong=shares[attention])

    # Hydra imports its plugins anew, so that the class of the module by name would be another one.
    (sweeper,) = (found for found in Plugins.instance().discover(Sweeper) if found.__name__ == "GridSweeper")
    monkeypatch.setattr(sweeper, "launch", write)
    monkeypatch.setitem(sweeper.plan_job.__globals__, "check", lambda config: None)  # it builds every job's model
    return launches, interrupted


def sequential(camvid_root, folder, *overrides):
    return command(camvid_root, folder, "attention=none,eca", "seed=0,1,2", "epochs=1", *overrides)


def test_seeds_are_added_to_wide_rows_and_their_baseline_until_the_interval_is_narrow(
    camvid_root, tmp_path, run_script, written_jobs
):
    launches, _ = written_jobs
    folder = tmp_path / "sweep"

    status, _, err = run_script("train", *sequential(camvid_root, folder, "attention=none,se,eca", "sweep.until=20"))

    assert status == 0, err
    assert len(launches[0]) == 9
    # Only the row that varies goes on, with its baseline.
    for seed, launch in enumerate(launches[1:], 3):
        assert launch == [("eca", seed), ("none", seed)]
    assert len(launches) > 1
    comparison = json.loads((folder / "comparison/comparison.json").read_text())
    halves = {row["label"]: (row["contrast"]["high"] - row["contrast"]["low"]) / 2 for row in comparison["rows"][1:]}
    assert all(half <= 0.2 for half in halves.values()), halves
    assert {row["label"]: row["contrast"]["n"] for row in comparison["rows"][1:]} == {"se": 3, "eca": 2 + len(launches)}
    assert any("Seeds were added until" in note for note in comparison["notes"])
    # One seed fewer was too wide.
    last = 1 + len(launches)
    for path in folder.glob(f"*seed-{last}_*"):
        shutil.rmtree(path)
    earlier = {row["label"]: row["contrast"] for row in compare_runs(read_folder(folder))["rows"]}
    assert (earlier["eca"]["high"] - earlier["eca"]["low"]) / 2 > 0.2

    # The same command runs the missing jobs alone. Without sweep.until the folder keeps its sequential intervals.
    del launches[:]
    assert run_script("train", *sequential(camvid_root, folder, "attention=none,se,eca", "sweep.until=20"))[0] == 0
    assert [launch for launch in launches if launch] == [[("eca", last), ("none", last)]]
    assert write_plan(folder, dataclasses.replace(read_plan(folder), until=None)).until == 20


def test_an_interrupted_seed_is_finished_and_max_seeds_ends_the_sweep(camvid_root, tmp_path, run_script, written_jobs):
    launches, interrupted = written_jobs
    interrupted.append(("eca", 3))
    folder = tmp_path / "sweep"

    first, _, _ = run_script("train", *sequential(camvid_root, folder, "sweep.until=1", "sweep.max_seeds=4"))
    del launches[:]
    second, _, err = run_script("train", *sequential(camvid_root, folder, "sweep.until=1", "sweep.max_seeds=4"))

    assert (first, second) == (1, 0)
    assert [launch for launch in launches if launch] == [[("eca", 3)]]
    assert "sweep.until=1: some intervals are wider with 4 seeds; raise sweep.max_seeds to add more." in err


def test_too_few_seeds_to_begin_with_are_refused_before_anything_runs(camvid_root, tmp_path, run_script, written_jobs):
    for seeds, count in (("seed=0,1", 2), ("seed=4", 1)):
        status, _, err = run_script(
            "train", *command(camvid_root, tmp_path, "attention=none,se", seeds, "sweep.until=1")
        )
        assert status == 1
        assert f"sweep.until: needs 3 seeds to begin with, got {count}; give seed=0,1,2." in err
    overrides = command(camvid_root, tmp_path, "attention=se,eca", "seed=0,1,2", "sweep.until=1")
    status, _, err = run_script("train", *overrides)
    assert status == 1
    assert "sweep.until: needs a baseline, and no job has attention=none; add it, or name another" in err
    assert written_jobs[0] == []
