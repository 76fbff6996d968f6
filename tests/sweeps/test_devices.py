import os
import subprocess
import sys

from ema_seg.sweeps import deal_device

PROGRAM = (
    "import os, sys; from pathlib import Path; from ema_seg.sweeps import deal_device\n"
    "first = deal_device(Path(sys.argv[1]))\n"
    "assert deal_device(Path(sys.argv[1])) == first == os.environ['CUDA_VISIBLE_DEVICES']\n"
    "print(first, flush=True); sys.stdin.read()"
)


def start(folder):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "4,7"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_each_process_has_a_device_of_its_own_and_leaves_it_when_it_ends(tmp_path):
    with start(tmp_path) as first, start(tmp_path) as second:
        assert {first.stdout.readline(), second.stdout.readline()} == {"4\n", "7\n"}
        first.kill()
        first.wait()
        with start(tmp_path) as third:
            assert third.stdout.readline() in ("4\n", "7\n")
            third.kill()
        second.kill()


def test_without_devices_none_is_dealt(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("ema_seg.sweeps.devices.count_devices", lambda: 0)

    assert deal_device(tmp_path) is None
