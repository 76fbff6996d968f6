"""User's own images and masks, in folders, with the classes in a YAML file.

    root/
      classes.yaml
      train/images/ride/001.jpg    train/masks/ride/001.png
      val/images/...               val/masks/...
      test/images/...              test/masks/...        (optional)

An image and its mask have the same path below ``images/`` and ``masks/`` up to the suffix; sub-folders are
optional. Images can be JPEG, PNG, TIFF, WebP, BMP, GIF or PPM with 8 bits a channel; masks the same, but lossless and
opaque. By default, files with an orientation tag are turned upright.

A mask is either *indexed*, one channel whose pixels are class values, or *colour-coded*, each pixel exactly the
colour of a class. ``masks="auto"`` chooses by the classes and the mask: RGB is colour-coded; a palette is colour-coded
if the classes have colours, else its indices are class values; grey holds class values unless all classes have grey
colours.

The classes file is a list of classes, or a mapping with such a list and the ignored pixels::

    classes:
      - {name: background, value: 0, color: [0, 0, 0]}
      - {name: leaf, value: 7, color: "#22cc44"}
    ignore: [255, "#ffffff"]

- A class is a name alone, or a mapping with ``name`` and, each optional, ``value`` and ``color``. The order of
  the list is the order of the train ids.
- ``value`` (0 to 255) is the class's value in indexed masks; without it, the class's position in the list,
  from 0.
- ``color`` is ``[red, green, blue]`` (0 to 255 each) or ``"#rrggbb"``: the class's colour in colour-coded masks
  and in figures. Give it to all classes or to none; without it, figures get distinct colours and masks must be
  indexed.
- ``ignore`` is a mask value or colour, or a list of them, that belongs to no class; its default is the value 255
  unless a class has it. Any other value or colour in a mask is an error.

The shortest classes file is thus ``[background, leaf]``.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

from ema_seg.data.base import (
    IGNORE_INDEX,
    INVALID,
    Color,
    MissingSplitError,
    Pairing,
    Sample,
    SegmentationDataset,
    pair_files,
    train_id_table,
)
from ema_seg.data.decoding import decode_mask, read_traits
from ema_seg.data.source import File, FolderSource
from ema_seg.runtime.errors import ConfigError, DataError, did_you_mean
from ema_seg.runtime.texts import read_yaml

__all__ = ["ClassList", "FolderDataset", "pair_split_folder"]

_MAX_CLASSES = 254  # train ids are uint8; 254 and 255 are reserved


@dataclass(frozen=True)
class ClassList:
    """Content of a classes file; a class's train id is its position in ``names``."""

    names: tuple[str, ...]
    values: tuple[int, ...]
    """Each class's value in indexed masks."""
    colors: tuple[Color, ...] | None
    """Each class's colour, or None if the file gives none."""
    ignored_values: tuple[int, ...] = (IGNORE_INDEX,)
    ignored_colors: tuple[Color, ...] = ()
    ignores_by_default: bool = False
    """True if the file has no ``ignore``, so that its default applies."""

    @classmethod
    def read(cls, path: Path) -> "ClassList":
        """Read a classes file; the module's docstring gives its format.

        Raises:
            DataError: The file is missing, is not YAML, or does not have the format.
        """
        try:
            content = read_yaml(path)
        except OSError as error:
            raise DataError(f"{path}: the classes file cannot be read ({error.strerror}).") from error
        try:
            return cls._parse(content)
        except ValueError as error:
            raise DataError(f"{path}: {error}.") from error

    @classmethod
    def _parse(cls, content: object) -> "ClassList":
        if not isinstance(content, Mapping):
            content = {"classes": content}
        _refuse_unknown_keys(content, {"classes", "ignore"}, "the classes file")
        entries = content.get("classes")
        if not isinstance(entries, list) or not 1 <= len(entries) <= _MAX_CLASSES:
            raise ValueError(f"expected a list of 2 to {_MAX_CLASSES} classes, found {_shown(entries)}")
        classes = [_parse_class(entry, position) for position, entry in enumerate(entries)]
        names, values, colors = zip(*classes, strict=True)
        if len(classes) == 1:
            raise ValueError(
                f"expected at least two classes, found only {names[0]!r}; add one for the other pixels, as in "
                f"[background, {names[0]}]"
            )
        default = None if IGNORE_INDEX in values else IGNORE_INDEX
        ignored = _parse_ignored(content.get("ignore", default))
        ignored_values = tuple(item for item in ignored if isinstance(item, int))
        ignored_colors = tuple(item for item in ignored if isinstance(item, tuple))
        _refuse_repeated(names, "name")
        _refuse_repeated(values + ignored_values, "value")
        _refuse_repeated([color for color in colors + ignored_colors if color], "color")
        if None in colors and any(colors):
            raise ValueError(
                f"class {names[colors.index(None)]!r} has no color but others have; give it to all or none"
            )
        return cls(
            names,
            values,
            None if None in colors else colors,
            ignored_values,
            ignored_colors,
            ignores_by_default="ignore" not in content,
        )

    @property
    def value_train_ids(self) -> dict[int, int]:
        """Train id of each value that may occur in an indexed mask."""
        return dict.fromkeys(self.ignored_values, IGNORE_INDEX) | {v: i for i, v in enumerate(self.values)}

    @property
    def color_train_ids(self) -> dict[Color, int]:
        """Train id of each colour that may occur in a colour-coded mask."""
        return dict.fromkeys(self.ignored_colors, IGNORE_INDEX) | {c: i for i, c in enumerate(self.colors or ())}


