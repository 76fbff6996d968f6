"""EMA's Triton kernels without a GPU: they are compiled for compute capability 9.0, and a launch does nothing.

``python -m tests.attention.stub_driver compile`` compiles EMA's kernels for some inputs, ``count`` counts the
compilations of the default training; both print JSON.
"""

import contextlib
import json
import sys
import time
from pathlib import Path

import torch
import triton

from ema_seg.attention import EMA, DynamicEMA
from ema_seg.attention.ema import triton_launch
from ema_seg.models import build_segmenter

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from bench_ema_host import stub_gpu


class NoKernel:
    """Compiled kernel that does nothing."""

    function, packed_metadata = 1, None

    def run(self, *_):
        """Launch it from a call of the kernel."""

    def launch_metadata(self, *_):
        """Describe a launch to a profiler."""


@contextlib.contextmanager
def without_compiling():
    """Replace each compilation by nothing; yield the list of their keys."""
    compiled = []
    launchable = NoKernel()

    def skip(kernel, key, signature, device, *_, **__):
        compiled.append((kernel.__name__, key))
        kernel.device_caches[device][0][key] = launchable
        return launchable

    before = triton.JITFunction._do_compile
    triton.JITFunction._do_compile = skip
    try:
        yield compiled
    finally:
        triton.JITFunction._do_compile = before


def run_both(block, x):
    """Launch forward and backward of a block."""
    x = x.requires_grad_()
    y = block(x)
    y.backward(torch.ones_like(y))


def compile_variants():
    """Compile the kernels for inputs that have all dtypes and blocks between them, fused and split."""
    with stub_gpu():
        triton_launch.empty_kernel[(1,)]()
    cases = [
        ("float64", EMA, (2, 4, 16, 16), 2, torch.channels_last),
        ("float16", DynamicEMA, (1, 4, 512, 512), 2, torch.contiguous_format),
    ]
    for name, block, shape, groups, layout in cases:
        start = time.perf_counter()
        with stub_gpu() as driver:
            x = torch.zeros(shape, dtype=getattr(torch, name)).contiguous(memory_format=layout)
            run_both(block(shape[1], factor=groups, implementation="triton"), x)
        seconds = round(time.perf_counter() - start, 1)
        print(json.dumps({"dtype": name, "block": block.__name__, "launches": driver.launches, "seconds": seconds}))


def count_compilations():
    """Count the compilations that the default training on the street scenes needs, for its crops and its images."""
    model = build_segmenter(classes=19, attention="ema", attention_options={"factor": "auto"})
    model.to(memory_format=torch.channels_last)
    with stub_gpu(), without_compiling() as compiled, torch.no_grad():
        for module in model.modules():
            if isinstance(module, EMA):
                module.implementation = "triton"
        with torch.enable_grad():
            model(torch.zeros(2, 3, 160, 320)).sum().backward()
        model.eval()(torch.zeros(1, 3, 160, 320))
    print(json.dumps({"compilations": len(compiled), "different": len(set(compiled))}))


if __name__ == "__main__":
    {"compile": compile_variants, "count": count_compilations}[sys.argv[1]]()
