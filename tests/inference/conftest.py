"""A small segmenter with random weights."""

import pytest
import torch

from ema_seg.data.normalise import Normalise
from ema_seg.inference.segmenter import Segmenter
from ema_seg.models import build_segmenter

NORMALISE = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLASSES = ("sky", "road", "tree")
PALETTE = ((0, 0, 255), (128, 128, 128), (0, 255, 0))


@pytest.fixture(scope="module")
def segmenter():
    torch.manual_seed(0)
    model = build_segmenter(
        "linknet", classes=3, encoder="tu-test_efficientnet", attention="ema", attention_options={"factor": "auto"}
    )
    return Segmenter(model.eval(), classes=CLASSES, palette=PALETTE, normalise=NORMALISE)