class FolderDataset(SegmentationDataset):
    """User's own data set; the module's docstring gives its layout and the format of the classes file.

    Args:
        root: The folder with ``train/``, ``val/`` and, if there is one, ``test/``.
        split: "train", "val" or "test".
        transform: Applied to each sample.
        classes: The classes file; ``<root>/classes.yaml`` by default.
        masks: "index" for masks of class values, "color" for masks of the classes' colours, or "auto"; see the module's
            docstring.
        orientation: "upright" applies orientation tags, as viewers do; "ignore" keeps pixels as stored.
        allow_unpaired: See :class:`SegmentationDataset`.
    """

    layout: ClassVar[str] = "a folder with train/, val/ or test/, each with images/ and masks/"

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        transform: Callable[[Sample], Any] | None = None,
        *,
        classes: str | os.PathLike[str] | None = None,
        masks: str = "auto",
        orientation: str = "upright",
        allow_unpaired: bool = False,
    ) -> None:
        _require_choice("masks", masks, ("auto", "index", "color"))
        _require_choice("orientation", orientation, ("upright", "ignore"))
        super().__init__(root, split, transform, allow_unpaired=allow_unpaired)
        self.classes_file = self.root / "classes.yaml" if classes is None else Path(classes).expanduser()
        self.class_list = ClassList.read(self.classes_file)
        self.classes = self.class_list.names
        self.palette = self.class_list.colors or distinct_colors(len(self.classes))
        self.train_ids = train_id_table(self.class_list.value_train_ids)
        self.expects_all_classes = split == "train" and self.class_list.ignores_by_default
        self.upright = orientation == "upright"
        self.masks = masks
        colors = self.class_list.colors
        if masks == "color" and colors is None:
            raise DataError(f"{self.classes_file}: gives no colors, which data.masks=color needs; add them.")
        self.palette_colors = masks == "color" or (masks == "auto" and colors is not None)
        grey = colors is not None and all(len(set(color)) == 1 for color in colors)
        self.grey_colors = masks == "color" or (masks == "auto" and grey)

    def find_pairs(self) -> Pairing:
        """Pair images and masks by path; see :meth:`SegmentationDataset.find_pairs`."""
        return pair_split_folder(self.root, self.split, self.layout)

    def decode_mask(self, file: File) -> NDArray[np.uint8]:
        """Decode a mask to values or colours; see :meth:`SegmentationDataset.decode_mask`."""
        return decode_mask(file, palette_colors=self.palette_colors, grey_colors=self.grey_colors, upright=self.upright)

    def to_train_ids(self, mask: NDArray[np.uint8], file: File) -> NDArray[np.uint8]:
        """Map values or colours to train ids by the classes file; see :meth:`SegmentationDataset.to_train_ids`."""
        if mask.ndim == 2:
            return super().to_train_ids(mask, file)
        if self.masks == "index":
            raise DataError(f"{file}: is a colour image, but data.masks=index expects one channel of class values.")
        color_train_ids = self.class_list.color_train_ids
        if self.class_list.colors is None:
            raise DataError(f"{file}: is a colour image, but {self.classes_file} gives the classes no colors.")
        train_ids = _color_table(tuple(color_train_ids.items()))[_color_code(mask)]
        outside = np.argwhere(train_ids == INVALID)
        if len(outside):
            row, column = outside[0]
            color = tuple(int(channel) for channel in mask[row, column])
            advice = ""
            if self._reading(file) in ("colours of a palette", "colours of a grey image"):
                advice = "; if the masks hold class values, set data.masks=index"
            raise DataError(
                f"{file}: mask colour {color} (row {row}, column {column}, {len(outside) - 1} more pixels)"
                f" is not the colour of a class or of ignored pixels in {self.classes_file}{advice}."
            )
        return train_ids

    def notes(self, index: int) -> list[str]:
        """Note how the mask is read, and orientation tags; see :meth:`SegmentationDataset.notes`."""
        image, mask = self.pairs[index].image, self.pairs[index].mask
        notes = [] if mask is None else [f"masks read as {self._reading(mask)}"]
        done = "turned upright by it" if self.upright else "read as stored (data.orientation=ignore)"
        for kind, file in (("images", image), ("masks", mask)):
            if file is not None and read_traits(file).orientation != 1:
                notes.append(f"{kind} with an orientation tag, {done}")
        return notes

    def describe_problem(self, pixels: NDArray[np.int64]) -> str | None:
        """Report also a class without pixels if pixels are ignored by default.

        See :meth:`SegmentationDataset.describe_problem`.
        """
        absent = np.flatnonzero(pixels[: self.num_classes] == 0)
        ignored = pixels[IGNORE_INDEX]
        if not (self.expects_all_classes and len(absent) and ignored):
            return super().describe_problem(pixels)
        names = ", ".join(repr(self.classes[train_id]) for train_id in absent[:3]) + (", …" if len(absent) > 3 else "")
        value = self.class_list.values[absent[0]]
        return (
            f"{self.classes_file}: no training pixel is {names} (mask value {value}), but "
            f"{100 * ignored / pixels.sum():.2g} % of all pixels have the value {IGNORE_INDEX}, which is ignored by "
            f"default; write {{name: {self.classes[absent[0]]}, value: {IGNORE_INDEX}}} if that is the class's value, "
            f"or ignore: {IGNORE_INDEX} beside classes: if these pixels belong to no class."
        )

    def _reading(self, file: File) -> str:
        """Return the interpretation of a mask's pixels, for messages."""
        traits = read_traits(file)
        if traits.palette:
            return "colours of a palette" if self.palette_colors else "indices of a palette"
        if traits.grey:
            return "colours of a grey image" if self.grey_colors else "class values"
        return "colours"


