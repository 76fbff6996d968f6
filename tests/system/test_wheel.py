"""The wheel, installed without the source tree: a training, an evaluation and a sweep in an empty folder."""

import subprocess
import sys
import zipfile

import pytest

from tests.conftest import QUICK, ROOT

# All packages but the project's are those of this environment. One process runs all commands and imports them once.
PROGRAM = """
import sys

sys.path[:] = [{site!r}, *(folder for folder in sys.path if folder not in ("", {root!r}))]
from hydra.core.global_hydra import GlobalHydra

import ema_seg.__main__

assert ema_seg.__file__.startswith({site!r}), ema_seg.__file__
for arguments in {commands!r}:
    sys.argv = ["ema-seg", *arguments]
    GlobalHydra.instance().clear()
    assert ema_seg.__main__.main() == 0
files = [str(getattr(module, "__file__", "")) for module in sys.modules.values()]
assert not [file for file in files if file.startswith(({root!r} + "/ema_seg", {root!r} + "/hydra_plugins"))]
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", folder, ROOT]
    subprocess.run(command, check=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_configurations_the_kernels_and_the_sweepers(wheel):
    names = zipfile.ZipFile(wheel).namelist()

    configs = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")}
    assert {name.removeprefix("ema_seg/") for name in names if name.startswith("ema_seg/configs/")} == configs
    assert {
        "ema_seg/attention/ema/kernels/ema.cpp",
        "ema_seg/attention/ema/kernels/layout.h",
        "ema_seg/evaluation/kernels/counts.cpp",
        "ema_seg/inference/kernels/classes.cpp",
        "ema_seg/comparison/page_assets/page.html",
        "hydra_plugins/ema_seg_sweepers/grid.py",
    } <= set(names)
    assert not [name for name in names if name.startswith(("tests", "configs", "train.py"))]


def test_an_installed_wheel_trains_evaluates_and_sweeps_from_an_empty_folder(wheel, camvid_root, tmp_path):
    site, here = tmp_path / "site", tmp_path / "empty"
    here.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    settings = [*QUICK, "data=camvid", f"data.root={camvid_root}", "epochs=1"]
    commands = [
        ["train", *settings, "hydra.run.dir=run"],
        ["eval", "run=run", "report.dir=again"],
        ["train", "-m", *settings, "attention=none,se", "hydra.sweep.dir=sweep"],
        ["compare", "sweep"],
        ["check", "camvid", str(camvid_root)],
        ["sweeps", "sweep"],
    ]
    program = PROGRAM.format(site=str(site), root=str(ROOT), commands=commands)

    done = subprocess.run([sys.executable, "-c", program], cwd=here, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert (here / "again" / "report.json").is_file()
    assert (here / "sweep" / "comparison" / "comparison.html").is_file()
    assert sorted(path.name for path in here.iterdir()) == ["again", "run", "sweep"]
