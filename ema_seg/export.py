"""The export, in the order in which it happens: a checkpoint becomes an artefact, which is verified before it is kept.

``ema_seg/cli/export.py`` leads from a command line to ``export``. Writing and running artefacts is in
``ema_seg/inference``.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

import ema_seg
from ema_seg.data import SegmentationDataModule
from ema_seg.data.datamodule import SampleSelection, spread_evenly
from ema_seg.evaluation import ConfusionMatrix
from ema_seg.evaluation.environment import describe_environment
from ema_seg.inference.export import check_export, write_artefact
from ema_seg.inference.exported import ExportedModel, Metadata
from ema_seg.inference.prediction import pad_to_stride, predict, segment
from ema_seg.models import load_segmenter, model_stride
from ema_seg.models.checkpoint import check_classes, checkpoint_digest
from ema_seg.models.shared import config_without_paths
from ema_seg.runtime.errors import DataError, ModelError
from ema_seg.runtime.execution import set_execution
from ema_seg.runtime.files import write_file
from ema_seg.runtime.progress import track
from ema_seg.runtime.texts import read_json

__all__ = ["export"]

_LEAST_EQUAL = 0.999  # share of equal pixels of an fp32 artefact
_SCALES = (0.5, 0.75, 1.25)  # further sizes of some images
_SCALED_IMAGES = 4

Images = Sequence[Mapping[str, Any]]


def export(
    checkpoint: Path,
    data: Mapping[str, Any],
    out: Path,
    *,
    format: Any = "onnx",
    precision: str = "fp32",
    processing: bool = True,
    images: int = 100,
    calibration_images: int = 64,
    budget: float = 10.0,
    run: Path | None = None,
) -> dict[str, Any]:
    """Export the model of a checkpoint, and keep the artefact if its masks are those of the model.

    Args:
        checkpoint: a checkpoint of ``train.py``.
        data: arguments of ``SegmentationDataModule``; the artefact is verified on images of its ``evaluation_split``,
            and int8 is calibrated on images of its training split.
        out: folder for ``model.onnx``, ``model.pt2`` or ``model.xml`` with ``model.bin``, and for ``export.json``.
        format: "onnx", "torch" or "openvino".
        precision: "fp32", "fp16" or "int8".
        processing: see ``ema_seg.inference.exported.Metadata``.
        images: number of images to verify on, spread evenly over the split.
        calibration_images: number of training images for int8, spread likewise.
        budget: seconds to time the model and the artefact for.
        run: the run's folder, whose scores become part of the metadata.

    Returns:
        The content of ``export.json``: ``file``, ``format``, ``precision``, ``processing``, ``bytes``, ``images``,
        ``equal_pixels`` (share), ``largest_difference`` (of the logits; of the model's two logits where the class
        differs, if the artefact returns classes), ``miou`` and ``seconds`` of an image by "model" and "artefact",
        ``size`` of the timed image and ``environment``.

    Raises:
        ModelError: the model cannot be exported, or an fp32 artefact has less than 99.9 % equal pixels.
        EmaSegError: the settings, the checkpoint or the data have a fault that the user can correct.
    """
    check_export(format, precision)
    model, saved = load_segmenter(checkpoint)
    config = saved["config"]
    set_execution(model, channels_last=True, compile=False)

    # Data: images to verify on, and for int8 images to calibrate with.
    data = {**data, **{key: data[key] or config["data"][key] for key in ("mean", "std")}}
    module = SegmentationDataModule(**data)
    module.setup("test")
    advice = "verify on data with the same classes"
    check_classes(saved["classes"], module.classes, module.dataset_name, checkpoint, advice)
    shown = SampleSelection(module, spread_evenly(len(module.test_dataset), images))

    def calibration() -> Iterator[NDArray[Any]]:
        dataset = module.train_dataset
        for index in spread_evenly(len(dataset), calibration_images):
            image = torch.from_numpy(np.ascontiguousarray(dataset.read_image(index)))
            if processing:
                yield image[None].numpy()
            else:
                normalised = module.normalise(image.permute(2, 0, 1)[None])
                yield pad_to_stride(normalised, model_stride(model)).contiguous().numpy()

    # Artefact: in a folder of its own until it is verified.
    metadata = Metadata(
        format=format,
        precision=precision,
        processing=processing,
        stride=model_stride(model),
        classes=list(saved["classes"]),
        palette=[list(colour) for colour in module.palette],
        config=config_without_paths(config),
        scores=_scores_of(run),
        origin={
            "checkpoint": checkpoint_digest(checkpoint),
            "ema_seg": ema_seg.__version__,
            "torch": torch.__version__,
        },
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = TemporaryDirectory(dir=out, prefix="unverified_")
    except OSError as error:
        raise DataError(f"out={out}: cannot be written ({error.strerror}); choose another folder.") from error
    with folder as unverified:
        path = write_artefact(Path(unverified), model, module.normalise, metadata, calibration)
        artefact = ExportedModel(path)

        # Verification: masks of the validation images, at several sizes, and both speeds.
        report = {
            "schema": "ema-seg.export_report/1",
            "file": path.name,
            "format": format,
            "precision": precision,
            "processing": processing,
            "bytes": sum(file.stat().st_size for file in Path(unverified).iterdir()),
            **_compare(model, artefact, shown, module),
            **_time(model, artefact, shown[0]["image"], module, budget),
            "environment": describe_environment(torch.device("cpu")),
        }
        if precision == "fp32" and report["equal_pixels"] < _LEAST_EQUAL:
            raise ModelError(
                f"format={format}: {report['equal_pixels']:.2%} of the artefact's pixels are those of the model; "
                f"expected at least {_LEAST_EQUAL:.1%}, so it is not kept; export to another format."
            )
        for file in Path(unverified).iterdir():
            file.replace(out / file.name)
    write_file(out / "export.json", json.dumps(report, indent=1, ensure_ascii=False).encode())
    return report


def _scores_of(run: Path | None) -> dict[str, Any] | None:
    """Return the scores in a run's report; None if it has none."""
    path = run / "report" / "report.json" if run else None
    if path is None or not path.is_file():
        return None
    report = read_json(path)
    return {"miou": report["miou"], "images": len(report["images"]), "split": report["data"]["split"]}


