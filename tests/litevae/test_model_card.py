"""Model cards, and uploads to a stand-in of the Hub with them."""

import re
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderTiny, VQModel
from huggingface_hub import ModelCard, snapshot_download

import litevae
from litevae.distilled import DistilledVAE
from litevae.ldm import LDM, NormalizedAutoencoder, save_ldm
from litevae.model_card import CARD, CITATION, Metric, ModelFacts, write_card, write_ldm_card
from tests import hub_server
from tests.commands import REPO
from tests.litevae.test_ldm import make

WIDTHS = (8, 8, 8, 8)
FACTS = ModelFacts(
    name="faces",
    data="/home/somebody/photos/",
    images=1200,
    left_out="12 hidden (.jpg | .png)",
    training={"steps": "1,500", "loss": "l1 1"},
    validation="s3://bucket/secret/photos-val",
    validation_kind="folder",
    measured="the first 256 images at 256 px",
    metrics=[Metric("psnr", "PSNR", 22.25, "mean over images"), Metric("ssim", "SSIM", 0.5, "11x11 | sigma 1.5")],
    limits=["It was trained at 256 px."],
    license="cc-by-4.0",
)


def small(**config):
    torch.manual_seed(0)
    return litevae.LiteVAE("S", levels=(3,), block_out_channels=WIDTHS, layers_per_block=1, **config).eval()


def distilled():
    torch.manual_seed(0)
    teacher = AutoencoderTiny(encoder_block_out_channels=WIDTHS, decoder_block_out_channels=WIDTHS)
    return DistilledVAE.of(teacher, levels=[3]).eval()


def normalized():
    return NormalizedAutoencoder.of(small(), torch.tensor([0.5, -1, 0, 2]), torch.tensor([2.0, 1, 0.5, 3]))


def around_vq():
    torch.manual_seed(0)
    inner = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=4, num_vq_embeddings=16, latent_channels=3,
    )  # fmt: skip
    return NormalizedAutoencoder.of(inner, torch.zeros(3), torch.ones(3))


MODELS = {"LiteVAE": small, "DistilledVAE": distilled, "NormalizedAutoencoder": normalized}
EVERY = MODELS | {"around VQModel": around_vq, "dwt": lambda: litevae.LiteVAE("dwt", 12, block_out_channels=WIDTHS)}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


# --- the card -----------------------------------------------------------------------------------------------------


@pytest.fixture
def card_of(tmp_path):
    def card_of(model, facts=FACTS):
        write_card(tmp_path, model, facts)
        return (tmp_path / CARD).read_text()

    return card_of


def test_the_card_says_what_is_known(card_of):
    model = small(scaling_factor=0.4375, shift_factor=0.25, latents_mean=[1.5, 2, 3, 4], latents_std=[5.5, 6, 7, 8])
    text = card_of(model)
    for row in (
        "| class | `LiteVAE` |",
        f"| encoder | S, {count(model.encoder):,} parameters |",
        f"| decoder | {count(model.decoder):,} parameters |",
        "| latent | 4 channels, 1/8 of the image's height and width (downsampling factor 8) |",
        "| `scaling_factor` | 0.4375 |", "| `shift_factor` | 0.25 |", "| `latents_mean` | 1.5, 2, 3, 4 |",
        "| `latents_std` | 5.5, 6, 7, 8 |",
        "`photos`: 1,200 images. Left out: 12 hidden (.jpg \\| .png).", "| steps | 1,500 |", "| loss | l1 1 |",
        "From the training's own validation on `photos-val`: the first 256 images at 256 px.",
        "| PSNR | 22.25 | mean over images |", "| SSIM | 0.5 | 11x11 \\| sigma 1.5 |", "- It was trained at 256 px.",
        "Of these weights: cc-by-4.0.", "# faces",
    ):  # fmt: skip
        assert f"\n{row}\n" in text
    assert not re.search("somebody|home/|bucket|secret", text)


def test_the_hub_reads_the_metadata(card_of, tmp_path):
    card_of(small())
    data = ModelCard.load(tmp_path / CARD).data
    assert (data.library_name, data.license, data.model_name) == ("litevae", "cc-by-4.0", "faces")
    assert {"litevae", "autoencoder"} <= set(data.tags)
    found = [(one.dataset_name, one.dataset_type, one.metric_type, one.metric_value) for one in data.eval_results]
    assert found == [("photos-val", "imagefolder", "psnr", 22.25), ("photos-val", "imagefolder", "ssim", 0.5)]
    assert data.eval_results[0].metric_args == {"protocol": "mean over images", "images": FACTS.measured}


