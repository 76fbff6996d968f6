"""Tests of the Hub: addresses, and downloads and uploads up to the network."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from ema_seg.runtime.errors import ConfigError, DataError
from ema_seg.runtime.hub import HubAddress, download_model, hub_address, upload_model


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hf://user/name", HubAddress("user/name")),
        (Path("hf://user/name"), HubAddress("user/name")),
        ("hf://user/na.me-2@v1.0", HubAddress("user/na.me-2", "v1.0")),
        ("hf://user/name@refs/pr/1", HubAddress("user/name", "refs/pr/1")),
        ("runs/my_run", None),
        ("user/name", None),
        ("C:/runs/my_run", None),
    ],
)
def test_addresses_are_told_from_paths(text, address):
    assert hub_address(text) == address


@pytest.mark.parametrize(
    "text",
    [
        *("hf://user", "hf://", "hf://a/b/c", "hf://a/b@", "hf:///", "hf://a b/c"),
        "hf:a/b",
        "https://huggingface.co/a/b",
    ],
)
def test_a_malformed_address_is_one_sentence(text):
    with pytest.raises(ConfigError, match="must be hf://user/name or hf://user/name@revision"):
        hub_address(text)


def test_only_the_named_files_of_the_revision_are_fetched(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: calls.append((name, options)) or str(tmp_path)
    )

    assert download_model(HubAddress("user/name", "v1"), ["config.json"]) == tmp_path
    assert calls == [("user/name", {"revision": "v1", "allow_patterns": ["config.json"]})]


def test_a_network_failure_is_one_sentence(monkeypatch):
    def fail(*_, **__):
        raise LocalEntryNotFoundError("Got: ConnectError\nAn error happened. Please check your connection.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)

    with pytest.raises(DataError) as raised:
        download_model(HubAddress("user/name"), ["config.json"])
    assert str(raised.value) == (
        "hf://user/name: cannot be fetched from the Hub (Got: ConnectError); connect to the network, or give a folder."
    )
    with pytest.raises(DataError, match=r"name: cannot be uploaded to the Hub \(Got: ConnectError\); connect"):
        upload_model(Path(), HubAddress("user/name"))


@pytest.fixture
def hub(monkeypatch):
    """Replace the calls to the network; return the files that the model has and the uploads."""
    files, uploads = [".gitattributes"], []

    class Api:
        def create_repo(self, name, *, private, exist_ok):
            assert exist_ok
            return f"https://huggingface.co/{name}"

        def list_repo_files(self, name):
            return files

        def upload_folder(self, **options):
            uploads.append(options)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return files, uploads


def test_a_new_model_is_uploaded_in_one_commit_and_another_one_is_kept(hub, tmp_path):
    files, uploads = hub

    assert upload_model(tmp_path, HubAddress("user/name")) == "https://huggingface.co/user/name"
    assert [(upload["repo_id"], upload["folder_path"]) for upload in uploads] == [("user/name", tmp_path)]
    files.append("README.md")
    with pytest.raises(DataError, match=r"hf://user/name: has 1 files already, such as README\.md; .* overwrite=true"):
        upload_model(tmp_path, HubAddress("user/name"))
    assert len(uploads) == 1
    upload_model(tmp_path, HubAddress("user/name"), overwrite=True)
    assert len(uploads) == 2
    with pytest.raises(ConfigError, match="hf://user/name@v1: a model is uploaded to its main branch; remove @v1"):
        upload_model(tmp_path, HubAddress("user/name", "v1"))
