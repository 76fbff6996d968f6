"""Exported models: an artefact with its metadata, run by its own software as a module of PyTorch."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from segmentation_models_pytorch.base.heads import SegmentationHead as SmpHead
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from ema_seg.data.normalise import Normalise
from ema_seg.models.checkpoint import check_contents
from ema_seg.models.head import SegmentationHead
from ema_seg.runtime.errors import CheckpointError, ConfigError, one_line
from ema_seg.runtime.extras import install_command

__all__ = ["METADATA_KEY", "SUFFIXES", "ExportedModel", "Metadata", "is_exported", "runs_on_cuda"]

Format = Literal["onnx", "torch", "openvino"]
Run = Callable[[Tensor], Tensor]

SUFFIXES: Mapping[Format, str] = {"onnx": ".onnx", "torch": ".pt2", "openvino": ".xml"}
METADATA_KEY = "ema_seg"
_SCHEMA = "ema-seg.export/1"


@dataclass(frozen=True)
class Metadata:
    """Metadata of an artefact, kept in its file as JSON.

    Attributes:
        format: name of the software that runs it.
        precision: fp32, fp16 or int8.
        processing: True if the artefact maps uint8 RGB B x H x W x 3 to class ids, uint8 B x H x W; False if it maps
            normalised float32 B x 3 x H x W, with H and W multiples of the stride, to logits B x K x H x W.
        stride: the model's stride.
        classes: the K class names.
        palette: their colours, (red, green, blue) from 0 to 255.
        config: configuration of the run without paths, with the normalisation in ``data.mean`` and ``data.std``.
        scores: of the run's own evaluation: ``miou``, ``images`` and ``split``; None if there is none.
        origin: ``checkpoint`` (its SHA-256), ``ema_seg`` and ``torch`` (versions).
    """

    format: Format
    precision: str
    processing: bool
    stride: int
    classes: list[str]
    palette: list[list[int]]
    config: dict[str, Any]
    scores: dict[str, Any] | None
    origin: dict[str, str]

    def as_json(self) -> str:
        """Serialise the metadata."""
        return json.dumps({"schema": _SCHEMA, **asdict(self)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | None, path: Path) -> "Metadata":
        """Read and check metadata.

        Raises:
            CheckpointError: there are none, or they are not those of this project.
        """
        refusal = f"{path}: has no metadata of ema-seg; give a file that ema-seg export wrote."
        try:
            content = json.loads(text or "null")
        except ValueError as error:
            raise CheckpointError(refusal) from error
        if not isinstance(content, dict) or content.get("schema") != _SCHEMA:
            raise CheckpointError(refusal)
        missing = [field.name for field in fields(cls) if field.name not in content]
        if missing or content["format"] not in SUFFIXES or type(content["stride"]) is not int:
            raise CheckpointError(f"{path}: its metadata are damaged; export the model again.")
        check_contents(path, {**content, "state_dict": {}})
        return cls(**{field.name: content[field.name] for field in fields(cls)})


def runs_on_cuda(path: Path) -> bool:
    """Return whether the software of an exported model, by its suffix, runs on CUDA here."""
    if path.suffix.lower() == ".onnx":
        with suppress(ImportError):
            import onnxruntime

            return "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    return path.suffix.lower() == ".pt2"


def is_exported(path: Path) -> bool:
    """Return whether a file is an exported model by its suffix."""
    return path.suffix.lower() in SUFFIXES.values()


class ExportedModel(nn.Module):
    """Model that runs an exported artefact.

    With ``metadata.processing`` the module takes bytes, B x 3 x H x W of any size, and its logits are highest at the
    artefact's class ids and say nothing else.

    Args:
        path: the artefact.
        device: device that the artefact runs on; tensors are copied to and from it.

    Attributes:
        metadata: see ``Metadata``.
        stride: number that height and width of the module's input must be multiples of.
        run: the artefact as a function of a tensor.

    Raises:
        CheckpointError: the file is missing, damaged or not one of this project.
        ConfigError: the software that runs it is not installed, or not for this device.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        super().__init__()
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; give a file that ema-seg export wrote.")
        open_artefact = {".onnx": _open_onnx, ".pt2": _open_torch, ".xml": _open_openvino}[path.suffix.lower()]
        text, self.run = open_artefact(path, torch.device(device))
        self.metadata = Metadata.from_json(text, path)
        self.stride = 1 if self.metadata.processing else self.metadata.stride
        if self.metadata.processing:
            self.head = _class_layer(len(self.metadata.classes))

    @property
    def normalise(self) -> Normalise:
        """The normalisation of the module's input."""
        data = self.metadata.config["data"]
        return _Bytes() if self.metadata.processing else Normalise(data["mean"], data["std"])

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits B x K x H x W of images B x 3 x H x W; see the class."""
        if not self.metadata.processing:
            return self.run(images).to(images.device)
        # Bytes as they are; the cost is measured on random numbers.
        ids = self.run(images.to(torch.uint8).permute(0, 2, 3, 1))
        return self.head(ids[:, None].float().to(images.device))


class _Bytes(Normalise):
    """The normalisation of an artefact that normalises itself: none."""

    def __init__(self) -> None:
        super().__init__((0, 0, 0), (1, 1, 1))

    def __call__(self, images: Tensor, *_: object) -> Tensor:
        """Return the images unchanged."""
        return images


def _class_layer(classes: int) -> SegmentationHead:
    """Return a head whose logits -(k - id)^2 + id^2 are highest at k = id."""
    head = SegmentationHead(SmpHead(1, classes, kernel_size=1))
    ids = torch.arange(classes, dtype=torch.float32)
    conv = head.last_conv
    assert conv is not None and conv.bias is not None
    with torch.no_grad():
        conv.weight.copy_(2 * ids[:, None, None, None])
        conv.bias.copy_(-ids.square())
    return head.requires_grad_(False)


def _open_onnx(path: Path, device: torch.device) -> tuple[str | None, Run]:
    try:
        import onnxruntime
    except ImportError as error:
        raise _not_installed(path, "onnxruntime") from error
    providers = ["CPUExecutionProvider"]
    if device.type == "cuda":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise ConfigError(f"device={device}: this onnxruntime has no CUDA; install onnxruntime-gpu, or use cpu.")
        providers.insert(0, "CUDAExecutionProvider")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's own types
        raise _damaged(path, error) from error
    (name,) = (item.name for item in session.get_inputs())

    def run(images: Tensor) -> Tensor:
        (output,) = session.run(None, {name: _as_array(images)})
        return torch.from_numpy(output)

    return session.get_modelmeta().custom_metadata_map.get(METADATA_KEY), run


def _open_torch(path: Path, device: torch.device) -> tuple[str | None, Run]:
    extra = {METADATA_KEY: ""}
    try:
        program = torch.export.load(path, extra_files=extra)
    except Exception as error:
        raise _damaged(path, error) from error
    if device.type != "cpu":
        program = move_to_device_pass(program, device)  # the graph creates tensors on the device of its tracing
    # Some guards refuse images of a single cell of the smallest map, though the graph holds for them.
    module = program.module(check_guards=False).to(device)
    return extra[METADATA_KEY], lambda images: module(images.to(device))


def _open_openvino(path: Path, device: torch.device) -> tuple[str | None, Run]:
    try:
        import openvino
    except ImportError as error:
        raise _not_installed(path, "OpenVINO") from error
    if device.type == "cuda":
        raise ConfigError(f"device={device}: OpenVINO does not run on CUDA; use cpu.")
    core = openvino.Core()
    try:
        model = core.read_model(path)
        text = str(model.get_rt_info(METADATA_KEY).value) if model.has_rt_info(METADATA_KEY) else None
        # By default some CPUs compute in bfloat16.
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        compiled = core.compile_model(model, "CPU", settings)
    except Exception as error:
        raise _damaged(path, error) from error
    return text, lambda images: torch.from_numpy(compiled(_as_array(images))[0].copy())


def _as_array(images: Tensor) -> np.ndarray:
    return np.ascontiguousarray(images.cpu().numpy())


def _not_installed(path: Path, software: str) -> ConfigError:
    return ConfigError(f"{path}: {software}, which runs it, is not installed; run {install_command('export')}.")


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read ({one_line(error)[:300]}); give a file that ema-seg export wrote.")
