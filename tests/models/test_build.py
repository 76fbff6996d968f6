from functools import partial

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn
from torch.testing import assert_close

from ema_seg.attention import EMA, AblatedEMA, DynamicEMA
from ema_seg.models import build_segmenter, decoder_names, model_stride, segmenter_from_config
from ema_seg.models.placement import PLACEMENTS, place_attention
from ema_seg.runtime.errors import ConfigError, ModelError

# The lightest encoder of each decoder, if it is not tu-test_resnet.
ENCODERS = {"dpt": "tu-test_vit", "segformer": "mit_b0"}

# Fewer channels for decoders whose defaults take seconds.
LIGHT = {
    "deeplabv3": {"decoder_channels": 32},
    "dpt": {"decoder_intermediate_channels": (16, 16, 16, 16), "decoder_fusion_channels": 16},
    "unet": {"decoder_channels": (32, 32, 16, 16, 16)},
    "unetplusplus": {"decoder_channels": (32, 32, 16, 16, 16)},
    "upernet": {"decoder_channels": 32},
}

# Blocks that the placements "encoder" (feature maps that the decoder reads) and "decoder" add; "head" adds one.
EXPECTED_BLOCKS = {
    "unet": (5, 5),
    "unetplusplus": (5, 11),
    "manet": (5, 5),
    "linknet": (5, 5),
    "fpn": (4, 4),
    "pspnet": (1, 1),
    "pan": (4, 3),
    "deeplabv3": (1, 1),
    "deeplabv3plus": (2, 1),
    "upernet": (4, 3),
    "segformer": (4, 1),
    "dpt": (4, 4),
    "linear": (1, 1),
}


def encoder_of(decoder):
    return ENCODERS.get(decoder, "tu-test_resnet")


def build(decoder, **arguments):
    torch.manual_seed(0)
    return build_segmenter(decoder, classes=3, encoder=encoder_of(decoder), **arguments)


@pytest.mark.parametrize(
    ("decoder", "options"),
    [
        ("unet", {"in_channels": 1}),
        ("unet", {"aux_params": {"classes": 2}}),
        ("unet", {"activation": "softmax"}),
        ("fpn", {"upsampling": 2}),
        ("fpn", {"encoder_depth": 3}),
        ("pspnet", {"encoder_depth": 4}),
        ("unet", {"encoder": "tu-test_efficientnet", "checkpoint_path": "x"}),
        ("unet", {"encoder": "tu-test_efficientnet", "pretrained_cfg_overlay": {"file": "x"}}),
    ],
)
def test_what_is_decided_here_is_refused_by_name(decoder, options):
    *_, option = options
    with pytest.raises(ConfigError, match=rf"^model\.{option}=.*: this option is fixed: {decoder} takes RGB images"):
        build_segmenter(decoder, classes=2, **{"encoder": "resnet18", **options})


@pytest.mark.parametrize("option", ["classes", "attention", "placements", "encoder_stages", 1])
def test_what_is_set_elsewhere_is_no_option_of_a_model(option):
    config = {"model": {"decoder": "fpn", "encoder": "resnet18", option: 3}}
    with pytest.raises(ConfigError, match=rf"^model\.{option}: the decoder has no such option"):
        segmenter_from_config(config, 2)


def test_the_depth_of_an_encoder_can_be_chosen_where_the_size_follows_it():
    model = build_segmenter("unet", classes=2, encoder="resnet18", encoder_depth=3, decoder_channels=(16, 16, 8))
    assert model_stride(model) == 8
    assert model.eval()(torch.zeros(1, 3, 40, 48)).shape == (1, 2, 40, 48)


def test_the_table_covers_every_decoder_of_smp_and_ours():
    assert set(decoder_names()) == set(EXPECTED_BLOCKS) == {*smp.MODEL_ARCHITECTURES_MAPPING, "linear"}


