"""Runs that continue or repeat another one: ``resume=<run>``, ``resume=auto`` and ``rerun=<run>``."""

import json
import sys
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, open_dict

from ema_seg.cli.command_line import key_of, quoted, read_config, run_config, saved_config
from ema_seg.cli.early_checks import check_early, check_root
from ema_seg.runtime.errors import ConfigError, TrainingError
from ema_seg.runtime.host_memory import gc_frozen_imports
from ema_seg.sweeps import hash_config, is_running, machine_keys

__all__ = ["register_repeated", "register_resumed", "require_identical", "require_same_job", "resume_unfinished"]


def resume_unfinished(composed: DictConfig) -> None:
    """Change ``sys.argv`` to resume the unfinished run of the same configuration, if there is one.

    Candidates are hydra.run.dir if it is given, else the siblings of a new run's folder, the last by name first.
    """
    unfinished = _unfinished_run(composed)
    from ema_seg.runtime.distributed.collectives import broadcast  # imports torch, so only after the checks

    folder = broadcast(unfinished)
    text = "null" if folder is None else quoted(folder)
    sys.argv = [f"resume={text}" if argument.startswith("resume=") else argument for argument in sys.argv]
    if folder is not None:
        sys.argv.append(f"hydra.run.dir={text}")


def _unfinished_run(composed: DictConfig) -> Path | None:
    here = Path(str(composed.hydra.run.dir))
    named = any(text.startswith("hydra.run.dir=") for text in sys.argv[1:])
    with open_dict(composed):
        del composed["hydra"]
    config = run_config(composed)
    check_early(config)
    check_root(config["data"])
    with gc_frozen_imports():
        from ema_seg.cli.checks import check_config
        from ema_seg.cli.launch import complete_paths

    check_config(config)
    complete_paths(config)
    found = [here] if named else sorted(here.parent.glob("*"), key=lambda folder: folder.name, reverse=True)
    for folder in found:
        if not named and is_running(folder):
            continue
        kept = [folder / "checkpoints" / name for name in ("last.ckpt", "previous.ckpt")]
        if any(path.is_file() for path in kept) and _is_unfinished(config, folder):
            return folder
    return None


def _is_unfinished(config: dict[str, Any], run: Path) -> bool:
    """Return whether the run in this folder has this configuration and no report."""
    try:
        saved = read_config(run, key="resume")
    except ConfigError:  # not a run, or an incomplete one
        return False
    report = Path(str(saved.get("report", {}).get("dir") or run / "report"))
    return not (report / "report.json").is_file() and _is_same(config, saved)


def register_resumed(run: Path) -> str:
    """Register a run's own configuration as the primary config, to which the command line's overrides apply."""
    return _register(saved_config(run, key="resume"), str(run))


def register_repeated(run: Path) -> str:
    """Register a run's own configuration for a new run; allow overrides of machine settings only."""
    # The new run must not write into the original's report folder.
    config = {**saved_config(run, key="rerun"), "report": {"dir": None}}
    free = ("rerun", "hydra", *machine_keys(config))
    for text in sys.argv[1:]:
        if text.startswith("-") or not ("=" in text or text.startswith("~")):
            continue  # an option of Hydra's, such as --cfg, or its value
        key = key_of(text)
        if not any(key == name or key.startswith(f"{name}.") for name in free):
            raise ConfigError(f"rerun={run}: {text} would make it a different run; remove it.")
    name = "${data.name}_${model.decoder}_${attention.name}"
    return _register(config, f"runs/${{started:%Y-%m-%d_%H-%M-%S}}_{name}_rerun")


def _register(config: dict[str, Any], folder: str) -> str:
    """Store a configuration in Hydra's ConfigStore, for a run in this folder, and return its name there."""
    settings = {"run": {"dir": folder}, "output_subdir": None}
    logs = [{"override hydra/hydra_logging": "quiet"}, {"override hydra/job_logging": "stderr"}]
    node = {"rerun": None, **config, "resume": None, "hydra": settings, "defaults": ["_self_", *logs]}
    ConfigStore.instance().store("saved", node)
    return "saved"


def require_same_job(config: dict[str, Any], run: Path) -> None:
    """Raise a ConfigError if overrides give a resumed job of a sweep another identity."""
    if not _is_same(config, read_config(run, key="resume")):
        raise ConfigError(
            f"resume={run}: the overrides would make this job of a sweep a different one; remove them, or add them to "
            "the sweep's command."
        )


def _is_same(config: dict[str, Any], saved: dict[str, Any]) -> bool:
    """Return whether both have the same identity; values that a run fills in itself are the saved ones."""
    own = {key for key in ("mean", "std") if config["data"][key] is None}
    own |= {"batch_size"} if config["data"]["batch_size"] == "auto" else set()
    config = {**config, "data": config["data"] | {key: saved.get("data", {}).get(key) for key in own}}
    return hash_config(config) == hash_config(saved)


def require_identical(original: Path, run: Path) -> None:
    """Compare a rerun with its original, print and save the result; raise a TrainingError if they differ."""
    from ema_seg.comparison.repeat import compare_runs, describe_comparison
    from ema_seg.runtime.files import write_file

    comparison = compare_runs(original, run)
    write_file(run / "rerun.json", f"{json.dumps(comparison, indent=2)}\n".encode())
    lines, identical = describe_comparison(comparison)
    print(f"compared with {original}:", *lines, sep="\n")
    if not identical:
        raise TrainingError(
            f"rerun={original}: {run} must be bitwise identical, but differs; see {run / 'rerun.json'}."
        )
