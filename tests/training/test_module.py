import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from ema_seg.attention import EMA
from ema_seg.data.normalise import Normalise
from ema_seg.models import build_segmenter
from ema_seg.models.auxiliary import add_auxiliary_head
from ema_seg.models.head import RowLogits
from ema_seg.runtime.errors import CheckpointError, ConfigError, DataError, TrainingError
from ema_seg.runtime.files import write_file
from ema_seg.training import checkpoints
from ema_seg.training.callbacks import EpochLog, KernelSearch, ProgressBar, attention_map
from ema_seg.training.checkpoints import AtomicCheckpoints
from ema_seg.training.loggers import build_loggers
from ema_seg.training.losses import build_loss
from ema_seg.training.module import SegmentationModule
from ema_seg.training.trainer import build_trainer
from tests.models.test_vision_transformer import EXPECTED, small
from tests.training.synchronisations import Synchronisations

ENCODER = "tu-test_efficientnet"
PALETTE = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
NORMALISE = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def random_image(*size):
    return torch.randint(256, (3, *size), dtype=torch.uint8)


def segmenter(**arguments):
    torch.manual_seed(0)
    return build_segmenter("fpn", classes=3, encoder=ENCODER, **arguments)


def module(model, terms=None, auxiliary=None):
    return SegmentationModule(
        model,
        build_loss(terms or {"cross_entropy": {}}, 3),
        NORMALISE,
        classes=["a", "b", "c"],
        palette=PALETTE,
        optimizer={"name": "adamw", "lr": 1e-3, "encoder_lr_factor": 1.0, "weight_decay": 0.0},
        schedule={"name": "constant"},
        config={"seed": 0} if auxiliary is None else {"seed": 0, "model": {"auxiliary": auxiliary}},
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_step_and_the_samples(value):
    model = segmenter()
    nn.init.constant_(next(model.parameters()), value)
    batch = {
        "image": torch.zeros(2, 3, 64, 64, dtype=torch.uint8),
        "mask": torch.zeros(2, 64, 64, dtype=torch.uint8),
        "name": ["aachen_1", "bochum_2"],
    }

    with pytest.raises(TrainingError, match=r"the loss is nan at step 0 .* aachen_1, bochum_2"):
        module(model).training_step(batch, 0)


def test_a_checkpoint_carries_the_configuration_the_classes_and_their_colours():
    checkpoint = {}

    module(segmenter()).on_save_checkpoint(checkpoint)

    assert checkpoint.pop("sums").tolist() == [0.0] * 5
    assert checkpoint == {"config": {"seed": 0}, "classes": ["a", "b", "c"], "palette": PALETTE}


class Failing(checkpoints._ArchiveFile):
    """File whose write number ``writes`` fails, as after Ctrl-C or on a full disk."""

    def __init__(self, file, writes, failure):
        super().__init__(file)
        self.writes, self.failure = writes, failure

    def write(self, data):
        self.writes -= 1
        if not self.writes:
            raise self.failure
        return super().write(data)


@pytest.mark.parametrize(
    "failure",
    [KeyboardInterrupt(), OSError(28, "No space left on device"), PermissionError(13, "Permission denied")],
)
@pytest.mark.parametrize("writes", [1, 2, 5, 20])
def test_a_checkpoint_that_cannot_be_written_says_why_and_leaves_the_one_before(tmp_path, monkeypatch, failure, writes):
    path = tmp_path / "last.ckpt"
    checkpoint = {str(number): torch.full((100,), float(number)) for number in range(20)}
    AtomicCheckpoints().save_checkpoint(checkpoint, path)
    before = path.read_bytes()
    monkeypatch.setattr(checkpoints, "_ArchiveFile", lambda file: Failing(file, writes, failure))

    with pytest.raises((KeyboardInterrupt, CheckpointError)) as error:
        AtomicCheckpoints().save_checkpoint(checkpoint, path)

    monkeypatch.undo()
    if isinstance(failure, OSError):
        assert f"{path}: the checkpoint cannot be written ({failure.strerror})" in str(error.value)
    else:
        assert error.value is failure
    assert path.read_bytes() == before


def test_the_attention_map_is_the_last_blocks_at_the_images_size():
    model = segmenter(attention="ema", attention_options={"factor": 2}, placements=["head"]).eval()
    image = random_image(50, 70)
    block = model.segmentation_head.attention
    assert isinstance(block, EMA)
    nn.init.zeros_(block.conv3x3.weight)
    nn.init.zeros_(block.gn.weight)
    nn.init.constant_(block.conv3x3.bias, 2.0)
    nn.init.constant_(block.gn.bias, -1.0)

    weights = attention_map(model, image, 32, NORMALISE)

    # Both branches are constant, so the weight is the sigmoid of their sum everywhere.
    assert weights.shape == (50, 70)
    assert torch.allclose(weights, torch.tensor(1.0).sigmoid())


def test_a_compiled_model_has_the_same_attention_map():
    model = segmenter(attention="ema", attention_options={"factor": 2}, placements=["head"]).eval()
    image = random_image(64, 64)
    expected = attention_map(model, image, 32, NORMALISE)
    model.compile(backend="eager", dynamic=False)
    with torch.inference_mode():
        model(NORMALISE(image)[None])  # compiles for this size, before any hook is registered

    assert torch.allclose(attention_map(model, image, 32, NORMALISE), expected)


def test_a_model_without_weight_maps_has_no_attention_map():
    assert attention_map(segmenter(attention="se").eval(), random_image(32, 32), 32, NORMALISE) is None


def test_the_epoch_log_survives_a_kill_in_the_middle_of_writing(tmp_path, monkeypatch):
    from ema_seg.training import callbacks

    path = tmp_path / "metrics.csv"
    row = dict.fromkeys(callbacks._COLUMNS, "1")
    callbacks._write_rows(path, [row])
    before = path.read_text()

    def killed(file, content):
        with file.open("wb") as opened:
            opened.write(content[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        callbacks._write_rows(path, [row, row])

    assert path.read_text() == before
    assert EpochLog(path).path == path


def test_the_bar_counts_epochs_as_the_lines_do_and_shares_no_line_with_them(tmp_path, capsys, monkeypatch):
    trainer = Trainer(max_epochs=7, accelerator="cpu", logger=CSVLogger(tmp_path), callbacks=[ProgressBar()])
    bar, log = trainer.progress_bar_callback, EpochLog(tmp_path / "metrics.csv")
    lightning_module = module(segmenter())
    monkeypatch.setattr(lightning_module, "epoch_means", lambda: {"train/loss": 0.5})
    monkeypatch.setattr(lightning_module, "log_dict", lambda values: None)
    trainer.strategy.connect(lightning_module)
    trainer.strategy.optimizers = [torch.optim.SGD(lightning_module.parameters(), lr=0.1)]
    trainer.fit_loop.epoch_progress.current.completed = 2
    bar.setup(trainer, lightning_module, "fit")
    bar.on_train_start(trainer, lightning_module)

    bar.on_train_epoch_start(trainer)
    assert bar.train_progress_bar.desc == "epoch 3/7: "
    assert bar.get_metrics(trainer, lightning_module) == {}  # without Lightning's v_num
    log._start = time.perf_counter()
    log.on_train_epoch_end(trainer, lightning_module)
    captured = capsys.readouterr()
    assert captured.err == "epoch 3/7  loss 0.500  not validated  0.0 images/s  0 s\n"
    assert captured.out.rpartition("\r")[2].startswith("epoch 3/7: ")  # redrawn below the line

    bar.on_exception(trainer, lightning_module, KeyboardInterrupt())
    assert capsys.readouterr().out.endswith("\r")
    assert bar.train_progress_bar.disable


def test_loggers_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.loggers.WandbLogger", lambda **options: options)
    assert build_loggers(tmp_path, {}) == []

    tensorboard, wandb = build_loggers(tmp_path, {"tensorboard": {}, "wandb": {"project": "leaves"}})

    assert tensorboard.log_dir == str(tmp_path / "tensorboard")
    assert wandb == {"project": "leaves", "save_dir": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"logger\.wandbb: must be one of .*Did you mean 'wandb'"):
        build_loggers(tmp_path, {"wandbb": {}})
    with pytest.raises(ConfigError, match=r"logger\.wandb='leaves': must be the logger's options"):
        build_loggers(tmp_path, {"wandb": "leaves"})


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_names_the_extra(name, tmp_path, monkeypatch):
    import lightning.pytorch.loggers

    class_name = {"wandb": "WandbLogger", "mlflow": "MLFlowLogger"}[name]

    def missing(**_):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(lightning.pytorch.loggers, class_name, missing)
    with pytest.raises(
        ConfigError, match=rf"logger={name}: its package is not installed; run pip install .*\[{name}\]"
    ):
        build_loggers(tmp_path, {name: {}})


def test_a_prediction_is_scored_at_the_images_own_size():
    lightning_module = module(segmenter().eval())
    image, mask = random_image(45, 61), torch.from_numpy(np.full((45, 61), 1))
    mask[:5] = 255
    lightning_module.on_validation_epoch_start()

    lightning_module.validation_step({"image": [image], "mask": [mask], "name": ["x"]}, 0)
    lightning_module.compute_scores()

    assert lightning_module.confusion.matrix.sum() == 40 * 61


def test_rows_that_are_not_of_a_run_are_named(tmp_path):
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")

    with pytest.raises(DataError, match=r"metrics\.csv: its rows are not as train\.py wrote them"):
        EpochLog(tmp_path / "metrics.csv").on_train_start(Trainer(logger=False, accelerator="cpu"), None)


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
def test_a_file_that_cannot_be_written_leaves_the_one_before_and_no_room_taken(failure, tmp_path, monkeypatch):
    write_file(tmp_path / "config.yaml", b"seed: 0")

    def fail(file, content):
        with file.open("wb") as opened:
            opened.write(content[:3])
        raise failure

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(DataError, match=rf"config\.yaml: cannot be written \({failure.strerror}\)"):
        write_file(tmp_path / "config.yaml", b"seed: 1")

    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert (tmp_path / "config.yaml").read_bytes() == b"seed: 0"


def test_an_epoch_that_goes_on_counts_its_earlier_part(tmp_path):
    log = EpochLog(tmp_path / "metrics.csv")
    log.load_state_dict({"seconds": 1000.0, "images": 8})
    trainer = Trainer(logger=False, accelerator="cpu")

    log.on_train_start(trainer, None)
    state = log.state_dict()
    log.on_train_epoch_start(trainer, None)

    assert 1000 < state["seconds"] < 1100
    assert state["images"] == 8
    assert log.state_dict()["seconds"] < 100
    assert log.state_dict()["images"] == 0


class Steps(Callback):
    """Watch the training steps between two log steps."""

    def __init__(self):
        self.watch = Synchronisations()

    def on_train_start(self, trainer, module):
        module.finite.every = trainer.log_every_n_steps  # as on a GPU

    def on_train_batch_start(self, trainer, module, batch, index):
        if index == 1:
            self.watch.__enter__()
        if index == 4:
            self.watch.__exit__(None, None, None)


def run_steps(tmp_path, batches, callbacks, **options):
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        callbacks=[EpochLog(tmp_path / "metrics.csv", quiet=True), *callbacks],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
        log_every_n_steps=5,
        **options,
    )
    lightning_module = module(build_segmenter("linknet", classes=3, encoder=ENCODER), {"cross_entropy": {}, "dice": {}})
    lightning_module.optimizer_settings["name"] = "sgd"  # AdamW reads its step counters, which are on the host anyway
    trainer.fit(lightning_module, DataLoader(batches, batch_size=None))
    return lightning_module


def small_batches(count):
    return [
        {
            "image": random_image(32, 32)[None].repeat(2, 1, 1, 1),
            "mask": torch.randint(3, (2, 32, 32), dtype=torch.uint8),
            "name": [f"{index}_a", f"{index}_b"],
        }
        for index in range(count)
    ]


def test_steps_between_two_log_steps_never_wait_for_the_device(tmp_path):
    steps = Steps()

    run_steps(tmp_path, small_batches(6), [steps])

    assert steps.watch.found == []


def test_steps_that_the_loss_scale_overflows_are_left_out_of_the_gradient_norms():
    lightning_module = module(segmenter())
    (weight,) = (parameter for name, parameter in lightning_module.named_parameters() if name.endswith("head.0.weight"))
    for norm in (3.0, math.inf, math.nan, 1.0):
        weight.grad = torch.zeros_like(weight)
        weight.grad.flatten()[0] = norm
        lightning_module.on_before_optimizer_step(None)
    lightning_module.sums[1] = 1

    means = lightning_module.epoch_means()

    assert means["train/gradient_norm"] == 2
    assert means["train/gradient_norm_max"] == 3


def test_a_loss_that_is_not_finite_is_named_at_the_next_log_step(tmp_path):
    class Break(Steps):
        def on_train_batch_start(self, trainer, module, batch, index):
            if index == 2:
                nn.init.constant_(next(module.model.parameters()), float("nan"))
            self.reached = index

    broken = Break()
    with pytest.raises(TrainingError, match=r"the loss is nan at step 2 \(epoch 0\), in the batch of 2_a, 2_b; lower"):
        run_steps(tmp_path, small_batches(9), [broken])
    assert broken.reached == 4


@pytest.mark.parametrize("moment", ["validation", "checkpoint", "epoch"])
def test_nothing_is_validated_or_saved_after_a_loss_that_is_not_finite(moment):
    lightning_module = module(segmenter())
    lightning_module.finite.every = 100
    lightning_module.finite.add(torch.tensor(float("inf")), 7, 1, ["aachen_1"])

    with pytest.raises(TrainingError, match=r"the loss is inf at step 7 \(epoch 1\), in the batch of aachen_1;"):
        {
            "validation": lightning_module.on_validation_epoch_start,
            "checkpoint": lambda: lightning_module.on_save_checkpoint({}),
            "epoch": lightning_module.on_train_epoch_end,
        }[moment]()


def test_kernels_are_searched_for_in_training_alone(tmp_path):
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, *arguments):
            seen.append(torch.backends.cudnn.benchmark)

    run_steps(tmp_path, small_batches(1), [KernelSearch(), Look()])

    assert seen == [True]
    assert not torch.backends.cudnn.benchmark
    plain, deterministic = (
        build_trainer({"accelerator": "cpu", "max_epochs": 1, "deterministic": flag}, tmp_path, [])
        for flag in (False, True)
    )
    for trainer, searches in ((plain, True), (deterministic, False)):
        assert any(isinstance(callback, KernelSearch) for callback in trainer.callbacks) == searches
    torch.use_deterministic_algorithms(False)


def test_the_auxiliary_loss_is_added_by_its_weight_and_logged_without_it():
    model = segmenter()
    add_auxiliary_head(model, 3)
    plain, guided = module(segmenter()), module(model, auxiliary=0.4)
    (batch,) = small_batches(1)
    batch["image"] = batch["image"].repeat(1, 1, 2, 2)
    batch["mask"] = batch["mask"].repeat(1, 2, 2)
    losses = []
    for lightning_module in (plain, guided):
        torch.manual_seed(0)
        losses.append(lightning_module.train().training_step(batch, 0).item())

    means = guided.epoch_means()

    assert means["train/loss"] == plain.epoch_means()["train/loss"] == losses[0]
    assert losses[1] == pytest.approx(losses[0] + 0.4 * means["train/auxiliary_loss"])
    assert "train/auxiliary_loss" not in plain.epoch_means()
    checkpoint = {}
    guided.on_save_checkpoint(checkpoint)
    assert len(checkpoint["sums"]) == 6


def test_the_auxiliary_loss_is_computed_in_strips(monkeypatch):
    model = build_segmenter("linknet", classes=3, encoder=ENCODER)
    add_auxiliary_head(model, 3)
    monkeypatch.setattr(RowLogits, "whole", lambda self: pytest.fail("all logits at once"))

    module(model, auxiliary=0.4).train().training_step(small_batches(1)[0], 0).backward()

    assert model.auxiliary.layers[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("decoder", EXPECTED)
def test_crops_are_padded_to_patches_of_14_pixels(decoder):
    model = small(decoder)
    add_auxiliary_head(model, 3)
    lightning_module = module(model.train(), auxiliary=0.4)
    (batch,) = small_batches(1)
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2:]))

    lightning_module.training_step(batch, 0).backward()
    loss = lightning_module.epoch_means()["train/loss"]

    stride = lightning_module.stride
    assert seen == [(-(-32 // stride) * stride,) * 2]
    assert math.isfinite(loss)
    assert model.encoder.model.cls_token.grad.abs().sum() > 0


def test_the_loss_of_a_padded_crop_is_that_of_its_own_pixels():
    model = small("linear")
    lightning_module = module(model.eval())
    (batch,) = small_batches(1)
    padded = nn.functional.pad(NORMALISE(batch["image"]), (0, 10, 0, 10))
    expected = nn.functional.cross_entropy(model(padded)[..., :32, :32], batch["mask"].long())

    assert lightning_module.training_step(batch, 0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_crops_that_a_convolutional_encoder_cannot_halve_are_refused():
    (batch,) = small_batches(1)
    batch["image"] = batch["image"][..., :30]
    with pytest.raises(ConfigError, match=r"crops must be multiples of 32, the model's stride, got 32 x 30 pixels"):
        module(segmenter()).training_step(batch, 0)
