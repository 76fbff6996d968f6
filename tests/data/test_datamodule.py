import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer

from ema_seg.data import SegmentationDataModule
from ema_seg.data.source import FolderSource
from ema_seg.runtime.errors import ConfigError, DataError, EmaSegError
from tests.data.builders import random_image, random_mask, save, write_split_folder

CROP = {"crop": {"transform": "CategoryLimitedCrop", "height": 8, "width": 10}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_split_folder(tmp_path, "train", [f"t{index}" for index in range(7)], [0, 1])
    write_split_folder(tmp_path, "val", ["v0", "v1"], [0, 1])
    save(tmp_path / "val/images/v2.jpg", random_image(2, 20, 30))
    save(tmp_path / "val/masks/v2.png", random_mask([0, 1], 2, 20, 30))
    write_split_folder(tmp_path, "test", ["x0"], [0, 1])
    (tmp_path / "classes.yaml").write_text("[background, leaf]")
    return tmp_path


def make_module(root: Path | None, **changes: Any) -> SegmentationDataModule:
    arguments: dict[str, Any] = {
        "name": "folder",
        "root": root,
        "batch_size": 3,
        "evaluation_batch_size": 2,
        "workers": 0,
        "augmentation": CROP,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
    }
    return SegmentationDataModule(**arguments | changes)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_are_stacked_crops(root: Path, workers: int) -> None:
    module = make_module(root, workers=workers)
    module.setup("fit")
    batches = list(module.train_dataloader())
    assert len(batches) == 2  # the seventh image does not fill a batch
    assert batches[0]["image"].shape == (3, 3, 8, 10) and batches[0]["image"].dtype == torch.uint8
    assert batches[0]["mask"].shape == (3, 8, 10) and batches[0]["mask"].dtype == torch.uint8
    names = [name for batch in batches for name in batch["name"]]
    assert len(set(names)) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_batches_keep_every_image_and_its_size(root: Path, workers: int) -> None:
    module = make_module(root, workers=workers)
    module.setup("validate")
    batches = list(module.val_dataloader())
    assert [name for batch in batches for name in batch["name"]] == ["v0", "v1", "v2"]
    assert [tuple(image.shape) for batch in batches for image in batch["image"]] == [
        (3, 12, 16),
        (3, 12, 16),
        (3, 20, 30),
    ]
    assert batches[1]["mask"][0].shape == (20, 30)


def test_test_batches_come_from_the_evaluation_split(root: Path) -> None:
    module = make_module(root)
    module.setup("test")
    assert module.test_dataset is module.val_dataset
    module = make_module(root, evaluation_split="test")
    module.setup("test")
    assert [batch["name"] for batch in module.test_dataloader()] == [["x0"]]


def test_describes_the_classes(root: Path) -> None:
    module = make_module(root)
    assert module.classes == ("background", "leaf")
    assert module.num_classes == len(module.palette) == 2


def test_datasets_are_built_once(root: Path) -> None:
    module = make_module(root)
    module.setup("fit")
    built = module.train_dataset, module.val_dataset
    module.setup("fit")
    assert (module.train_dataset, module.val_dataset) == built


def test_seed_and_epoch_decide_order_and_crops_for_any_number_of_workers(root: Path) -> None:
    def epochs(seed: int, workers: int, first: int = 0) -> list[Any]:
        torch.manual_seed(seed)
        loader = make_module(root, workers=workers).train_dataloader()
        loader.sampler.set_epoch(first)
        return [[(batch["name"], batch["image"].sum().item()) for batch in loader] for _ in range(first, 3)]

    once = epochs(1, workers=0)
    assert once == epochs(1, workers=0) == epochs(1, workers=2)
    assert once[1:] == epochs(1, workers=2, first=1)
    assert once[0] != once[1]
    assert once != epochs(2, workers=0)


def test_a_loader_that_is_made_anew_draws_as_the_first_did(root: Path) -> None:
    """In training each rank has its own random state, but all ranks must draw parts of the same batches."""
    module = make_module(root)
    first = list(module.train_dataloader().sampler)
    torch.manual_seed(1234)

    assert list(module.train_dataloader().sampler) == first


def test_loading_leaves_the_generator_of_training_alone(root: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    list(make_module(root).train_dataloader())
    list(make_module(root).val_dataloader())
    assert torch.equal(torch.rand(2), expected)


def test_dataset_options_are_passed_on(root: Path, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("[soil, plant]")
    assert make_module(root, classes=tmp_path / "other.yaml").classes == ("soil", "plant")
    with pytest.raises(ConfigError, match=r"data\.coarse=True is not an option"):
        make_module(root, coarse=True).setup("fit")


@pytest.mark.parametrize(
    ("key", "value"),
    [("batch_size", 0), ("evaluation_batch_size", 1.5), ("workers", -1), ("batch_size", True), ("batch_size", "auto")],
)
def test_a_number_out_of_range_is_named(root: Path, key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{key}: must be a whole number .*, got {value!r}"):
        make_module(root, **{key: value})


@pytest.mark.parametrize("key", ["mean", "std"])
def test_a_normalisation_that_is_not_known_yet_is_named(root: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{key}: must be three numbers, .*, got None"):
        make_module(root, **{key: None})


def test_a_batch_larger_than_the_data_set_is_named(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.batch_size=8 is more than the 7 training images"):
        make_module(root, batch_size=8).setup("fit")
    make_module(root, batch_size=7).setup("fit")


def test_training_without_a_crop_to_one_size_is_named(root: Path) -> None:
    save(root / "train/images/t0.jpg", random_image(0, 20, 30))
    save(root / "train/masks/t0.png", random_mask([0], 0, 20, 30))
    module = make_module(root, augmentation={}, batch_size=7)
    with pytest.raises(ConfigError, match=r"data\.augmentation: .*differ in size: .*30 x 20.* crop all to one size"):
        next(iter(module.train_dataloader()))


def test_setup_fails_early_on_missing_data(root: Path) -> None:
    (root / "val/masks/v0.png").unlink()
    with pytest.raises(DataError, match=r"v0\.jpg: the image has no mask"):
        make_module(root).setup("fit")


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_workers_are_one_sentence(root: Path, workers: int) -> None:
    (root / "val/images/v1.jpg").write_bytes(b"broken")
    module = make_module(root, workers=workers)
    with pytest.raises(DataError) as raised:
        list(module.val_dataloader())
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(f"{root / 'val/images/v1.jpg'}: cannot be decoded as an image")


class Recorder(LightningModule):
    """Module that records the names in the batches of each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, list[str]] = {}
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        self.seen.setdefault(self.current_epoch, []).extend(batch["name"])
        return self.weight * batch["image"].float().mean()

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        assert isinstance(batch["image"], list)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: SegmentationDataModule, path: Path, epochs: int, checkpoint: Path | None = None) -> Recorder:
    recorder = Recorder()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(recorder, module, ckpt_path=checkpoint, weights_only=False)
    trainer.save_checkpoint(path)
    return recorder


def test_trains_with_lightning_and_a_resumed_run_does_not_repeat_an_epoch(root: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = fit(make_module(root, batch_size=1), tmp_path / "first.ckpt", epochs=1)
    torch.manual_seed(0)
    resumed = fit(make_module(root, batch_size=1), tmp_path / "second.ckpt", 2, tmp_path / "first.ckpt")
    assert sorted(first.seen[0]) == sorted(resumed.seen[1]) == [f"t{index}" for index in range(7)]
    assert list(resumed.seen) == [1]
    assert first.seen[0] != resumed.seen[1]


def test_a_missing_root_is_named() -> None:
    with pytest.raises(ConfigError, match=r"data\.root is not set; expected a folder with train/"):
        make_module(None).setup("fit")


def test_files_that_a_disk_does_not_list_are_not_waited_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    monkeypatch.setattr(FolderSource, "files", lambda source, folder: answered.wait(60))
    with pytest.raises(EmaSegError) as raised:
        make_module(root, timeout=0.2).setup("fit")
    answered.set()
    assert str(raised.value).startswith(f"{root}: the disk did not respond for 0.2 seconds; ")


@pytest.mark.parametrize("option", ["split", "transform"])
def test_what_the_module_chooses_itself_is_no_option(root: Path, option: str) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.{option}='x' is not an option of the data set 'folder'"):
        make_module(root, **{option: "x"}).setup("fit")


def test_labels_that_teach_or_score_nothing_are_refused(root: Path) -> None:
    make_module(root).setup("fit")
    (root / "classes.yaml").write_text("[ground, sky, rest]")  # the masks hold only the first two, and no ignored pixel
    make_module(root).setup("fit")
    for path in (root / "test/masks").iterdir():
        save(path, random_mask([255]))
    module = make_module(root, evaluation_split="test")
    for stage in ("fit", "test"):
        with pytest.raises(DataError, match="the split 'test' has no labelled pixel"):
            module.setup(stage)
    save(root / "train/masks/t0.png", random_mask([0, 255]))
    with pytest.raises(DataError, match=r"classes\.yaml: no training pixel is 'rest' \(mask value 2\)"):
        make_module(root).setup("fit")
    (root / "classes.yaml").write_text("{classes: [ground, sky, rest], ignore: 255}")
    make_module(root).setup("fit")