@torch.inference_mode()
def _compare(
    model: nn.Module, artefact: ExportedModel, samples: SampleSelection, module: SegmentationDataModule
) -> dict[str, Any]:
    """Compare masks and logits; see ``export``."""
    scores = {"model": ConfusionMatrix(module.num_classes), "artefact": ConfusionMatrix(module.num_classes)}
    equal = pixels = 0
    largest = 0.0
    count = len(samples.indices)
    for number in track(range(count), "Verifying"):
        sample = samples[number]
        image, truth = sample["image"], sample["mask"].numpy()
        scaled = [_resize(image, scale) for scale in _SCALES] if number < _SCALED_IMAGES else []
        for shown in (image, *scaled):
            (expected,) = predict(model, [shown], model_stride(model), module.normalise)
            (found,) = predict(artefact, [shown], artefact.stride, artefact.normalise)
            logits, exported = expected.whole()[0], found.whole()[0]
            own, ids = logits.argmax(dim=0), exported.argmax(dim=0)
            equal, pixels = equal + int((own == ids).sum()), pixels + ids.numel()
            if artefact.metadata.processing:
                difference = logits.amax(dim=0) - logits.gather(0, ids[None])[0]
            else:
                difference = (logits - exported).abs()
            largest = max(largest, float(difference.max()))
            if shown is image:
                scores["model"].update(own.numpy(), truth)
                scores["artefact"].update(ids.numpy(), truth)
    return {
        "images": count,
        "scales": list(_SCALES),
        "equal_pixels": equal / pixels,
        "largest_difference": largest,
        "miou": {name: matrix.compute()["miou"] for name, matrix in scores.items()},
    }


def _resize(image: Tensor, scale: float) -> Tensor:
    size = [max(1, round(length * scale)) for length in image.shape[1:]]
    return functional.interpolate(image[None].float(), size=size, mode="bilinear").round().to(torch.uint8)[0]


def _time(
    model: nn.Module, artefact: ExportedModel, image: Tensor, module: SegmentationDataModule, budget: float
) -> dict[str, Any]:
    """Time both on one image in turns, from bytes to classes; see ``export``."""
    calls = {
        "model": lambda: segment(model, [image], model_stride(model), module.normalise),
        "artefact": lambda: segment(artefact, [image], artefact.stride, artefact.normalise),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    deadline = time.perf_counter() + budget
    while len(seconds["model"]) < 3 or time.perf_counter() < deadline:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {
        "size": list(image.shape[1:]),
        "seconds": {name: float(np.median(values)) for name, values in seconds.items()},
        "threads": torch.get_num_threads(),
    }
