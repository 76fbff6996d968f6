"""Tests of exported models: written, read, and compared with the model."""

import contextlib
import json
import sys

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import ema_seg
from ema_seg.inference import segmenter as segmenter_module
from ema_seg.inference.export import AdaptiveAveragePooling, _same_padding_of_multiples, check_export, write_artefact
from ema_seg.inference.exported import ExportedModel, Metadata
from ema_seg.inference.loading import load_model
from ema_seg.inference.prediction import predict, segment
from ema_seg.models import build_segmenter
from ema_seg.runtime.errors import CheckpointError, ConfigError
from tests.inference.conftest import CLASSES, NORMALISE, PALETTE

ENCODER = "tu-test_efficientnet"
CONFIG = {
    "model": {"decoder": "linknet", "encoder": ENCODER, "encoder_weights": None},
    "attention": {"name": "ema", "factor": "auto"},
    "placement": {"encoder": False, "decoder": False, "head": True, "encoder_stages": None},
    "data": {"mean": list(NORMALISE.mean), "std": list(NORMALISE.std)},
    "trainer": {},
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    options = {"attention": "ema", "attention_options": {"factor": "auto"}, "placements": ("head",)}
    model = build_segmenter("linknet", classes=3, encoder=ENCODER, **options).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


@pytest.fixture(scope="module", autouse=True)
def _imported_outside_the_capture():
    # NNCF's loggers, and absl's beneath, keep the streams of their import. absl would close those of pytest's capture.
    with contextlib.redirect_stdout(sys.__stdout__), contextlib.redirect_stderr(sys.__stderr__):
        import nncf  # noqa: F401


@pytest.fixture(scope="module")
def export(model, one_trace, tmp_path_factory):
    """Return a function that exports the model once for each of its arguments."""
    written = {}

    def artefact_of(form, precision="fp32", *, processing=True):
        key = form, precision, processing
        if key not in written:
            colours = [list(colour) for colour in PALETTE]
            metadata = Metadata(*key, 32, list(CLASSES), colours, CONFIG, {"miou": 0.5}, {"ema_seg": "0.1.0"})
            shape = (1, 64, 96, 3) if processing else (1, 3, 64, 96)
            images = [np.random.default_rng(seed).integers(0, 256, shape, np.uint8) for seed in range(3)]
            if not processing:
                images = [(image / 128 - 1).astype(np.float32) for image in images]
            folder = tmp_path_factory.mktemp("artefact")
            written[key] = write_artefact(folder, model, NORMALISE, metadata, lambda: iter(images))
        return written[key]

    return artefact_of


def random_images(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]


@pytest.mark.slow
def test_masks_are_those_of_the_model_at_any_size(model, export):
    artefact = ExportedModel(export("onnx"))

    for images in (random_images((96, 128)), random_images((70, 33), (70, 33)), random_images((200, 65))):
        expected = segment(model, images, 32, NORMALISE)
        found = segment(artefact, images, artefact.stride, artefact.normalise)
        equal = [float((own == other).float().mean()) for own, other in zip(expected, found, strict=True)]
        assert min(equal) > 0.999
        assert torch.unique(torch.stack(expected)).numel() > 1


@pytest.mark.slow
@torch.no_grad()
def test_logits_are_those_of_the_model(model, export):
    artefact = ExportedModel(export("torch", processing=False))

    for images in (random_images((96, 128)), random_images((70, 33), (70, 33))):
        expected = predict(model, images, 32, NORMALISE)
        found = predict(artefact, images, artefact.stride, artefact.normalise)
        for own, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other.whole(), own.whole(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "precision"), [("onnx", "int8"), ("openvino", "int8"), ("torch", "fp16")])
def test_lower_precisions_are_close(model, export, form, precision):
    artefact = ExportedModel(export(form, precision, processing=False))
    images = random_images((64, 96))

    (expected,) = segment(model, images, 32, NORMALISE)
    (found,) = segment(artefact, images, artefact.stride, artefact.normalise)

    equal = float((expected == found).float().mean())
    assert equal > 0.98 if precision == "fp16" else 0.7 < equal < 1  # below 1, or it is not quantised


@pytest.mark.slow
def test_an_onnx_file_says_what_it_is(export):
    file = onnx.load(export("onnx"))

    (image,), (mask,) = file.graph.input, file.graph.output
    sizes = [[size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim] for value in (image, mask)]
    assert (image.name, mask.name) == ("image", "mask")
    assert sizes == [["batch", "height", "width", 3], ["batch", "height", "width"]]
    metadata = json.loads({item.key: item.value for item in file.metadata_props}["ema_seg"])
    assert metadata["classes"] == list(CLASSES) and metadata["palette"] == [list(colour) for colour in PALETTE]
    assert metadata["config"] == CONFIG and metadata["scores"] == {"miou": 0.5}
    # EMA is made of operators that every runtime has.
    assert {node.domain for node in file.graph.node} == {""}


