"""Pictures of a comparison's examples: photograph, truth, and the masks of a configuration and of its baseline."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ema_seg.comparison.compare import Match
from ema_seg.comparison.runs import Result
from ema_seg.comparison.schema import Disagreement, comparison_manifest
from ema_seg.data.source import IMAGE_FORMATS
from ema_seg.inference.masks import encode_mask
from ema_seg.runtime.errors import DataError, EmaSegError, one_line
from ema_seg.runtime.files import Manifest, file_names, write_file

if TYPE_CHECKING:
    from ema_seg.data import SegmentationDataset

__all__ = ["draw_examples", "open_dataset"]

# Longer side in pixels: a page with twenty configurations shows 160 pictures.
_LARGEST = 1024
_FOLDER = "examples"


def draw_examples(
    examples: Sequence[Disagreement], matches: Sequence[Match], directory: Path
) -> tuple[list[Disagreement], list[str]]:
    """Write the pictures of examples into ``examples/``, shrunk to 1024 pixels on the longer side if larger.

    Photograph and truth are read from the data set, if it is at the root of one of the evaluations; the masks are read
    from the reports' folders.

    Args:
        examples: the examples of a comparison.
        matches: the configurations of the comparison, see ``match_runs``.
        directory: folder of ``comparison.json``.

    Returns:
        The examples with their ``files``, None where there is no picture, and notes on pictures that cannot be read.
    """
    by_label = {match.label: match for match in matches}
    results = [result for match in matches for result in match.results.values()]
    album = _Album(
        comparison_manifest(directory),
        results,
        [match.label for match in matches],
        [example["name"] for example in examples],
    )
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
    """Writer of pictures, which writes each one once for all examples that show it."""

    def __init__(
        self, manifest: Manifest, results: Sequence[Result], labels: Sequence[str], names: Sequence[str]
    ) -> None:
        self.notes: list[str] = []
        self._manifest = manifest
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
        # ``file_names`` gives no plus signs, so the joined names are unique.
        file = f"{self._names[name]}+{self._labels[label]}+{seed}.png"
        return self._once(file, lambda: self._read_prediction(result, name))

    def remove_others(self) -> None:
        """Remove the pictures that only an earlier comparison has written: they show other images or models."""
        earlier = {file for file in self._manifest.files if file.startswith(f"{_FOLDER}/")}
        self._manifest.remove(earlier - set(self._written.values()))

    def _once(self, file: str, read: Callable[[], bytes | None]) -> str | None:
        if file not in self._written:
            content = read()
            if content is not None:
                self._manifest.claim([f"{_FOLDER}/{file}"])
                write_file(self._manifest.directory / _FOLDER / file, content)
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
                # Class ids alone: shrinking must not mix colours, and the palette is the report's.
                return _encode(Image.frombytes("L", mask.size, mask.tobytes()), result.report["palette"])
        except (OSError, ValueError) as error:
            self.notes.append(f"No prediction of {name}: {result.path.parent / path} ({one_line(error)}).")
            return None

    @cached_property
    def _dataset(self) -> "SegmentationDataset | None":
        """Data set of all results; None if it cannot be read at any of their roots."""
        reports = {result.report["data"]["root"]: result.report for result in self._results}
        reasons = []
        for report in reports.values():
            try:
                return open_dataset(report["data"], report["config"].get("data", {}))
            except Exception as error:  # a missing picture must not end the comparison
                reasons.append(one_line(error))
        self.notes.append(f"No photographs and no truth: {' '.join(reasons)}")
        return None

    @cached_property
    def _places(self) -> dict[str, int]:
        dataset = self._dataset
        return {} if dataset is None else {dataset.name(index): index for index in range(len(dataset))}


def open_dataset(data: Mapping[str, Any], options: Mapping[str, Any]) -> "SegmentationDataset":
    """Open the data set of a report.

    Args:
        data: the report's ``data``.
        options: the section ``data`` of the run's configuration.

    Raises:
        EmaSegError: the data set cannot be opened.
    """
    if not Path(data["root"]).exists():  # a generated data set would be generated
        raise DataError(f"the data set is not in {data['root']} here.")
    # Imports torch, which takes longer than a comparison without pictures may take.
    from ema_seg.data import build_dataset, find_dataset_class

    # The data config also holds the loader's settings.
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
