"""Configuration files from somebody else: they cannot run code, read the environment or read other files."""

import itertools
import re
from pathlib import Path

import hydra._internal.hydra as hydras_own
import pytest
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import OmegaConf

from ema_seg.cli.trust import require_printable
from ema_seg.config import require_plain
from ema_seg.runtime.errors import ConfigError
from ema_seg.sweeps import read_plan
from tests.conftest import QUICK

CALLBACK = {"hydra": {"callbacks": {"mine": {"_target_": "os.system", "command": "touch mark"}}}}
HANDLER = {"hydra": {"job_logging": {"handlers": {"console": {"class": "logging.os.system", "command": "touch mark"}}}}}
# The settings of logging accept a factory under the key "()" in place of a "class".
FACTORY = {"hydra": {"job_logging": {"formatters": {"simple": {"()": "os.system", "command": "touch mark"}}}}}


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """Return a function that writes an experiment file and options of a group "taken", and returns the arguments."""
    monkeypatch.chdir(tmp_path)

    def write(settings, **taken):
        files = {"experiment/theirs": settings, **{f"taken/{option}": content for option, content in taken.items()}}
        for name, content in files.items():
            file = tmp_path / "given" / f"{name}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("# @package _global_\n" + yaml.safe_dump(content))
        return "--config-dir", tmp_path / "given", "+experiment=theirs"

    return write


# Settings that logging resolves to an object, to an attribute of an object, and to a file.
OBJECT = {"hydra": {"job_logging": {"evil": {"write": "ext://os.system"}}}}
ATTRIBUTE = {"hydra": {"job_logging": {"handlers": {"console": {".": {"stream": "mark"}}}}}}
FILE = {"hydra": {"job_logging": {"handlers": {"file": {"filename": "mark", "mode": "w"}}}}}
REFERENCE = {"evil": {"write": "ext://os.system"}, "hydra": {"hydra_logging": "${evil}"}}
NAMED = {"hydra": {"job": {"name": "../../mark"}}}
VARIABLE = {"hydra": {"job": {"env_set": {"CXX": "touch mark"}}}}
COMMAND = {"defaults": [{"override /launcher": "submitit"}], "hydra": {"launcher": {"setup": ["touch mark"]}}}
FOLDER = {"hydra": {"run": {"dir": "mark"}}}
TEXT = {"hydra": {"callbacks": {"mine": "${oc.create:'{_target_: os.system, command: touch mark}'}"}}}


@pytest.mark.parametrize("script", ["train", "eval"])
@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (CALLBACK, "hydra.callbacks.mine,"),
        (HANDLER, "hydra.job_logging.handlers.console.class,"),
        (FACTORY, "hydra.job_logging.formatters.simple.(),"),
        (OBJECT, "hydra.job_logging.evil,"),
        (ATTRIBUTE, "hydra.job_logging.handlers.console..,"),
        (FILE, "hydra.job_logging.handlers.file,"),
        (REFERENCE, "hydra.hydra_logging,"),
        (NAMED, "hydra.job.name,"),
        (VARIABLE, "hydra.job.env_set.CXX,"),
        (FOLDER, "hydra.run.dir,"),
        (TEXT, "hydra.callbacks.mine,"),
    ],
)
def test_an_experiment_file_sets_nothing_of_hydra(script, settings, key, experiment, run_script, tmp_path):
    status, _, err = run_script(script, *experiment(settings))

    assert status == 1
    assert f"{tmp_path / 'given'}: a configuration file must not change {key} because Hydra's settings can run" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("header", "content"),
    [
        ("# @package hydra.callbacks", {"mine": CALLBACK["hydra"]["callbacks"]["mine"]}),
        ("# @package _global_", {"defaults": [{"/taken@hydra.callbacks.mine": "called"}]}),
        ("# @package _global_", {"defaults": [{"/taken@_global_.hydra.callbacks.mine": "called"}]}),
    ],
)
def test_a_package_is_no_way_around(header, content, experiment, run_script, tmp_path):
    command = experiment({}, called={})
    (tmp_path / "given" / "taken" / "called.yaml").write_text("{_target_: os.system, command: touch mark}")
    (tmp_path / "given" / "experiment" / "theirs.yaml").write_text(f"{header}\n{yaml.safe_dump(content)}")

    status, _, err = run_script("train", *command)

    assert status == 1
    assert "a configuration file must not change hydra.callbacks.mine" in err
    assert not (tmp_path / "mark").exists()


