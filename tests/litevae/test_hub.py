"""Models named as on the Hugging Face Hub, against a stand-in of its HTTP API."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from litevae import hub
from litevae.any_autoencoder import fingerprint, load_autoencoder
from litevae.errors import UserError
from pipelines.data.first_look import check_model
from tests import hub_server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny AutoencoderKL, with a pickle beside it, at the root and in vae/."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("repo")
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(folder)
    (folder / "evil.bin").write_bytes(b"pickle")
    shutil.copytree(folder, folder / "vae")
    return folder


@pytest.fixture(scope="module")
def server():
    with hub_server.running() as server:
        yield server


@pytest.fixture
def remote(server, folder, tmp_path, monkeypatch):
    """The Hub with org/name, in an empty working folder, with an empty cache."""
    server.commits.clear()
    server.refs.clear()
    server.asked.clear()
    server.status = 0
    server.put("org/name", folder)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    hub_server.use(server, tmp_path / "cache", monkeypatch)
    return server


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("org/name", True), ("org/name/vae", True), ("org/name@main", True), ("org/name/vae@refs/pr/1", True),
        ("stabilityai/sd-vae-ft-mse", True), ("name", False), ("/org/name", False), ("./org/name", False),
        ("../org/name", False), ("~/org/name", False), ("org//name", False), ("org/name/", False), ("", False),
        ("s3://org/name", False), ("runs/vae/modle", False), ("here/there", False), ("here/there@" + "0" * 40, True),
        ("org/../name", False),
    ],
)  # fmt: skip
def test_what_is_a_name(place, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "here").mkdir()
    assert hub.is_name(place) is expected


def test_a_model_is_loaded_by_name_and_only_its_files_are_fetched(remote, folder, tmp_path):
    model = load_autoencoder("org/name")
    expected = load_autoencoder(folder).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert fingerprint("org/name") == fingerprint(folder)
    there = {path.name for path in hub.local_folder("org/name").iterdir()}
    assert there == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert not [line for line in remote.asked if "evil" in line or "/vae/" in line]
    assert fingerprint("org/name/vae") == fingerprint(folder)
    check_model("model", "org/name")


def test_a_local_folder_comes_first(remote, folder):
    shutil.copytree(folder, "org/name")
    assert hub.local_folder("org/name") == Path("org/name")
    assert hub.pinned("org/name") == str(Path("org/name").absolute())
    assert remote.asked == []


def test_all_nodes_get_the_commit_that_the_driver_saw(remote, folder, tmp_path, monkeypatch):
    pinned, before = hub.pinned("org/name"), fingerprint("org/name")
    assert pinned == "org/name@" + remote.refs["org/name", "main"]
    assert hub.pinned("org/name/vae@main") == "org/name/vae@" + remote.refs["org/name", "main"]
    assert hub.pinned(pinned) == pinned
    other = tmp_path / "other"
    torch.manual_seed(1)
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(other)
    remote.put("org/name", other)
    assert fingerprint("org/name") == before  # within a process a branch stays where it was
    hub_server.use(remote, tmp_path / "another node", monkeypatch)
    assert fingerprint(pinned) == before
    assert fingerprint("org/name") == fingerprint(other) != before


@pytest.mark.parametrize("how", ["offline", "status", "unreachable"])
def test_without_a_connection_the_copy_is_used_with_a_word(remote, tmp_path, monkeypatch, caplog, how):
    print_of_it, pinned = fingerprint("org/name"), hub.pinned("org/name")
    caplog.clear()
    hub_server.use(remote, tmp_path / "cache", monkeypatch, offline=how == "offline")
    if how == "status":
        remote.status = 500
    if how == "unreachable":
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert fingerprint("org/name") == print_of_it
    assert hub.pinned("org/name") == pinned
    (said,) = [record.getMessage() for record in caplog.records if record.name == "litevae.hub"]
    reason = "HF_HUB_OFFLINE is set" if how == "offline" else "can't be reached"
    assert reason in said
    assert said.startswith("org/name: ")
    assert f"the copy in {tmp_path / 'cache'}" in said
    caplog.clear()
    assert fingerprint(pinned) == print_of_it  # of a commit there is nothing newer, so nothing is said
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("org/name", "`hf download org/name`"),
        ("org/name/vae@v1", '`hf download org/name --revision v1 --include "vae/*"`'),
    ],
)
def test_offline_without_a_copy_it_says_what_is_needed(remote, tmp_path, monkeypatch, name, command):
    hub_server.use(remote, tmp_path / "cache", monkeypatch, offline=True)
    with pytest.raises(UserError) as caught:
        check_model("model", name)
    message = str(caught.value)
    assert message.startswith(f"model={name} does not exist; models are folders on disk")
    for part in (command, str(tmp_path / "cache"), "HF_HUB_OFFLINE is set", "HF_HOME", "config.json", "safetensors"):
        assert part in message
    assert remote.asked == []


def test_what_the_hub_has_not(remote, folder):
    for name, match in (
        ("org/nothing", "org/nothing does not exist; models are folders on disk.*hf auth login"),
        ("org/name@v9", "org/name@v9 does not exist; .*has no such revision"),
        ("org/name/unet", r"org/name has no config\.json|has no unet/config\.json"),
    ):
        with pytest.raises(UserError, match=match):
            load_autoencoder(name)
    remote.commit("org/whole", {"model_index.json": b"{}", "vae/config.json": b"{}"})
    with pytest.raises(UserError, match="whole diffusers pipeline; give its autoencoder: org/whole/vae@main"):
        load_autoencoder("org/whole@main")
    remote.commit("org/pickles", {"config.json": json.dumps({"_class_name": "AutoencoderKL"}).encode(), "m.bin": b"x"})
    with pytest.raises(UserError, match=r"has no diffusion_pytorch_model\.safetensors"):
        load_autoencoder("org/pickles")