def test_what_is_not_known_is_left_out(card_of, tmp_path):
    text = card_of(small(), ModelFacts())
    assert re.findall("^## (.*)", text, re.M) == ["Use", "Training", "Limits", "Citation", "Licence"]
    assert "does not tell its training" in text
    assert "None is given for these weights" in text
    assert not re.search(r"None[^ ]|\bnan\b|(?<!`)``(?!`)|: \.|\| \|\n(?!\| ---)", text)
    assert ModelCard.load(tmp_path / CARD).data.to_dict().keys() == {"library_name", "tags"}


@pytest.mark.parametrize("name", EVERY)
def test_the_cards_code_runs(card_of, tmp_path, name):
    model = EVERY[name]()
    model.save_pretrained(tmp_path)
    (code,) = re.findall("```python\n(.*?)```", card_of(model), re.S)
    found = {}
    exec(code.replace("FOLDER", str(tmp_path)), found)
    assert found["images"].shape == found["x"].shape
    assert type(found["vae"]) is type(model)


def test_a_students_card_says_how_near_it_is(card_of):
    model = distilled()
    assert "was not measured" in card_of(model)
    assert f"| decoder | {count(model.teacher):,} parameters, those of the teacher's `AutoencoderTiny` |" in card_of(
        model
    )
    model.rate(0.5, {"name": "taesd", "fingerprint": "f" * 64})
    assert "R² = 0.500 " in card_of(model)
    assert "too little" in card_of(model)
    model.rate(0.97, {"name": "taesd", "fingerprint": "f" * 64})
    assert "R² = 0.970 " in card_of(model)
    assert "count as those of `taesd`" in card_of(model)


def test_the_normalisation_is_in_the_card(card_of):
    text = card_of(normalized())
    assert "| class | `NormalizedAutoencoder` around `LiteVAE` |" in text
    assert "| `latents_mean` | 0.5, -1, 0, 2 |\n| `latents_std` | 2, 1, 0.5, 3 |" in text


def test_the_citation_is_the_readmes():
    assert CITATION in (REPO / "README.md").read_text()


@pytest.mark.parametrize(("network", "classes"), [("tiny", 0), ("dit", 5)])
def test_a_diffusion_models_card(tmp_path, network, classes):
    ldm: LDM = make(network, classes)
    save_ldm(tmp_path, ldm)
    write_ldm_card(tmp_path, ldm, FACTS)
    text = (tmp_path / CARD).read_text()
    assert f", {count(ldm.network):,} parameters |" in text
    assert f"| conditioning | {'5 classes' if classes else 'none'} |" in text
    assert "`photos`: 1,200 images" in text
    task = None if classes else "unconditional-image-generation"
    assert ModelCard.load(tmp_path / CARD).data.pipeline_tag == task
    (code,) = re.findall("```python\n(.*?)```", text, re.S)
    found = {}
    exec(code.replace("FOLDER", str(tmp_path)).replace("steps=50", "steps=1"), found)
    assert found["image"].size == (64, 64)


# --- uploads ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    with hub_server.running() as server:
        yield server


@pytest.fixture
def remote(server, tmp_path, monkeypatch):
    server.commits.clear()
    server.refs.clear()
    server.asked.clear()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    hub_server.use(server, tmp_path / "cache", monkeypatch)
    return server


def files(server, repo="org/pushed"):
    return server.commits[repo][server.refs[repo, "main"]]


@pytest.mark.parametrize("name", MODELS)
def test_what_was_pushed_comes_back(remote, tmp_path, name):
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "own")
    model = type(model).from_pretrained(tmp_path / "own")
    model.push_to_hub("org/pushed")
    there = files(remote)
    assert there.keys() == {"config.json", "diffusion_pytorch_model.safetensors", CARD}
    assert str(tmp_path).encode() not in there["config.json"]  # diffusers notes there where a model was loaded from
    assert f"| class | `{name}`".encode() in there[CARD]
    assert b"\n# org/pushed\n" in there[CARD]
    again = type(model).from_pretrained("org/pushed")
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        assert torch.equal(again(x).sample, model(x).sample)
    if name != "NormalizedAutoencoder":
        assert type(litevae.load_autoencoder("org/pushed")) is type(model)


def test_the_folders_card_is_sent_as_it_is(remote, tmp_path):
    model = small()
    model.save_pretrained(tmp_path / "own")
    write_card(tmp_path / "own", model, FACTS)
    written = (tmp_path / "own" / CARD).read_bytes() + b"by hand: \xc3\xa9\r\n"
    (tmp_path / "own" / CARD).write_bytes(written)
    remote.commit("org/pushed", {CARD: b"an older card"})
    litevae.load_autoencoder(tmp_path / "own").push_to_hub("org/pushed")
    assert files(remote)[CARD] == written
    litevae.load_autoencoder(tmp_path / "own").push_to_hub("org/other", license="mit")
    assert ModelCard(files(remote, "org/other")[CARD].decode()).data.license == "mit"
    assert "by hand: é" in files(remote, "org/other")[CARD].decode()


