import pytest
import torch
from hydra import compose, initialize_config_dir

from ema_seg.attention import build_attention
from ema_seg.cli.command_line import plain_config
from ema_seg.cli.launch import complete_config
from ema_seg.models import segmenter_from_config
from ema_seg.runtime.distributed.ranks import single_process
from ema_seg.runtime.errors import ConfigError
from ema_seg.training import find_batch_size
from ema_seg.training.parallel import batch_size
from ema_seg.training.parallel.batch_size import largest_that_fits
from tests.conftest import QUICK, ROOT


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 100])
def test_the_largest_is_found_in_few_trials(most):
    for largest in range(most + 1):
        tried = []

        def fits(number, largest=largest, tried=tried):
            tried.append(number)
            return number <= largest

        assert largest_that_fits(fits, most) == largest
        assert max(tried) <= min(most, max(1, 2 * largest))
        assert len(tried) == len(set(tried)) <= 2 * most.bit_length()


@pytest.fixture
def config(camvid_root):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        overrides = [*QUICK, "data=camvid", f"data.root={camvid_root}", "data.batch_size=auto"]
        config = plain_config(compose("train", overrides))
    complete_config(config)
    return config


def give_room_for(number, monkeypatch):
    """Simulate a GPU that runs out of memory with more than ``number`` crops."""

    def build(*arguments, **keywords):
        model = segmenter_from_config(*arguments, **keywords)
        model.register_forward_pre_hook(refuse)
        return model

    def refuse(model, arguments):
        if len(arguments[0]) > number:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(batch_size, "segmenter_from_config", build)
    monkeypatch.setattr(batch_size, "check_auto_batch_size", lambda config, device: None)


@pytest.mark.slow
def test_the_batch_is_the_largest_that_trains(config, monkeypatch):
    give_room_for(3, monkeypatch)
    state = torch.get_rng_state()

    assert find_batch_size(config, torch.device("cpu")) == 3
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_the_batch_is_no_larger_than_the_data_set(config, monkeypatch):
    give_room_for(100, monkeypatch)

    assert find_batch_size(config, torch.device("cpu")) == 4


def test_no_room_for_a_single_crop_is_told(config, monkeypatch):
    give_room_for(0, monkeypatch)

    with pytest.raises(ConfigError, match="not even one crop of 64 x 64 pixels fits"):
        find_batch_size(config, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("room", [1, 3])
def test_a_decoder_that_needs_two_crops_is_given_two_or_refused(config, monkeypatch, room):
    give_room_for(room, monkeypatch)
    config["model"] = {**config["model"], "decoder": "deeplabv3plus"}
    for option in ("decoder_pyramid_channels", "decoder_segmentation_channels"):
        config["model"].pop(option, None)

    if room == 3:
        assert find_batch_size(config, torch.device("cpu")) == 3
        return
    with pytest.raises(ConfigError, match=r"only one crop of 64 x 64 .* model's batch norm needs at least 2"):
        find_batch_size(config, torch.device("cpu"))


def test_emau_exchanges_nothing_while_a_process_tries_by_itself(monkeypatch):
    """Ranks may make different numbers of trials, so a collective in a trial would block."""
    exchanged = []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", exchanged.append)
    block = build_attention("emau", 8)

    with single_process():
        block(torch.rand(2, 8, 4, 4))
    assert exchanged == []
    block(torch.rand(2, 8, 4, 4))
    assert len(exchanged) == 1


def test_without_a_gpu_there_is_no_automatic_batch(config):
    with pytest.raises(ConfigError, match=r"data\.batch_size=auto: needs a CUDA GPU, got cpu"):
        find_batch_size(config, torch.device("cpu"))
