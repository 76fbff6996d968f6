"""Places where a training step, or a validated image, waits for the GPU, as JSON.

    python benchmarks/gpu/synchronisations.py --output <file> [override …]

The overrides are those of ``train.py``. The second step of the training and the first batch of its validation are
watched.
"""

import argparse
import json
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, cast

import torch
from hydra import compose, initialize_config_dir
from lightning import Callback
from omegaconf import OmegaConf

from ema_seg.cli.launch import complete_config
from ema_seg.train import train

ROOT = Path(__file__).resolve().parents[2]
STEP, BATCH = 1, 0


class Watch(Callback):
    """Counter of the waits in one training step and one validation batch, by the lines that lead to them."""

    def __init__(self) -> None:
        self.found: dict[str, Counter[str] | None] = {"training step": None, "validation batch": None}
        self._show = warnings.showwarning

    def _start(self, part: str) -> None:
        lines = self.found[part] = Counter()

        def show(message: Any, *_: Any, **__: Any) -> None:
            if "called a synchronizing" in str(message):
                own = ("ema_seg", "lightning", "torch/optim", "torch/nn")
                frames = [frame for frame in traceback.extract_stack() if any(name in frame.filename for name in own)]
                places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames)]
                lines[" < ".join(places[:3])] += 1

        if torch.cuda.is_available():
            warnings.simplefilter("always")
            warnings.showwarning = show
            torch.cuda.set_sync_debug_mode("warn")

    def _stop(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = self._show

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        """Start watching."""
        if index == STEP:
            self._start("training step")

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Stop watching."""
        self._stop()

    def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, index: int, loader: int = 0) -> None:
        """Start watching."""
        if index == BATCH:
            self._start("validation batch")

    def on_validation_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int, loader: int = 0
    ) -> None:
        """Stop watching."""
        self._stop()


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the waits of a training step by line.")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("overrides", nargs="*", help="settings of train.py")
    options = parser.parse_args()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        composed = compose("train", ["epochs=1", "logger=none", "training.pictures_every=0", *options.overrides])
    config = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    complete_config(config)
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder), quiet=True, callbacks=[watch])
    result = {
        part: None if lines is None else {"total": sum(lines.values()), "lines": lines.most_common()}
        for part, lines in watch.found.items()
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
