"""Benchmark of the losses: from logits to their gradient.

    python benchmarks/bench_loss.py

Each loss is computed in two ways, which take turns in one process:

* ``strips``: this project's losses, in strips of rows whose gradient is taken at once;
* ``whole``: the same losses in PyTorch's operations on all logits at once: ``cross_entropy``, and Dice with a one-hot
  of the labels, as segmentation libraries write it.
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
    positive_float,
    positive_int,
    ratio,
    run_as_markdown,
    time_in_turns,
    write_result,
)
from torch import Tensor
from torch.nn import functional as F

from ema_seg.data.base import IGNORE_INDEX
from ema_seg.evaluation.cost import LiveBytes
from ema_seg.runtime.host_memory import keep_freed_memory
from ema_seg.training.losses import build_loss

SCHEMA = 1
NAME = "bench_loss"
# Crops of the default configurations: classes, height, width.
SHAPES = {"cityscapes": (19, 512, 1024), "ade20k": (150, 512, 512)}
TERMS: dict[str, dict[str, Any]] = {
    "cross_entropy": {"cross_entropy": {}},
    "cross_entropy_dice": {"cross_entropy": {}, "dice": {}},
}

Loss = Callable[[Tensor, Tensor], Tensor]


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


def measure(shape: tuple[int, int, int], batch: int, terms: str, device: torch.device, budget: float) -> dict[str, Any]:
    """Measure seconds and peak memory of forward and backward, both ways."""
    classes, height, width = shape
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, *shape, generator=generator).to(device).requires_grad_()
    target = torch.randint(classes, (batch, height, width), generator=generator, dtype=torch.uint8)
    target[:, : height // 16] = IGNORE_INDEX
    target = target.to(device)
    losses: dict[str, Loss] = {
        "strips": build_loss(TERMS[terms], classes),
        "whole": lambda logits, target: whole(logits, target, dice="dice" in TERMS[terms]),
    }

    def learn(loss: Loss) -> tuple[Tensor, Tensor]:
        logits.grad = None
        value = loss(logits, target)
        value.backward()
        return value.detach(), logits.grad

    results = {way: learn(loss) for way, loss in losses.items()}
    torch.testing.assert_close(*(result[0] for result in results.values()), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(*(result[1] for result in results.values()), rtol=1e-3, atol=1e-8)
    del results
    peaks = {way: _peak(lambda loss=loss: learn(loss), [logits, target], device) for way, loss in losses.items()}
    calls = {way: (lambda call, loss=loss: learn(loss)) for way, loss in losses.items()}
    samples = time_in_turns(calls, device, budget=budget, min_rounds=3)
    return {
        way: {
            "seconds": Spread.of(samples[way]).as_json(),
            "ratio": ratio(samples[way], samples["whole"]).as_json(),
            "peak": (peaks[way] - logits.nbytes) / logits.nbytes,
        }
        for way in losses
    }


def _peak(call: Callable[[], object], resident: Sequence[Tensor], device: torch.device) -> int:
    """Return the peak memory of a call in bytes, with what it starts from."""
    resident[0].grad = None
    if device.type != "cuda":
        with LiveBytes(resident) as live:
            call()
        return live.peak
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device)


def as_markdown(record: Mapping[str, Any]) -> str:
    """Format the table of a result."""
    rows = [
        [
            f"{shape}: {SHAPES[shape][0]} classes, {SHAPES[shape][1]} x {SHAPES[shape][2]}",
            terms,
            way,
            number(row["seconds"]["median"]),
            number(row["ratio"]["median"]),
            number(row["peak"]),
        ]
        for shape, by_terms in record["results"].items()
        for terms, by_way in by_terms.items()
        for way, row in by_way.items()
    ]
    header = ["crops", "loss", "", "seconds", "/ whole", "peak beyond the logits / logits"]
    return (
        f"# From logits to their gradient\n\n{run_as_markdown(record['run'])}\n"
        f"Batches of {record['batch']}, float32.\n\n{markdown_table(header, rows, text_columns=3)}\n\n"
        "The peak includes the gradient, which is as large as the logits.\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="From logits to their gradient.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: all")
    parser.add_argument("--batch", type=positive_int, default=2, help="default: %(default)s")
    parser.add_argument("--threads", type=positive_int, default=1, help="threads of a CPU (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--budget", type=positive_float, default=20, help="seconds per way (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs", NAME), help="default: %(default)s")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()  # as train.py does
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    results = {
        shape: {terms: measure(SHAPES[shape], options.batch, terms, device, options.budget) for terms in TERMS}
        for shape in options.shapes
    }
    record = {"schema": SCHEMA, "run": describe_run(device), "batch": options.batch, "results": results}
    write_result(options.output, NAME, record, as_markdown(record))
    print(as_markdown(record))
    print(f"Written to {options.output}.")


if __name__ == "__main__":
    main()
