"""Format of a shared model: a folder with ``config.json`` and ``model.safetensors``, on disk or on the Hub.

=====================  =============================================================================================
``schema``             ``"ema-seg.model/1"``
``ema_seg_version``    the version that wrote it
``classes``            the K names
``palette``            K colours, [red, green, blue] from 0 to 255; or null
``stride``             height and width of the model's input, in pixels, are multiples of it; for other programs
``config``             the run's configuration without paths, loggers and devices; see ``shared_config``
``scores``             ``data``, ``split``, ``images``, ``miou``, ``mean_accuracy``, ``pixel_accuracy``, ``fw_iou`` and
                       ``iou`` (K values) of the run's report; null if they were not measured
=====================  =============================================================================================

``model.safetensors`` has the segmenter's tensors by their names. No file is code, and none is run.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import ema_seg
from ema_seg.runtime.errors import CheckpointError, DataError, one_line
from ema_seg.runtime.files import Manifest, write_file
from ema_seg.runtime.texts import read_json

__all__ = [
    "CARD",
    "CONFIG",
    "PANEL",
    "SCHEMA",
    "VERSION",
    "WEIGHTS",
    "config_without_paths",
    "is_shared_setting",
    "read_shared",
    "shared_config",
    "write_shared",
]

SCHEMA = "ema-seg.model/1"
VERSION = ema_seg.__version__
CONFIG, WEIGHTS, CARD, PANEL = "config.json", "model.safetensors", "README.md", "panel.png"

# Settings that describe a model and its training, and nothing of the machine or its paths.
_SECTIONS = ("model", "attention", "placement", "loss", "optimizer", "schedule", "freeze", "data", "evaluation")
_VALUES = ("seed", "epochs", "reproducible")
_PARTS = {
    "trainer": (
        *("precision", "max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val"),
        *("gradient_clip_algorithm", "sync_batchnorm", "deterministic", "limit_train_batches"),
    ),
    "training": ("channels_last", "compile", "tf32", "weight_averaging", "early_stopping", "loss_strips"),
}
_PUBLIC_WEIGHTS = ("imagenet", "packaged", None)
# Stands for a path of the machine that trained.
_FILE = "file"


def shared_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Select the settings of a run's configuration that may be shared.

    Loggers, devices, the sweep and the run's folder are left out, and so are paths; see ``config_without_paths``.

    Args:
        config: the resolved configuration of ``train.py`` as plain data.
    """
    shared = {key: config[key] for key in (*_VALUES, *_SECTIONS) if key in config}
    for section, keys in _PARTS.items():
        found = config.get(section, {})
        shared[section] = {key: found[key] for key in keys if key in found}
    if config.get("init_from") is not None:
        shared["init_from"] = _FILE
    return config_without_paths(shared)


def is_shared_setting(key: str) -> bool:
    """Return whether a setting such as ``"data.batch_size"`` or a group may be shared, but for a path as its value."""
    section, _, name = key.partition(".")
    if section in _PARTS:
        return not name or name in _PARTS[section] or name in ("devices", "num_nodes")
    return section in (*_VALUES, *_SECTIONS, "experiment") and key not in ("data.cache", "data.classes")


