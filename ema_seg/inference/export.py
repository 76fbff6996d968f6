"""Export of a model: to an ONNX file, a program of torch.export or an OpenVINO model, with metadata inside.

Batch, height and width are dynamic. Attention blocks become plain operators.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ema_seg.data.normalise import Normalise
from ema_seg.inference.exported import METADATA_KEY, SUFFIXES, Format, Metadata
from ema_seg.models import model_stride
from ema_seg.runtime.errors import ConfigError, ModelError, one_line
from ema_seg.runtime.extras import install_command

__all__ = ["Deployable", "check_export", "write_artefact"]

_PRECISIONS: dict[Format, tuple[str, ...]] = {
    "onnx": ("fp32", "fp16", "int8"),
    "torch": ("fp32", "fp16"),
    "openvino": ("fp32", "fp16", "int8"),
}
_PACKAGES: dict[Format, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "torch": (),
    "openvino": ("onnx", "onnxscript", "openvino"),
}


class Deployable(nn.Module):
    """Segmenter with what surrounds it: as an artefact computes it.

    Args:
        model: segmenter in evaluation mode, on the CPU; it is copied.
        normalise: the normalisation that the model was trained with.
        processing: see ``Metadata``.
        dtype: dtype of the model; inputs and outputs keep theirs.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: nn.Module, normalise: Normalise, *, processing: bool, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.model = _exportable(copy.deepcopy(model)).to(dtype)
        self.stride = model_stride(model)
        self.processing = processing
        self.dtype = dtype
        for name, values in (("mean", normalise.mean), ("std", normalise.std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).mul_(255)[:, None, None])

    def forward(self, image: Tensor) -> Tensor:
        """Compute class ids or logits; see ``Metadata.processing``."""
        if not self.processing:
            logits: Tensor = self.model(image.to(self.dtype)).float()
            return logits
        pixels = (image.permute(0, 3, 1, 2).float() - self.mean) / self.std
        height, width = pixels.shape[2:]
        padded = functional.pad(pixels, (0, -width % self.stride, 0, -height % self.stride))
        ids = self.model(padded.to(self.dtype)).argmax(dim=1).to(torch.uint8)
        # Slices would ask whether the result is contiguous, and thereby fix sizes.
        rows, columns = (torch.arange(size, device=ids.device) for size in (height, width))
        return ids.index_select(1, rows).index_select(2, columns)

    def example(self) -> Tensor:
        """Return an input of the artefact."""
        height, width = 9 * self.stride, 11 * self.stride  # PAN pools the smallest map three times
        if self.processing:
            return torch.zeros(2, height - 3, width - 5, 3, dtype=torch.uint8)
        return torch.zeros(2, 3, height, width)

    def dynamic_sizes(self) -> dict[int, Any]:
        """Return which dimensions of the input are dynamic, as ``torch.export.export`` takes them."""
        if self.processing:
            return dict.fromkeys((0, 1, 2), torch.export.Dim.DYNAMIC)
        batch, height, width = map(torch.export.Dim, ("batch", "height", "width"))
        return {0: batch, 2: self.stride * height, 3: self.stride * width}


def check_export(form: Format, precision: str) -> None:
    """Check that a format has a precision, and that its software is installed.

    Raises:
        ConfigError: it has not, or is not.
    """
    if precision not in _PRECISIONS[form]:
        raise ConfigError(
            f"precision={precision}: format={form} has {', '.join(_PRECISIONS[form])}; choose one of them, or "
            "format=onnx or openvino."
        )
    packages = [*_PACKAGES[form], *["nncf"] * (precision == "int8")]
    for package in packages:
        try:
            __import__(package)
        except ImportError as error:
            raise ConfigError(
                f"format={form}, precision={precision}: {package} is not installed; run {install_command('export')}."
            ) from error