def pair_split_folder(root: Path, split: str, layout: str) -> Pairing:
    """Pair ``<root>/<split>/images/**`` with ``<root>/<split>/masks/**`` by path without suffix.

    Raises:
        MissingSplitError: The root has other splits but not this one.
        DataError: The root has no split at all, so it does not have this ``layout``.
    """
    source = FolderSource(root)
    image_folder, mask_folder = f"{split}/images", f"{split}/masks"
    images, masks = source.files(image_folder), source.files(mask_folder)
    if not images and not masks:
        present = [name for name in ("train", "val", "test") if (root / name / "images").is_dir()]
        if not present:
            raise DataError(f"{root}: has no images in {image_folder}/, expected {layout}.")
        raise MissingSplitError(f"{root}: has no images in {image_folder}/; splits with images: {', '.join(present)}.")
    defects = [f"{source.locate(name)}: is not an image file." for name in images + masks if not _is_image(name)]
    pairing = pair_files(
        [(_stem(name, image_folder), File(source, name)) for name in images if _is_image(name)],
        [(_stem(name, mask_folder), File(source, name)) for name in masks if _is_image(name)],
        image_place=f"{image_folder}/",
        mask_place=f"{mask_folder}/",
    )
    return Pairing(pairing.pairs, defects + pairing.unpaired)


