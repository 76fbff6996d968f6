"""Schema of the entry points' settings: names, types and ranges, checked before anything is built.

Further options of a decoder, a transform or Lightning's Trainer are accepted here and checked where they are used.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ema_seg.runtime.errors import ConfigError, did_you_mean

__all__ = [
    "EVALUATION",
    "EVALUATION_SECTION",
    "REBUILDING",
    "TRAINING",
    "require_plain",
    "require_settings",
    "suggest_own",
]

# Limits of a saved configuration, which has about a hundred values.
_MOST_VALUES, _DEEPEST = 20_000, 100

# Names of these settings in other training programs; by spelling alone, the hint could name a wrong setting.
_OTHER_NAMES = {
    "epochs": "max_epochs num_epochs n_epochs epoch trainer.epochs training.epochs",
    "optimizer.lr": "lr learning_rate base_lr optim.lr optimizer.learning_rate model.lr model.learning_rate",
    "optimizer.weight_decay": "weight_decay wd optim.weight_decay",
    "data.batch_size": "batch_size bs train_batch_size data.train_batch_size data.bs datamodule.batch_size",
    "data.workers": "num_workers workers data.num_workers datamodule.num_workers",
    "data.root": "root data_dir data_root dataset_root data.dir data.path data.data_dir data.data_root paths.data_dir",
    "data": "dataset datamodule",
    "data.augmentation.crop.height": "image_size img_size crop_size data.image_size data.img_size data.crop_size",
    "model": "arch architecture decoder model.arch model.architecture model.name",
    "model.encoder": "encoder backbone encoder_name model.encoder_name model.backbone",
    "model.encoder_weights": "pretrained weights encoder_weights model.pretrained model.weights",
    "optimizer": "optim",
    "schedule": "scheduler lr_scheduler",
    "trainer.devices": "gpus num_gpus n_gpus devices trainer.gpus trainer.num_gpus",
    "evaluation.batch_size": "batch_size",
    "evaluation.device": "device",
    "trainer.accelerator": "accelerator device trainer.gpu trainer.device",
    "trainer.precision": "precision amp fp16 bf16 trainer.amp",
    "training.compile": "compile torch_compile",
    "training.early_stopping": "early_stopping patience callbacks.early_stopping.patience",
    "training.progress_bar": "progress_bar trainer.enable_progress_bar",
    "logger": "trainer.logger loggers",
    "hydra.run.dir": "output_dir out_dir save_dir log_dir work_dir trainer.default_root_dir",
    "resume": "ckpt_path ckpt checkpoint checkpoint_path resume_from resume_from_checkpoint trainer.ckpt_path run",
    "ckpt": "ckpt_path checkpoint checkpoint_path model_path model",
    "run": "resume run_dir",
}


class _Setting(NamedTuple):
    """Check of one value, with the complaint about a value that fails."""

    fits: Callable[[Any], bool]
    complaint: str
    optional: bool = False
    """Whether the setting may be missing, for example in a configuration saved by an earlier version."""


class _Section(NamedTuple):
    """Settings and subsections by name; ``open`` accepts further keys unchecked."""

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
    return _Setting(_or_null(fits) if null else fits, _AT_LEAST.format(least), optional=True)


_FLAG = _Setting(_is_flag, "is neither true nor false")
_NAME = _Setting(_is_text, "is no name")
_PATH = _Setting(_or_null(_is_text), "must be a path; quote a path of digits twice, as in \"'2024'\"")

_NUMBER = _Setting(_is_number, "is no number")
_COLOUR = _Setting(
    _or_null(lambda value: isinstance(value, list | tuple) and len(value) == 3 and all(map(_is_number, value))),
    "must be three numbers, one for each of red, green and blue",
)
_AT_LEAST = "must be a whole number of at least {}"

_DATA = _Section(
    {
        "name": _NAME,
        "root": _PATH,
        "batch_size": _Setting(lambda value: value == "auto" or _is_whole(1)(value), _AT_LEAST.format(1)),
        "evaluation_batch_size": _Setting(_is_whole(1), _AT_LEAST.format(1)),
        "workers": _Setting(_is_whole(0), _AT_LEAST.format(0)),
        "mean": _COLOUR,
        "std": _COLOUR,
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
"""Schema of the section ``evaluation``, which ``train.py`` and ``eval.py`` share."""

_REPORT = _Section({"dir": _PATH})
_NAMED = _Section({"name": _NAME}, open=True)
_OPEN = _Section({}, open=True)

_PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true", "16", "bf16", "32", "64")

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
        "optimizer": _Section(
            {"name": _NAME, "lr": _NUMBER, "encoder_lr_factor": _NUMBER, "weight_decay": _NUMBER}, open=True
        ),
        "schedule": _NAMED,
        "trainer": _Section(
            {
                "precision": _Setting(
                    lambda value: value is None or str(value) in _PRECISIONS,
                    f"is no precision of Lightning's; choose one of {', '.join(_PRECISIONS)}",
                    optional=True,
                ),
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
        # Options by logger name; with logger=[] the section is missing.
        "logger": _Setting(
            lambda value: isinstance(value, Mapping),
            "must be loggers by name; choose them with logger=<name> or logger=[<name>,<name>] in a new run",
            optional=True,
        ),
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
        # Only in a sweep, which checks these settings itself.
        "sweep": _Setting(lambda value: isinstance(value, Mapping), "must be a section of settings", optional=True),
    }
)
"""Schema of ``train.py``."""

REBUILDING = _Section(
    {
        "data": _Section({"mean": _COLOUR, "std": _COLOUR}, open=True),
        "trainer": _OPEN,
        **{name: TRAINING.settings[name] for name in ("model", "attention", "placement")},
    },
    open=True,
)
"""Schema of the settings in a checkpoint that rebuilding and evaluating its model needs."""

EVALUATION = _Section(
    {
        "run": _PATH,
        "ckpt": _PATH,
        "devices": _Setting(lambda value: isinstance(value, str | int | list), "is no number of devices"),
        "data": _DATA,
        "epochs": _Setting(lambda value: True, "", optional=True),  # set by the data sets' configs
        "evaluation": EVALUATION_SECTION,
        "report": _REPORT,
    }
)
"""Schema of ``eval.py``."""


def require_settings(config: Mapping[str, Any], known: _Section, path: str = "") -> None:
    """Check a resolved configuration against its schema.

    Args:
        config: the configuration as plain data, or a section of it.
        known: the schema: ``TRAINING``, ``EVALUATION`` or ``REBUILDING``, or a section of one.
        path: the dotted name of the section, with a trailing dot.

    Raises:
        ConfigError: a setting is missing, unknown or has an invalid value.
    """
    for name in config:
        if name not in known.settings and not known.open:
            raise ConfigError(f"{path}{name}: there is no such setting; leave it out.{_near(str(name), known, path)}")
    for name, setting in known.settings.items():
        full = f"{path}{name}"
        if name not in config:
            if isinstance(setting, _Setting) and setting.optional:
                continue
            raise ConfigError(f"{full}: missing; every configuration must have it; restore it.")
        value = config[name]
        if isinstance(setting, _Section):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{full}: must be a section of settings, got {value!r}; set {full}.<name>=<value>.")
            require_settings(value, setting, f"{full}.")
        elif not setting.fits(value):
            raise ConfigError(f"{full}={value!r} {setting.complaint}.")


def require_plain(config: object) -> None:
    """Reject a saved configuration that holds anything but plain keys and values.

    An interpolation in it would be resolved, and so could read the environment of whoever evaluates or resumes the run;
    a list that contains itself is endless.

    Raises:
        ConfigError: the configuration holds an interpolation or a value of another type, or is too large or too deep.
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
                f"{path}: a saved configuration must hold plain values, got the interpolation {value!r}; write "
                "the value."
            )
        if isinstance(value, dict | list | tuple):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            below += [(f"{path}.{key}" if path else str(key), item, depth + 1) for key, item in items]
        elif not isinstance(value, str | int | float | None):
            raise ConfigError(f"{path}: a value must be text or a number, got {type(value).__name__}; restore it.")


def suggest_own(key: str, is_known: Callable[[str], bool]) -> str:
    """Return a hint for a key of other training programs; empty if there is none or our name for it is not known."""
    if key == "experiment":  # a config group, which sets no key of this name
        return " An experiment's file begins with the line: # @package _global_"
    own = [name for name, others in _OTHER_NAMES.items() if is_known(name) and key in others.split()]
    if "resume" in own:
        return (
            " resume=<folder of a run> goes on with a run; python eval.py ckpt=<file> evaluates a checkpoint; "
            "model.encoder_weights=<file> starts from weights."
        )
    return f" Did you mean {' or '.join(map(repr, own))}?" if own else ""


def _near(name: str, known: _Section, path: str) -> str:
    full = f"{path}{name}"
    own = suggest_own(full, lambda key: bool(path) or key.partition(".")[0] in known.settings)
    return own or did_you_mean(full, [f"{path}{other}" for other in known.settings])
