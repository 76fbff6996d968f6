"""Two small segmenters with random weights, whose classes differ in order and number."""

import pytest
import torch

from ema_seg.demo.models import Model
from ema_seg.inference.segmenter import Segmenter
from ema_seg.models import build_segmenter
from tests.inference.conftest import CLASSES, NORMALISE, PALETTE


def make_model(name, classes, palette, attention, **options):
    model = build_segmenter(
        "linknet", classes=len(classes), encoder="tu-test_efficientnet", attention=attention, **options
    )
    torch.nn.init.normal_(model.segmentation_head[0].weight)  # else one class covers all pixels
    return Model(name, Segmenter(model.eval(), classes=classes, palette=palette, normalise=NORMALISE))


@pytest.fixture(scope="package")
def models():
    torch.manual_seed(0)
    return [
        make_model("with <ema>", CLASSES, PALETTE, "ema", attention_options={"factor": "auto"}),
        make_model("without", ("road", "sky", "car"), ((1, 2, 3), (4, 5, 6), (7, 8, 9)), "none"),
    ]
