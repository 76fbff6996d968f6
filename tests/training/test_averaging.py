"""Tests of the average of the weights: its growing decay, and the scores of averaged and plain weights."""

import copy

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from ema_seg.data.normalise import Normalise
from ema_seg.evaluation import ConfusionMatrix
from ema_seg.inference.prediction import segment
from ema_seg.models import build_segmenter
from ema_seg.training.averaging import UNAVERAGED, GrowingAverage
from ema_seg.training.losses import build_loss
from ema_seg.training.module import SegmentationModule


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_the_decay_grows_up_to_the_one_given_and_goes_on_where_it_was(decay):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(30, generator=generator).tolist()
    expected = values[0]
    for updates, value in enumerate(values[1:], 1):
        share = min(decay, (1 + updates) / (10 + updates))
        expected = share * expected + (1 - share) * value

    def average(values, state=None):
        averaging, module = GrowingAverage(decay), LightningModule()
        module.register_parameter("weight", nn.Parameter(torch.zeros(())))
        averaging.setup(None, module, "fit")
        if state is not None:
            averaging._average_model.load_state_dict(state)
        for value in values:
            nn.init.constant_(module.weight, value)
            averaging._average_model.update_parameters(module)
        return averaging._average_model.state_dict()

    whole = average(values)
    in_parts = average(values[17:], average(values[:17]))

    assert whole["module.weight"].item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(whole["module.weight"], in_parts["module.weight"])
    assert whole["n_averaged"] == in_parts["n_averaged"] == 30


class _Recorder(Callback):
    def on_validation_start(self, trainer, module):
        (averaging,) = (callback for callback in trainer.callbacks if isinstance(callback, GrowingAverage))
        self.plain = copy.deepcopy(module.model)
        self.averaged = copy.deepcopy(averaging._average_model.module.model)

    def on_train_epoch_end(self, trainer, module):
        self.logged = dict(trainer.callback_metrics)
        self.after = copy.deepcopy(module.model.state_dict())


def test_the_average_and_the_plain_weights_are_both_scored_by_name(tmp_path):
    torch.manual_seed(0)
    model = build_segmenter("linknet", classes=3, encoder="tu-test_efficientnet")
    module = SegmentationModule(
        model,
        build_loss({"cross_entropy": {}}, 3),
        Normalise((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        classes=["road", "traffic light", "traffic_light"],
        optimizer={
            "name": "sgd",
            "lr": 0.1,
            "encoder_lr_factor": 1.0,
            "weight_decay": 0.0,
            "momentum": 0.0,
            "nesterov": False,
        },
        schedule={"name": "constant"},
        config={"seed": 0},
    )
    samples = [
        {
            "image": torch.randint(256, (3, 32, 32), dtype=torch.uint8),
            "mask": torch.randint(2, (32, 32)),
            "name": str(index),
        }
        for index in range(10)
    ]
    samples[8]["mask"][:] = 255
    recorder = _Recorder()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        callbacks=[GrowingAverage(0.999), recorder],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )

    trainer.fit(module, DataLoader(samples[:8], 2), DataLoader(samples[8:], 2))

    logged = recorder.logged
    for name, scored in (("val/miou", recorder.averaged), (UNAVERAGED, recorder.plain)):
        confusion = ConfusionMatrix(3)
        for sample in samples[8:]:
            (prediction,) = segment(scored.eval(), [sample["image"]], 32, module.normalise)
            confusion.update(prediction, sample["mask"])
        scores = confusion.compute()
        assert logged[name].item() == pytest.approx(scores["miou"])
        if name == "val/miou":
            names = ["val_iou/road_0", "val_iou/traffic_light_1", "val_iou/traffic_light_2"]
            found = {key: logged[key].item() for key in names if key in logged}
            assert found == pytest.approx(
                {key: iou for key, iou in zip(names, scores["iou"], strict=True) if iou == iou}
            )
            loss = module.loss(scored(module.normalise(samples[9]["image"][None])), samples[9]["mask"][None])
            assert logged["val/loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert logged["val/miou"] != logged[UNAVERAGED]
    # Training continues with the plain weights.
    assert all(torch.equal(tensor, recorder.after[key]) for key, tensor in recorder.plain.state_dict().items())
