"""A hundred and twenty random overrides at both entry points: each ends in success or in an error of one sentence."""

import inspect
import random

import albumentations as A
import hydra
import pytest
import segmentation_models_pytorch as smp
import timm
import yaml
from lightning import Trainer
from omegaconf import OmegaConf
from torch.optim import SGD, AdamW

from ema_seg.cli.trust import settings_of
from ema_seg.data.datamodule import SegmentationDataModule
from ema_seg.data.folder import FolderDataset
from ema_seg.models import build_segmenter
from ema_seg.runtime.errors import EmaSegError
from tests.conftest import QUICK, ROOT, made_once
from tests.system.overrides import draw

# Parts of 40 overrides each, which the test processes share.
TRAINING_PARTS, EVALUATION_PARTS = range(2), range(1)


class Reached(EmaSegError):
    """Error in place of a training or of the measurement of a model."""

    exit_status = 0


@pytest.fixture(scope="module")
def known():
    """Return all keys, the project's own more often than Hydra's, and the options of the groups."""
    OmegaConf.register_new_resolver("started", lambda pattern: "", replace=True)
    OmegaConf.register_new_resolver("parallel_jobs", lambda devices: 1, replace=True)
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = hydra.compose("train", list(QUICK), return_hydra_config=True)
    keys = [path for path, _ in settings_of(config)]
    own = [key for key in keys if not key.startswith("hydra")]
    groups = {folder.name: [path.stem for path in folder.glob("*.yaml")] for folder in (ROOT / "configs").iterdir()}
    groups = {name: options for name, options in groups.items() if options}
    groups["data"].remove("street")  # it would generate its images each time
    return own * 5 + [key for key in keys if key.startswith("hydra")], groups


@pytest.fixture(scope="module")
def options():
    """Return options from the libraries' signatures, most of them not listed in the configuration."""
    taken = {
        "trainer": [Trainer],
        "model": [*smp.MODEL_ARCHITECTURES_MAPPING.values(), timm.create_model],
        "optimizer": [AdamW, SGD],
        "data": [SegmentationDataModule, FolderDataset],
        "data.augmentation.crop": [A.RandomCrop, A.RandomResizedCrop],
    }
    names = {f"{section}.{name}" for section, parts in taken.items() for part in parts for name in parameters(part)}
    transforms = [name for name, part in vars(A).items() if inspect.isclass(part) and issubclass(part, A.DualTransform)]
    return sorted(names | {f"data.augmentation.{name}.transform" for name in transforms[:5]})


def parameters(part):
    return inspect.signature(part).parameters


models = {}


def build(*arguments, **keywords):
    """Return ``build_segmenter``'s result from a cache: nearly every command builds the same model."""
    key = repr((arguments, keywords))
    if key not in models:
        models[key] = build_segmenter(*arguments, **keywords)
    return models[key]


@pytest.fixture
def reach(run_script, monkeypatch, tmp_path):
    """Return ``run_script``, patched to stop where the training or measurement would begin."""

    def stop(*arguments, **keywords):
        raise Reached("reached.")

    monkeypatch.setattr(Trainer, "fit", stop)
    monkeypatch.setattr("ema_seg.evaluate.measure_cost", stop)
    monkeypatch.setattr("ema_seg.cli.launch.run_together", stop)
    monkeypatch.setattr("ema_seg.models.build.build_segmenter", build)
    monkeypatch.setattr("yaml.SafeLoader", yaml.CSafeLoader)
    monkeypatch.chdir(tmp_path)
    return run_script


def complaints(status, err):
    lines = err.splitlines()
    said = [line for line in lines if line.startswith("error: ")]
    if status in (0, 1) and len(said) == 1 and lines[-1] == said[0] and "Traceback" not in err:
        return []
    if status == 2 and lines[0].startswith("usage: "):  # an option, not an override
        return []
    return [f"status {status}: {err[-2000:]}"]


def throw(reach, script, common, known, seed):
    """Run 40 commands with one random override each, check how they end, and return their exit statuses."""
    generator, found, statuses = random.Random(seed), [], set()
    for number in range(40):
        override = draw(generator, *known)
        status, _, err = reach(script, *(text.format(number=number) for text in common), override)
        found += [f"{override!r}: {complaint}" for complaint in complaints(status, err)]
        statuses.add(status)
    assert not found, "\n".join(found)
    return statuses


@pytest.mark.parametrize("part", TRAINING_PARTS)
def test_a_training_begins_or_says_in_one_sentence_why_not(part, known, options, reach, camvid_root):
    common = [*QUICK, "data=camvid", f"data.root={camvid_root}", "hydra.run.dir=run_{number}"]

    assert throw(reach, "train", common, (*known, options), part) >= {0, 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory, camvid_root, entry):
    def make(folder):
        command = [*QUICK, "data=camvid", f"data.root={camvid_root}", "epochs=1", f"hydra.run.dir={folder / 'run'}"]
        status, err = entry.run(*command)
        assert status == 0, err

    return made_once(tmp_path_factory, "overrides", make) / "run"


@pytest.mark.parametrize("part", EVALUATION_PARTS)
def test_an_evaluation_begins_or_says_in_one_sentence_why_not(part, known, options, reach, run):
    keys = [key for key in known[0] if key.startswith(("data", "evaluation", "report", "hydra"))] + ["devices"] * 20
    groups = {name: known[1][name] for name in ("data", "evaluation")}
    own = (keys, groups, [name for name in options if name.startswith("data.")])

    assert throw(reach, "eval", [f"run={run}", "report.dir=report_{number}"], own, part) >= {0, 1}
