"""Files that somebody has shared: what they may have called."""

import pytest
import yaml
from omegaconf import OmegaConf

from configs.trust import require_harmless
from ema_seg.errors import ConfigError
from ema_seg.sweeps import read_plan
from tests.conftest import QUICK

CALLBACK = {"hydra": {"callbacks": {"mine": {"_target_": "os.system", "command": "touch mark"}}}}
HANDLER = {"hydra": {"job_logging": {"handlers": {"console": {"class": "logging.os.system", "command": "touch mark"}}}}}
# Every "class" of the settings of logging may be a factory of any kind instead.
FACTORY = {"hydra": {"job_logging": {"formatters": {"simple": {"()": "os.system", "command": "touch mark"}}}}}


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """Write an experiment file, and give the command line that takes it."""
    monkeypatch.chdir(tmp_path)

    def write(settings):
        (tmp_path / "shared" / "experiment").mkdir(parents=True)
        text = "# @package _global_\n" + yaml.safe_dump(settings)
        (tmp_path / "shared" / "experiment" / "theirs.yaml").write_text(text)
        return "--config-dir", tmp_path / "shared", "+experiment=theirs"

    return write


# Settings made out of text, by a name made out of parts, and by one that the first resolution lays bare.
_TEXT = '"{_target_: ema_seg.host_memory.os.system, command: touch mark}"}'
TEXT = {"part": "create", "hydra": {"callbacks": {"mine": "${oc.${part}:" + _TEXT}}}
ESCAPED = {"_target_": "hydra.experimental.callbacks.LogJobReturnCallback", "x": "\\${oc.create:" + _TEXT}


@pytest.mark.parametrize("script", ["train", "eval"])
@pytest.mark.parametrize("settings", [CALLBACK, HANDLER, FACTORY])
def test_an_experiment_file_cannot_have_the_shell_called(script, settings, experiment, run_script, tmp_path):
    status, _, err = run_script(script, *experiment(settings), f"hydra.run.dir={tmp_path / 'run'}")

    assert status == 1
    assert "os.system: a configuration may only have" in err
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("script", ["train", "eval"])
@pytest.mark.parametrize("settings", [TEXT, {"hydra": {"callbacks": {"mine": ESCAPED}}}])
def test_what_is_called_cannot_hide_in_text(script, settings, experiment, run_script, tmp_path):
    status, _, err = run_script(script, *experiment(settings), f"hydra.run.dir={tmp_path / 'run'}")

    assert status == 1
    assert "Unsupported interpolation type oc.create" in err
    assert not (tmp_path / "mark").exists()


def test_a_sweep_of_an_experiment_file_cannot_have_the_shell_called(experiment, run_script, tmp_path):
    status, _, err = run_script("train", "-m", *experiment(CALLBACK), f"hydra.sweep.dir={tmp_path / 'sweep'}")

    assert status == 1
    assert "hydra.callbacks.mine._target_=os.system: a configuration may only have" in err
    assert not (tmp_path / "mark").exists()


def test_a_job_that_an_experiment_file_names_cannot_have_the_shell_called(
    experiment, run_script, camvid_root, tmp_path
):
    handler = "hydra.job_logging.handlers.console"
    hostile = f"{handler}.class=logging.os.system +{handler}.command=true"
    command = experiment({"sweep": {"variants": {"theirs": hostile}}})

    run_script("train", "-m", *command, *QUICK, "data=camvid", f"data.root={camvid_root}", "hydra.sweep.dir=sweep")

    (job,) = read_plan(tmp_path / "sweep").jobs
    assert "logging.os.system: a configuration may only have" in job.impossible


def test_the_configuration_of_a_run_cannot_have_the_shell_called(experiment, run_script, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for settings in (CALLBACK, {"data": {"name": "camvid", "x": {"_target_": "os.system", "command": "touch mark"}}}):
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
        for script, key in {"train": "resume", "eval": "run"}.items():
            status, _, _ = run_script(script, f"{key}={run}")
            assert status == 1
    assert not (tmp_path / "mark").exists()


def test_a_pickled_job_of_hydra_is_not_loaded(run_script):
    status, _, err = run_script("train", "--experimental-rerun", "job.pickle")

    assert status == 1
    assert err.startswith("error: --experimental-rerun job.pickle: a pickle can run any code")


@pytest.mark.parametrize(
    "settings",
    [
        {"_target_": "ema_seg.host_memory.os.system"},
        {"_target_": "hydra_plugins.ema_seg_sweepers.base.os.system"},
        {"_target_": "hydra.experimental.callbacks.pickle.loads"},
        {"x": [{"y": {"_target_": ["os", "system"]}}]},
        {"name": "os.system", "_target_": "${name}"},
        {"class": "logging.handlers.logging.os.system"},
        {"class": "logging.handlers.QueueHandler", "listener": "os.system"},
    ],
)
def test_a_name_is_known_by_all_of_it(settings):
    with pytest.raises(ConfigError, match="may only have"):
        require_harmless(OmegaConf.create({"hydra": settings}))


def test_what_is_known_passes():
    require_harmless(
        OmegaConf.create(
            {
                "hydra": {
                    "launcher": {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"},
                    "sweeper": {"_target_": "hydra_plugins.ema_seg_sweepers.grid.GridSweeper"},
                    "callbacks": {"log": {"_target_": "hydra.experimental.callbacks.LogJobReturnCallback"}},
                    "job_logging": {"handlers": {"file": {"class": "logging.FileHandler", "filename": "${x}"}}},
                }
            }
        )
    )