@pytest.mark.parametrize("decoder", decoder_names())
def test_every_placement_is_in_the_graph_of_every_decoder(decoder):
    options = {"attention": "ema", "attention_options": {"factor": "auto"}, "placements": PLACEMENTS}
    model = build(decoder, **options, **LIGHT.get(decoder, {}))
    stride = model_stride(model)
    images = torch.randn(2, 3, 128, 192)  # not square; multiples of every stride

    logits = model(images)
    logits.square().mean().backward()

    blocks = [module for module in model.modules() if isinstance(module, EMA)]
    assert 128 % stride == 192 % stride == 0
    assert logits.shape == (2, 3, 128, 192)
    assert len(blocks) == sum(EXPECTED_BLOCKS[decoder]) + 1  # the head has one
    for block in blocks:
        for name, parameter in block.named_parameters():
            assert parameter.grad is not None, name
        # The gradient of the 3×3 branch is not zero even with one channel per group, whose softmax is constant.
        assert block.conv3x3.bias.grad.abs().sum() > 0


@pytest.mark.parametrize("decoder", smp.MODEL_ARCHITECTURES_MAPPING)
def test_none_is_plain_smp_bit_for_bit(decoder):
    ours = build(decoder, attention="none", placements=PLACEMENTS)
    torch.manual_seed(0)
    options = {"dynamic_img_size": True} if decoder == "dpt" else {}
    plain = smp.create_model(decoder, encoder_of(decoder), encoder_weights=None, classes=3, **options)
    images = torch.randn(1, 3, 128, 192)

    assert list(ours.state_dict()) == list(plain.state_dict())
    with torch.inference_mode():
        assert torch.equal(ours.eval()(images), plain.eval()(images))


def test_attention_leaves_the_other_weights_and_the_batch_statistics_as_they_were():
    plain = build("unet").state_dict()
    model = build("unet", attention="ema", attention_options={"factor": 4}, placements=PLACEMENTS)
    names = {
        name: name.replace("encoder.encoder.", "encoder.")
        .replace(".block.", ".")
        .replace("segmentation_head.head.", "segmentation_head.")
        for name in model.state_dict()
        if ".attention." not in name
    }

    for name, original in names.items():
        assert torch.equal(model.state_dict()[name], plain[original]), name
    assert set(names.values()) == set(plain)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


def test_placements_combine():
    model = build("unet", attention="se", attention_options={}, placements=PLACEMENTS, encoder_stages=[3, 5])

    assert list(model.encoder.attention) == ["3", "5"]
    assert all(hasattr(block, "attention") for block in model.decoder.blocks)
    assert hasattr(model.segmentation_head, "attention")
    assert model(torch.randn(1, 3, 64, 96).expand(2, -1, -1, -1)).shape == (2, 3, 64, 96)


def test_an_attention_block_changes_the_output():
    images = torch.randn(1, 3, 64, 64)
    plain = build("unet").eval()
    attended = build("unet", attention="ema", attention_options={"factor": 4}).eval()

    with torch.inference_mode():
        assert not torch.allclose(plain(images), attended(images))


def test_a_model_runs_in_channels_last_and_bfloat16():
    model = build("fpn", attention="ema", attention_options={"factor": "auto"}).eval()
    images = torch.randn(1, 3, 64, 96)
    expected = model(images)
    model.to(memory_format=torch.channels_last)

    with torch.autocast("cpu", torch.bfloat16):
        low = model(images.contiguous(memory_format=torch.channels_last))

    assert_close(model(images), expected, rtol=1e-3, atol=1e-4)
    assert_close(low.float(), expected, rtol=0.1, atol=0.05 * expected.abs().max().item())


def test_transformer_encoders_without_a_stride_2_map_are_handled():
    model = build_segmenter(
        "unetplusplus",
        classes=2,
        encoder="tu-convnext_atto",
        attention="se",
        placements=["encoder", "decoder"],
    )

    assert "1" not in model.encoder.attention
    assert model(torch.randn(2, 3, 64, 96)).shape == (2, 2, 64, 96)


def place_as_before(model, decoder, block):
    """Place blocks with the ``factor=auto`` of earlier versions: the largest divisor of the channels up to 32."""
    place_attention(
        model,
        decoder,
        lambda channels, _: block(channels, factor=max(n for n in range(1, 33) if channels % n == 0)),
        PLACEMENTS,
    )
    return model


