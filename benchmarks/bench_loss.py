"""Benchmark of the losses: from the input of a head's last layer to its gradient.

    python benchmarks/bench_loss.py

Head and loss are computed in two ways, which take turns in one process:

* ``strips``: this project's losses, in strips of rows whose gradient is taken at once;
* ``whole``: the same in PyTorch's operations on all logits at once: ``conv2d`` or ``interpolate``, ``cross_entropy``,
  and Dice with a one-hot of the labels, as segmentation libraries write it.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import (
    Spread,
    describe_run,
    markdown_table,
    number,
    peak_bytes,
    positive_float,
    positive_int,
    ratio,
    run_as_markdown,
    saved_bytes,
    time_in_turns,
    write_result,
)
from torch import Tensor
from torch.nn import functional as F

from ema_seg.data.base import IGNORE_INDEX
from ema_seg.models.head import RowLogits
from ema_seg.runtime.host_memory import keep_freed_memory
from ema_seg.training.losses import build_loss

SCHEMA = 2
NAME = "bench_loss"
# Crops of the default configurations: classes, height, width.
SHAPES = {"cityscapes": (19, 512, 1024), "ade20k": (150, 512, 512)}
# Last layers of the decoders: channels and size of the convolution at full resolution, or factor of the upsampling.
HEADS: dict[str, tuple[tuple[int, int] | None, int]] = {
    "unet": ((16, 3), 1),  # as unetplusplus and manet
    "linknet": ((32, 1), 1),
    "dpt": (None, 2),
    "fpn": (None, 4),  # as pan, deeplabv3plus, upernet and segformer
    "pspnet": (None, 8),  # as deeplabv3
}
TERMS: dict[str, dict[str, Any]] = {
    "cross_entropy": {"cross_entropy": {}},
    "cross_entropy_dice": {"cross_entropy": {}, "dice": {}},
}


def whole(logits: Tensor, target: Tensor, *, dice: bool) -> Tensor:
    """Compute cross-entropy, and Dice if set, in PyTorch's operations on all logits at once."""
    target = target.long()
    loss = F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX)
    if not dice:
        return loss
    labelled = target != IGNORE_INDEX
    truth = F.one_hot(target.where(labelled, 0), logits.shape[1]).permute(0, 3, 1, 2) * labelled[:, None]
    probabilities = logits.softmax(dim=1) * labelled[:, None]
    sums = [part.sum(dim=(0, 2, 3)) for part in (probabilities * truth, probabilities, truth.to(logits.dtype))]
    coefficients = (2 * sums[0] + 1) / (sums[1] + sums[2] + 1)
    return loss + ((1 - coefficients) * (sums[2] > 0)).mean()


def build_head(name: str, classes: int, height: int, width: int, batch: int, device: torch.device) -> RowLogits:
    """Build random features and weights of a decoder's last layer; all require a gradient."""
    conv, scale = HEADS[name]
    channels = conv[0] if conv else classes
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, channels, height // scale, width // scale)]
    if conv:
        shapes += [(classes, channels, conv[1], conv[1]), (classes,)]
    inputs = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    inputs[0] = inputs[0].contiguous(memory_format=torch.channels_last)  # as training.channels_last, the default
    features, *weights = (tensor.requires_grad_() for tensor in inputs)
    return RowLogits(features, tuple(weights), scale)


def measure(
    head: str, shape: tuple[int, int, int], batch: int, terms: str, device: torch.device, budget: float
) -> dict[str, Any]:
    """Measure seconds, peak memory and saved memory of forward and backward, both ways."""
    classes, height, width = shape
    logits = build_head(head, *shape, batch, device)
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(classes, (batch, height, width), generator=generator, dtype=torch.uint8)
    target[:, : height // 16] = IGNORE_INDEX
    target = target.to(device)
    in_strips = build_loss(TERMS[terms], classes)
    losses: dict[str, Callable[[], Tensor]] = {
        "strips": lambda: in_strips(logits, target),
        "whole": lambda: whole(logits.whole(), target, dice="dice" in TERMS[terms]),
    }

    def learn(loss: Callable[[], Tensor]) -> list[Tensor]:
        for tensor in logits.inputs:
            tensor.grad = None
        value = loss()
        value.backward()
        return [value.detach(), *(tensor.grad for tensor in logits.inputs if tensor.grad is not None)]

    results = {way: learn(loss) for way, loss in losses.items()}
    for own, plain in zip(*results.values(), strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))
    del results
    resident = [*logits.inputs, target]
    peaks = {}
    for way, loss in losses.items():
        for tensor in logits.inputs:
            tensor.grad = None
        peaks[way] = peak_bytes(lambda loss=loss: learn(loss), resident, device)
    calls = {way: (lambda call, loss=loss: learn(loss)) for way, loss in losses.items()}
    samples = time_in_turns(calls, device, budget=budget, min_rounds=3)
    return {
        way: {
            "seconds": Spread.of(samples[way]).as_json(),
            "ratio": ratio(samples[way], samples["whole"]).as_json(),
            "peak": peaks[way],
            "saved": saved_bytes(lambda _, loss=loss: loss(), logits.features, logits.inputs),
        }
        for way, loss in losses.items()
    }


def as_markdown(record: Mapping[str, Any]) -> str:
    """Format the results as tables."""
    rows = [
        [
            f"{shape}: {SHAPES[shape][0]} classes, {SHAPES[shape][1]} x {SHAPES[shape][2]}",
            terms,
            head,
            number(ways["strips"]["seconds"]["median"]),
            number(ways["whole"]["seconds"]["median"]),
            number(ways["strips"]["ratio"]["median"]),
            *(number(ways[way]["peak"] / 2**20) for way in ("strips", "whole")),
            number(ways["strips"]["peak"] / ways["whole"]["peak"]),
            *(number(ways[way]["saved"] / 2**20) for way in ("strips", "whole")),
        ]
        for shape, by_terms in record["results"].items()
        for terms, by_head in by_terms.items()
        for head, ways in by_head.items()
    ]
    header = ["crops", "loss", "head", "seconds in strips", "whole", "ratio", "peak MiB in strips", "whole", "ratio"]
    header += ["saved MiB in strips", "whole"]
    return (
        "# From the input of the last layer to its gradient\n\n"
        f"{run_as_markdown(record['run'])}\nBatches of {record['batch']}, float32, channels-last features.\n\n"
        f"{markdown_table(header, rows, text_columns=3)}\n"
        "Peak is the memory beyond the features, the weights and the labels, with the gradients; saved is what a "
        "forward keeps for its backward.\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="From the input of the last layer to its gradient.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: all")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS), help="default: all")
    parser.add_argument("--batch", type=positive_int, default=2, help="default: %(default)s")
    parser.add_argument("--threads", type=positive_int, default=1, help="threads of a CPU (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--budget", type=positive_float, default=4, help="seconds per way (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs", NAME), help="default: %(default)s")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()  # as train.py does
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    results = {
        shape: {
            terms: {
                head: measure(head, SHAPES[shape], options.batch, terms, device, options.budget)
                for head in options.heads
            }
            for terms in TERMS
        }
        for shape in options.shapes
    }
    record = {"schema": SCHEMA, "run": describe_run(device), "batch": options.batch, "results": results}
    write_result(options.output, NAME, record, as_markdown(record))
    print(as_markdown(record))
    print(f"Written to {options.output}.")


if __name__ == "__main__":
    main()
