import hashlib
import multiprocessing
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import ema_seg
from ema_seg.data.base import IGNORE_INDEX
from ema_seg.data.cityscapes import CityscapesDataset
from ema_seg.data.street import StreetDataset
from ema_seg.data.street_scene import LabelId, render_scene
from ema_seg.runtime.distributed.ranks import RankInfo
from ema_seg.runtime.errors import ConfigError, DataError

TINY = {"height": 48, "width": 96, "train_images": 3, "val_images": 2, "test_images": 1}


def content(folder: Path) -> dict[str, str]:
    """Return the SHA-256 digest of every file, by its path inside the folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def scenes() -> list[tuple[np.ndarray, np.ndarray]]:
    return [render_scene(np.random.default_rng([7, index]), 160, 320) for index in range(40)]


def test_two_generations_have_identical_bytes(tmp_path: Path) -> None:
    first, second = StreetDataset(tmp_path / "a", **TINY), StreetDataset(tmp_path / "b", **TINY)
    assert content(first.root) == content(second.root)
    assert len(content(first.root)) == 2 * (3 + 2 + 1)


@pytest.mark.slow
def test_another_process_with_another_hash_seed_writes_identical_bytes(tmp_path: Path) -> None:
    here = StreetDataset(tmp_path / "a", **TINY)
    assert generate(tmp_path / "b", PYTHONHASHSEED="123").wait() == 0
    assert content(here.root) == content(tmp_path / "b" / here.root.name)


def test_an_image_depends_on_no_count(tmp_path: Path) -> None:
    few = content(StreetDataset(tmp_path, **TINY).root)
    many = content(StreetDataset(tmp_path, **TINY | {"train_images": 5, "val_images": 3, "test_images": 2}).root)
    assert few.items() < many.items()


def test_scenes_differ_within_a_split_between_splits_and_between_seeds(tmp_path: Path) -> None:
    first, second = StreetDataset(tmp_path, **TINY), StreetDataset(tmp_path, seed=1, **TINY)
    digests = [*content(first.root).values(), *content(second.root).values()]
    assert len(set(digests)) == len(digests)


def test_it_is_read_by_the_cityscapes_reader(tmp_path: Path) -> None:
    street = StreetDataset(tmp_path, "val", **TINY)
    plain = CityscapesDataset(street.root, "val")
    assert [plain.name(i) for i in range(len(plain))] == ["eastgate_000000_000019", "eastgate_000001_000019"]
    for ours, theirs in zip((street[0], street[1]), (plain[0], plain[1]), strict=True):
        np.testing.assert_array_equal(ours["image"], theirs["image"])
        np.testing.assert_array_equal(ours["mask"], theirs["mask"])


def test_layout_and_file_formats_are_those_of_cityscapes(tmp_path: Path) -> None:
    root = StreetDataset(tmp_path, **TINY).root
    assert root.name.startswith("street-48x96-3+2+1-s0-v")
    image = root / "leftImg8bit/train/northgate/northgate_000002_000019_leftImg8bit.png"
    labels = root / "gtFine/train/northgate/northgate_000002_000019_gtFine_labelIds.png"
    with Image.open(image) as picture:
        assert (picture.mode, picture.size) == ("RGB", (96, 48))
    with Image.open(labels) as picture:
        assert (picture.mode, picture.size) == ("L", (96, 48))
        assert set(np.unique(np.array(picture))) <= set(LabelId)


def test_samples_hold_train_ids_of_the_asked_size(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        dataset = StreetDataset(tmp_path, split, **TINY)
        assert len(dataset) == count
        sample = dataset[count - 1]
        assert sample["image"].shape == (48, 96, 3)
        assert sample["mask"].shape == (48, 96)
        assert set(np.unique(sample["mask"])) <= {*range(19), IGNORE_INDEX}
    assert len(dataset.classes) == len(dataset.palette) == 19


def test_a_transform_is_applied(tmp_path: Path) -> None:
    dataset = StreetDataset(tmp_path, transform=lambda sample: sample["name"], **TINY)
    assert dataset[1] == "northgate_000001_000019"


def test_the_default_root_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert StreetDataset(**TINY).root.parent == tmp_path / "cache" / "ema-seg" / "street"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert StreetDataset(**TINY).root.parent == tmp_path / "home" / ".cache" / "ema-seg" / "street"


def test_the_first_process_says_once_and_in_one_line_what_it_writes_and_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        StreetDataset(tmp_path, **TINY)
    assert capsys.readouterr() == ("", f"Generating 6 street scenes in {tmp_path}\n")

    monkeypatch.setattr("ema_seg.data.street.rank_info", lambda: RankInfo(1, 2, 1, 2))
    StreetDataset(tmp_path / "other", **TINY)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47), (200, 64), (64, 400)])
def test_any_size_and_proportion_can_be_drawn(height: int, width: int) -> None:
    for index in range(6):
        image, labels = render_scene(np.random.default_rng([1, index]), height, width)
        assert (image.shape, image.dtype) == ((height, width, 3), np.uint8)
        assert (labels.shape, labels.dtype) == ((height, width), np.uint8)
        assert set(np.unique(labels)) <= set(LabelId)


@pytest.mark.slow
def test_every_class_occurs_often_enough_to_be_learnt(scenes: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for label in LabelId:
        share = np.mean([(labels == label).any() for _, labels in scenes])
        assert share >= 0.1, f"{label.name} is in {share:.0%} of the scenes"


def test_large_regions_are_large_and_small_things_small(scenes: list[tuple[np.ndarray, np.ndarray]]) -> None:
    area = {label: np.mean([np.mean(labels == label) for _, labels in scenes]) for label in LabelId}
    for label in (LabelId.ROAD, LabelId.BUILDING, LabelId.SKY):
        assert area[label] > 0.08
    for label in (LabelId.POLE, LabelId.TRAFFIC_LIGHT, LabelId.TRAFFIC_SIGN, LabelId.PERSON, LabelId.BICYCLE):
        assert 0.0005 < area[label] < 0.03


def test_poles_are_thin_and_survive_the_reduction(scenes: list[tuple[np.ndarray, np.ndarray]]) -> None:
    runs = np.concatenate([run_lengths(labels == LabelId.POLE) for _, labels in scenes])
    assert np.median(runs) <= 4
    assert (runs <= 2).mean() > 0.1


def test_people_are_seen_at_many_distances(scenes: list[tuple[np.ndarray, np.ndarray]]) -> None:
    heights = []
    for _, labels in scenes:
        _, _, boxes, _ = cv2.connectedComponentsWithStats((labels == LabelId.PERSON).astype(np.uint8))
        heights += boxes[1:, cv2.CC_STAT_HEIGHT].tolist()
    assert min(heights) < 12
    assert max(heights) > 40


def test_the_label_edges_lie_on_the_image_edges(scenes: list[tuple[np.ndarray, np.ndarray]]) -> None:
    at_edges, elsewhere = [], []
    for image, labels in scenes:
        jump = np.abs(np.diff(image.astype(float), axis=1)).sum(2)[1:-1, 1:-1]
        edge = np.diff(labels.astype(int), axis=1)[1:-1, 1:-1] != 0
        at_edges.append(jump[edge].mean())
        elsewhere.append(jump[~edge].mean())
    assert np.mean(at_edges) > 3 * np.mean(elsewhere)


@pytest.mark.slow
def test_processes_that_generate_at_the_same_time_end_with_one_whole_folder(tmp_path: Path) -> None:
    writers = [generate(tmp_path / "shared") for _ in range(2)]
    assert [writer.wait() for writer in writers] == [0, 0]
    alone = StreetDataset(tmp_path / "alone", **TINY).root
    assert [path.name for path in (tmp_path / "shared").iterdir()] == [alone.name]
    assert content(tmp_path / "shared" / alone.name) == content(alone)


@pytest.mark.slow
def test_a_killed_generation_is_done_again(tmp_path: Path) -> None:
    writer = generate(tmp_path, train_images=40)
    while not list(tmp_path.glob(".street-*/leftImg8bit/train/*/*.png")):
        assert writer.poll() is None
    writer.kill()
    writer.wait()
    assert not list(tmp_path.glob("street-*"))
    assert len(StreetDataset(tmp_path, **TINY | {"train_images": 40})) == 40


def test_what_a_killed_generation_left_is_removed_after_a_day(tmp_path: Path) -> None:
    name = StreetDataset(tmp_path / "elsewhere", **TINY).root.name
    old, recent = tmp_path / f".{name}.old", tmp_path / f".{name}.recent"
    for leftover in (old, recent):
        leftover.mkdir()
    os.utime(old, (0, 0))
    StreetDataset(tmp_path, **TINY)
    assert not old.exists()
    assert recent.exists()


def test_a_failed_generation_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ema_seg.data.street._write_scenes", fail)
    with pytest.raises(DataError, match="No space left on device"):
        StreetDataset(tmp_path, **TINY)
    assert list(tmp_path.iterdir()) == []


def test_a_generated_folder_that_lost_files_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    root = StreetDataset(tmp_path, **TINY).root
    for path in root.rglob("northgate_000001_*"):
        path.unlink()
    with pytest.raises(DataError, match="has 2 train images, expected 3; delete the folder"):
        StreetDataset(tmp_path, **TINY)
    assert len(StreetDataset(tmp_path, "val", **TINY)) == 2


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("height", 0),
        ("height", 31),
        ("width", 4096),
        ("width", 320.0),
        ("train_images", 0),
        ("val_images", -1),
        ("test_images", True),
        ("train_images", "many"),
        ("seed", -1),
        ("seed", None),
    ],
)
def test_an_impossible_option_is_named_with_its_value(tmp_path: Path, option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{option}: must be a whole number .*, got {value!r}\."):
        StreetDataset(tmp_path, **TINY | {option: value})
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_split_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="split='validation'"):
        StreetDataset(tmp_path, "validation", **TINY)
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match=r"file.*cannot write.*set data\.root"):
        StreetDataset(tmp_path / "file" / "street", **TINY)


def run_lengths(mask: np.ndarray) -> np.ndarray:
    """Return the lengths of the horizontal runs of a mask."""
    steps = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(int), axis=1).ravel()
    return np.flatnonzero(steps == -1) - np.flatnonzero(steps == 1)


def generate(root: Path, train_images: int = TINY["train_images"], **environment: str) -> subprocess.Popen[bytes]:
    """Start another interpreter that generates the tiny data set."""
    options = TINY | {"train_images": train_images}
    code = f"from ema_seg.data.street import StreetDataset; StreetDataset({str(root)!r}, **{options!r})"
    package = str(Path(ema_seg.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": package} | environment,
        stderr=subprocess.DEVNULL,
    )


def test_scenes_are_drawn_where_a_launcher_has_set_its_own_start_method(tmp_path: Path) -> None:
    before = multiprocessing.get_start_method(allow_none=True)
    import_module("joblib.externals.loky.backend.context")  # registers the start method "loky"
    multiprocessing.set_start_method("loky", force=True)
    try:
        assert len(StreetDataset(tmp_path, height=32, width=32, train_images=2, val_images=1, test_images=1)) == 2
    finally:
        multiprocessing.set_start_method(before, force=True)
