"""Tests of the model of the traffic between a GPU's memory and its cache."""

import importlib
from collections import OrderedDict

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from ema_seg.attention import EMA
from ema_seg.attention.ema import triton_kernels, triton_launch, triton_plan

SECTOR = 32  # bytes


@pytest.fixture
def bench():
    return importlib.import_module("bench_ema_traffic")


@pytest.fixture
def plans_of_a_gpu(monkeypatch):
    """Plan as for a GPU; Triton's interpreter has other tiles, and keeps bfloat16 in float32."""
    for where, name, value in (
        (triton_plan, "SMALLEST_TILE", 1024),
        (triton_plan, "_PRODUCT", 4096),
        (triton_plan, "INTERPRETED", False),
        (triton_launch, "SMALLEST_TILE", 1024),
        (triton_launch, "_empty_like", torch.empty_like),
        (triton_launch, "_forward_kernel", triton_launch._forward_kernel.__wrapped__),
        (triton_launch, "_backward_kernels", triton_launch._backward_kernels.__wrapped__),
    ):
        monkeypatch.setattr(where, name, value)


class CacheOfSectors:
    """Cache of the addresses that the interpreter loads and stores."""

    def __init__(self, size):
        self.capacity, self.sectors, self.moved = size // SECTOR, OrderedDict(), 0

    def access(self, pointers, mask, stored, streams=False):
        addresses, inside = np.broadcast_arrays(pointers.data, mask.data)
        for sector in np.unique(addresses[inside] // SECTOR).tolist():
            written = self.sectors.pop(sector, None)
            if streams:
                self.moved += 1
                continue
            if written is None:
                self.moved += not stored
                if len(self.sectors) == self.capacity:
                    self.moved += self.sectors.popitem(last=False)[1]
            self.sectors[sector] = stored or bool(written)

    def empty(self):
        self.moved += sum(self.sectors.values())
        self.sectors.clear()


def counted_passes(monkeypatch, shape, width, dtype, last, cache_size):
    """Count the passes over x in the interpreter."""
    cache = CacheOfSectors(cache_size)
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(self, pointers, mask, *rest):
        cache.access(pointers, mask, stored=False)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, modifier, policy):
        cache.access(pointers, mask, stored=True, streams=str(modifier).endswith("CS"))
        return store(self, pointers, value, mask, modifier, policy)

    monkeypatch.setattr(builder, "create_masked_load", counted_load)
    monkeypatch.setattr(builder, "create_masked_store", counted_store)
    monkeypatch.setattr(triton_plan, "_device", lambda device: (2, cache_size))
    memory_format = torch.channels_last if last else torch.contiguous_format
    x, dy = (torch.randn(shape).to(dtype).contiguous(memory_format=memory_format) for _ in range(2))
    options = shape[1] // width, 1e-5, False
    parameters = EMA(shape[1], factor=options[0])._parameters_of_block()[0]
    _, *statistics = triton_launch.forward(x, parameters, *options)
    cache.empty()
    forward = cache.moved
    triton_launch.backward(dy, x, *statistics, parameters, *options)
    cache.empty()
    sectors_of_x = x.nbytes / SECTOR
    return forward / sectors_of_x, cache.moved / sectors_of_x


@pytest.mark.slow
@pytest.mark.skipif(not triton_kernels.INTERPRETED, reason="on a GPU, the kernels are compiled")
@pytest.mark.parametrize(("dtype", "last", "fraction"), [(torch.float32, True, 0.4), (torch.bfloat16, False, 1.0)])
def test_the_model_counts_what_the_kernels_load_and_store(bench, plans_of_a_gpu, monkeypatch, dtype, last, fraction):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_plan, "_LARGEST_FUSED", 0)
    monkeypatch.setattr(triton_plan, "_SMALLEST_WAVE", 0)
    shape, width = (1, 8, 64, 64), 4
    size = int(fraction * 8 * 64 * 64 * dtype.itemsize)

    counted = counted_passes(monkeypatch, shape, width, dtype, last, size)
    modelled = bench.passes(shape, width, dtype, last, processors=2, cache_size=size)

    # The model leaves out the numbers per row, column and channel, a tenth of so small a map.
    for of_kernels, of_model in zip(counted, modelled, strict=True):
        assert of_model <= of_kernels <= 1.15 * of_model


@pytest.mark.parametrize(
    ("name", "dtype", "last", "most"),
    [
        ("cityscapes-b1-unet-16, Cg 1", torch.bfloat16, True, 10),
        ("cityscapes-b1-unet-16, Cg 4", torch.bfloat16, True, 8),
        ("cityscapes-b1-unet-16, Cg 8", torch.float32, False, 8),
        ("ade20k-b8-deeplabv3plus-256, Cg 8", torch.float32, True, 8),
    ],
)
def test_few_passes_over_maps_beyond_the_cache(bench, plans_of_a_gpu, name, dtype, last, most):
    forward, both = bench.passes(*bench.SHAPES[name], dtype, last)
    assert 2 <= forward <= 3
    assert 5 <= both <= most
