"""Optimisers and learning-rate schedules, both by timm's names."""

import inspect
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import timm.optim
import timm.scheduler
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ema_seg.models.placement import parameter_stages
from ema_seg.runtime.errors import ConfigError, did_you_mean, one_line

__all__ = ["build_optimizer", "build_schedule"]

# Arguments of timm's schedules that ``build_schedule`` sets itself.
_OWN_ARGUMENTS = ("optimizer", "t_initial", "lr_min", "t_in_epochs", "initialize")
# Options in optimiser steps; below 1 they are fractions of all steps.
_STEP_OPTIONS = ("decay_t", "stable_timescale", "noise_range_t")
# Noise of timm's schedules stays below the rate itself, and so below twice the peak.
_LARGEST_FACTOR = 2.0


def build_optimizer(
    model: nn.Module,
    /,
    *,
    name: str,
    lr: float,
    encoder_lr_factor: float,
    weight_decay: float,
    layer_decay: float | None = None,
    stages: Mapping[str, int] | None = None,
    later: Collection[str] = (),
    **options: Any,
) -> Optimizer:
    """Build an optimiser with learning rates by depth, and no weight decay for norms and biases.

    Args:
        model: a segmenter, whose encoder's parameters are named ``encoder.…``.
        name: a name that ``timm.optim.list_optimizers`` lists, such as ``"adamw"``.
        lr: learning rate of everything but the encoder. Attention blocks on the encoder's features count as
            new layers and learn at this rate too.
        encoder_lr_factor: the encoder's rate is this times ``lr``.
        weight_decay: decay of the weights with two or more dimensions.
        layer_decay: factor of the rate for each stage of the encoder between a parameter and the decoder: the last
            stage learns at ``layer_decay`` times the encoder's rate, the stage before at its square (BEiT,
            https://arxiv.org/abs/2106.08254). None for no such factor.
        stages: result of ``parameter_stages``; None to compute it here if ``layer_decay`` needs it.
        later: names of frozen parameters that will train later, and so belong to the groups.
        **options: further options of the optimiser, such as ``momentum`` or ``betas``.

    Raises:
        ConfigError: a name, an option or a value is not valid.
    """
    _check_optimizer_name(name)
    for option, value in {"lr": lr, "encoder_lr_factor": encoder_lr_factor, "weight_decay": weight_decay}.items():
        if not isinstance(value, int | float):
            raise ConfigError(f"optimizer.{option} must be a number, got {value!r}.")
    _check_options(name, options)
    distances = _distances(model, stages) if layer_decay is not None else {}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad or parameter_name in later:
            factor = encoder_lr_factor if _is_encoder(parameter_name) else 1.0
            if layer_decay is not None:
                factor *= layer_decay ** distances.get(parameter_name, 0)
            groups.setdefault((factor, parameter.ndim >= 2), []).append(parameter)
    settings = [
        {"params": parameters, "lr": lr * factor, "weight_decay": weight_decay if decays else 0.0}
        for (factor, decays), parameters in groups.items()
    ]
    try:
        return timm.optim.create_optimizer_v2(settings, name, lr=lr, **options)
    except (AssertionError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"optimizer: torch refuses these settings of {name}: {one_line(error)}.") from error


def _check_optimizer_name(name: str) -> None:
    known = [str(optimizer) for optimizer in timm.optim.list_optimizers()]
    if name not in known:
        hint = did_you_mean(name, known, most=3)
        raise ConfigError(f"optimizer.name={name!r}: timm has no such optimiser; correct it.{hint}")
    if timm.optim.get_optimizer_info(name).second_order:
        raise ConfigError(
            f"optimizer.name={name}: needs second derivatives, which the training does not compute; choose another."
        )


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    """Reject options that the optimiser does not have: timm leaves some of them out silently."""
    try:
        optimizer = timm.optim.get_optimizer_class(name, bind_defaults=False)
    except (AssertionError, ImportError) as error:
        raise ConfigError(f"optimizer.name={name}: cannot be used here ({one_line(error)}); choose another.") from error
    parameters = inspect.signature(optimizer).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters if parameter.name not in ("params", "lr", "weight_decay")]
    for option in options:
        if option not in known:
            raise ConfigError(
                f"optimizer.{option}: {name} has no such option; it has {', '.join(known)}."
                f"{did_you_mean(option, known)}"
            )


def _is_encoder(parameter_name: str) -> bool:
    return parameter_name.startswith("encoder.") and not parameter_name.startswith("encoder.attention.")


def _distances(model: nn.Module, stages: Mapping[str, int] | None) -> dict[str, int]:
    """Count the stages from each of the encoder's parameters to the decoder: 1 for the last stage."""
    stages = parameter_stages(model) if stages is None else stages
    deepest = max(stages.values(), default=0)
    return {name: deepest + 1 - stage for name, stage in stages.items()}


def _schedules() -> dict[str, Callable[..., Any]]:
    """Return the classes of timm's schedules by name.

    Without plateau: it follows a score instead of the step, and its state is in no checkpoint, so that a resumed run
    would learn at other rates. timm has deprecated it.
    """
    end = "LRScheduler"
    found = {name: value for name, value in vars(timm.scheduler).items() if name.endswith(end)}
    known = {name.removesuffix(end).lower(): value for name, value in found.items()}
    known.pop("plateau", None)
    return known


