"""Models on the Hugging Face Hub: addresses ``hf://user/name``, download and upload through huggingface_hub."""

import re
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import NamedTuple

from ema_seg.runtime.errors import ConfigError, DataError, one_line

__all__ = ["HubAddress", "download_model", "hub_address", "upload_model"]

# A Path of hf://user/name has one slash after the colon.
_ADDRESS = re.compile(r"hf:/+([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_URL = re.compile(r"hf:|[a-zA-Z][\w+.-]+:/")  # one letter before the colon is a drive of Windows
_LONGEST_REASON = 200  # characters of a library's message


class HubAddress(NamedTuple):
    """Model on the Hub: ``hf://<repository>`` or ``hf://<repository>@<revision>``.

    Attributes:
        repository: user and name, as in ``"user/name"``.
        revision: branch, tag or commit; None for the main branch.
    """

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"hf://{self.repository}" + (f"@{self.revision}" if self.revision else "")


def hub_address(source: str | PathLike[str]) -> HubAddress | None:
    """Parse an address of the Hub; return None for a path.

    Raises:
        ConfigError: the text is another address, such as a URL.
    """
    text = fspath(source)
    if not _URL.match(text):
        return None
    if (match := _ADDRESS.fullmatch(text)) is None:
        raise ConfigError(f"{text}: must be hf://user/name or hf://user/name@revision; correct it, or give a path.")
    return HubAddress(match[1], match[2])


def download_model(address: HubAddress, files: Sequence[str]) -> Path:
    """Download files of a model into the cache of huggingface_hub, unless they are there; return their folder.

    No other file of the repository is fetched.

    Raises:
        DataError: the Hub cannot be reached, or has no such model or revision.
    """
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        folder = huggingface_hub.snapshot_download(
            address.repository, revision=address.revision, allow_patterns=list(files)
        )
    except RevisionNotFoundError as error:
        raise DataError(
            f"{address}: the model has no revision {address.revision!r}; give a branch, a tag or a commit of it."
        ) from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"{address}: the Hub has no such model, or it is not public; correct the name, or log in with "
            "`hf auth login`."
        ) from error
    except Exception as error:  # huggingface_hub has no common base class: OSError, httpx and its own errors occur
        raise DataError(
            f"{address}: cannot be fetched from the Hub ({_reason(error)}); connect to the network, or give a folder."
        ) from error
    return Path(folder)


def upload_model(folder: Path, address: HubAddress, *, private: bool = False, overwrite: bool = False) -> str:
    """Upload a folder to the main branch of a model on the Hub in one commit; create the model if it is missing.

    Args:
        folder: the files.
        address: the model.
        private: whether a new model is private.
        overwrite: add a commit to a model that has files.

    Returns:
        The URL of the model.

    Raises:
        ConfigError: the address has a revision.
        DataError: the Hub cannot be reached or refuses; or the model has files and ``overwrite`` is false.
    """
    import huggingface_hub

    if address.revision:
        raise ConfigError(f"{address}: a model is uploaded to its main branch; remove @{address.revision}.")
    api = huggingface_hub.HfApi()
    try:
        url = api.create_repo(address.repository, private=private, exist_ok=True)
        present = [file for file in api.list_repo_files(address.repository) if file != ".gitattributes"]
        if not present or overwrite:
            api.upload_folder(
                repo_id=address.repository,
                folder_path=folder,
                commit_message="Upload a model with ema-seg",
                ignore_patterns=["written_files.json"],
            )
    except Exception as error:  # see download_model
        raise DataError(
            f"{address}: cannot be uploaded to the Hub ({_reason(error)}); connect to the network and log in with "
            "`hf auth login`, or write to a folder."
        ) from error
    if present and not overwrite:
        raise DataError(
            f"{address}: has {len(present)} files already, such as {present[0]}; choose another name, or set "
            "overwrite=true, which adds a commit."
        )
    return str(url)


def _reason(error: Exception) -> str:
    """Return the first line of a message, without the library's advice."""
    lines = str(error).strip().splitlines() or [one_line(error)]
    return " ".join(lines[0].split())[:_LONGEST_REASON].rstrip(".")
