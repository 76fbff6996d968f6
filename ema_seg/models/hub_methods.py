"""Methods of a segmenter that save it, load it and upload it in the format of ``ema_seg.models.shared``."""

import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from torch import nn

from ema_seg.runtime.errors import CheckpointError, ConfigError
from ema_seg.runtime.hub import HubAddress, hub_address, upload_model

__all__ = ["HubMethods"]

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


class HubMethods:
    """Replacement of the methods that models inherit from segmentation-models-pytorch.

    smp's own files name no attention block: they would load another network without an error.

    Attributes:
        origin: ``config``, ``classes`` and ``palette`` of the checkpoint that the model was loaded from; None for a
            model that was not.
    """

    origin: Mapping[str, Any] | None = None

    def save_pretrained(self, save_directory: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Write the model with its present weights into a folder that ``ema_seg.load`` reads.

        The model card says that scores were not measured: ``ema-seg push`` writes a run's model with its scores.

        Args:
            save_directory: a new or empty folder.
            overwrite: replace an earlier model in the folder.

        Raises:
            ConfigError: the model was not loaded from a checkpoint, so that its classes are not known.
            DataError: see ``write_shared``.
        """
        self._write(Path(save_directory), overwrite=overwrite)

    def _write(self, folder: Path, *, address: HubAddress | None = None, overwrite: bool = False) -> None:
        from ema_seg.models.build import model_stride
        from ema_seg.models.card import render_card
        from ema_seg.models.shared import write_shared

        assert isinstance(self, nn.Module)
        if self.origin is None:
            raise ConfigError(
                "save_pretrained: the model has no class names and no normalisation, because it was built and not "
                "loaded; share a trained run with ema-seg push run=<run> to=<folder>, or load the model with "
                "ema_seg.load(<run>).model."
            )
        card = render_card(
            config=self.origin["config"],
            classes=self.origin["classes"],
            address=None if address is None else str(address),
        )
        write_shared(
            folder,
            self.state_dict(),
            **self.origin,
            stride=model_stride(self),
            card=card,
            overwrite=overwrite,
        )

    @classmethod
    def from_pretrained(cls, source: str | PathLike[str], *, revision: str | None = None) -> Self:
        """Load a model that ``ema-seg push`` or ``save_pretrained`` wrote, in evaluation mode on the CPU.

        Args:
            source: a folder, or ``"user/name"`` on the Hub.
            revision: branch, tag or commit on the Hub.

        Raises:
            CheckpointError: the model has another architecture than this class, or see ``load_segmenter``.
            ConfigError: a folder has no revisions, or the source names another one.
            DataError: see ``checkpoint_path``.
        """
        from ema_seg.models.checkpoint import checkpoint_path, load_segmenter

        address = hub_address(source)
        if address is None and not Path(source).exists() and _REPOSITORY.fullmatch(str(source)):
            address = HubAddress(str(source))
        if revision is not None and (address is None or address.revision not in (None, revision)):
            raise ConfigError(f"revision={revision}: {source} is a folder or has a revision; remove one of the two.")
        if address is not None:
            source = str(HubAddress(address.repository, revision or address.revision))
        model, _ = load_segmenter(checkpoint_path(source))
        if not isinstance(model, cls):
            raise CheckpointError(
                f"{source}: is a {type(model).__name__}, expected a {cls.__name__}; load it with ema_seg.load."
            )
        return model

    def push_to_hub(self, repo_id: str, *, private: bool = False, overwrite: bool = False) -> str:
        """Upload the model as ``save_pretrained`` writes it.

        Args:
            repo_id: ``"user/name"``.
            private: whether a new model is private.
            overwrite: add a commit to a model that has files.

        Returns:
            The URL of the model.

        Raises:
            EmaSegError: see ``save_pretrained`` and ``upload_model``.
        """
        address = hub_address(f"hf://{repo_id.removeprefix('hf://')}")
        assert address is not None
        with TemporaryDirectory() as temporary:
            self._write(folder := Path(temporary) / "model", address=address)
            return upload_model(folder, address, private=private, overwrite=overwrite)

    def generate_model_card(self, *_: Any, **__: Any) -> Any:
        """Refuse to write smp's card, which names another way to load the model and smp's licence.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("generate_model_card: save_pretrained and ema-seg push write the card; read its README.md.")
