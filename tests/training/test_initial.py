"""Start from a trained model: which tensors are taken, and which rows of the head."""

import pytest
import torch

from ema_seg.models import build_segmenter
from ema_seg.runtime.errors import CheckpointError, DataError
from ema_seg.training.initial import gives_encoder, initialise, load_trained

ENCODER = "tu-test_efficientnet"
PLACES = ("encoder", "decoder", "head")
# The widths of a small DPT.
DPT = {"decoder_fusion_channels": 8, "decoder_intermediate_channels": [8, 8, 8, 8]}


def save(folder, classes, decoder="linknet", encoder=ENCODER, attention="none", places=("decoder",), **options):
    """Save a checkpoint as train.py does, and return its path and model."""
    model = build_segmenter(
        decoder, classes=len(classes), encoder=encoder, attention=attention, placements=places, **options
    )
    config = {
        "data": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
        "model": {"decoder": decoder, "encoder": encoder, "encoder_weights": None, **options},
        "attention": {"name": attention},
        "placement": {**{place: place in places for place in PLACES}, "encoder_stages": None},
        "trainer": {},
    }
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    # The plain weights beside averaged ones, which are not those of an evaluation.
    plain = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    path = folder / "some.ckpt"
    torch.save({"state_dict": weights, "current_model_state": plain, "config": config, "classes": classes}, path)
    return path, model


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"attention": "none"}, {"attention": "se", "placements": PLACES}),
        ({"attention": "simam", "places": PLACES}, {"attention": "none"}),
        ({"attention": "eca"}, {"attention": "se", "placements": ["head"]}),
    ],
)
def test_everything_but_the_block_is_taken_whatever_the_block(tmp_path, before, now):
    path, trained = save(tmp_path, ["road", "sky"], **before)
    model = build_segmenter("linknet", classes=2, encoder=ENCODER, **now)
    plain = build_segmenter("linknet", classes=2, encoder=ENCODER)

    table = initialise(model, load_trained(str(path)), ["road", "sky"])

    count = len(plain.state_dict())
    assert f"{count} of {len(model.state_dict())} tensors taken" in table
    for part in ("encoder", "decoder", "segmentation_head"):
        taken, own = (layers(each, part) for each in (trained, model))
        assert len(own) == len([name for name in plain.state_dict() if name.startswith(f"{part}.")])
        assert all(torch.equal(*pair) for pair in zip(taken, own, strict=True))


def layers(model, part):
    """Return the tensors of a part, in order, without those of attention blocks."""
    state = model.state_dict()
    return [state[name] for name in state if name.startswith(f"{part}.") and ".attention." not in name]


@pytest.mark.parametrize("decoder", ["linknet", "dpt"])
def test_rows_of_the_head_follow_the_names_of_the_classes(tmp_path, decoder):
    encoder, options = ("tu-test_vit", DPT) if decoder == "dpt" else (ENCODER, {})
    path, trained = save(tmp_path, ["road", "sky", "pole"], decoder, encoder, **options)
    model = build_segmenter(decoder, classes=3, encoder=encoder, attention="eca", placements=["head"], **options)
    before = [parameter.detach().clone() for parameter in last_layer(model).parameters()]

    table = initialise(model, load_trained(str(path)), ["sky", "tree", "road"])

    for old, own, found in zip(before, last_layer(model).parameters(), last_layer(trained).parameters(), strict=True):
        assert torch.equal(own[0], found[1])
        assert torch.equal(own[1], old[1])
        assert torch.equal(own[2], found[0])
    assert "classes taken: 2 (sky, road)" in table
    assert "classes made anew: 1 (tree)" in table


def last_layer(model):
    return [module for module in model.segmentation_head.modules() if isinstance(module, torch.nn.Conv2d)][-1]


def test_classes_of_other_names_are_made_anew_even_if_as_many(tmp_path):
    path, _ = save(tmp_path, ["road", "sky"])
    model = build_segmenter("linknet", classes=2, encoder=ENCODER)
    before = last_layer(model).weight.detach().clone()

    initialise(model, load_trained(str(path)), ["cat", "dog"])

    assert torch.equal(last_layer(model).weight, before)


def test_another_decoder_takes_the_encoder_and_the_table_counts_the_rest(tmp_path):
    path, trained = save(tmp_path, ["road", "sky"])
    model = build_segmenter("fpn", classes=2, encoder=ENCODER, decoder_pyramid_channels=16)

    table = initialise(model, load_trained(str(path)), ["road", "sky"]).splitlines()

    encoder = len(model.encoder.state_dict())
    left = len(trained.decoder.state_dict())
    assert table[2].split() == ["encoder", str(encoder), "0", "0"]
    assert next(line.split() for line in table if "decoder " in line)[3] == str(left)


def test_a_bias_without_its_weights_is_not_taken(tmp_path):
    path, _ = save(tmp_path, ["road", "sky"])
    model = build_segmenter("fpn", classes=2, encoder=ENCODER, decoder_pyramid_channels=16)
    before = last_layer(model).bias.detach().clone()

    table = initialise(model, load_trained(str(path)), ["road", "sky"])

    assert torch.equal(last_layer(model).bias, before)
    assert "classes taken" not in table


@pytest.mark.parametrize("classes", [["cat", "dog"], ["road", "sky"]])
def test_nothing_that_fits_is_one_sentence(tmp_path, classes):
    path, _ = save(tmp_path, ["road", "sky"], "fpn", "resnet18")
    model = build_segmenter("linknet", classes=2, encoder=ENCODER)

    with pytest.raises(
        CheckpointError, match=r"init_from=.*some\.ckpt: none of its \d+ tensors fits .* fpn on resnet18"
    ):
        initialise(model, load_trained(str(path)), classes)


def test_loading_draws_no_random_numbers_and_takes_runs_or_files(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    path, _ = save(tmp_path, ["road", "sky"])
    path.rename(tmp_path / "checkpoints" / "best.ckpt")
    before = torch.random.get_rng_state()

    load_trained(str(tmp_path))

    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(DataError, match="no such folder or file"):
        load_trained(str(tmp_path / "missing"))


def test_an_encoder_is_given_if_its_name_and_its_options_are_the_same():
    model = {"decoder": "fpn", "encoder": "resnet18", "encoder_weights": "imagenet", "decoder_dropout": 0.1}

    assert gives_encoder({"model": model}, {"model": model | {"decoder": "unet", "encoder_weights": None}})
    assert not gives_encoder({"model": model}, {"model": model | {"encoder": "resnet34"}})
    assert not gives_encoder({"model": model}, {"model": model | {"encoder_depth": 3}})
    assert not gives_encoder({"model": model}, {"model": model | {"decoder": "pspnet"}})  # three stages by default
    assert gives_encoder({"model": model}, {"model": model | {"auxiliary": 0.4}})
