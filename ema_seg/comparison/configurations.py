"""Configurations of a comparison: runs grouped over seeds, the keys that differ, labels and baselines."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ema_seg.comparison.runs import Run
from ema_seg.runtime.errors import ConfigError, did_you_mean
from ema_seg.sweeps import ANY, machine_keys, setting_text

__all__ = ["Configuration", "find_baselines", "group_runs", "has_settings"]

# Keys that do not distinguish rows. The report, not the training's config, has the settings of the evaluation;
# ``trainer.max_epochs`` repeats ``epochs``.
_IGNORED_KEYS = ("seed", "evaluation", "trainer.log_every_n_steps", "trainer.max_epochs")


def _placement_name(options: Mapping[str, Any]) -> str:
    return "+".join(place for place in ("encoder", "decoder", "head") if options.get(place)) or "none"


def _loss_name(options: Mapping[str, Any]) -> str:
    return "+".join(name for name, loss in options.items() if loss is not None)


# Name of each config section; its other keys are compared only between runs with the same name.
_SECTION_NAMES: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "attention": lambda options: options.get("name"),
    "placement": _placement_name,
    "model": lambda options: options.get("decoder"),
    "data": lambda options: options.get("name"),
    "loss": _loss_name,
    "optimizer": lambda options: options.get("name"),
    "schedule": lambda options: options.get("name"),
}


@dataclass
class Configuration:
    """Row of a comparison: runs that differ in the seed alone.

    Attributes:
        settings: value of each key that differs between configurations; None where a configuration has no such key.
        runs: its runs, in the order of their seeds.
        label: short text, unique among the configurations.
    """

    settings: dict[str, Any]
    runs: list[Run] = field(default_factory=list)
    label: str = ""

    @cached_property
    def mixed_keys(self) -> list[str]:
        """Keys in which its finished runs differ although their overrides in the sweep are the same."""
        finished = [replace(run, overrides=None) for run in self.runs if run.result is not None]
        return group_runs(finished)[0] if len(finished) > 1 else []


def group_runs(runs: Sequence[Run]) -> tuple[list[str], list[Configuration]]:
    """Group runs whose configurations differ in the seed alone.

    Jobs of one sweep are grouped by their overrides, other runs by their whole configurations, without the keys that
    say where and how they ran. Where the protocols of the evaluations differ they are settings, too.

    Args:
        runs: finished runs, or jobs of a sweep in any state.

    Returns:
        The keys that differ, and the configurations in the order in which they first occur.
    """
    planned = all(run.overrides is not None for run in runs)
    keys = [_override_settings(run) if planned else _config_settings(run) for run in runs]
    protocols = [_protocol_settings(run) for run in runs]
    if len({_canonical_json(own) for own in protocols if own is not None}) > 1:
        # A job that is not finished has no protocol yet: it gets that of a finished one with the same settings.
        by_settings = {
            _canonical_json(settings): own
            for own, settings in zip(reversed(protocols), reversed(keys), strict=True)
            if own is not None
        }
        keys = [
            (by_settings.get(_canonical_json(settings), {}) if own is None else own) | settings
            for own, settings in zip(protocols, keys, strict=True)
        ]
    shown = _differing_overrides(keys) if planned else _differing_settings(runs, keys)
    named = keys if planned else [_section_names(run) | settings for run, settings in zip(runs, keys, strict=True)]
    groups: dict[str, Configuration] = {}
    for run, settings, values in zip(runs, keys, named, strict=True):
        group = groups.setdefault(_canonical_json(settings), Configuration({key: values.get(key) for key in shown}))
        group.runs.append(run)
    configurations = list(groups.values())
    for configuration in configurations:
        configuration.runs.sort(key=lambda run: -1 if run.seed is None else run.seed)
    _set_labels(configurations)
    return shown, configurations


def find_baselines(configurations: Sequence[Configuration], baseline: Mapping[str, str]) -> list[Configuration | None]:
    """Find the baseline of each configuration: the one with the settings ``baseline`` and otherwise the same ones.

    In a grid of attention blocks and decoders, each block is thus compared with no attention in the same decoder.
    Options of a setting in ``baseline`` (``attention.factor`` beside ``attention``) are ignored. For ``attention=none``
    the placement is ignored too if no configuration matches otherwise.

    Returns:
        The baseline of each configuration; None for a baseline itself and where no other matches.

    Raises:
        ConfigError: a key of ``baseline`` does not differ between configurations, or no configuration has its values.
    """
    keys = list(configurations[0].settings)
    for key in baseline:
        if key not in keys:
            known = f"the key must be a setting that differs ({', '.join(keys)})" if keys else "no setting differs"
            raise ConfigError(f"--baseline {key}={baseline[key]}: {known}.{did_you_mean(key, keys)}")
    # One job may stand for several values (``ANY``); exact matches come first.
    bases = sorted(
        (candidate for candidate in configurations if has_settings(candidate, baseline)),
        key=lambda candidate: any(candidate.settings[key] == ANY for key in baseline),
    )
    if not bases:
        key = next(iter(baseline))
        values = dict.fromkeys(setting_text(configuration.settings[key]) for configuration in configurations)
        wanted = ",".join(f"{key}={value}" for key, value in baseline.items())
        raise ConfigError(f"--baseline {wanted}: no configuration has it; choose {key} from {', '.join(values)}.")
    replaced = [key for key in keys if any(key == name or key.startswith(f"{name}.") for name in baseline)]
    compared = [[key for key in keys if key not in replaced]]
    if baseline.get("attention") == "none":
        compared.append([key for key in compared[0] if not key.startswith("placement")])
    return [
        None if configuration in bases else _first_match(configuration, bases, compared)
        for configuration in configurations
    ]


def _first_match(
    configuration: Configuration, bases: Sequence[Configuration], compared: Sequence[Sequence[str]]
) -> Configuration | None:
    for keys in compared:
        wanted = [setting_text(configuration.settings[key]) for key in keys]
        known = [(base, [setting_text(base.settings[key]) for key in keys]) for base in bases]
        for base, values in known:
            if values == wanted:
                return base
        for base, values in known:  # one job may stand for several values, such as the model without attention
            if all(value in (ANY, text) for value, text in zip(values, wanted, strict=True)):
                return base
    return None


def has_settings(configuration: Configuration, values: Mapping[str, str]) -> bool:
    """Check whether a configuration has these values, as on the command line; their keys must be in its settings."""
    return all(setting_text(configuration.settings[key]) in (ANY, value) for key, value in values.items())


def _override_settings(run: Run) -> dict[str, Any]:
    return {key: value for key, value in (run.overrides or {}).items() if key != "seed"}


def _config_settings(run: Run) -> dict[str, Any]:
    """Return a run's configuration by dotted key, without nulls, machine keys and ``_IGNORED_KEYS``."""
    assert run.result is not None
    config = run.result.report["config"]
    left_out = [*machine_keys(config), *_IGNORED_KEYS]
    return {
        key: value
        for key, value in _flatten(config).items()
        if value is not None and not any(key == name or key.startswith(f"{name}.") for name in left_out)
    }