def config_without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Remove what a run's configuration says about the machine.

    ``data.root`` becomes ``???``, so that an evaluation asks for it, and any other path ``"file"``. The auxiliary head
    is left out, because its weights are no part of the trained model.

    Args:
        config: the resolved configuration of ``train.py`` as plain data, or some of its sections.
    """
    shared: dict[str, Any] = _without_paths(config)
    data, model = shared["data"], shared["model"]
    if data.get("root") is not None:
        data["root"] = "???"
    for key in ("cache", "classes"):
        if key in data:
            data[key] = None
    if model.get("encoder_weights") not in _PUBLIC_WEIGHTS:
        model["encoder_weights"] = _FILE
    if "auxiliary" in model:
        model["auxiliary"] = None
    if "device" in shared.get("evaluation", {}):
        shared["evaluation"]["device"] = "auto"
    return shared


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    return _FILE if isinstance(value, str) and ("/" in value or "\\" in value) else value


def write_shared(
    folder: Path,
    weights: Mapping[str, Tensor],
    *,
    classes: list[str],
    palette: list[list[int]] | None,
    stride: int,
    config: Mapping[str, Any],
    card: str,
    scores: Mapping[str, Any] | None = None,
    panel: bytes | None = None,
    overwrite: bool = False,
) -> None:
    """Write a shared model into a folder, whole or not at all.

    Args:
        folder: missing or empty, or, with ``overwrite``, an earlier shared model. Its other files stay.
        weights: the segmenter's state dict.
        classes: the K class names.
        palette: their colours.
        stride: see ``model_stride``.
        config: the run's configuration; see ``shared_config``.
        card: the model card, Markdown.
        scores: see this module.
        panel: the picture of the card, PNG.
        overwrite: replace an earlier shared model.

    Raises:
        DataError: the folder has files of others or an earlier model, or a file cannot be written.
    """
    content = {
        "schema": SCHEMA,
        # segmentation_models_pytorch looks for a class of this name, and so names the right function in its error.
        "_model_class": "ema_seg.load",
        "ema_seg_version": VERSION,
        "classes": list(classes),
        "palette": palette,
        "stride": stride,
        "config": shared_config(config),
        "scores": scores,
    }
    # safetensors takes no views, and no tensors that share memory.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    files = {CONFIG: f"{json.dumps(content, indent=1, ensure_ascii=False)}\n".encode(errors="backslashreplace")}
    files[CARD] = card.encode(errors="backslashreplace")
    if panel is not None:
        files[PANEL] = panel
    with _replaced(folder, overwrite) as new:
        try:
            save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
            (new / WEIGHTS).chmod(0o666 & ~_umask())  # safetensors' files are private
        except (OSError, SafetensorError) as error:
            raise _cannot_write(folder / WEIGHTS, error) from error
        for name, data in files.items():
            write_file(new / name, data)


@contextmanager
def _replaced(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder whose files take their place in ``folder`` at the end of the block."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: is a file; give a folder.")
    present = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    ours = Manifest(folder, earlier=_files_of_model)
    if present and CONFIG not in ours.files:
        raise DataError(
            f"{folder}: has files that ema-seg did not write as a model, such as {present[0]}; choose a new folder."
        )
    if CONFIG in present and not overwrite:
        raise DataError(f"{folder}: has a model already; choose a new folder, or set overwrite=true.")
    new = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        new = Path(mkdtemp(prefix=".", dir=folder))  # on the same disk, even if the folder is a mount or a link
        yield new
        names = [path.name for path in new.iterdir()]
        ours.claim(names)
        # Without its config the folder is no model, so that a kill leaves the old one, the new one or none.
        (folder / CONFIG).unlink(missing_ok=True)
        ours.remove({PANEL}.difference(names))
        for name in sorted(names, key=lambda name: name == CONFIG):
            (new / name).replace(folder / name)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    finally:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)
        if not present:
            with suppress(OSError):  # it is missing, or has the new model
                folder.rmdir()


def _files_of_model(folder: Path) -> list[str]:
    """Return the files of a model that came without a manifest, as from the Hub."""
    with suppress(OSError, DataError):
        content = read_json(folder / CONFIG)
        if isinstance(content, dict) and content.get("schema") == SCHEMA:
            return [CONFIG, WEIGHTS, CARD, PANEL]
    return []


def _cannot_write(path: Path, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or one_line(error)
    return DataError(
        f"{path}: cannot be written ({reason}); free disk space, give permission or choose another folder."
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_shared(path: Path) -> dict[str, Any]:
    """Read a shared model from its ``model.safetensors`` and the ``config.json`` beside it.

    Returns:
        ``state_dict``, ``config``, ``classes`` and ``palette`` under the names of a checkpoint, not checked further.

    Raises:
        CheckpointError: a file is missing or damaged, or the folder is a model of another program.
    """
    description = path.parent / CONFIG
    try:
        content = read_json(description, advice="get the model again")
    except DataError as error:
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(
            f"{description}: cannot be read ({error.strerror}); give a folder that ema-seg push wrote."
        ) from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise CheckpointError(
            f"{description}: must be a model with the schema {SCHEMA!r}, got {schema!r}; give a folder that ema-seg "
            "push wrote."
        )
    missing = [key for key in ("config", "classes", "palette") if key not in content]
    if missing:
        raise CheckpointError(f"{description}: lacks {', '.join(missing)}; get the model again.")
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; get the model again, with all of its files.") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: is truncated or not a safetensors file ({one_line(error)}); get the model again."
        ) from error
    # Copies: the file is mapped into memory, and a read after another program has cut it kills the process.
    weights = {f"model.{name}": tensor.clone() for name, tensor in tensors.items()}
    return {"state_dict": weights, **{key: content[key] for key in ("config", "classes", "palette")}}
