import pytest

from tests.conftest import ROOT

# Environment variables that the kernels' tests set and benchmarks refuse.
DISTORTING_VARIABLES = ("EMA_SEG_IMPLEMENTATION", "TRITON_INTERPRET")


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    """Make the benchmarks importable, as for a script in their folder, and unset the variables that they refuse."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for variable in DISTORTING_VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def run_benchmark(entry):
    """Return a function that runs a benchmark as a user does and returns its standard output."""

    def run(script, *arguments):
        status, err = entry.run(*arguments, script=f"benchmarks/{script}")
        assert status == 0, err
        return entry.out

    return run


@pytest.fixture
def refusal(capsys):
    """Return a function that runs a benchmark with an invalid command line and returns its error output."""

    def run(main, *arguments):
        with pytest.raises(SystemExit) as exit:
            main(list(map(str, arguments)))
        assert exit.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err

    return run
