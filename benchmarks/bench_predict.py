"""Benchmark of ``ema-seg predict``: images/s from files to files, against the model's forward alone.

    python benchmarks/bench_predict.py

The default model (random weights, 11 classes) segments JPEG images of 360 x 480: the files are read, predicted in
batches, and written as masks, overlays and areas; in turns with it, the bare forward computes the logits of the same
batches, which are in memory and normalised.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import (
    Parser,
    Spread,
    describe_run,
    markdown_table,
    positive_int,
    ratio,
    run_as_markdown,
    time_in_turns,
    write_result,
)
from PIL import Image

from ema_seg.data.folder import distinct_colors
from ema_seg.data.normalise import Normalise
from ema_seg.inference.files import find_files, segment_files
from ema_seg.inference.prediction import model_input, pad_to_stride
from ema_seg.inference.results import Results
from ema_seg.inference.segmenter import Segmenter
from ema_seg.models import build_segmenter
from ema_seg.runtime.execution import set_execution
from ema_seg.runtime.host_memory import keep_freed_memory

NAME = "bench_predict"
CLASSES = 11
HEIGHT, WIDTH = 360, 480
MIN_ROUNDS = 3


def write_images(folder: Path, count: int) -> None:
    """Write JPEG images with shapes and some noise, as large as photographs of their size."""
    generator = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), np.uint8))
        smooth = np.array(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.int16)
        noisy = (smooth + generator.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{index:04}.jpg", quality=90)


def measure(
    folder: Path, encoder: str, count: int, batch_size: int, device: torch.device, budget: float
) -> dict[str, Any]:
    """Measure both ways on so many images; seconds are per image."""
    source = folder / "images"
    source.mkdir()
    write_images(source, count)
    options = {"factor": "auto"}
    model = build_segmenter("unet", classes=CLASSES, encoder=encoder, attention="ema", attention_options=options).eval()
    set_execution(model.to(device), channels_last=True, compile=False)
    normalise = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    names = [f"class {index}" for index in range(CLASSES)]
    segmenter = Segmenter(model, classes=names, palette=distinct_colors(CLASSES), normalise=normalise)
    images = find_files(str(source))
    pixels = [torch.from_numpy(segmenter.read(image).copy()).permute(2, 0, 1) for image in images]
    batches = [
        pad_to_stride(model_input(model, torch.stack(pixels[first : first + batch_size]).to(device), normalise), 32)
        for first in range(0, count, batch_size)
    ]

    def forward(_: int) -> None:
        with torch.inference_mode():
            for batch in batches:
                model(batch)

    def command(_: int) -> None:
        results = Results(folder / "out", segmenter)
        results.claim({"model": "benchmark"}, overwrite=True)
        assert not segment_files(images, results, batch_size=batch_size, overwrite=True)

    calls = {"forward": forward, "predict": command}
    for call in calls.values():
        call(0)
    samples = time_in_turns(calls, device, budget=budget, min_rounds=MIN_ROUNDS)
    return {
        "images": count,
        "batch_size": batch_size,
        "seconds": {
            way: Spread.of([second / count for second in seconds]).as_json() for way, seconds in samples.items()
        },
        "ratio": ratio(samples["forward"], samples["predict"]).as_json(),
    }


def as_markdown(record: dict[str, Any]) -> str:
    """Format the record as a table."""
    result = record["result"]
    rates = [f"{1 / result['seconds'][way]['median']:.1f}" for way in ("predict", "forward")]
    spread = result["ratio"]
    quartiles = f"{spread['median']:.2f} ({spread['lower_quartile']:.2f} to {spread['upper_quartile']:.2f})"
    header = ["images/s, predict", "images/s, forward alone", "ratio (quartiles)"]
    return f"{run_as_markdown(record['run'])}\n{markdown_table(header, [[*rates, quartiles]], text_columns=0)}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("Images/s of ema-seg predict, against the forward alone.", NAME, budget=30)
    parser.add_argument("--images", type=positive_int, default=32, help="default: %(default)s")
    parser.add_argument("--batch", type=positive_int, default=4, help="default: %(default)s")
    parser.add_argument("--encoder", default="tu-tf_efficientnet_lite0", help="default: %(default)s")
    options = parser.options(arguments)
    run = describe_run(options.device)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options.encoder, options.images, options.batch, options.device, options.budget)
    record = {"run": run, "result": result}
    write_result(options.output, NAME, record, as_markdown(record))
    print(as_markdown(record))


if __name__ == "__main__":
    keep_freed_memory()
    main()
