"""Optimisers and learning-rate schedules."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ema_seg.runtime.errors import ConfigError

__all__ = ["build_optimizer", "build_schedule"]

_OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adamw": AdamW, "sgd": SGD}


def build_optimizer(
    model: nn.Module, /, *, name: str, lr: float, encoder_lr_factor: float, weight_decay: float, **options: Any
) -> Optimizer:
    """Build an optimiser with a separate learning rate for the encoder, and no weight decay for norms and biases.

    Args:
        model: a segmenter, whose encoder's parameters are named ``encoder.…``.
        name: ``"adamw"`` or ``"sgd"``.
        lr: learning rate of everything but the encoder. Attention blocks on the encoder's features count as
            new layers and learn at this rate too.
        encoder_lr_factor: the encoder's rate is this times ``lr``.
        weight_decay: decay of the weights with two or more dimensions.
        **options: further options of the torch optimiser, such as ``momentum`` or ``betas``.

    Raises:
        ConfigError: a name, an option or a value is not valid.
    """
    if name not in _OPTIMIZERS:
        raise ConfigError(f"optimizer.name: unknown optimiser {name!r}; choose among {', '.join(_OPTIMIZERS)}.")
    for option, value in {"lr": lr, "encoder_lr_factor": encoder_lr_factor, "weight_decay": weight_decay}.items():
        if not isinstance(value, int | float):
            raise ConfigError(f"optimizer.{option} must be a number, got {value!r}.")
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (_is_encoder(parameter_name), parameter.ndim >= 2)
            groups.setdefault(key, []).append(parameter)
    settings = [
        {
            "params": parameters,
            "lr": lr * (encoder_lr_factor if encoder else 1.0),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (encoder, decays), parameters in groups.items()
    ]
    try:
        return _OPTIMIZERS[name](settings, lr=lr, **options)
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"optimizer: torch refuses these settings of {name}: {error}.") from error


def _is_encoder(parameter_name: str) -> bool:
    return parameter_name.startswith("encoder.") and not parameter_name.startswith("encoder.attention.")


def _poly(progress: float, power: float = 0.9) -> float:
    return (1.0 - progress) ** power


def _cosine(progress: float, final_factor: float = 0.0) -> float:
    return final_factor + (1.0 - final_factor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _constant(progress: float) -> float:
    return 1.0


_SCHEDULES: dict[str, Callable[..., float]] = {"poly": _poly, "cosine": _cosine, "constant": _constant}


def build_schedule(
    optimizer: Optimizer, total_steps: int, /, *, name: str, warmup_steps: int | float = 0, **options: Any
) -> LambdaLR:
    """Build a learning-rate schedule, to be stepped after every optimiser step.

    Args:
        optimizer: the optimiser; the learning rates of its groups are the peaks.
        total_steps: number of optimiser steps of the whole training.
        name: ``"poly"`` (option ``power``), ``"cosine"`` (option ``final_factor``) or ``"constant"``.
        warmup_steps: number of steps over which the rate rises linearly to its peak; a value below 1 is a
            share of ``total_steps``.
        **options: options of the named schedule.

    Raises:
        ConfigError: a name, an option or a value is not valid.
    """
    if name not in _SCHEDULES:
        raise ConfigError(f"schedule.name: unknown schedule {name!r}; choose among {', '.join(_SCHEDULES)}.")
    decay = _SCHEDULES[name]
    known = [key for key in inspect.signature(decay).parameters if key != "progress"]
    for key in options:
        if key not in known:
            raise ConfigError(f"schedule.{key}: {name} has no such option; it has {', '.join(known) or 'none'}.")
    if not isinstance(warmup_steps, int | float) or not math.isfinite(warmup_steps):
        raise ConfigError(f"schedule.warmup_steps must be a finite number, got {warmup_steps!r}.")
    _check_decay(name, decay, options)
    warmup = round(warmup_steps * total_steps) if 0 < warmup_steps < 1 else int(warmup_steps)
    if not 0 <= warmup <= total_steps:
        raise ConfigError(
            f"schedule.warmup_steps must be from 0 to {total_steps}, the steps of the training, got {warmup_steps}."
        )
    return LambdaLR(optimizer, lambda step: _factor(step, total_steps, warmup, decay, options))


def _check_decay(name: str, decay: Callable[..., float], options: Mapping[str, Any]) -> None:
    try:
        possible = all(decay(progress, **options) >= 0 for progress in (0.0, 0.5, 1.0))
    except (ArithmeticError, TypeError):
        possible = False
    if not possible:
        shown = ", ".join(f"schedule.{key}={value!r}" for key, value in options.items())
        raise ConfigError(
            f"{shown}: {name} must give a learning rate of 0 or more at every step; choose a positive number."
        )


def _factor(step: int, total_steps: int, warmup: int, decay: Callable[..., float], options: Mapping[str, Any]) -> float:
    if step < warmup:
        return (step + 1) / (warmup + 1)
    # Clamped because the scheduler computes one more rate after the last step.
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return decay(progress, **options)
