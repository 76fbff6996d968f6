"""Checks and measurements on one GPU, within ten minutes and without a network; ``make gpu`` runs it.

    python benchmarks/gpu/run.py                      # or: make gpu
    python benchmarks/gpu/run.py --camvid <folder>    # also a small sweep on CamVid
    python benchmarks/gpu/run.py --device cpu         # everything but the device, on small inputs

It writes ``gpu.md``, one page, and ``gpu.json``, with all that it holds; both can be committed. An earlier call's
folder is replaced. A step that fails or
runs out of time ends neither the others nor the page.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
SCHEMA = 1
LONGEST_TAIL = 1500  # characters of a failed step's output
# Options of the steps' programs, for a GPU and for a trial on a CPU.
SMALL_MODEL = ["model.encoder=tu-test_resnet", "model.encoder_weights=null"]
OPTIONS: dict[str, dict[str, list[str]]] = {
    "cuda": {
        "train": [
            *("trainer=gpu", "epochs=1", "data.train_images=96", "data.val_images=16", "data.test_images=16"),
            *("logger=none", "evaluation.budget=3"),
        ],
        "bf16": ["trainer.precision=bf16-mixed"],
        "fp16": ["trainer.precision=16-mixed"],
        "kernels": ["--processes", "8"],
        "tests": [
            *("tests/attention/test_ema.py", "tests/attention/test_equations.py", "tests/training"),
            *("tests/evaluation", "-n", "8", "--dist", "worksteal"),
        ],
        "bench_ema": ["--implementations", "reference", "triton", "triton-replayed", "--budget", "0.1"],
        "bench_ema_model": ["--decoders", "unet", "--layouts", "channels_last", "--budget", "1"],
        "bench_step": ["--overrides", "trainer.precision=bf16-mixed"],
        "bench_loss": ["--budget", "0.5"],
        "full_size": ["--train", "4", "--val", "4"],
        "bench_scoring": ["--budget", "1"],
        "camvid": ["experiment=camvid", "attention=none,ema", "trainer=gpu", "epochs=3", "logger=none"],
    },
    "cpu": {
        "train": [
            *("trainer=cpu", "epochs=1", "data.train_images=16", "data.val_images=2", "data.test_images=2"),
            *("data.height=64", "data.width=128", "data.workers=0", "logger=none", "evaluation.budget=0.1"),
            *("data.augmentation.crop.height=64", "data.augmentation.crop.width=64", *SMALL_MODEL),
        ],
        "bf16": [],
        "fp16": [],
        "kernels": ["--processes", "1"],
        "tests": ["tests/training/test_losses.py", "-k", "ohem"],
        "bench_ema": ["--shapes", "ade20k-b1-unet-256", "--implementations", "reference", "--budget", "0.01"],
        "bench_ema_model": [
            *("--decoders", "linknet", "--layouts", "contiguous", "--encoder", "tu-test_resnet"),
            *("--batch", "1", "--size", "64", "64", "--budget", "0.01"),
        ],
        "bench_step": ["--batch", "2", "--height", "32", "--width", "64", "--steps", "2", "--overrides", *SMALL_MODEL],
        "bench_loss": ["--shapes", "cityscapes", "--heads", "pspnet", "--batch", "1", "--budget", "0.01"],
        "full_size": ["--train", "1", "--val", "1"],
        "bench_scoring": ["--data", "ade20k", "--budget", "0.01"],
        "camvid": [
            *("data=camvid", "attention=none,ema", "trainer=cpu", "epochs=1", "logger=none", "data.workers=0"),
            *("data.augmentation.crop.height=64", "data.augmentation.crop.width=64", "evaluation.budget=0.1"),
            *("training.pictures_every=0", *SMALL_MODEL),
        ],
    },
}


@dataclass(frozen=True)
class Step:
    """A command with a time limit in seconds; ``results`` are files that it writes."""

    name: str
    limit: float
    command: Sequence[str | Path]
    results: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)


def all_steps(device: str, output: Path, camvid: Path | None) -> list[list[Step]]:
    """Return the steps in groups: those of a group run at the same time, groups one after another."""
    options, python = OPTIONS[device], sys.executable

    def program(name: str, limit: float, path: str, *arguments: str, environment: dict[str, str] | None = None) -> Step:
        command = [python, HERE / path, "--device", device, *arguments, "--output", output / f"{name}.json"]
        return Step(name, limit, command, [f"{name}.json"], environment or {})

    def train(name: str, limit: float, *overrides: str) -> Step:
        command = [python, ROOT / "train.py", *options["train"], *overrides, f"hydra.run.dir={output / name}"]
        return Step(name, limit, command, [f"{name}/metrics.csv"])

    def benchmark(name: str, limit: float, *arguments: str) -> Step:
        path = ROOT / "benchmarks" / f"{name}.py"
        command = [python, path, *arguments, "--device", device, *options[name], "--output", output / name]
        return Step(name, limit, command, [f"{name}/{name}.json", f"{name}/{name}.md"])

    interpreted = {"TRITON_INTERPRET": "1"} if device == "cpu" else None
    rerun = [python, ROOT / "train.py", f"rerun={output / 'reproducible'}", f"hydra.run.dir={output / 'rerun'}"]
    waits = [python, HERE / "synchronisations.py", "--output", output / "synchronisations.json"]
    full_size = output / "full_size"
    generate = [python, ROOT / "benchmarks" / "full_size.py", full_size, *options["full_size"]]
    groups = [
        [program("machine", 40, "machine.py")],
        [program("kernels", 90, "kernels.py", *options["kernels"], environment=interpreted)],
        [
            Step("tests", 170, [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options["tests"]]),
            train("train_bf16", 90, *options["bf16"]),
            train("train_fp16", 90, *options["fp16"]),
        ],
        [train("reproducible", 60, "reproducible=true")],
        [Step("rerun", 60, rerun, ["rerun/metrics.csv"])],
        [Step("synchronisations", 45, [*waits, *options["train"]], ["synchronisations.json"])],
        [benchmark("bench_ema", 110)],
        [benchmark("bench_step", 45)],
        [benchmark("bench_loss", 45)],
        [benchmark("bench_ema_model", 60)],
        [Step("full_size", 60, generate)],
        [benchmark("bench_scoring", 40, str(full_size))],
    ]
    if camvid is not None:
        sweep = [python, ROOT / "train.py", "-m", *options["camvid"], f"data.root={camvid}"]
        groups.append([Step("camvid", 90, [*sweep, f"hydra.sweep.dir={output / 'camvid'}"])])
    return groups


def run_step(step: Step, output: Path, deadline: float) -> dict[str, Any]:
    """Run a step; return its status, seconds and, if it failed, the end of its output."""
    began = time.monotonic()
    limit = min(step.limit, deadline - began)
    if limit < 5:
        return {"step": step.name, "status": "no time left", "seconds": 0.0}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_ALBUMENTATIONS_UPDATE": "1", **step.environment}
    log = output / f"{step.name}.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [str(part) for part in step.command],
            cwd=ROOT,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            status = "ok" if code == 0 else f"failed with status {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
            process.wait()
            status = f"stopped after {limit:.0f} s"
    row: dict[str, Any] = {"step": step.name, "status": status, "seconds": round(time.monotonic() - began, 1)}
    if status != "ok":
        row["output"] = log.read_text(errors="replace")[-LONGEST_TAIL:]
    return row


def read_result(path: Path) -> Any:
    """Return the content of a result: parsed if it is JSON."""
    text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text) if path.suffix == ".json" else text
    except ValueError:  # of a step that was stopped while it wrote
        return None


def as_markdown(record: dict[str, Any]) -> str:
    """Format the record as one page."""
    results = record["results"]
    lines = ["# One GPU", ""]
    if machine := results.get("machine.json"):
        run = machine["run"]
        versions = ", ".join(f"{name} {run['packages'][name]}" for name in ("ema-seg", "torch", "triton"))
        commit = (run["git"] or {}).get("commit", "no commit")[:12]
        lines += [f"{run['date']}: {run['device']['name']}; {versions}, Python {run['python']}; {commit}.", ""]
        rates = machine["copy_bytes_per_second"].items()
        lines += ["Copies: " + ", ".join(f"{size} at {rate / 1e12:.3g} TB/s" for size, rate in rates) + ".", ""]
    lines += ["| step | status | seconds |", "| --- | --- | ---: |"]
    lines += [f"| {row['step']} | {row['status']} | {row['seconds']} |" for row in record["steps"]]
    if rows := results.get("kernels.json"):
        lines += ["", f"## Kernels: {sum(row['ok'] for row in rows)} of {len(rows)} cases agree with float64", ""]
        lines += ["| shape | groups | block | dtype | layout | y | dx | parameters | same bits twice |"]
        lines += ["| --- | ---: | --- | --- | --- | ---: | ---: | ---: | --- |"]
        for row in rows:
            shape = " x ".join(map(str, row["shape"]))
            cells = [shape, row["groups"], row["block"], row["dtype"], row["layout"]]
            cells += [f"{row[key]:.1e}" for key in ("y", "dx", "parameters")] if "y" in row else ["error", "", ""]
            lines += ["| " + " | ".join(map(str, [*cells, row.get("repeats", "")])) + " |"]
    if waits := results.get("synchronisations.json"):
        lines += ["", "## Waits for the device", ""]
        for part, found in waits.items():
            lines += [f"- one {part}: {found['total'] if found else 'not reached'}"]
            lines += [f"  - {count} at {place}" for place, count in (found or {"lines": []})["lines"]]
    for row in record["steps"]:
        if "output" in row:
            lines += ["", f"## {row['step']}: {row['status']}", "", "```text", row["output"].rstrip(), "```"]
    for name, result in results.items():
        if name.endswith(".csv"):
            lines += ["", f"## {name}", "", "```text", result.rstrip(), "```"]
        elif name.endswith(".md"):
            lines += ["", re.sub(r"^#", "##", result, flags=re.MULTILINE).rstrip()]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Check and measure on one GPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument("--camvid", type=Path, help="folder of CamVid, for a small sweep")
    parser.add_argument("--steps", nargs="+", help="names of the steps to run; default: all")
    parser.add_argument("--limit", type=float, default=580, help="seconds for all steps (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs", "gpu"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    output = options.output.absolute()
    if (output / "gpu.json").exists():
        shutil.rmtree(output)  # an earlier call's, whose results must not be taken for this one's
    output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.limit
    record: dict[str, Any] = {"schema": SCHEMA, "device": options.device, "steps": [], "results": {}}
    groups = [
        [step for step in group if not options.steps or step.name in options.steps]
        for group in all_steps(options.device, output, options.camvid)
    ]
    for group in filter(None, groups):
        with ThreadPoolExecutor(len(group)) as pool:
            for step, row in zip(group, pool.map(lambda step: run_step(step, output, deadline), group), strict=True):
                record["steps"].append(row)
                print(f"{step.name}: {row['status']}, {row['seconds']} s", flush=True)
                for name in step.results:
                    if (output / name).exists():
                        record["results"][name] = read_result(output / name)
        # After each step, for a machine that is taken away.
        (output / "gpu.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (output / "gpu.md").write_text(as_markdown(record), encoding="utf-8")
    print(f"Written to {output}: gpu.md and gpu.json.")
    if any(row["status"] != "ok" for row in record["steps"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