def distinct_colors(count: int) -> tuple[Color, ...]:
    """Return up to 254 distinct colours, none black: the PASCAL VOC colour map without its first entry.

    Bits 3k, 3k + 1 and 3k + 2 of a label become bit 7 - k of red, green and blue.
    """

    def channel(label: int, offset: int) -> int:
        return sum((label >> (3 * bit + offset) & 1) << (7 - bit) for bit in range(3))

    return tuple((channel(label, 0), channel(label, 1), channel(label, 2)) for label in range(1, count + 1))


def _require_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"data.{key}={value!r} must be one of {', '.join(choices)}.{did_you_mean(value, choices)}")


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in Image.registered_extensions()


def _stem(name: str, folder: str) -> str:
    return str(PurePosixPath(name).relative_to(folder).with_suffix(""))


def _color_code(colors: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Encode colours (... x 3) as numbers of 24 bits (...)."""
    return colors.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)


# Cached here: held by the data set, its 16 MiB would be pickled for each worker that is not forked.
@lru_cache(maxsize=4)
def _color_table(train_ids: tuple[tuple[Color, int], ...]) -> NDArray[np.uint8]:
    """Build a lookup table from the 2**24 colours to train ids."""
    table = np.full(1 << 24, INVALID, dtype=np.uint8)
    for color, train_id in train_ids:
        table[_color_code(np.array(color, dtype=np.uint8))] = train_id
    return table


def _parse_class(entry: object, position: int) -> tuple[str, int, Color | None]:
    if isinstance(entry, str):
        return entry, position, None
    if not isinstance(entry, Mapping):
        raise ValueError(
            f"class {position} is {_shown(entry)}, expected a name (a text, in quotes if need be) or a mapping"
        )
    _refuse_unknown_keys(entry, {"name", "value", "color"}, f"class {position}")
    name, value = entry.get("name"), entry.get("value", position)
    if not isinstance(name, str):
        raise ValueError(f"class {position} has the name {_shown(name)}, expected a text, in quotes if need be")
    if not _is_byte(value):
        raise ValueError(f"class {name!r} has the value {_shown(value)}, expected a whole number from 0 to 255")
    return name, value, _parse_color(entry["color"]) if "color" in entry else None


def _parse_ignored(ignored: object) -> list[int | Color]:
    """Parse the values and colours under ``ignore``."""
    if ignored is None:
        return []
    # [1, 2, 3] is three values; a single colour is "#rrggbb" or [[1, 2, 3]].
    items = ignored if isinstance(ignored, list) else [ignored]
    return [item if isinstance(item, int) and _is_byte(item) else _parse_color(item) for item in items]


def _parse_color(color: object) -> Color:
    if isinstance(color, str) and len(color) == 7 and color.startswith("#"):
        try:
            red, green, blue = ImageColor.getrgb(color)[:3]
        except ValueError:
            pass
        else:
            return red, green, blue
    if isinstance(color, list) and len(color) == 3 and all(map(_is_byte, color)):
        return color[0], color[1], color[2]
    raise ValueError(f'{_shown(color)} is not a color, expected [red, green, blue] from 0 to 255 or "#rrggbb"')


def _is_byte(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255


def _refuse_unknown_keys(mapping: Mapping[Any, Any], known: set[str], where: str) -> None:
    for key in mapping.keys() - known:
        raise ValueError(f"{where} has the unknown key {key!r}, expected {', '.join(sorted(known))}")


def _refuse_repeated(items: Iterable[Any], kind: str) -> None:
    seen = set()
    for item in items:
        if item in seen:
            raise ValueError(f"the {kind} {_shown(item)} occurs twice, expected it once")
        seen.add(item)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
