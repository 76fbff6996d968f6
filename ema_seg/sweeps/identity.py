"""Identity of a job: a hash of its configuration, without the keys that say where and how it runs."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from ema_seg.sweeps.folder import ANY

__all__ = ["hash_config", "job_name", "machine_keys", "setting_text"]

# Keys of the machine, the paths and the display, which change no result but the timings.
_MACHINE_KEYS = (
    "resume",
    "rerun",
    "reproducible",
    "report",
    "logger",
    "sweep",
    "data.root",
    "data.workers",
    "data.cache",
    "data.timeout",
    "data.max_skipped",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "training.progress_bar",
    "training.pictures_every",
    "training.checkpoint_every",
    "training.loss_strips",
    "evaluation.device",
    "evaluation.budget",
)
_LONGEST_NAME = 80


def hash_config(config: Mapping[str, Any]) -> str:
    """Hash a configuration to twelve hexadecimal digits, which are equal for configurations of the same job.

    Args:
        config: the resolved configuration of ``train.py`` as plain data.
    """
    left_out = machine_keys(config)
    if config.get("attention", {}).get("name") == "none":
        left_out.append("placement")  # no block to place
    # Unused settings, as before they existed.
    for section, key in (("training", "tf32"), ("optimizer", "layer_decay"), ("model", "auxiliary")):
        if config.get(section, {}).get(key) is None:
            left_out.append(f"{section}.{key}")
    if config.get("init_from") is None:
        left_out.append("init_from")
    if not (config.get("freeze") or {}).get("parts"):
        left_out.append("freeze")
    kept = _without(config, "", left_out)
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def machine_keys(config: Mapping[str, Any]) -> list[str]:
    """Return the keys of a configuration that concern the machine alone.

    ``data.root`` is one of them, except for ``data=folder``, where it identifies the data.
    """
    names_data = config.get("data", {}).get("name") == "folder"
    return [key for key in _MACHINE_KEYS if not (key == "data.root" and names_data)]


def _without(value: Any, path: str, left_out: list[str]) -> Any:
    if not isinstance(value, Mapping):
        return value
    paths = {key: f"{path}.{key}" if path else str(key) for key in value}
    return {str(key): _without(item, paths[key], left_out) for key, item in value.items() if paths[key] not in left_out}


def setting_text(value: Any) -> str:
    """Format a value as on the command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def job_name(overrides: Mapping[str, str], identity: str) -> str:
    """Return the name of a job's folder, easy to read and to type: ``attention-ema_seed-0_1a2b3c4d5e6f``.

    Args:
        overrides: the overrides that distinguish the job from the others of its sweep.
        identity: see ``hash_config``; it keeps names unique that have to be cut or cleaned.
    """
    told = {key: value for key, value in overrides.items() if value != ANY}
    text = "_".join(f"{key.rpartition('.')[2]}-{value}" for key, value in told.items())
    # No characters that are special to a shell or to Hydra's override grammar.
    clean = re.sub(r"[^\w.+]+", "-", text)[:_LONGEST_NAME].strip("_-.")
    return f"{clean}_{identity}" if clean else identity