def test_the_card_of_the_repository_stays_where_there_is_no_other(remote):
    remote.commit("org/pushed", {CARD: b"written on the Hub"})
    small().push_to_hub("org/pushed")
    assert files(remote)[CARD] == b"written on the Hub"
    assert "diffusion_pytorch_model.safetensors" in files(remote)


def test_saving_with_an_upload_keeps_the_card_too(remote, tmp_path):
    model = small()
    model.save_pretrained(tmp_path / "own")
    write_card(tmp_path / "own", model, FACTS)
    written = (tmp_path / "own" / CARD).read_bytes()
    model.save_pretrained(tmp_path / "own", push_to_hub=True, repo_id="org/pushed", commit_message="again")
    assert files(remote)[CARD] == (tmp_path / "own" / CARD).read_bytes() == written
    model.save_pretrained(tmp_path / "plain", push_to_hub=True, repo_id="org/plain")
    assert b"| class | `LiteVAE` |" in files(remote, "org/plain")[CARD]


def test_a_pipeline_saves_our_part_as_it_is_told(tmp_path):
    """diffusers looks at the signature of a part's `save_pretrained`."""
    pipeline = litevae.LatentDiffusionPipeline(make("tiny", 0).scheduler, unet=make("tiny", 0).network, vae=small())
    pipeline.save_pretrained(tmp_path, variant="fp16", max_shard_size="1MB")
    assert {path.name for path in (tmp_path / "vae").iterdir()} > {
        "diffusion_pytorch_model.safetensors.index.fp16.json"
    }


def test_a_subfolder_has_no_card_and_a_pipelines_card_is_not_a_models(remote, tmp_path):
    model = small()
    model.save_pretrained(tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / CARD).write_text("of the pipeline")
    model = litevae.LiteVAE.from_pretrained(tmp_path / "pipeline", subfolder="vae")
    model.push_to_hub("org/pushed", subfolder="vae", variant="fp16")
    assert files(remote).keys() == {"vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors"}
    model.push_to_hub("org/other")
    assert b"| class | `LiteVAE` |" in files(remote, "org/other")[CARD]


# --- what diffusers loads by itself ---------------------------------------------------------------------------------

_FRESH = """
import sys
from diffusers import AutoModel, DiffusionPipeline

def message(load, *given, **more):
    try:
        return type(load(*given, **more)).__name__
    except ValueError as error:
        return str(error)

model, pipeline = sys.argv[1:]
print(message(AutoModel.from_pretrained, model))
print(message(DiffusionPipeline.from_pretrained, pipeline))
assert "litevae" not in sys.modules
import litevae
print(message(AutoModel.from_pretrained, model))
print(message(AutoModel.from_pretrained, pipeline, subfolder="vqvae"))
print(message(DiffusionPipeline.from_pretrained, pipeline))
"""


@pytest.mark.slow
def test_what_diffusers_needs_to_be_told(tmp_path):
    """As docs/diffusers.md has it, with the diffusers of constraints.txt; in a process that has not imported us."""
    small().save_pretrained(tmp_path / "model")
    save_ldm(tmp_path / "ldm", make("tiny", 0))
    words = [sys.executable, "-c", _FRESH, tmp_path / "model", tmp_path / "ldm"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=REPO)
    assert done.returncode == 0, done.stderr
    before, alone, after, part, whole = done.stdout.splitlines()
    assert "LiteVAE" in before
    assert "diffusers" in before
    assert "import litevae before calling `from_pretrained`" in alone
    assert after == before
    assert (part, whole) == ("NormalizedAutoencoder", "LDMPipeline")


def test_a_pipeline_on_the_hub_is_downloaded_first(remote, tmp_path):
    save_ldm(tmp_path / "ldm", make("tiny", 0))
    remote.put("org/ldm", tmp_path / "ldm")
    with pytest.raises(ValueError, match="litevae.py as defined in `model_index.json` does not exist"):
        litevae.LatentDiffusionPipeline.from_pretrained("org/ldm")
    folder = snapshot_download("org/ldm")
    pipeline = litevae.LatentDiffusionPipeline.from_pretrained(folder)
    assert type(pipeline.autoencoder) is NormalizedAutoencoder