# Hydra's own blocklist has os.system, but not this.
CODE = {
    "_target_": "numpy.testing.runstring",
    "astr": "open('mark', 'w').close()",
    "dict": {"_target_": "builtins.dict"},
}
LOG = {"class": "logging.FileHandler", "filename": "mark"}
# Each puts a file of the project below hydra, and fills its interpolations or its nodes with what Hydra calls.
ROUTES = {
    "an interpolation of a trusted file": {
        "experiment/theirs": {
            "defaults": [{"/evaluation@_global_.hydra.callbacks.mine": "default"}, "_self_"],
            "trainer": {"precision": CODE},
        }
    },
    "a handler of a log": {
        "experiment/theirs": {
            "defaults": [{"/evaluation@_global_.hydra.job_logging.handlers": "default"}, "_self_"],
            "trainer": {"precision": "32-true"},
            "data": {"evaluation_batch_size": LOG},
        }
    },
    "a trusted file that another one changes in Hydra's cache": {
        "experiment/theirs": {"defaults": [{"override /hydra/output": "mine"}]},
        "hydra/output/mine": {
            "defaults": [{"/hydra/job_logging/stderr@_global_": None}, {"/taken/fill@_global_": None}]
        },
        "taken/fill": {"handlers": {"mine": LOG}},
    },
    "a node shared by two places": {
        "experiment/theirs": {
            "defaults": ["/sweep/grid@_global_", "/taken/fill", {"/sweep@_global_.hydra.callbacks.mine": "grid"}]
        },
        "taken/fill": {"variants": {"mine": CODE}},
    },
    "Hydra's own log file": {
        "experiment/theirs": {"defaults": ["/hydra/job_logging/default@_global_.hydra.job_logging", "_self_"]}
    },
    "an environment of values of the project": {
        "experiment/theirs": {"defaults": [{"/attention@_global_.hydra.job.env_set": "simam"}]}
    },
}


@pytest.mark.parametrize("route", ROUTES)
def test_no_route_leads_below_hydra(route, experiment, run_script, tmp_path):
    command = experiment({})
    for name, content in ROUTES[route].items():
        file = tmp_path / "given" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("# @package _global_\n" + yaml.safe_dump(content).replace(": null", ""))

    status, _, err = run_script("train", *command, "data=camvid", "data.root=none")

    assert (status, "given: a configuration file must not change hydra." in err) == (1, True), err
    assert not (tmp_path / "mark").exists()


def test_a_job_that_differs_from_its_plan_is_checked_where_it_runs(experiment, run_script, camvid_root, tmp_path):
    """``sweep.job`` is set in the job alone, so a value that depends on it is another one than in the plan."""
    value = '${oc.select:sweep.baseline.${sweep.job},${oc.create:"{class: logging.FileHandler, filename: mark}"}}'
    variants = {"theirs": ["+evaluation@hydra.job_logging.handlers=default"]}
    command = experiment(
        {
            "sweep": {"baseline": {"None": 2}, "variants": variants},
            "data": {"evaluation_batch_size": value},
        }
    )
    quick = [text for text in QUICK if not text.startswith("data.evaluation_batch_size")]

    run_script("train", "-m", *command, *quick, "data=camvid", f"data.root={camvid_root}", "hydra.sweep.dir=sweep")

    (job,) = read_plan(tmp_path / "sweep").jobs
    assert "a configuration file must not change hydra.job_logging.handlers" in job.impossible
    assert not list(tmp_path.rglob("mark"))


def test_a_primary_config_without_the_projects_is_refused(experiment, run_script, tmp_path):
    experiment({})
    (tmp_path / "given" / "bare.yaml").write_text("epochs: 1")

    status, _, err = run_script("train", "--config-dir", tmp_path / "given", "--config-name", "bare")

    assert (status, "given: a configuration file must not change hydra." in err) == (1, True), err
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("script", ["train", "eval"])
def test_a_primary_config_on_top_of_the_projects_is_taken(script, experiment, run_script, tmp_path):
    experiment({})
    (tmp_path / "given" / "mine.yaml").write_text(
        yaml.safe_dump({"defaults": [script, "_self_"], "data": {"max_skipped": 3}})
    )

    status, out, err = run_script(script, "--config-dir", "given", "--config-name", "mine", "--cfg", "job")

    assert (status, "max_skipped: 3" in out) == (0, True), err