@pytest.mark.slow
def test_an_exported_file_is_loaded_like_a_run(model, export, segmenter, monkeypatch):
    loaded = ema_seg.load(export("onnx"))
    picture = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    segmenter = segmenter_module.Segmenter(model, classes=CLASSES, palette=PALETTE, normalise=NORMALISE)

    assert np.mean(loaded(picture).mask == segmenter(picture).mask) > 0.999
    assert loaded.classes == CLASSES and loaded.palette == PALETTE
    for option in ("probabilities", "weight_maps"):
        with pytest.raises(ConfigError, match=option):
            loaded(picture, **{option: True})
    with pytest.raises(ConfigError, match="an exported model computes as its file says"):
        ema_seg.load(export("onnx"), precision="bf16-mixed")
    monkeypatch.setattr(segmenter_module, "_MOST_PIXELS", 1000)
    monkeypatch.setattr(segmenter_module, "_LARGEST_WINDOW", 256)
    wide = np.random.default_rng(0).integers(0, 256, (70, 600, 3), np.uint8)
    assert np.mean(loaded(wide).mask == segmenter(wide).mask) > 0.98  # windows vote instead of adding logits


def test_files_that_ema_seg_did_not_write_are_refused(tmp_path):
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [value],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])],
    )
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, ir_version=10, opset_imports=opset), tmp_path / "foreign.onnx")
    for name in ("damaged.onnx", "damaged.pt2", "damaged.xml"):
        (tmp_path / name).write_text("no model")

    with pytest.raises(CheckpointError, match=r"foreign\.onnx: has no metadata of ema-seg"):
        ExportedModel(tmp_path / "foreign.onnx")
    for name in ("damaged.onnx", "damaged.pt2", "damaged.xml"):
        with pytest.raises(CheckpointError, match=f"{name}: cannot be read"):
            ExportedModel(tmp_path / name)
    with pytest.raises(CheckpointError, match="no such file"):
        ExportedModel(tmp_path / "missing.onnx")


@pytest.mark.slow
def test_a_program_of_torch_computes_on_the_device_that_is_asked_for(export):
    artefact = ExportedModel(export("torch", processing=False), "meta")  # whose tensors have no values

    logits = artefact.run(torch.zeros(2, 3, 96, 128))

    assert (logits.device.type, logits.shape) == ("meta", (2, 3, 96, 128))


@pytest.mark.slow
def test_without_cuda_in_the_software_a_model_runs_on_the_cpu_unless_cuda_is_asked_for(export, monkeypatch):
    monkeypatch.setattr("ema_seg.inference.loading.find_device", lambda *_: torch.device("cuda"))

    assert load_model(export("onnx"), "auto").device.type == "cpu"
    with pytest.raises(ConfigError, match="device=cuda: this onnxruntime has no CUDA"):
        load_model(export("onnx"), "cuda")


def test_metadata_are_checked(tmp_path):
    good = Metadata("onnx", "fp32", True, 32, list(CLASSES), [[0, 0, 0]] * 3, CONFIG, None, {})
    assert Metadata.from_json(good.as_json(), tmp_path) == good
    for change in ({"palette": [[0, 0, 300]] * 3}, {"classes": []}, {"stride": "32"}, {"config": {"model": 1}}):
        text = json.dumps(json.loads(good.as_json()) | change)
        with pytest.raises(CheckpointError):
            Metadata.from_json(text, tmp_path)


def test_torch_has_no_int8():
    with pytest.raises(ConfigError, match="precision=int8: format=torch has fp32, fp16"):
        check_export("torch", "int8")


@pytest.mark.parametrize("size", [(6, 6), (7, 11), (13, 4), (2, 3)])
def test_adaptive_pooling_as_products_is_adaptive_pooling(size):
    x = torch.randn(2, 5, *size, dtype=torch.float64)
    for cells in ((2, 2), (3, 3), (6, 6), (1, 4)):
        torch.testing.assert_close(AdaptiveAveragePooling(cells)(x), nn.AdaptiveAvgPool2d(cells)(x))


def test_the_fixed_padding_is_timms_on_multiples_of_the_stride():
    from timm.layers import Conv2dSame

    for kernel, stride, dilation in ((3, 2, 1), (5, 2, 1), (3, 1, 2), (1, 2, 1), (7, 4, 1)):
        conv = Conv2dSame(2, 3, kernel, stride, dilation=dilation)
        x = torch.randn(1, 2, 16, 24)
        expected = conv(x)
        with _same_padding_of_multiples():
            assert torch.equal(conv(x), expected)