@pytest.mark.parametrize(
    ("decoder", "block", "name", "options"),
    [
        ("unet", EMA, "ema", {}),
        ("pan", DynamicEMA, "ema_dynamic", {}),
        ("deeplabv3", partial(AblatedEMA, branches="pointwise"), "ema_ablated", {"branches": "pointwise"}),
    ],
)
def test_weights_tell_the_groups_that_auto_had(decoder, block, name, options, recwarn):
    light = LIGHT.get(decoder, {})
    before = place_as_before(build(decoder, **light), decoder, block)
    weights = before.state_dict()
    arguments = {"attention": name, "attention_options": {"factor": "auto", **options}, "placements": PLACEMENTS}
    recwarn.clear()

    model = build(decoder, **arguments, weights=weights, **light)

    assert not recwarn
    assert list(model.state_dict()) == list(weights)
    # A repeated run must start from the same random weights.
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    now = build(decoder, **arguments, **light).state_dict()
    assert any(tensor.shape != weights[key].shape for key, tensor in now.items())


@pytest.mark.parametrize("shape", [(3, 3, 3, 3), (0, 0, 3, 3), (2,)])
def test_weights_that_fit_no_block_leave_auto_as_it_is(shape):
    weights = {"segmentation_head.attention.conv3x3.weight": torch.zeros(shape)}
    options = {"attention": "ema", "attention_options": {"factor": "auto"}, "placements": ["head"], "weights": weights}
    model = build("unet", **options, **LIGHT["unet"])
    assert model.segmentation_head.attention.groups == 2


def test_options_reach_the_decoder():
    model = build("unet", decoder_channels=[64, 48, 32, 24, 8])

    assert model.segmentation_head[0].in_channels == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decoder": "unnet"}, r"unknown decoder 'unnet'.*Did you mean 'unet'"),
        ({"encoder": "resnet81"}, r"encoder 'resnet81'.*Did you mean.*resnet18"),
        ({"encoder": "tu-tf_efficientnet_lit0"}, r"'tu-tf_efficientnet_lit0'.*tu-tf_efficientnet_lite0"),
        ({"decoder_chanels": [1]}, r"model\.decoder_chanels: .*Did you mean 'decoder_channels'"),
        ({"attention": "emu"}, r"attention\.name: must be one of none, .*, got 'emu'"),
        ({"attention": "ema", "placements": []}, r"attention=ema is placed nowhere"),
        ({"attention": "ema", "encoder_stages": [2]}, r"encoder_stages=\[2\] has no effect"),
        ({"attention_options": {"factor": 3}}, r"attention\.factor: .*'none' has no such option"),
    ],
)
def test_unknown_names_are_config_errors(arguments, message):
    with pytest.raises(ConfigError, match=message):
        build_segmenter(**{"classes": 2, "encoder": "resnet18", **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"placements": ["neck"]}, "'neck' is unknown; choose among encoder, decoder, head"),
        ({"placements": ["encoder"], "encoder_stages": [1]}, "stage 1 of the encoder does not feed the fpn"),
        ({"attention_options": {"factor": 7}}, r"cannot split 128 channels into factor=7"),
        ({"decoder_interpolation": "abc"}, r"cannot run with encoder='resnet18', decoder_interpolation='abc'"),
        ({"decoder_interpolation": "ab", "attention": "none", "attention_options": {}}, "decoder_interpolation='ab'"),
        ({"decoder_pyramid_channels": -9}, r"cannot be built with encoder='resnet18', decoder_pyramid_channels=-9"),
    ],
)
def test_parts_that_do_not_fit_are_model_errors(arguments, message):
    settings = {
        "classes": 2,
        "encoder": "resnet18",
        "attention": "ema",
        "attention_options": {"factor": "auto"},
    }
    with pytest.raises(ModelError, match=message):
        build_segmenter("fpn", **(settings | arguments))


def test_a_configuration_describes_a_model():
    config = {
        "model": {"decoder": "fpn", "encoder": "resnet18", "encoder_weights": "missing-file.pth"},
        "attention": {"name": "ema", "factor": 2},
        "placement": {"encoder": False, "encoder_stages": None, "decoder": False, "head": True},
    }

    model = segmenter_from_config(config, 5, pretrained=False)

    assert isinstance(model.segmentation_head.attention, EMA)
    assert model.segmentation_head.attention.groups == 2
    assert model(torch.zeros(1, 3, 32, 64)).shape == (1, 5, 32, 64)
    assert isinstance(model, nn.Module)