@pytest.mark.parametrize("source", ["run", "ckpt"])
def test_a_defaults_list_in_a_saved_configuration_is_not_followed(source, run_script, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = {
        "data": {
            "name": "camvid",
            "root": "none",
            "defaults": ["_self_", {"/evaluation@_global_.hydra.callbacks.mine": "of_run"}],
        },
        "evaluation": CODE,
        "model": {"decoder": "unet"},
        "attention": {"name": "ema"},
        "report": {"dir": None},
    }
    if source == "run":
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        status, _, err = run_script("eval", f"run={tmp_path}")
    else:
        monkeypatch.setattr("ema_seg.models.load_checkpoint", lambda path: {"config": config})
        (tmp_path / "theirs.ckpt").touch()
        status, _, err = run_script("eval", "ckpt=theirs.ckpt")

    assert (status, "evaluation._target_: there is no such setting" in err) == (1, True), err
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "choice", [{"/launcher": "joblib"}, {"/hydra/launcher": "joblib"}, {"/hydra/sweeper": "search"}]
)
def test_a_file_chooses_among_the_launchers_and_sweepers_of_the_project(choice, experiment, run_script):
    command = experiment({"defaults": [{f"override {group}": option} for group, option in choice.items()]})

    status, out, err = run_script("train", *command, "hydra.verbose=true", "--cfg", "hydra")

    assert status == 0, err
    assert (
        f"_target_: hydra_plugins.{'ema_seg_sweepers.search' if 'search' in choice.values() else 'hydra_joblib'}" in out
    )


def test_a_users_file_in_a_group_of_hydra_is_no_way_around(run_script, tmp_path):
    file = tmp_path / "given" / "hydra" / "job_logging" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(yaml.safe_dump(HANDLER["hydra"]["job_logging"]))

    status, _, err = run_script("train", "--config-dir", tmp_path / "given", "hydra/job_logging=mine")

    assert status == 1
    assert "given: a configuration file must not change hydra.job_logging.handlers" in err


