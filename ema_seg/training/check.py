"""What can be said against a configuration before anything of it is trained."""

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from ema_seg.data import SegmentationDataModule
from ema_seg.errors import ConfigError
from ema_seg.models import segmenter_from_config

__all__ = ["check_config", "check_seed"]

# Of a model's parts only the head depends on the number of classes, which is not known without the data.
_CLASSES = 2


def check_config(config: Mapping[str, Any]) -> None:
    """Build the model without its pretrained weights, and the augmentation, as ``fit`` would.

    What has been built before in this process is not built again, so that a sweep's seeds cost nothing.

    Args:
        config: the resolved configuration of ``train.py``; the mean and deviation of the data may be None.

    Raises:
        EmaSegError: what the user has to correct.
    """
    check_seed(config["seed"])
    _check_data(json.dumps(config["data"]))
    _check_model(json.dumps({key: config[key] for key in ("model", "attention", "placement")}))


def check_seed(seed: Any) -> None:
    """A ConfigError if this is no seed."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed!r} is no whole number from 0 to 4294967295.")


@cache
def _check_data(text: str) -> None:
    settings = json.loads(text)
    settings |= {key: settings[key] or [0.5, 0.5, 0.5] for key in ("mean", "std")}
    SegmentationDataModule(**settings)


@cache
def _check_model(text: str) -> None:
    segmenter_from_config(json.loads(text), _CLASSES, pretrained=False)
