import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.testing import assert_close

from ema_seg.attention import EMA
from ema_seg.data.normalise import Normalise
from ema_seg.inference.prediction import predict
from ema_seg.models import build_segmenter, encoder_normalisation, model_stride
from ema_seg.models.auxiliary import add_auxiliary_head, auxiliary_logits
from ema_seg.models.head import row_logits
from ema_seg.models.placement import PLACEMENTS
from ema_seg.models.vision_transformer import is_plain_transformer
from ema_seg.runtime.errors import ConfigError, ModelError

DINOV2, REGISTERS, DINOV3 = "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"
# Their blocks with few channels.
SMALL = {"embed_dim": 32, "num_heads": 2}
LIGHT = {
    "dpt": {"decoder_intermediate_channels": (16, 16, 16, 16), "decoder_fusion_channels": 16},
    "linear": {},
    "unet": {"decoder_channels": (32, 32, 16, 16, 16)},
    "fpn": {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 64},
    "upernet": {"decoder_channels": 32},
}
# The model's stride in patches, and the blocks of the placements "encoder" and "decoder".
EXPECTED = {"dpt": (2, 4, 4), "linear": (1, 1, 1), "unet": (2, 4, 5), "fpn": (2, 4, 4), "upernet": (2, 4, 3)}


def small(decoder, encoder=DINOV2, **arguments):
    torch.manual_seed(0)
    return build_segmenter(decoder, classes=3, encoder=f"tu-{encoder}", **{**SMALL, **LIGHT[decoder], **arguments})


@pytest.mark.parametrize("encoder", [DINOV2, REGISTERS, DINOV3])
@pytest.mark.parametrize("decoder", EXPECTED)
def test_every_placement_is_in_the_graph_of_every_decoder_at_any_size(decoder, encoder):
    options = {"attention": "ema", "attention_options": {"factor": "auto"}, "placements": PLACEMENTS}
    model = small(decoder, encoder, **options).to(memory_format=torch.channels_last)
    add_auxiliary_head(model, 3)
    patches, of_encoder, of_decoder = EXPECTED[decoder]
    stride = patches * (16 if encoder == DINOV3 else 14)
    assert model_stride(model) == stride

    for height, width in ((2 * stride, 3 * stride), (5 * stride, stride)):
        images = torch.randn(2, 3, height, width).contiguous(memory_format=torch.channels_last)
        logits, auxiliary = row_logits(model, images), auxiliary_logits(model)
        assert logits.shape == auxiliary.shape == (2, 3, height, width)
        (logits.whole().square().mean() + auxiliary.whole().square().mean()).backward()

    names = dict(model.named_modules())
    assert sum(isinstance(module, EMA) for module in names.values()) == of_encoder + of_decoder + 1
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    # smp's encoder of DPT keeps the norm after the last block, which DPT does not read.
    assert [name for name in unused if not (decoder == "dpt" and "encoder.model.norm." in name)] == []


