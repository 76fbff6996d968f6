import os
import subprocess
import sys
from contextlib import ExitStack

import pytest

from ema_seg.runtime.errors import ConfigError
from ema_seg.sweeps import claim_devices, devices

# The devices need not exist: the program takes their number from its arguments instead of from torch.
PROGRAM = (
    "import os, sys; from pathlib import Path; from ema_seg.sweeps import claim_devices, devices\n"
    "devices.count_devices = lambda: int(sys.argv[2])\n"
    "first = claim_devices(Path(sys.argv[1]))\n"
    "assert claim_devices(Path(sys.argv[1])) == first == os.environ.get('CUDA_VISIBLE_DEVICES', first)\n"
    "print(first, flush=True); sys.stdin.read()"
)


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a process, which runs until it is killed, and returns it with its device."""
    with ExitStack() as stack:

        def run(count, visible="4,7"):
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(tmp_path), str(count)],
                env={**os.environ, "CUDA_VISIBLE_DEVICES": visible},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process, process.stdout.readline().strip()

        yield run


def test_each_process_has_a_device_of_its_own_and_leaves_it_when_it_ends(start):
    (first, left), (_, kept) = start(2), start(2)
    assert {left, kept} == {"4", "7"}

    first.kill()
    first.wait()

    assert start(2)[1] == left


def test_more_processes_than_devices_share_them_evenly(start):
    assert [start(2)[1] for _ in range(5)] == ["4", "7", "4", "7", "4"]


def test_names_behind_the_last_device_that_cuda_finds_are_not_dealt(start):
    assert [start(1)[1] for _ in range(2)] == ["4", "4"]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((3,), "must be at most the 2 GPUs of this machine, got 3"),
        ((2, 1), "must be the same for all jobs .*, got 1 after 2"),
        (([4, 7],), r"trainer\.devices: must be a number of GPUs .*, got the list \[4, 7\]; set trainer\.devices=2"),
    ],
)
def test_devices_that_cannot_be_dealt_are_refused(tmp_path, monkeypatch, numbers, message):
    monkeypatch.setattr(devices, "count_devices", lambda: 2)
    monkeypatch.setattr(devices, "_held", [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")

    with pytest.raises(ConfigError, match=message):
        for number in numbers:
            assert claim_devices(tmp_path, number) == "4,7"
            assert claim_devices(tmp_path, number) == "4,7"  # for the process's next job


def test_names_that_are_no_file_names_are_dealt(start):
    assert start(1, "MIG-GPU-1a/2/0")[1] == "MIG-GPU-1a/2/0"


def test_where_cuda_finds_no_device_none_is_dealt(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setattr("ema_seg.sweeps.devices.count_devices", lambda: 0)

    assert claim_devices(tmp_path) is claim_devices(tmp_path, [0, 1]) is None
    assert not list(tmp_path.iterdir())
