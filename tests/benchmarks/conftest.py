import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# What the tests of the kernels set, and benchmarks refuse.
DISTORTING_VARIABLES = ("EMA_SEG_IMPLEMENTATION", "TRITON_INTERPRET")


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    """As for a script, whose folder Python searches first."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for variable in DISTORTING_VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def run_benchmark():
    """Run a benchmark as a user does; gives its standard output."""

    def run(script, *arguments):
        environment = {name: value for name, value in os.environ.items() if name not in DISTORTING_VARIABLES}
        environment["PYTHONPATH"] = str(ROOT)
        done = subprocess.run(
            [sys.executable, ROOT / "benchmarks" / f"{script}.py", *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def refusal(capsys):
    """What a benchmark says to a command line that it does not accept."""

    def run(main, *arguments):
        with pytest.raises(SystemExit) as exit:
            main(list(map(str, arguments)))
        assert exit.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err

    return run
