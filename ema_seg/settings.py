"""The settings of the entry points: which there are, and what each can be, before anything is built from them.

Parts that others define (a decoder's options, a transform's, Lightning's trainer's) are open here, and are checked
where they are built.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ema_seg.errors import ConfigError, did_you_mean

__all__ = ["EVALUATION", "EVALUATION_SECTION", "REBUILDING", "TRAINING", "require_plain", "require_settings"]


# Of a saved configuration, which has about a hundred.
_MOST_VALUES, _DEEPEST = 20_000, 100


class _Setting(NamedTuple):
    """What a value has to be, and what is said about one that is not."""

    fits: Callable[[Any], bool]
    complaint: str
    optional: bool = False
    """Whether a configuration that was saved by an earlier version may be without it."""


class _Section(NamedTuple):
    """Settings by name; ``open`` for further ones."""

    settings: Mapping[str, "_Setting | _Section"]
    open: bool = False


def _is_whole(least: int, most: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _or_null(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_whole(1), value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _whole_or_not_there(least: int, *, null: bool = False) -> _Setting:
    fits = _is_whole(least)
    return _Setting(_or_null(fits) if null else fits, "is not possible; give a whole number", optional=True)


_FLAG = _Setting(_is_flag, "is neither true nor false")
_NAME = _Setting(_is_text, "is no name")
_PATH = _Setting(_or_null(_is_text), "is no path; one of digits alone is put in two kinds of quotes, as in \"'2024'\"")
# To be there; what it can be is checked by the part that takes it.
_ANY = _Setting(lambda value: True, "")

_DATA = _Section(
    {
        "name": _NAME,
        "root": _PATH,
        "batch_size": _ANY,
        "evaluation_batch_size": _ANY,
        "workers": _ANY,
        "mean": _ANY,
        "std": _ANY,
        "augmentation": _Section({}, open=True),
        "evaluation_split": _NAME,
    },
    open=True,
)
EVALUATION_SECTION = _Section(
    {
        "device": _Setting(_is_text, "is no device, such as auto, cpu or cuda:1"),
        "precision": _Setting(lambda value: isinstance(value, str | int), "is no precision, such as 32-true"),
        "channels_last": _FLAG,
        "compile": _FLAG,
        "batch_size": _Setting(_is_whole(1), "is no positive number"),
        "size": _Setting(_or_null(_is_size), "is no [height,width] in pixels, such as [512,1024]"),
        "budget": _Setting(lambda value: _is_number(value) and value > 0, "is no positive number of seconds"),
    }
)
"""``evaluation`` of both."""

_REPORT = _Section({"dir": _PATH})
_NAMED = _Section({"name": _NAME}, open=True)
_OPEN = _Section({}, open=True)

TRAINING = _Section(
    {
        "epochs": _Setting(_or_null(_is_whole(-1)), "is no whole number of 1 or more"),
        "seed": _Setting(_is_whole(0, 2**32 - 1), "is no whole number from 0 to 4294967295"),
        "resume": _PATH,
        "rerun": _PATH._replace(optional=True),
        "reproducible": _FLAG._replace(optional=True),
        "data": _DATA,
        "model": _Section({"decoder": _NAME, "encoder": _NAME, "encoder_weights": _PATH}, open=True),
        "attention": _NAMED,
        "placement": _Section(
            {
                "encoder": _FLAG,
                "encoder_stages": _Setting(
                    _or_null(lambda value: isinstance(value, list) and all(map(_is_whole(0), value))),
                    "is no list of the encoder's stages, such as [1,2]",
                ),
                "decoder": _FLAG,
                "head": _FLAG,
            }
        ),
        "loss": _OPEN,
        "optimizer": _Section({"name": _NAME, "lr": _ANY, "encoder_lr_factor": _ANY, "weight_decay": _ANY}, open=True),
        "schedule": _NAMED,
        "trainer": _Section(
            {
                "accumulate_grad_batches": _whole_or_not_there(1),
                "check_val_every_n_epoch": _whole_or_not_there(1, null=True),
                "num_sanity_val_steps": _whole_or_not_there(-1, null=True),
                "log_every_n_steps": _whole_or_not_there(0, null=True),
                "min_epochs": _whole_or_not_there(0, null=True),
                "max_steps": _whole_or_not_there(-1),
                "min_steps": _whole_or_not_there(0, null=True),
                "max_time": _Setting(
                    _or_null(lambda value: isinstance(value, str | Mapping)),
                    "is no time of the form days:hours:minutes:seconds",
                    optional=True,
                ),
                "gradient_clip_val": _Setting(_or_null(_is_number), "is no number", optional=True),
                "gradient_clip_algorithm": _Setting(_or_null(_is_text), "is neither norm nor value", optional=True),
                "fast_dev_run": _Setting(
                    lambda value: isinstance(value, bool) or _is_whole(0)(value),
                    "is no number of batches",
                    optional=True,
                ),
                "benchmark": _Setting(_or_null(_is_flag), "is neither true nor false", optional=True),
                "model_registry": _Setting(_or_null(_is_text), "is no name", optional=True),
                "profiler": _Setting(_or_null(_is_text), "is no name", optional=True),
                "sync_batchnorm": _FLAG._replace(optional=True),
                "deterministic": _Setting(
                    lambda value: isinstance(value, bool) or value in (None, "warn"),
                    "is none of true, false and warn",
                    optional=True,
                ),
            },
            open=True,
        ),
        "logger": _Section({"name": _Setting(_or_null(_is_text), "is no name")}, open=True),
        "evaluation": EVALUATION_SECTION,
        "training": _Section(
            {
                "channels_last": _FLAG,
                "compile": _FLAG,
                "weight_averaging": _Setting(
                    lambda value: not value or (_is_number(value) and 0 < value < 1),
                    "is no decay between 0 and 1, such as 0.999",
                ),
                "early_stopping": _Setting(
                    lambda value: not value or _is_whole(1)(value), "is no number of validations, such as 10"
                ),
                "checkpoint_every": _Setting(
                    _or_null(_is_whole(1)), "is no number of steps; null is once in each epoch", optional=True
                ),
                "pictures_every": _Setting(_or_null(_is_whole(0)), "is no number of epochs; 0 draws none"),
                "progress_bar": _Setting(
                    lambda value: isinstance(value, bool) or value == "auto", "is none of true, false and auto"
                ),
            }
        ),
        "report": _REPORT,
        # Of the sweep that a run may be a part of, which looks at it.
        "sweep": _Setting(lambda value: isinstance(value, Mapping), "is one value, of several settings", optional=True),
    }
)
"""Of ``train.py``."""

_COLOUR = _Setting(
    _or_null(lambda value: isinstance(value, list | tuple) and len(value) == 3 and all(map(_is_number, value))),
    "is no list of three numbers",
)
REBUILDING = _Section(
    {
        "data": _Section({"mean": _COLOUR, "std": _COLOUR}, open=True),
        "trainer": _OPEN,
        **{name: TRAINING.settings[name] for name in ("model", "attention", "placement")},
    },
    open=True,
)
"""What of these a checkpoint has to have for its model to be rebuilt and evaluated."""

EVALUATION = _Section(
    {
        "run": _PATH,
        "ckpt": _PATH,
        "devices": _Setting(lambda value: isinstance(value, str | int | list), "is no number of devices"),
        "data": _DATA,
        "epochs": _Setting(lambda value: True, "", optional=True),  # which a data set's configuration brings along
        "evaluation": EVALUATION_SECTION,
        "report": _REPORT,
    }
)
"""Of ``eval.py``."""


def require_settings(config: Mapping[str, Any], known: _Section, path: str = "") -> None:
    """Look at the resolved configuration of an entry point as plain data.

    Args:
        config: the configuration, or a section of it.
        known: ``TRAINING``, ``EVALUATION`` or ``REBUILDING``, or a section of it.
        path: the dotted name of the section, with a dot at its end.

    Raises:
        ConfigError: a setting is missing, unknown, or nothing that it could be.
    """
    for name in config:
        if name not in known.settings and not known.open:
            raise ConfigError(f"{path}{name}: there is no such setting; leave it out.{_near(str(name), known, path)}")
    for name, setting in known.settings.items():
        full = f"{path}{name}"
        if name not in config:
            if isinstance(setting, _Setting) and setting.optional:
                continue
            raise ConfigError(f"{full} is missing, which every configuration has; do not take it out.")
        value = config[name]
        if isinstance(setting, _Section):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{full}={value!r} is one value, where there are several settings; set those.")
            require_settings(value, setting, f"{full}.")
        elif not setting.fits(value):
            raise ConfigError(f"{full}={value!r} {setting.complaint}.")


def require_plain(config: object) -> None:
    """Refuse a saved configuration that is not only of keys and values, as ``train.py`` saves one.

    A reference in it would be resolved, and so could read the environment of whoever evaluates or resumes the run; a
    list that holds itself has no end.

    Raises:
        ConfigError: there is a reference, a value of another type, or no end.
    """
    count = 0
    below: list[tuple[str, object, int]] = [("", config, 0)]
    while below:
        path, value, depth = below.pop()
        count += 1
        if count > _MOST_VALUES or depth > _DEEPEST:
            raise ConfigError(
                f"{path}: a saved configuration has at most {_MOST_VALUES:,} values in {_DEEPEST} levels; restore it."
            )
        if isinstance(value, str) and "${" in value:
            raise ConfigError(
                f"{path}={value!r} is a reference, and a saved configuration has values alone; write the value."
            )
        if isinstance(value, dict | list | tuple):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            below += [(f"{path}.{key}" if path else str(key), item, depth + 1) for key, item in items]
        elif not isinstance(value, str | int | float | None):
            raise ConfigError(f"{path}: a value must be text or a number, got {type(value).__name__}; restore it.")


def _near(name: str, known: _Section, path: str) -> str:
    return did_you_mean(f"{path}{name}", [f"{path}{other}" for other in known.settings])