def _protocol_settings(run: Run) -> dict[str, Any] | None:
    """Return the settings by which a run's images were predicted, without plain ones; None if it is not finished."""
    if run.result is None:
        return None
    protocol = run.result.report.get("protocol") or {}
    plain = {"window": None, "window_stride": None, "scales": [1.0], "flip": False}
    return {f"evaluation.{key}": value for key, value in protocol.items() if value != plain.get(key)}


def _section_names(run: Run) -> dict[str, Any]:
    assert run.result is not None
    config = run.result.report["config"]
    return {section: name(config[section]) for section, name in _SECTION_NAMES.items() if section in config}


def _differing_overrides(keys: Sequence[Mapping[str, Any]]) -> list[str]:
    known = dict.fromkeys(key for settings in keys for key in settings)
    return [key for key in known if len({_canonical_json(settings.get(key)) for settings in keys}) > 1]


def _differing_settings(runs: Sequence[Run], keys: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the sections whose names differ, and the keys that differ between runs with the same name there."""
    names = [_section_names(run) for run in runs]
    sections = [
        section for section in _SECTION_NAMES if len({_canonical_json(name.get(section)) for name in names}) > 1
    ]
    shown = list(sections)
    for key in dict.fromkeys(key for settings in keys for key in settings):
        section = key.partition(".")[0]
        values: dict[str, set[str]] = {}
        for name, settings in zip(names, keys, strict=True):
            values.setdefault(_canonical_json(name.get(section)), set()).add(_canonical_json(settings.get(key)))
        if any(len(found) > 1 for found in values.values()):
            shown.append(key)
    order = list(_SECTION_NAMES)
    return sorted(shown, key=lambda key: [*order, key.partition(".")[0]].index(key.partition(".")[0]))


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _canonical_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _set_labels(configurations: Sequence[Configuration]) -> None:
    """Set the shortest unique labels: values alone, with the last parts of keys, with whole keys, or numbered."""
    for name in (_short_part, _named_part, _full_part):
        labels = [
            ", ".join(filter(None, (name(key, value) for key, value in configuration.settings.items())))
            or _lone_label(configuration)
            for configuration in configurations
        ]
        for configuration, label in zip(configurations, labels, strict=True):
            configuration.label = label
        if len(set(labels)) == len(labels):
            return
    seen: dict[str, int] = {}
    for configuration, label in zip(configurations, labels, strict=True):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] > 1:
            configuration.label = f"{label} ({seen[label]})"


def _short_part(key: str, value: Any) -> str:
    """Format a word alone, any other value with its key, and None or ``ANY`` as nothing."""
    if value is None or value == ANY:
        return ""
    text = setting_text(value)
    is_word = text[:1].isalpha() and text not in ("true", "false", "null")
    return text if is_word and "." not in key else f"{key.rpartition('.')[2]}={text}"


def _named_part(key: str, value: Any) -> str:
    return f"{key.rpartition('.')[2]}={setting_text(value)}"


def _full_part(key: str, value: Any) -> str:
    return f"{key}={setting_text(value)}"


def _lone_label(configuration: Configuration) -> str:
    """Return the label of the only configuration: its attention block, if a run is finished."""
    for run in configuration.runs:
        if run.result is not None:
            return str(run.result.report["attention"]["name"])
    return "all runs"
