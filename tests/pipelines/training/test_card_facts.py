"""What the cards of model folders say of their training, and the commits of models that a training begins with."""

import re
import shutil

import pytest
import ray.train.torch
import skimage.data
import torch
import yaml
from diffusers import AutoencoderKL
from huggingface_hub import ModelCard
from PIL import Image

from litevae import hub
from litevae.any_autoencoder import fingerprint
from litevae.errors import UserError
from litevae.order import batch_positions
from pipelines.data.open_source import open_source
from pipelines.runtime.cli import load
from pipelines.training import vae
from pipelines.training.card_facts import METRICS, facts_of_vae, steps
from pipelines.training.config import TrainLDM, TrainVAE
from pipelines.training.ldm import LdmTask
from pipelines.training.teacher import Lessons
from pipelines.training.vae import VaeTask
from tests import hub_server
from tests.encoding import encoded_crops
from tests.in_process import up_to_the_workers
from tests.setups import ldm_setup, leave_checkpoint, vae_setup

CPU = torch.device("cpu")
DWT2 = ["model.encoder=dwt-2", "model.latent_channels=48"]  # nothing to learn in it: quick
SMALL = [
    *DWT2, "model.decoder.channels=[8, 8, 8, 8]", "model.decoder.layers=1", "loss.lpips.required=false",
    "loss.adversarial.start=1000", "loss.adversarial.channels=2", "loop.precision=fp32", "ray.gpu=false",
    "tracking.enabled=false", "name=faces", "seed=7", "loop.ema=0.9",
    "stages=[{resolution: 32, images: 8, batch_size: 4}, {resolution: 64, images: 4, batch_size: 4}]",
]  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Nine photos of 64 px, a file that is none, and a hidden one; below a folder that no card may name."""
    folder = tmp_path_factory.mktemp("of-somebody") / "photos"
    folder.mkdir()
    for n in range(9):
        Image.fromarray(skimage.data.astronaut()[40 * n : 40 * n + 64, 200:264]).save(folder / f"{n}.png")
    (folder / "5.broken.png").write_bytes(b"no image")
    shutil.copy(folder / "1.png", folder / ".hidden.png")
    return folder


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.setattr(ray.train.torch, "prepare_model", lambda model: model)


def task_of(photos, *more, val=True, **setup):
    config = load(TrainVAE, None, [*SMALL, f"data.train.uri={photos}", f"data.val.uri={photos}", *more])
    source = open_source(config.data.train)
    return VaeTask(config, vae_setup(source, open_source(config.data.val) if val else None, **setup), 0, 1, CPU)


def trained(task, images):
    """Train up to a number of images, validate, and return the metrics."""
    start = 0
    for stage, (length, batch_size) in enumerate(task.stages):
        task.begin(stage)
        for pixels in task.batches(start, min(start + length, images), batch_size):
            task.step(pixels, start)
            start += batch_size
        task.count()
        if start >= images:
            break
    return task.validate()[0]


def card(task, folder):
    task.exports()["model"](folder)
    return (folder / "README.md").read_text()


# --- the facts ----------------------------------------------------------------------------------------------------


def test_the_card_tells_the_training(photos, tmp_path):
    one = task_of(photos)
    values = trained(one, 12)
    text = card(one, tmp_path / "model")
    for line in (
        "# faces", "| seed | 7 |", "| EMA | decay 0.9 a step; these weights are the average |", "| steps | 3 |",
        "| stages | 32 px: 8 images in batches of 4; 64 px: 4 images in batches of 4 |",
        "| start | random weights |",
        "| loss | l1 1, lpips 1 (off: its weights were missing), kl 2.1e-08, wavelet 1, gaussian 0.5, adversarial 0.1 "
        "(from 1,000 images on) |",
        "| optimizer | Adam, learning rate 0.0001 (constant), betas 0.5 and 0.9 |",
        "`photos`: 10 images. Left out: 1 hidden (.png), at least 1 that could not be read.",
        "- It was trained at 32 and 64 px.",
        f"| PSNR | {values['psnr']:.4g} | {METRICS['psnr'][1]} |",
        f"| SSIM | {values['ssim']:.4g} | {METRICS['ssim'][1]} |",
        "From the training's own validation on `photos`: the first 10 images at 64 px, resized and cropped in the "
        "middle, decoded from the mean in fp32.",
    ):  # fmt: skip
        assert f"\n{line}\n" in text
    assert "of-somebody" not in text
    found = ModelCard(text).data.eval_results
    assert [one.metric_value for one in found] == [values["psnr"], values["ssim"]]
    config = yaml.safe_load((tmp_path / "model" / "config.json").read_text())
    assert f"| `scaling_factor` | {config['scaling_factor']:.6g} |" in text


def test_a_finished_run_that_is_started_again_writes_the_same_card(photos, tmp_path):
    one = task_of(photos)
    trained(one, 12)
    text = card(one, tmp_path / "model")
    torch.save(one.state() | {"images": 12, "digest": one.digest}, tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    again = task_of(photos, val=False)  # the metrics are those that were measured, also if nothing is validated now
    again.load(state)
    unread = ", at least 1 that could not be read"  # which only a training finds out
    assert card(again, tmp_path / "again") == text.replace(unread, "")
    again.load(state | {"digest": "of other data"})
    assert "## Metrics" not in card(again, tmp_path / "other")
    again.load({key: value for key, value in state.items() if key != "validation"})  # of an older version
    assert "## Metrics" not in card(again, tmp_path / "older")


def test_an_unfinished_training_says_so(photos, tmp_path):
    one = task_of(photos, val=False, begin="/runs/other/checkpoint-1")
    assert trained(one, 4) == {}
    text = card(one, tmp_path / "model")
    assert "\n| steps | 1 so far (4 of 12 images) |\n" in text
    assert "\n- It was trained at 32 px.\n" in text
    assert "\n| start | a checkpoint of another training |\n" in text
    assert "## Metrics" not in text
    assert "## Latents" not in text  # which are measured at the end


@pytest.mark.parametrize("stages", [[(8, 4), (4, 4)], [(10, 4), (10, 8), (3, 2)], [(3, 8), (3, 8), (40, 8)]])
def test_steps_are_those_that_the_loop_takes(stages):
    position = end = count = 0
    for images, batch_size in stages:
        end += images
        for _ in batch_positions(max(position, end - images), end, batch_size) if position < end else ():
            count, position = count + 1, position + batch_size
            assert steps(stages, position) == count
    assert steps(stages, 0) == 0


def test_what_a_training_began_with_is_named_without_its_path(photos, tmp_path):
    (tmp_path / "of-somebody").mkdir()
    named = "org/name@" + "0" * 40
    for words, start in (
        (["model.init=/of-somebody/vae"], "the model `vae`"),
        ([f"model.init={named}"], f"the model `{named}`"),
        (["model.init_decoder=/of-somebody/sd", "model.freeze=[decoder]"], "random weights, with the decoder of `sd`"),
        ([f"teacher={named}"], f"random weights, with the decoder of `{named}`"),
    ):
        plain = [word for word in SMALL if not word.startswith(("model.", "loss."))]
        config = load(TrainVAE, None, [*plain, f"data.train.uri={photos}", *words])
        facts = facts_of_vae(config, vae_setup(open_source(config.data.train)), 12)
        assert facts.training["start"] == start
        taught = "teacher" in words[0]
        assert facts.training.get("teacher") == (f"`{named}`" if taught else None)
        assert (facts.training["loss"] == "latent 1, logvar 0.1") == taught
        assert facts.training.get("not trained") == ("decoder" if "freeze" in words[-1] else None)


def test_a_diffusion_models_card_tells_its_training(tmp_path):
    cache, _, _ = encoded_crops(tmp_path, rows_per_shard=10)
    words = ["network=tiny", "batch_size=8", "images=24", "loop.ema=0.5", "more_ema=[0.25]", "sample_images=0"]
    words += ["loop.precision=fp32", "ray.gpu=false", "tracking.enabled=false", f"cache={cache}", f"root={tmp_path}"]
    config = load(TrainLDM, None, words)
    one = LdmTask(config, ldm_setup(config), 0, 1, CPU)
    one.begin(0)
    one.step(next(iter(one.batches(0, 8, 8))), 0)
    for name, write in one.exports().items():
        write(tmp_path / name)
        text = (tmp_path / name / "README.md").read_text()
        for line in (
            "| steps | 1 so far (8 of 24 images) |", "`cache`: 24 images.", "| autoencoder | `LiteVAE`",
            f"| EMA | decay {0.25 if '0.25' in name else 0.5} a step",
        ):  # fmt: skip
            assert f"\n{line}" in text
        assert str(tmp_path) not in text


# --- commits of models on the Hub ---------------------------------------------------------------------------------


def kl(seed, folder):
    torch.manual_seed(seed)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8), norm_num_groups=1, layers_per_block=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def remote(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with hub_server.running() as server:
        hub_server.use(server, tmp_path / "cache", monkeypatch)
        server.put("org/name", kl(0, tmp_path / "first"))
        yield server


PLAIN = [word for word in SMALL if word not in DWT2 and not word.startswith(("model.", "loss.adv", "name"))]
FIELDS = {
    "teacher": ["teacher=NAME", "model.encoder=S"],
    "model.init_decoder": ["model.init_decoder=NAME", "model.conv1x1=true", *SMALL[2:4], "model.encoder=S"],
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_run_keeps_the_commit_that_it_began_with(remote, photos, tmp_path, monkeypatch, capsys, field):
    folder = tmp_path / "runs" / "mine"

    def run(name, **use):
        """Start the job in a new process's stead; return the model in the workers' config and in the run's."""
        hub_server.use(remote, tmp_path / "cache", monkeypatch, **use)
        words = [word.replace("NAME", name) for word in FIELDS[field]]
        words += [*PLAIN, f"data.train.uri={photos}", f"root={tmp_path / 'runs'}", "name=mine"]
        with up_to_the_workers({"model": str(tmp_path / "first"), "images": 12}) as noted:
            vae.train_vae(load(TrainVAE, None, words))
        stored = yaml.safe_load((folder / "config.yaml").read_text())
        for part in field.split("."):
            stored = stored[part]
        given = noted.fitted[1].config
        for part in field.split("."):
            given = given[part]
        return given, stored

    old = "org/name@" + remote.refs["org/name", "main"]
    assert run("org/name") == (old, old)
    assert f"{field}=org/name is {old} in this run" in capsys.readouterr().out
    remote.put("org/name", kl(1, tmp_path / "second"))
    new = "org/name@" + remote.refs["org/name", "main"]
    assert run("org/name") == (new, new)  # the run has made nothing yet
    remote.put("org/name", kl(2, tmp_path / "third"))
    leave_checkpoint(folder)
    for name in ("org/name", "org/name@main", new):
        assert run(name) == (new, new)
    assert run("org/name", offline=True) == (new, new)
    with pytest.raises(UserError, match=f"{field}: was 'org/name@.*, is 'org/name@"):
        run(old)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace(new, "org/name"))  # as earlier versions kept it
    assert run("org/name") == ("org/name", "org/name")
    with pytest.raises(UserError, match=rf"{field}=org/none does not exist"):
        run("org/none")


def test_a_students_latent_space_names_the_model_of_the_hub(remote, photos):
    name = hub.pinned("org/name")
    plain = [word for word in PLAIN if not word.startswith("loss.")]
    config = load(TrainVAE, None, [*plain, f"data.train.uri={photos}", f"teacher={name}", "model.encoder=S"])
    one = VaeTask(config, vae_setup(open_source(config.data.train)), 0, 1, CPU)
    assert isinstance(one.lessons, Lessons)
    assert one.lessons.about == {"name": name, "fingerprint": fingerprint("org/name")}
    assert re.fullmatch("org/name@[0-9a-f]{40}", name)