@pytest.mark.parametrize("decoder", EXPECTED)
def test_images_of_any_size_are_segmented_at_their_size(decoder):
    model = small(decoder).eval()
    normalise = Normalise((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in ((45, 61), (28, 28), (1, 100))]

    with torch.inference_mode():
        logits = predict(model, images, model_stride(model), normalise)

        assert [tuple(found.whole().shape[2:]) for found in logits] == [(45, 61), (28, 28), (1, 100)]
        assert_close(logits[1].whole(), model(normalise(images[1][None])))


def test_dpt_takes_every_multiple_of_its_stride():
    """With an odd number of patches, the map of half the patches' resolution has no size to be added at."""
    model = build_segmenter("dpt", classes=2, encoder="tu-test_vit", **LIGHT["dpt"]).eval()
    assert model_stride(model) == 32
    assert model(torch.zeros(1, 3, 96, 32)).shape == (1, 2, 96, 32)


def test_the_pyramid_resamples_the_last_normalised_map():
    model = small("unet").eval()
    images = torch.randn(1, 3, 56, 84)

    with torch.inference_mode():
        found, last = model.encoder(images)
        _, empty, *levels = model.decoder.pyramid([found, last])
        tokens = model.encoder.model.forward_features(images)[:, 1:]

    assert found is images
    assert_close(last, tokens.transpose(1, 2).unflatten(2, (4, 6)))
    assert [tuple(level.shape) for level in (empty, *levels)] == [
        (1, 0, 28, 42),
        (1, 8, 16, 24),
        (1, 16, 8, 12),
        (1, 32, 4, 6),
        (1, 32, 2, 3),
    ]
    assert_close(levels[3], F.max_pool2d(last, 2))
    assert not any("pyramid" in name for name in smp.encoders.get_encoder_names())


@pytest.mark.parametrize("maps", [1, 4])
def test_the_linear_head_is_linear_in_the_normalised_maps(maps):
    model = small("linear", decoder_maps=maps).eval()
    images = torch.randn(1, 3, 28, 42)

    with torch.inference_mode():
        features = torch.cat(model.encoder(images)[1:], dim=1)
        assert features.shape == (1, 32 * maps, 2, 3)
        logits = model.segmentation_head[0](model.decoder.norm(features))
        expected = F.interpolate(logits, size=(28, 42), mode="bilinear", align_corners=True)
        assert_close(model(images), expected)
    new = [name for name, _ in model.named_parameters() if not name.startswith("encoder.")]
    assert new == ["decoder.norm.weight", "decoder.norm.bias", "segmentation_head.0.weight", "segmentation_head.0.bias"]


@pytest.mark.parametrize("decoder", ["linear", "unet", "dpt"])
def test_the_encoder_has_the_weights_of_a_file_of_timm(decoder, tmp_path):
    trained = timm.create_model(REGISTERS, **SMALL)
    save_file(trained.state_dict(), tmp_path / "dino.safetensors")

    model = small(decoder, REGISTERS, encoder_weights=str(tmp_path / "dino.safetensors"))

    weights = trained.state_dict()
    found = {name.removeprefix("encoder.model."): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    # All that is new learns at the decoder's rate.
    assert {name for name, _ in model.named_parameters() if name.startswith("encoder.")} == {
        f"encoder.model.{name}" for name, _ in trained.named_parameters()
    }


def test_normalisation_is_that_of_the_transformers_training():
    assert encoder_normalisation(f"tu-{DINOV2}", None).mean == (0.485, 0.456, 0.406)
    assert encoder_normalisation("tu-test_vit", None).mean == (0.5, 0.5, 0.5)


def test_plain_transformers_are_known_by_name():
    assert is_plain_transformer(f"tu-{DINOV2}")
    assert is_plain_transformer(f"tu-{DINOV3}.lvd1689m")
    assert not is_plain_transformer(DINOV2)
    assert not is_plain_transformer("tu-swin_tiny_patch4_window7_224")


@pytest.mark.parametrize(
    ("error", "decoder", "arguments", "message"),
    [
        (ConfigError, "pan", {}, r"model\.decoder=pan: reads .* model\.encoder=tu-vit_.*; choose model=dpt, linear"),
        (ConfigError, "dpt", {"encoder": "resnet18"}, r"model\.decoder=dpt: needs a plain vision transformer"),
        (ConfigError, "dpt", {"encoder": "tu-resnet18"}, r"model\.decoder=dpt: needs a plain vision transformer"),
        (ConfigError, "unet", {"encoder_depth": 4}, r"model\.encoder_depth=4: this option is fixed"),
        (ConfigError, "linear", {"dynamic_img_size": False}, r"model\.dynamic_img_size=False: this option is fixed"),
        (ModelError, "linear", {"decoder_maps": 0}, "decoder_maps must be a whole number of at least 1, got 0"),
        (ModelError, "linear", {"decoder_maps": 13}, "linear decoder cannot be built with .*, decoder_maps=13"),
        (
            ModelError,
            "linear",
            {"encoder": "resnet18", "decoder_maps": 2},
            "decoder_maps must be 1: only the maps of a vision transformer have one stride",
        ),
        (ModelError, "unet", {"no_such_option": 1}, "unet decoder cannot be built with .*no_such_option"),
    ],
)
def test_parts_that_do_not_fit_are_refused(error, decoder, arguments, message):
    with pytest.raises(error, match=message):
        build_segmenter(decoder, **{"classes": 2, "encoder": f"tu-{DINOV2}", **arguments})