SEARCHED = {"defaults": ["train", "_self_"], "hydra": {"searchpath": ["pkg://theirs.code"]}}
POINTED_AT = {"defaults": ["train", "_self_"], "hydra": "${x}", "x": {"searchpath": ["pkg://theirs.code"]}}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Make a package ``theirs.code`` importable that creates the file ``mark`` when it is imported."""
    code = tmp_path / "packages" / "theirs" / "code" / "__init__.py"
    code.parent.mkdir(parents=True)
    code.write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("COMP_LINE", "train.py model=")


def test_a_file_cannot_have_a_package_imported(experiment, package, run_script, tmp_path):
    # A file may name a package in a search path, which Hydra follows before anything else, or in a defaults list.
    experiment({"epochs": 1})
    for content in (SEARCHED, POINTED_AT):
        (tmp_path / "given" / "theirs.yaml").write_text(yaml.safe_dump(content))
        for options in (["--cfg", "job"], ["--help"], ["-m"], ["--info", "searchpath"]):
            status, _, err = run_script("train", "--config-dir", "given", "--config-name", "theirs", *options)
            refused = "given: a configuration file must not change hydra" if content == SEARCHED else "of HydraConf"
            assert (status, refused in err, err.count("\n")) == (1, True, 1), err
        run_script("train", "--config-dir", "given", "--config-name", "theirs", "--shell-completion", "query=bash")
    for entry in ("pkg://theirs.code/x", "/pkg://theirs.code/x", {"/taken": "pkg://theirs.code/x"}, "structured://x"):
        status, _, err = run_script("train", *experiment({"defaults": [entry, "_self_"]}), "--cfg", "job")
        assert status == 1
        assert err.count("\n") == 1, err
    status, _, err = run_script("train", *experiment(SEARCHED["hydra"] | {"hydra": SEARCHED["hydra"]}), "--cfg", "job")
    assert "Overriding hydra.searchpath is only supported from the primary config" in err
    assert not (tmp_path / "mark").exists()


def test_a_typed_search_path_is_followed(experiment, package, run_script, tmp_path):
    experiment({"epochs": 7})
    status, out, _ = run_script("train", "hydra.searchpath=[file://given]", "+experiment=theirs", "--cfg", "job")
    assert (status, "epochs: 7" in out) == (0, True)
    experiment(CALLBACK)
    status, _, err = run_script("train", "hydra.searchpath=[file://given]", "+experiment=theirs", "--cfg", "job")
    assert (status, "must not change hydra.callbacks.mine" in err) == (1, True)
    run_script("train", "hydra.searchpath=[pkg://theirs.code]", "--cfg", "job")
    assert (tmp_path / "mark").exists()


def test_a_file_cannot_name_files_beyond_its_folder(experiment, run_script, tmp_path):
    (tmp_path / "private.yaml").write_text("password: mine")
    private = str(tmp_path / "private")
    for entry in (
        "../../private",
        "/../private",
        f"/{private}",
        {"/taken": "../../private"},
        {"/../given/..": "private"},
    ):
        status, out, err = run_script("train", *experiment({"defaults": [entry, "_self_"]}), "--cfg", "job")
        assert (status, "must be below a folder of the config search path" in err) == (1, True), err
        assert "password" not in out


SHOW = ("--cfg", "job", "--resolve")


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"data": {"root": "${oc.env:SECRET}"}}, SHOW),
        ({"x": "oc.env", "data": {"root": "${${x}:SECRET}"}}, SHOW),
        ({"data": {"root": "${oc.select:nothing,${oc.env:SECRET,none}}"}}, ["data=camvid"]),
        ({"defaults": [{"/taken": "${oc.env:SECRET}"}, "_self_"]}, ["--cfg", "job"]),
    ],
)
def test_an_experiment_file_cannot_read_the_environment(
    settings, options, experiment, run_script, monkeypatch, tmp_path
):
    monkeypatch.setenv("SECRET", "hunter2")

    status, out, err = run_script("train", *experiment(settings), *options)

    assert status == 1
    assert "configuration files must not read the environment" in err
    assert "hunter2" not in out + err
    assert not list(tmp_path.rglob("*hunter2*"))


def test_a_typed_variable_is_read(experiment, run_script, monkeypatch):
    monkeypatch.setenv("MINE", "elsewhere")
    command = experiment({"data": {"root": "${hydra:job.env_set.MINE}"}})
    for typed in ("data.root='${oc.env:MINE}'", "data.root=${oc.env:NONE,elsewhere}"):
        assert "root: elsewhere" in run_script("train", typed, "--cfg", "job", "--resolve")[1], typed
    out = run_script("train", *command, "hydra.job.env_copy=[MINE]", "--cfg", "job", "--resolve")[1]
    assert "root: elsewhere" in out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "a: &a [x, x, x, x]\n"
            + "".join(f"{n}: &{n} [{', '.join(['*' + chr(ord(n) - 1)] * 9)}]\n" for n in "bcdefgh"),
            "is not valid YAML (line 5: more than 20,000 values with aliases expanded); correct the configuration.",
        ),
        ("x: " + "[" * 3000, "is not valid YAML (line 1 is nested more than 100 levels deep)"),
        ("x: " + "9" * 5000, "is not valid YAML (line 1: a number of 5,000 characters exceeds the limit of 100)"),
        ("x: '" + "${" * 3000 + "'", "x must have at most 50 opening brackets in an interpolation; simplify it."),
        ("x: 1\nx: 2", "is not valid YAML (line 2 has the key 'x' for the second time)"),
        ("text", "a configuration must have keys with values, got 'text'; correct it."),
        ("[1]", "a configuration must have keys with values, got [1]; correct it."),
    ],
)
def test_a_file_that_is_no_configuration_is_a_sentence(content, message, experiment, run_script, tmp_path):
    command = experiment({})
    (tmp_path / "given" / "experiment" / "theirs.yaml").write_text(content)

    status, _, err = run_script("train", *command, "--cfg", "job")

    assert status == 1
    assert f"given/experiment/theirs.yaml: {message}" in err
    assert err.count("\n") == 1


def test_help_is_no_way_around(experiment, run_script):
    command = experiment({"hydra": {"hydra_logging": {"x": "ext://os.system"}}})
    for option in ("--help", "--hydra-help"):
        status, _, err = run_script("train", option, *command)
        assert (status, "must not change hydra.hydra_logging.x" in err) == (1, True), err


def test_what_is_typed_is_the_users_own(run_script):
    for typed in (
        "+hydra.job.env_set={CC: gcc}",
        "hydra.job.name=mine",
        "+hydra.callbacks.log={_target_: hydra.experimental.callbacks.LogJobReturnCallback}",
    ):
        status, _, err = run_script("train", "--cfg", "job", typed)
        assert status == 0, err


def test_an_experiment_file_sets_no_command_of_a_job(experiment, run_script):
    status, _, err = run_script("train", *experiment(COMMAND))

    assert (status, "a configuration file must not change hydra.launcher.setup.0, because" in err) == (1, True), err


def test_a_sweep_of_an_experiment_file_cannot_have_the_shell_called(experiment, run_script, tmp_path):
    status, _, err = run_script("train", "-m", *experiment(CALLBACK), f"hydra.sweep.dir={tmp_path / 'sweep'}")

    assert status == 1
    assert "a configuration file must not change hydra.callbacks.mine" in err
    assert not (tmp_path / "mark").exists()


def test_a_job_that_an_experiment_file_names_cannot_have_code_run(
    experiment, package, run_script, camvid_root, tmp_path
):
    handler = "hydra.job_logging.handlers.console"
    hostile = f"{handler}.class=logging.os.system +{handler}.command=true"
    searched = "hydra.searchpath=[pkg://theirs.code]"
    command = experiment({"sweep": {"variants": {"called": hostile, "imported": searched}}})

    run_script("train", "-m", *command, *QUICK, "data=camvid", f"data.root={camvid_root}", "hydra.sweep.dir=sweep")

    called, imported = read_plan(tmp_path / "sweep").jobs
    assert f"a configuration file must not change {handler}.class" in called.impossible
    assert "a job of a sweep must not set hydra.searchpath" in imported.impossible
    assert not (tmp_path / "mark").exists()


def test_a_job_that_an_experiment_file_names_sets_no_variable(experiment, run_script, camvid_root, tmp_path):
    command = experiment({"sweep": {"variants": {"theirs": "+hydra.job.env_set.CXX=mark"}}})

    run_script("train", "-m", *command, *QUICK, "data=camvid", f"data.root={camvid_root}", "hydra.sweep.dir=sweep")

    (job,) = read_plan(tmp_path / "sweep").jobs
    assert "a configuration file must not change hydra.job.env_set.CXX" in job.impossible


def test_a_folder_of_a_sweep_is_no_command_of_its_script(experiment, run_script, camvid_root):
    command = experiment({"sweep": {"name": "sweep\ntouch mark"}})
    options = ("launcher=submitit", *QUICK, "data=camvid", f"data.root={camvid_root}")

    status, _, err = run_script("train", "-m", *command, *options)

    assert status == 1
    assert "hydra.launcher.submitit_folder: " in err
    assert "must be one line of printable text, got" in err


def test_no_sweeper_composes_jobs_unseen(experiment, run_script):
    for command in (("eval", "-m"), ("train", "-m", "hydra/sweeper=basic"), ("eval", "hydra.mode=MULTIRUN")):
        status, _, err = run_script(*command)
        assert (status, "works only with train.py and the sweepers of this project" in err) == (1, True), err


def test_no_machines_are_rented(experiment, run_script):
    status, _, err = run_script("train", "-m", *experiment({"defaults": [{"override /hydra/launcher": "ray_aws"}]}))
    assert (status, "a launcher that rents machines is not supported" in err) == (1, True), err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "data.root=none: no such file or folder"),  # of the configuration that was checked
        (("resume=auto",), "given: a configuration file must not change hydra.job_logging"),  # composed once more
    ],
)
def test_what_hydra_acts_on_is_what_was_looked_at(options, message, experiment, run_script, camvid_root, tmp_path):
    """The choice of a defaults list changes after it has been resolved once."""
    read = itertools.count()
    OmegaConf.register_new_resolver("clock", lambda: "late" if next(read) else "soon", replace=True)
    command = experiment({"defaults": [{"/taken": "${clock:}"}, "_self_"]}, soon={}, late=HANDLER)
    root = camvid_root if options else "none"

    status, _, err = run_script(
        *("train", *command, *QUICK, "data=camvid", f"data.root={root}", f"hydra.run.dir={tmp_path / 'run'}", *options)
    )

    assert status == 1
    assert message in err
    assert not (tmp_path / "mark").exists()
    assert hydras_own.ConfigLoaderImpl is ConfigLoaderImpl  # restored for later compositions in this process


@pytest.mark.slow
def test_what_a_process_of_a_launcher_acts_on_is_looked_at_there(experiment, run_script, camvid_root, tmp_path):
    choice = "${oc.env:SUBMITIT_EXECUTOR,here}"
    command = experiment({"defaults": [{"/taken": choice}, "_self_"]}, here={}, local=HANDLER)

    status, _, err = run_script(
        *("train", "-m", *command, "launcher=submitit_local", *QUICK, f"+hydra.job.env_set.E='{choice}'"),
        *("data=camvid", f"data.root={camvid_root}", "hydra.sweep.dir=sweep"),
    )

    assert status == 1
    error = f"ema_seg.runtime.errors.ConfigError: {tmp_path}/given: a configuration file must not change"
    assert f"(FailedJobError: {error}" in err
    assert not list(tmp_path.rglob("mark"))


def test_the_configurations_of_the_project_stay(run_script):
    status, _, err = run_script("train", "--config-path", "elsewhere")

    assert status == 1
    assert "--config-path elsewhere: the project's own configurations cannot be replaced" in err
    assert "--config-dir" in err


def test_the_configuration_of_a_run_cannot_have_the_shell_called(experiment, run_script, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for settings in (CALLBACK, {"data": {"name": "camvid", "x": {"_target_": "os.system", "command": "touch mark"}}}):
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
        for script, key in {"train": "resume", "eval": "run"}.items():
            status, _, _ = run_script(script, f"{key}={run}")
            assert status == 1
    assert not (tmp_path / "mark").exists()


def test_a_saved_configuration_has_values_alone(run_script, monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", "hunter2")
    whole = yaml.safe_load("a: {b: [{c: '${oc.env:SECRET}'}]}")
    folded = loop = ["x"]
    for _ in range(9):
        folded = [folded] * 9
    loop.append(loop)
    for content, message in (
        (whole, "a.b.0.c: a saved configuration must hold plain values, got the interpolation '${oc.env:SECRET}'"),
        ({"a": "\\${oc.env:SECRET}"}, "a: a saved configuration must hold plain values"),
        ({"a": folded}, "a saved configuration has at most 20,000 values in 100 levels"),
        ({"a": loop}, "a saved configuration has at most 20,000 values in 100 levels"),
        ({"a": {1, 2}}, "a: a value must be text or a number, got set"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            require_plain(content)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(whole))
    for script, key in {"train": "resume", "eval": "run"}.items():
        status, out, err = run_script(script, f"{key}={tmp_path}", "--cfg", "job", "--resolve")
        assert (status, "the interpolation '${oc.env:SECRET}'" in err, "hunter2" in out) == (1, True, False)


def test_a_pickled_job_of_hydra_is_not_loaded(run_script):
    status, _, err = run_script("train", "--experimental-rerun", "job.pickle")

    assert status == 1
    assert err.startswith("error: --experimental-rerun job.pickle: a pickle can run any code")


def test_a_launcher_has_single_lines_but_in_its_commands():
    require_printable(OmegaConf.create({"partition": "gpu", "timeout_min": 60, "setup": ["cd\nls"]}))
    for value in ("gpu\ntouch mark", Path("gpu\ntouch mark")):
        with pytest.raises(ConfigError, match=r"^hydra\.launcher\.partition: must be one line of printable text"):
            require_printable(OmegaConf.create({"partition": value}))


def test_the_projects_own_launchers_are_harmless(run_script):
    for launcher in ("serial", "joblib", "submitit", "submitit_local", "ray"):
        status, _, err = run_script("train", f"launcher={launcher}", "--cfg", "hydra")
        assert status == 0, err
