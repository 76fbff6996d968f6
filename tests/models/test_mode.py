import os

import pytest
import torch

from ema_seg.runtime.errors import ConfigError
from ema_seg.runtime.execution import deterministic_algorithms, tf32


def test_an_operation_that_cannot_repeat_its_bits_is_named():
    message = r"^reproducible=true: put_, which this model or loss needs, has no deterministic implementation"
    with pytest.raises(ConfigError, match=message), deterministic_algorithms(True):
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))

    assert not torch.are_deterministic_algorithms_enabled()


def test_a_later_job_of_the_process_can_still_repeat_its_bits(monkeypatch):
    """cuBLAS reads its environment variable once per process, at the first matrix multiplication."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)

    with deterministic_algorithms(False):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize("wanted", [True, False, None])
def test_tf32_is_restored_after_an_error(wanted):
    def settings():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = settings()
    with pytest.raises(ZeroDivisionError), tf32(wanted):
        assert settings() == {True: ("high", True), False: ("highest", False), None: before}[wanted]
        raise ZeroDivisionError

    assert settings() == before