def write_artefact(
    folder: Path,
    model: nn.Module,
    normalise: Normalise,
    metadata: Metadata,
    calibration: Callable[[], Iterator[NDArray[Any]]],
) -> Path:
    """Write an artefact, ``model`` with its format's suffix.

    Args:
        folder: folder that exists.
        model: segmenter in evaluation mode, on the CPU.
        normalise: the normalisation that the model was trained with.
        metadata: metadata of the artefact, which also say what it is.
        calibration: yields inputs of the artefact, to calibrate int8.

    Raises:
        ModelError: the model cannot be exported.
    """
    path = folder / f"model{SUFFIXES[metadata.format]}"
    half = metadata.precision == "fp16" and metadata.format != "openvino"
    dtype = torch.float16 if half else torch.float32
    deployable = Deployable(model, normalise, processing=metadata.processing, dtype=dtype).eval()
    try:
        program = _trace(deployable)
        if metadata.format == "torch":
            torch.export.save(program, path, extra_files={METADATA_KEY: metadata.as_json()})
            return path
        file = folder / "model.onnx"
        _save_onnx(program, file, metadata)
    except Exception as error:  # torch.export and its ONNX exporter each raise their own types
        raise ModelError(
            f"the model of {metadata.config['model']['decoder']} and {metadata.config['model']['encoder']} with "
            f"attention={metadata.config['attention']['name']} cannot be exported ({one_line(error)[:300]})."
        ) from error
    if metadata.format == "openvino":
        _convert_to_openvino(file, path, metadata, calibration)
        file.unlink()
    elif metadata.precision == "int8":
        import onnx

        onnx.save(_quantise(onnx.load(file), [{"image": image} for image in calibration()]), file)
    return path


def _trace(deployable: Deployable) -> torch.export.ExportedProgram:
    with torch.no_grad(), _same_padding_of_multiples():
        return torch.export.export(
            deployable, (deployable.example(),), dynamic_shapes=(deployable.dynamic_sizes(),), strict=False
        )


@contextmanager
def _same_padding_of_multiples() -> Iterator[None]:
    """Have timm's "same" padding assume that sizes are multiples of the stride, which padding to the stride ensures.

    For other sizes it depends on the size, and symbolic sizes then grow with each layer: a trace takes hours.
    """

    def same_padding(size: int, kernel: int, stride: int, dilation: int) -> int:
        return max((kernel - 1) * dilation + 1 - stride, 0)

    with patch("timm.layers.padding.get_same_padding", same_padding):
        yield


class AdaptiveAveragePooling(nn.Module):
    """``nn.AdaptiveAvgPool2d`` as two matrix products, whose graph holds for any size of the input."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Average x (B, C, H, W) over the cells of a grid."""
        rows, columns = (_shares(length, cells, x) for length, cells in zip(x.shape[2:], self.size, strict=True))
        return rows @ x @ columns.T


def _shares(length: int, cells: int, like: Tensor) -> Tensor:
    """Return the share of each of ``length`` values in the mean of each cell."""
    index, place = torch.arange(cells, device=like.device)[:, None], torch.arange(length, device=like.device)
    first, last = index * length // cells, ((index + 1) * length + cells - 1) // cells
    inside = (place >= first) & (place < last)
    return (inside / (last - first)).to(like.dtype)


def _exportable(model: nn.Module) -> nn.Module:
    """Replace, in place, modules whose graph would hold for one size alone."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.AdaptiveAvgPool2d):
            size: Any = module.output_size
            height, width = (size, size) if isinstance(size, int) else size
            if (height, width) != (1, 1) and height and width:
                model.set_submodule(name, AdaptiveAveragePooling((height, width)))
    return model


def _save_onnx(program: torch.export.ExportedProgram, path: Path, metadata: Metadata) -> None:
    import onnx

    output = "mask" if metadata.processing else "logits"
    exported = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["image"], output_names=[output])
    assert exported is not None
    exported.save(path)
    model = onnx.load(path)
    sizes = ("batch", "height", "width", "3") if metadata.processing else ("batch", "3", "height", "width")
    for value in (*model.graph.input, *model.graph.output):
        for size, name in zip(value.type.tensor_type.shape.dim, sizes, strict=False):
            if size.dim_param:
                size.dim_param = name
    onnx.helper.set_model_props(model, {METADATA_KEY: metadata.as_json()})
    onnx.save(model, path)


def _quantise(model: Any, inputs: Sequence[Any]) -> Any:
    """Quantise a model of onnx or OpenVINO statically, calibrated on inputs as its software takes them."""
    import nncf

    return nncf.quantize(model, nncf.Dataset(inputs), subset_size=len(inputs))


def _convert_to_openvino(
    onnx: Path, path: Path, metadata: Metadata, calibration: Callable[[], Iterator[NDArray[Any]]]
) -> None:
    import openvino

    model = openvino.convert_model(onnx)
    if metadata.precision == "int8":
        model = _quantise(model, list(calibration()))
    model.set_rt_info(metadata.as_json(), [METADATA_KEY])
    openvino.save_model(model, path, compress_to_fp16=metadata.precision == "fp16")
