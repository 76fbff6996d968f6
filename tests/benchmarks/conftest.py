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
def run_benchmark(entry):
    """Run a benchmark as a user does; gives its standard output."""

    def run(script, *arguments):
        status, err = entry.run(*arguments, script=f"benchmarks/{script}")
        assert status == 0, err
        return entry.out

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
