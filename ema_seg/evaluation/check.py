"""Checks of the settings of an evaluation."""

from collections.abc import Mapping
from typing import Any

from ema_seg.config import EVALUATION_SECTION, require_settings
from ema_seg.inference import autocast

__all__ = ["check_settings"]


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check the settings of an evaluation, as far as that is possible without its machine.

    A training calls this before it starts, so that its evaluation does not fail for an invalid setting.

    Raises:
        ConfigError: a setting is missing, unknown or invalid.
    """
    require_settings(settings, EVALUATION_SECTION, "evaluation.")
    autocast("cpu", settings["precision"])  # raises for an unknown precision
