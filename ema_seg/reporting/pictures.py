"""The pictures of a comparison's examples: photograph, truth, and the masks of a configuration and of its baseline."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ema_seg.data.source import IMAGE_FORMATS
from ema_seg.errors import DataError, EmaSegError, one_line
from ema_seg.reporting.compare import Match
from ema_seg.reporting.comparison import Disagreement
from ema_seg.reporting.files import file_names, write_file
from ema_seg.reporting.predictions import encode_mask
from ema_seg.reporting.runs import Result
from ema_seg.texts import read_json

if TYPE_CHECKING:
    from ema_seg.data import SegmentationDataset

__all__ = ["draw_examples"]

# Of the longer side, in pixels: a page with twenty configurations shows 160 of them.
_LARGEST = 1024
_FOLDER = "examples"


def draw_examples(
    examples: Sequence[Disagreement], matches: Sequence[Match], directory: Path
) -> tuple[list[Disagreement], list[str]]:
    """Write the pictures of examples into ``examples/``, as large as they are or with their longer side 1024.

    Photograph and truth are read from the data set, if it is where one of the evaluations had it; the masks from the
    reports.

    Args:
        examples: of a comparison.
        matches: the configurations that it was drawn up from, see ``match_runs``.
        directory: where ``comparison.json`` goes.

    Returns:
        The examples with their ``files``, each None where it cannot be had, and sentences that say which and why.
    """
    by_label = {match.label: match for match in matches}
    results = [result for match in matches for result in match.results.values()]
    album = _Album(directory, results, [match.label for match in matches], [example["name"] for example in examples])
    drawn = []
    for example in examples:
        name, seed = example["name"], example["seed"]
        row = by_label[example["row"]].results[seed]
        files = {
            "image": album.photograph(name),
            "truth": album.truth(name),
            "prediction": album.prediction(row, name, example["row"], seed),
            "baseline": album.prediction(by_label[example["baseline"]].results[seed], name, example["baseline"], seed),
        }
        drawn.append(Disagreement(**{**example, "files": files}))
    album.remove_others()
    return drawn, list(dict.fromkeys(album.notes))


class _Album:
    """Writes each picture once, however many examples show it."""

    def __init__(self, directory: Path, results: Sequence[Result], labels: Sequence[str], names: Sequence[str]) -> None:
        self.notes: list[str] = []
        self._directory = directory
        self._results = results
        self._labels = dict(zip(labels, file_names(labels), strict=True))
        unique = list(dict.fromkeys(names))
        self._names = dict(zip(unique, file_names(unique), strict=True))
        self._written: dict[str, str | None] = {}

    def photograph(self, name: str) -> str | None:
        return self._once(f"{self._names[name]}+image.jpg", lambda: self._read_photograph(name))

    def truth(self, name: str) -> str | None:
        return self._once(f"{self._names[name]}+truth.png", lambda: self._read_truth(name))

    def prediction(self, result: Result, name: str, label: str, seed: int | None) -> str | None:
        # No name of a file has a plus sign in it, so that no two of these are the same.
        file = f"{self._names[name]}+{self._labels[label]}+{seed}.png"
        return self._once(file, lambda: self._read_prediction(result, name))

    def remove_others(self) -> None:
        """Remove the pictures of an earlier comparison, which show other images or other models; nothing else."""
        try:
            earlier = read_json(self._directory / "comparison.json")
            files = {file for example in earlier["examples"] for file in example["files"].values() if file}
        except (OSError, AttributeError, KeyError, TypeError, DataError):
            return
        for file in files - set(self._written.values()):
            path = self._directory / file
            if path.parent == self._directory / _FOLDER:
                path.unlink(missing_ok=True)

    def _once(self, file: str, read: Callable[[], bytes | None]) -> str | None:
        if file not in self._written:
            content = read()
            if content is not None:
                write_file(self._directory / _FOLDER / file, content)
            self._written[file] = None if content is None else f"{_FOLDER}/{file}"
        return self._written[file]

    def _read_photograph(self, name: str) -> bytes | None:
        if self._dataset is None or name not in self._places:
            return None
        try:
            image = _shrink(Image.fromarray(self._dataset.read_image(self._places[name])), Image.Resampling.LANCZOS)
        except EmaSegError as error:
            self.notes.append(f"No picture of {name}: {error}")
            return None
        content = BytesIO()
        image.save(content, "JPEG", quality=90)
        return content.getvalue()

    def _read_truth(self, name: str) -> bytes | None:
        if self._dataset is None or name not in self._places:
            return None
        try:
            mask = Image.fromarray(self._dataset.read_mask(self._places[name]))
        except EmaSegError as error:
            self.notes.append(f"No truth of {name}: {error}")
            return None
        return _encode(mask, self._results[0].report["palette"])

    def _read_prediction(self, result: Result, name: str) -> bytes | None:
        path = result.predictions[result.names.index(name)]
        if path is None:
            return None
        try:
            with Image.open(result.path.parent / path, formats=IMAGE_FORMATS) as mask:
                # The indices alone: shrinking must not mix colours, and the palette is the comparison's.
                return _encode(Image.frombytes("L", mask.size, mask.tobytes()), result.report["palette"])
        except (OSError, ValueError) as error:
            self.notes.append(f"No prediction of {name}: {result.path.parent / path} ({one_line(error)}).")
            return None

    @cached_property
    def _dataset(self) -> "SegmentationDataset | None":
        """The data set, which is the same for all results; None if it cannot be read in any of their places."""
        reports = {result.report["data"]["root"]: result.report for result in self._results}
        reasons = []
        for root, report in reports.items():
            if not Path(root).exists():
                reasons.append(f"the data set is not in {root} here.")
                continue
            try:
                return _open_dataset(report["data"], report["config"].get("data", {}))
            except Exception as error:  # a picture is no reason to lose the comparison
                reasons.append(one_line(error))
        self.notes.append(f"No photographs and no truth: {' '.join(reasons)}")
        return None

    @cached_property
    def _places(self) -> dict[str, int]:
        dataset = self._dataset
        return {} if dataset is None else {dataset.name(index): index for index in range(len(dataset))}


def _open_dataset(data: Mapping[str, Any], options: Mapping[str, Any]) -> "SegmentationDataset":
    # Torch comes with it, and takes longer to import than a comparison may take where no picture can be had.
    from ema_seg.data import build_dataset, find_dataset_class

    # The configuration of the data has the loader's settings too.
    known = list(inspect.signature(find_dataset_class(data["name"])).parameters)[3:]
    same = options.get("name") == data["name"]
    chosen = {key: value for key, value in options.items() if same and key in known}
    return build_dataset(data["name"], data["root"], data["split"], **chosen)


def _encode(mask: Image.Image, palette: Sequence[Sequence[int]]) -> bytes:
    return encode_mask(np.asarray(_shrink(mask, Image.Resampling.NEAREST)), palette)


def _shrink(image: Image.Image, resampling: Image.Resampling) -> Image.Image:
    scale = _LARGEST / max(image.size)
    if scale >= 1:
        return image
    return image.resize((max(round(image.width * scale), 1), max(round(image.height * scale), 1)), resampling)
