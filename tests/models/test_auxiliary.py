import copy

import pytest
import torch

from ema_seg.evaluation.cost import count_macs
from ema_seg.models import build_segmenter, decoder_names
from ema_seg.models.auxiliary import add_auxiliary_head, auxiliary_logits
from ema_seg.models.head import row_logits
from ema_seg.models.placement import PLACEMENTS
from tests.models.test_build import LIGHT, build

# The stage that the head is on and its stride, if they are not 4 and 16: PSPNet's encoder has three stages, and
# DeepLabV3's is dilated from the fourth on. A vision transformer's maps are outputs of its blocks.
STAGES = {"pspnet": (3, 8), "deeplabv3": (4, 8), "dpt": (3, 16)}


@pytest.mark.parametrize("decoder", decoder_names())
def test_the_head_is_on_the_stage_of_stride_16_of_every_decoder(decoder):
    options = {"attention": "ema", "attention_options": {"factor": "auto"}, "placements": PLACEMENTS}
    model = build(decoder, **options, **LIGHT.get(decoder, {}))
    plain = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()

    add_auxiliary_head(model, 3)

    assert torch.equal(torch.get_rng_state(), random)
    images = torch.randn(2, 3, 64, 128).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        if decoder == "pan":
            images = images.repeat(1, 1, 2, 1)
        logits = row_logits(model.to(memory_format=torch.channels_last).train(), images)
        auxiliary = auxiliary_logits(model)
    assert (model.auxiliary.stage, int(auxiliary.scale)) == STAGES.get(decoder, (4, 16))
    assert auxiliary.shape == logits.shape
    auxiliary.whole().float().square().mean().backward()
    assert any(parameter.grad is not None for parameter in model.encoder.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.auxiliary.parameters())
    assert {name for name in model.state_dict() if not name.startswith("auxiliary.")} == set(plain)


def test_evaluation_computes_nothing_of_it():
    model = build("fpn").eval()
    images = torch.randn(1, 3, 64, 64)
    expected, macs = model(images), count_macs(model, images)

    add_auxiliary_head(model, 3)

    assert torch.equal(model.eval()(images), expected)
    assert count_macs(model, images) == macs
    assert auxiliary_logits(model) is None
    assert auxiliary_logits(build("fpn")) is None


def test_logits_are_those_of_the_last_pass_and_taken_once():
    model = build("fpn")
    add_auxiliary_head(model, 3)
    averaged = copy.deepcopy(model)
    model.train()(torch.randn(2, 3, 64, 64))

    assert auxiliary_logits(averaged) is None  # its own hook fills its own head
    assert auxiliary_logits(model) is not None
    assert auxiliary_logits(model) is None
    averaged.train()(torch.randn(2, 3, 64, 64))
    assert auxiliary_logits(model) is None
    assert auxiliary_logits(averaged) is not None


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_logits():
    model = build_segmenter("linknet", classes=3, encoder="tu-test_resnet")
    add_auxiliary_head(model, 3)
    model.auxiliary.layers[3].p = 0.0
    images = torch.randn(2, 3, 64, 64)
    model.train()(images)
    expected = auxiliary_logits(model)

    model.compile(backend="eager", dynamic=False)
    for _ in range(2):
        model(images)
        assert torch.allclose(auxiliary_logits(model).features, expected.features)
