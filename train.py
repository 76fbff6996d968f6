"""Train a segmentation model with attention blocks, test its best checkpoint, report mIoU beside throughput.

python train.py --help shows what can be configured.
"""

import gc
import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from configs.command_line import argument, expand_home, plain_config, reports_errors, saved_config
from ema_seg.errors import ConfigError
from ema_seg.host_memory import keep_freed_memory
from ema_seg.sweeps import count_devices, deal_device, hold_job, identity, read_job, read_plan, run_job

CONFIGS = Path(__file__).resolve().parent / "configs"


@reports_errors
def main() -> None:
    """Compose the configuration, of a resumed run from its own file, and train."""
    keep_freed_memory()
    sys.argv = expand_home(sys.argv)
    OmegaConf.register_new_resolver("parallel_jobs", lambda: count_devices() or 2, replace=True)
    config_name = "train"
    if run := argument("resume"):
        if {"-m", "--multirun"} & set(sys.argv):
            raise ConfigError(f"resume={run}: a sweep goes on by itself when its command is given again; leave it out.")
        config_name = _register_resumed(Path(run))
    hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(_train)()


def _register_resumed(run: Path) -> str:
    """Make a run's own configuration the one that overrides on the command line change."""
    for text in sys.argv[1:]:
        if text.lstrip("+~").startswith("optimizer."):
            raise ConfigError(
                f"resume={run} goes on with the optimiser as it was saved, which {text} cannot change; leave it "
                "out, or start a new run."
            )
    config = saved_config(run, key="resume")
    hydra_settings = {"run": {"dir": str(run)}, "output_subdir": None}
    ConfigStore.instance().store("resumed", {**config, "resume": None, "hydra": hydra_settings})
    return "resumed"


def _train(composed: DictConfig) -> None:
    """Train, test and report one run, or one job of a sweep."""
    run = Path(HydraConfig.get().runtime.output_dir)
    if OmegaConf.select(composed, "sweep.job") is None:
        reports_errors(_train_run)(composed, run)
    else:
        _train_job(composed, run)


def _train_run(composed: DictConfig, run: Path) -> None:
    for text in HydraConfig.get().overrides.task:
        if text.lstrip("+~").startswith(("sweep=", "sweep.", "launcher=")):
            raise ConfigError(f"{text} is for sweeps: python train.py -m {text} …; leave it out to train one run.")
    config = _settings(composed)
    job = read_job(run)
    if not config["resume"] and (job or (run / "checkpoints").exists()):
        raise ConfigError(f"{run} holds a run already; continue it with resume={run}, or choose another hydra.run.dir.")

    from ema_seg.reporting import print_report

    with hold_job(run) if job else nullcontext():
        if job:
            _require_same_job(config, run)
        report = _produce(config, run, resume=bool(config["resume"]), job=job)
    print_report(report)
    print(f"run: {run}")


def _require_same_job(config: dict[str, Any], run: Path) -> None:
    """A ConfigError if a job of a sweep, which is known by its configuration, is to go on as something else."""
    saved = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    if identity(config) != identity(saved):  # type: ignore[arg-type]  # plain data of text keys
        raise ConfigError(
            f"resume={run}: this job of a sweep would be another one with the given overrides; leave them out, or add "
            "them to the sweep's command."
        )


def _train_job(composed: DictConfig, run: Path) -> None:
    """A job of a sweep: what goes wrong is written to its folder, and never ends the sweep."""
    (planned,) = (job for job in read_plan(run.parent).jobs if job.folder == run.name)
    job: dict[str, Any] = {"identity": planned.identity, "overrides": planned.overrides}
    launcher = HydraConfig.get().runtime.choices["launcher"]

    def work(resume: bool) -> None:
        if composed.sweep.deal_devices and composed.trainer.accelerator != "cpu":
            deal_device(run.parent)
        _freeze_libraries()
        callbacks = _search_callbacks(composed, run)
        told = {**job, "launcher": launcher}
        _produce(_settings(composed), run, resume=resume, job=told, quiet=True, callbacks=callbacks)

    run_job(run, job, work, retry=composed.sweep.retry)
    _free_memory()  # not earlier: what a job has raised holds on to all that it had


def _search_callbacks(composed: DictConfig, run: Path) -> list[Any]:
    """What a trial of a search needs to be given up early."""
    if composed.sweep.get("trial") is None:
        return []
    from ema_seg.sweeps.search import GiveUp, Search

    search = Search(run.parent, seed=composed.sweep.seed, grace=composed.sweep.grace)
    return [GiveUp(search, composed.sweep.trial)]


def _settings(composed: DictConfig) -> dict[str, Any]:
    """What describes a run: the configuration without that of the sweep which it may be part of."""
    config = plain_config(composed)
    config.pop("sweep", None)
    return config


def _produce(
    config: dict[str, Any],
    run: Path,
    *,
    resume: bool,
    job: dict[str, Any] | None,
    quiet: bool = False,
    callbacks: Sequence[Any] = (),
) -> dict[str, Any]:
    """Train what the configuration describes, test the best checkpoint, and write the report."""
    # Heavy libraries only now, so that --help and --cfg answer at once.
    from lightning import seed_everything

    from ema_seg.reporting import assess_checkpoint, find_device
    from ema_seg.training import check_config, fit

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    check_config(config)
    find_device(config["evaluation"]["device"])
    seed_everything(config["seed"], workers=True, verbose=False)
    _complete(config["data"], config["model"])
    OmegaConf.save(config, run / "config.yaml")
    best = fit(config, run, resume=resume, quiet=quiet, callbacks=callbacks)
    directory = Path(config["report"]["dir"] or run / "report")
    return assess_checkpoint(best, config["data"], config["evaluation"], directory, run=str(run), job=job, quiet=quiet)


def _freeze_libraries() -> None:
    """Keep the garbage collector from walking through the libraries after each job: a third of a second."""
    import ema_seg.reporting
    import ema_seg.training  # noqa: F401

    if not gc.get_freeze_count():
        gc.freeze()


def _free_memory() -> None:
    """Leave nothing of a job to the next one in this process."""
    import torch

    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _complete(data: dict[str, Any], model: dict[str, Any]) -> None:
    """Fill in what the user has left to the project, so that the saved configuration says all of it."""
    from ema_seg.models import encoder_normalisation

    if data["mean"] is None or data["std"] is None:
        normalisation = encoder_normalisation(model["encoder"], model["encoder_weights"])
        for key, values in normalisation._asdict().items():
            data[key] = list(values) if data[key] is None else data[key]
    for key in ("root", "classes"):
        if data.get(key) is not None:
            data[key] = str(Path(data[key]).absolute())


if __name__ == "__main__":
    main()
