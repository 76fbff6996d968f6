"""Commands, links and code blocks of the documentation, checked against the program."""

import re
import shlex
import sys
from types import ModuleType

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from ema_seg.attention import _BLOCKS
from ema_seg.cli.command_line import expand_home
from ema_seg.data import DATASETS, check
from tests.attention import test_attention as blocks
from tests.attention import test_equations as equations
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(
    r"^\s*(?:python (train|eval)\.py|ema-seg (train|eval|analyse|demo|export|predict|push)) ?([^#\n]*)", re.MULTILINE
)
SCRIPTS = ("train", "eval", "analyse", "demo", "export", "predict", "push")
HELP = [ROOT / "configs" / "hydra" / "help" / f"{script}.yaml" for script in SCRIPTS]


def commands():
    for page in (*PAGES, *HELP):
        for *scripts, arguments in COMMAND.findall(page.read_text()):
            script = "".join(scripts)
            if "--config-dir" in arguments:  # needs files that the user writes; tested below
                continue
            yield pytest.param(script, shlex.split(arguments), id=f"{page.name}: {script} {arguments.strip()}")


@pytest.mark.parametrize(("script", "arguments"), commands())
def test_every_command_is_one_that_the_program_takes(script, arguments):
    arguments = expand_home(arguments)
    overrides = [text for text in arguments if "=" in text]
    others = set(arguments) - set(overrides)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        if script in ("eval", "analyse", "export"):
            trained = compose("train", ["data=camvid"])
            for group in ("data", "evaluation"):
                ConfigStore.instance().store("of_run", trained[group], group=group)
        compose(script, [_first(text) for text in overrides] if "-m" in others else overrides)

    assert others <= {"--help", "--hydra-help", "--cfg", "job", "[overrides]", "-m"}


def _first(text):
    """Return the override with the first value of its sweep."""
    (override,) = OverridesParser.create().parse_overrides([text])
    if override.is_interval_sweep():
        return f"{override.get_key_element()}={override.value().start}"
    return (
        f"{override.get_key_element()}={next(override.sweep_string_iterator())}"
        if override.is_sweep_override()
        else text
    )


CHECK = re.compile(r"^python -m ema_seg\.data\.check (.*)$", re.MULTILINE)


@pytest.mark.parametrize("arguments", [text for page in PAGES for text in CHECK.findall(page.read_text())])
def test_every_check_is_one_that_the_program_takes(arguments, capsys):
    name, _, *others = shlex.split(arguments)

    status = check.main([name, str(ROOT / "missing"), *others])

    assert status == 1
    assert str(ROOT / "missing") in capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_inside_the_project_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_make_has_the_targets_that_the_readme_names():
    makefile = (ROOT / "Makefile").read_text()

    for target in re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_tests_that_the_documentation_names_are_there():
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = {name for path in PAGES for name in re.findall(r"`(test_\w+)`", path.read_text())}

    assert named
    assert not [name for name in named if f"def {name}(" not in tests]


def written_files():
    """Return the files that the reader of docs/extending.md writes, content by path."""
    files = {}
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    for told, indent, code in re.findall(r"^([^\n]+)\n\n( *)```\w+\n(.*?)\n *```$", page, re.MULTILINE | re.DOTALL):
        if named := re.search(r"[`[]((?:\w+/)+\w+\.\w+)[`\]]", told):
            files[named[1]] = re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) + "\n"
    return files


def imported(name, monkeypatch):
    """Import the module of this name from the code blocks of docs/extending.md."""
    module = ModuleType(name)
    exec(written_files()[f"{name.replace('.', '/')}.py"], vars(module))  # noqa: S102
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_an_attention_block_as_the_documentation_has_it_passes_the_tests(monkeypatch, tmp_path):
    monkeypatch.setitem(_BLOCKS, "mine", imported("ema_seg.attention.mine", monkeypatch).Mine)
    monkeypatch.setattr(blocks, "ROOT", tmp_path)
    for name in ("configs/attention/mine.yaml", "docs/attention.md"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(written_files()[name], encoding="utf-8")
    own = dict(vars(equations))
    exec(written_files()["tests/attention/test_equations.py"], own)  # noqa: S102
    options = blocks.options_of("mine")

    own["test_my_attention_gates_each_pixel"](torch.randn(2, own["CHANNELS"], 3, 4, dtype=torch.float64))
    equations.test_channels_are_a_positive_whole_number("mine")
    blocks.test_every_block_keeps_shape_and_dtype_and_trains("mine", options, torch.float32)
    blocks.test_few_channels_and_single_pixels_work_or_are_refused_in_a_sentence("mine", options, 3)
    blocks.test_the_configuration_has_the_link_and_the_defaults_and_the_documentation_has_the_block("mine")


def test_a_data_set_as_the_documentation_has_it_passes_its_test(monkeypatch, tmp_path):
    monkeypatch.setitem(DATASETS, "mine", imported("ema_seg.data.mine", monkeypatch).MineDataset.__name__)
    own = vars(imported("tests.data.test_mine", monkeypatch))

    own["test_reads_pairs_as_train_ids"](tmp_path)


def test_an_experiment_as_the_documentation_has_it_sets_what_it_says(run_script, tmp_path):
    file = tmp_path / "mine" / "experiment" / "leaves.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(written_files()["mine/experiment/leaves.yaml"], encoding="utf-8")
    arguments = ("--config-dir", tmp_path / "mine", "experiment=leaves", "data.root=here", "attention=eca")

    status, out, err = run_script("train", *arguments, "--cfg", "job")

    assert status == 0, err
    config = OmegaConf.create(out)
    assert (config.data.name, config.model.decoder, config.attention.name) == ("folder", "fpn", "eca")
    assert (config.epochs, config.optimizer.lr, config.logger) == (20, 3e-4, {"tensorboard": {}})
