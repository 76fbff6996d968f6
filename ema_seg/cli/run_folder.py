"""The folder of a new run: unused, locked, and the same on all ranks."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from ema_seg.cli.command_line import read_config
from ema_seg.runtime.distributed.ranks import rank_info
from ema_seg.runtime.errors import ConfigError
from ema_seg.sweeps import lock_run, read_job

__all__ = ["hold_folder", "is_named_by_time", "require_free"]


def require_free(run: Path) -> None:
    """Raise a ConfigError if a new run in this folder would replace a run or another program's files."""
    if read_job(run) or (run / "checkpoints").exists():
        raise ConfigError(
            f"{run}: holds a run already; continue it with resume={run}, or choose another hydra.run.dir."
        )
    if (run / "config.yaml").exists():  # from a run without a checkpoint yet, or another program
        try:
            foreign = None if "trainer" in read_config(run, key="resume") else "config.yaml"
        except ConfigError:
            foreign = "config.yaml"
    else:
        foreign = next((name for name in ("environment.json", "metrics.csv") if (run / name).exists()), None)
    if foreign:
        raise ConfigError(
            f"{run / foreign}: was not written by train.py and would be replaced; choose another hydra.run.dir."
        )


def is_named_by_time() -> bool:
    """Return whether the run's folder is named by the time, so that another command may choose the same name."""
    folder = OmegaConf.to_container(HydraConfig.get().run, resolve=False)
    assert isinstance(folder, dict)
    return "${started:" in str(folder["dir"]) or "${now:" in str(folder["dir"])


@contextmanager
def hold_folder(run: Path, *, by_time: bool) -> Iterator[Path]:
    """Lock the run's folder in rank 0, and yield the folder in all ranks.

    Commands that start within the same second choose the same name; all but the first append a number to it.
    """
    from ema_seg.runtime.distributed.collectives import broadcast

    with ExitStack() as stack:
        if rank_info().rank == 0:
            run = _hold_unused(run, stack) if by_time else run
            if not by_time:
                stack.enter_context(lock_run(run))
        yield broadcast(run)


def _hold_unused(run: Path, stack: ExitStack) -> Path:
    for number in count(1):
        folder = run if number == 1 else run.with_name(f"{run.name}_{number}")
        with ExitStack() as attempt, suppress(ConfigError):  # another command holds the lock
            attempt.enter_context(lock_run(folder))
            if not (folder / "config.yaml").exists():
                stack.push(attempt.pop_all())
                return folder
    raise AssertionError
