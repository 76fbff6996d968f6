"""The commands and the links of the documentation, against the program as it is."""

import re
import shlex

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser

from configs.command_line import expand_home
from ema_seg.data import check
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"^\s*python (train|eval)\.py ?([^#\n]*)", re.MULTILINE)
HELP = [ROOT / "configs" / "hydra" / "help" / f"{script}.yaml" for script in ("train", "eval")]


def commands():
    for page in (*PAGES, *HELP):
        for script, arguments in COMMAND.findall(page.read_text()):
            yield pytest.param(script, shlex.split(arguments), id=f"{page.name}: {script} {arguments.strip()}")


@pytest.mark.parametrize(("script", "arguments"), commands())
def test_every_command_is_one_that_the_program_takes(script, arguments):
    arguments = expand_home(arguments)
    overrides = [text for text in arguments if "=" in text]
    others = set(arguments) - set(overrides)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        if script == "eval":
            trained = compose("train", ["data=camvid"])
            for group in ("data", "evaluation"):
                ConfigStore.instance().store("of_run", trained[group], group=group)
        compose(script, [_first(text) for text in overrides] if "-m" in others else overrides)

    assert others <= {"--help", "--hydra-help", "--cfg", "job", "[overrides]", "-m"}


def _first(text):
    """The override with the first of the values that it sweeps over."""
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