def build_schedule(
    optimizer: Optimizer, total_steps: int, /, *, name: str, warmup_steps: int | float = 0, **options: Any
) -> LambdaLR:
    """Build a learning-rate schedule, to be stepped after every optimiser step.

    The schedule is timm's, as a function of the step; its rate is a factor of each group's own peak.

    Args:
        optimizer: the optimiser; the learning rates of its groups are the peaks.
        total_steps: number of optimiser steps of the whole training.
        name: ``"constant"``, or a schedule of ``timm.scheduler`` but plateau: ``"cosine"``, ``"poly"``, ``"step"``,
            ``"multistep"``, ``"tanh"``, ``"wsd"``.
        warmup_steps: number of steps over which the rate rises linearly to its peak, before timm's schedule starts; a
            value below 1 is a share of ``total_steps``.
        **options: options of timm's class, such as ``power``. ``final_factor`` is its ``lr_min`` as a factor of the
            peak. Steps (``decay_t``, …) below 1 are shares of the steps after the warm-up. ``cycle_limit`` cycles share
            these steps.

    Raises:
        ConfigError: a name, an option or a value is not valid.
    """
    if not isinstance(warmup_steps, int | float) or not math.isfinite(warmup_steps):
        raise ConfigError(f"schedule.warmup_steps must be a finite number, got {warmup_steps!r}.")
    warmup = round(warmup_steps * total_steps) if 0 < warmup_steps < 1 else int(warmup_steps)
    known = _schedules()
    if name not in ("constant", *known):
        names = ["constant", *sorted(known)]
        raise ConfigError(
            f"schedule.name: unknown schedule {name!r}; choose among {', '.join(names)}.{did_you_mean(name, names)}"
        )
    decay = _constant if name == "constant" else _decay(name, known[name], max(1, total_steps - warmup), options)
    if name == "constant" and options:
        raise ConfigError(f"schedule.{next(iter(options))}: constant has no such option; it has none.")
    if not 0 <= warmup <= total_steps:
        raise ConfigError(
            f"schedule.warmup_steps must be from 0 to {total_steps}, the steps of the training, got {warmup_steps}."
        )
    # timm's own warm-up rises from one rate for all groups.
    return LambdaLR(
        optimizer, lambda step: (step + 1) / (warmup + 1) if step < warmup else decay(min(step, total_steps) - warmup)
    )


def _constant(step: int) -> float:
    return 1.0


def _decay(name: str, schedule: Callable[..., Any], steps: int, options: Mapping[str, Any]) -> Callable[[int], float]:
    """Return a schedule of timm as the factor of the peak at each step after the warm-up."""
    signature = inspect.signature(schedule).parameters
    known = [key for key in signature if key not in _OWN_ARGUMENTS and not key.startswith("warmup")]
    known += ["final_factor"] if "lr_min" in signature else []
    for key in options:
        if key not in known:
            raise ConfigError(
                f"schedule.{key}: {name} has no such option; it has {', '.join(known)}; choose a schedule with its own "
                f"options by schedule=<name>.{did_you_mean(key, known)}"
            )
    unit = SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    with _refusals(name, options):
        arguments = {key: _in_steps(value, steps) if key in _STEP_OPTIONS else value for key, value in options.items()}
        if "final_factor" in arguments:
            arguments["lr_min"] = arguments.pop("final_factor")
        if "t_initial" in signature:
            arguments["t_initial"] = _cycle_steps(steps, **_subset(arguments, "cycle_limit", "cycle_mul"))
        timm_schedule = schedule(unit, t_in_epochs=False, **arguments)

    def factor(step: int) -> float:
        timm_schedule.step_update(step)
        return unit.param_groups[0]["lr"]

    with _refusals(name, options):
        possible = all(0 <= factor(step) <= _LARGEST_FACTOR for step in (0, steps // 2, steps - 1, steps))
    if not possible:
        raise ConfigError(
            f"{_shown(options)}: {name} must give a learning rate from 0 to {_LARGEST_FACTOR:g} times its peak at each "
            "step; choose other numbers."
        )
    return factor


def _cycle_steps(steps: int, cycle_limit: int = 1, cycle_mul: float = 1.0) -> float:
    """Return the length of the first of ``cycle_limit`` cycles that fill the steps, each ``cycle_mul`` times longer."""
    return steps if cycle_limit == 1 else steps / sum(cycle_mul**cycle for cycle in range(cycle_limit))


def _subset(arguments: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: arguments[key] for key in keys if key in arguments}


def _in_steps(value: Any, steps: int) -> Any:
    if isinstance(value, list | tuple):
        return [_in_steps(item, steps) for item in value]
    return max(1, round(value * steps)) if isinstance(value, float) and 0 < value < 1 else value


@contextmanager
def _refusals(name: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Turn timm's errors about options into a ConfigError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{_shown(options) or 'schedule'}: timm refuses these settings of {name} ({one_line(error)}); correct them."
        ) from error


def _shown(options: Mapping[str, Any]) -> str:
    return ", ".join(f"schedule.{key}={value!r}" for key, value in options.items())
