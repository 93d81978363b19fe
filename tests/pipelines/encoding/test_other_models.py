"""The encode job on models of the Hub and on autoencoders of diffusers, without Ray (tests/in_process.py)."""

import numpy as np
import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderTiny, VQModel

from litevae import hub
from litevae.any_autoencoder import fingerprint
from litevae.autoencoder import LiteVAE
from litevae.cache import LatentCache
from litevae.distilled import DistilledVAE
from litevae.errors import UserError
from litevae.images import ImageTransform
from pipelines.data.first_look import check_model
from pipelines.encoding.encode import encode_dataset
from tests import hub_server
from tests.encoding import SIDE, config, crops, save_model
from tests.in_process import in_process

WIDTHS = (8, 8, 8, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten photos."""
    folder = tmp_path_factory.mktemp("photos")
    for n, photo in enumerate(crops(10)):
        photo.save(folder / f"{n}.png")
    return folder


def encoded(folder, model, out):
    with in_process():
        encode_dataset(config(folder, model, out))
    return LatentCache(out)


def same_as_by_hand(cache, folder, model):
    """Compare a cache's rows with what a model of diffusers' interface makes of each image."""
    files = sorted(folder.iterdir())
    assert [cache.row(n)["id"] for n in range(len(cache))] == [path.name for path in files]
    pixels = [ImageTransform(SIDE, decode="fast")(path.read_bytes()).pixels for path in files]
    with torch.no_grad():
        wanted = model.encode(torch.tensor(np.stack(pixels)).movedim(-1, 1) / 127.5 - 1, return_dict=False)[0]
    wanted = getattr(wanted, "parameters", wanted)
    found = cache.latents(range(10), 0, 0) * cache.std.view(1, -1, 1, 1) + cache.mean.view(1, -1, 1, 1)
    found = cache.moments(range(10)).float() if cache.content == "moments" else found
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3)
    assert torch.cdist(wanted.flatten(1), wanted.flatten(1)).fill_diagonal_(1).min() > 0.1  # no two alike


# --- autoencoders of diffusers --------------------------------------------------------------------------------------


def vq():
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=WIDTHS[:3], norm_num_groups=4, num_vq_embeddings=16, latent_channels=3,
    )  # fmt: skip


def asymmetric():
    return AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, down_block_out_channels=WIDTHS[:3],
        up_block_types=("UpDecoderBlock2D",) * 3, up_block_out_channels=WIDTHS[:3], norm_num_groups=4,
    )  # fmt: skip


def distilled():
    return DistilledVAE.of(
        AutoencoderTiny(encoder_block_out_channels=WIDTHS, decoder_block_out_channels=WIDTHS), levels=[3]
    )


@pytest.mark.parametrize(
    ("make", "content", "shape"),
    [
        (vq, "mean", (3, SIDE // 4, SIDE // 4)),
        (asymmetric, "moments", (8, SIDE // 4, SIDE // 4)),
        (distilled, "mean", (4, SIDE // 8, SIDE // 8)),
    ],
)
def test_rows_are_what_the_model_says(folder, tmp_path, make, content, shape):
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():  # a new model's latents differ little from image to image
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "model")
    cache = encoded(folder, tmp_path / "model", tmp_path / "cache")
    assert (cache.content, cache.shape, len(cache)) == (content, shape, 10)
    same_as_by_hand(cache, folder, model.eval())


# --- a model of the Hub -------------------------------------------------------------------------------------------


@pytest.fixture
def remote(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save_model(tmp_path / "local" / "vae")
    with hub_server.running() as server:
        hub_server.use(server, tmp_path / "downloads", monkeypatch)
        server.put("org/name", tmp_path / "local")
        yield server


def test_a_model_of_the_hub_encodes_and_the_cache_names_its_commit(remote, folder, tmp_path, monkeypatch):
    cache = encoded(folder, "org/name/vae", tmp_path / "cache")
    same_as_by_hand(cache, folder, LiteVAE.from_pretrained(tmp_path / "local" / "vae"))
    pinned = "org/name/vae@" + remote.refs["org/name", "main"]
    assert cache.manifest["model"]["path"] == pinned
    assert cache.manifest["model"]["fingerprint"] == fingerprint(tmp_path / "local" / "vae")

    # Without a connection the copy is used.
    hub_server.use(remote, tmp_path / "downloads", monkeypatch, offline=True)
    remote.asked.clear()
    again = encoded(folder, "org/name/vae", tmp_path / "again")
    assert torch.equal(again.moments(range(10)), cache.moments(range(10)))
    assert hub.local_folder(pinned).is_dir()
    assert remote.asked == []


def test_without_a_connection_and_a_copy_the_job_says_what_it_needs(remote, folder, tmp_path, monkeypatch):
    hub_server.use(remote, tmp_path / "nothing", monkeypatch, offline=True)
    with pytest.raises(UserError) as caught:
        encoded(folder, "org/name/vae", tmp_path / "cache")
    message = str(caught.value)
    for part in ("org/name/vae does not exist", "HF_HUB_OFFLINE is set", "`hf download org/name --include", "HF_HOME"):
        assert part in message
    assert not (tmp_path / "cache").exists()
    # Where there is a connection, what was advised is done, and the cache of downloads is brought here.
    hub_server.use(remote, tmp_path / "downloads", monkeypatch)
    check_model("model", "org/name/vae")
    hub_server.use(remote, tmp_path / "downloads", monkeypatch, offline=True)
    assert len(encoded(folder, "org/name/vae", tmp_path / "cache")) == 10
