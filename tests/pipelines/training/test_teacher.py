"""train_vae with a teacher, with another model's decoder, and with frozen parts."""

import json
from pathlib import Path

import numpy as np
import pytest
import ray.train.torch
import skimage.data
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from PIL import Image

from litevae.any_autoencoder import load_autoencoder
from litevae.autoencoder import LiteVAE
from litevae.cache import LatentCache
from litevae.distilled import LIMIT, DistilledVAE
from litevae.errors import UserError
from litevae.images import ImageTransform
from litevae.latents import downsampling, encode_latents, latent_content
from pipelines.data.open_source import open_source
from pipelines.encoding.config import Encode, Verify
from pipelines.encoding.encode import encode_dataset
from pipelines.encoding.verify import verify
from pipelines.runtime.cli import load
from pipelines.training import first_look
from pipelines.training.config import TrainVAE
from pipelines.training.teacher import closing_line, load_teacher
from pipelines.training.vae import VaeTask, build_model, train_vae
from tests.in_process import in_process
from tests.setups import vae_setup
from tests.taesd import KODAK, WEIGHTS, taesd

CPU = torch.device("cpu")
BASE = ["loop.precision=fp32", "ray.gpu=false", "tracking.enabled=false", "optim.lr=3e-3", "model.encoder=S"]
SMALL_DECODER = ["model.decoder.channels=[8, 8, 8, 8]", "model.decoder.layers=1", "loss.lpips.weight=0"]


def kl(**config):
    torch.manual_seed(0)
    widths = config.pop("block_out_channels", (8, 8, 8, 8))
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths, norm_num_groups=1, scaling_factor=0.25, **config,
    )  # fmt: skip


def tiny():
    torch.manual_seed(0)
    widths = (8, 8, 8, 8)
    return AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths, scaling_factor=0.5)


def vq():
    torch.manual_seed(0)
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8), norm_num_groups=1, latent_channels=3, num_vq_embeddings=16,
    )  # fmt: skip


TEACHERS = {"kl": kl, "tiny": tiny, "vq": vq}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for n in range(12):
        corner = 30 * n
        image = skimage.data.astronaut()[corner : corner + 40, corner : corner + 40]
        Image.fromarray(image).save(folder / f"{n:02}.png")
    return folder


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    for name, make in TEACHERS.items():
        make().save_pretrained(folder / name)
    return folder


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.setattr(ray.train.torch, "prepare_model", lambda model: model)


@pytest.fixture
def task(photos, teachers):
    def make(teacher="kl", *more, val=True):
        config = configured(photos, f"teacher={teachers / teacher}", *more)
        source = open_source(config.data.train)
        return VaeTask(config, vae_setup(source, source if val else None), 0, 1, CPU)

    return make


def configured(photos, *more):
    stages = "stages=[{resolution: 32, images: 96, batch_size: 4}]"
    return load(TrainVAE, None, [*BASE, f"data.train.uri={photos}", stages, "val_images=8", *more])


def trained(task, start=0, end=96):
    for images, pixels in zip(range(start, end, 4), task.batches(start, end, 4), strict=True):
        values = task.step(pixels, images)
    return values


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEACHERS)
@torch.no_grad()
def test_a_student_stands_where_its_teacher_stands(name, teachers, tmp_path):
    teacher = load_autoencoder(teachers / name)
    DistilledVAE.of(teacher).save_pretrained(tmp_path / "student")
    student = load_autoencoder(tmp_path / "student")
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    theirs, own = teacher.encode(x), student.encode(x)
    assert hasattr(own, "latent_dist") == hasattr(theirs, "latent_dist")
    assert hasattr(own, "latents") == hasattr(theirs, "latents")
    assert latent_content(student) == latent_content(teacher)
    assert encode_latents(student, x).shape == encode_latents(teacher, x).shape
    assert downsampling(student) == 8
    assert student.config.scaling_factor == getattr(teacher.config, "scaling_factor", 1.0)
    z = torch.randn(2, student.config.latent_channels, 4, 4)
    torch.testing.assert_close(student.decode(z).sample, teacher.decode(z).sample)
    student.enable_slicing()
    torch.testing.assert_close(student.decode(z).sample, teacher.decode(z).sample)
    assert student(x).sample.shape == x.shape


def test_a_student_names_the_latents_only_from_the_limit_on(teachers, tmp_path):
    student, about = DistilledVAE.of(load_autoencoder(teachers / "tiny")), {"name": "t", "fingerprint": "f"}
    for r2, wanted in ((LIMIT, about), (LIMIT - 0.01, None)):
        student.rate(r2, about)
        student.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert (config["latent_space"], config["latent_r2"]) == (wanted, r2)


@pytest.mark.skipif(not (WEIGHTS.is_dir() and KODAK.is_dir()), reason="TAESD's weights or Kodak are not here")
@pytest.mark.parametrize(("name", "kodak"), [("taesd", 24.8), ("taesd3", 29.0)])
@torch.no_grad()
def test_a_pretrained_teacher_decodes_through_its_student(name, kodak, tmp_path):
    """The known quality is a mean over Kodak's 24 images; the mean of a hard and an easy one is within 3 dB of it."""
    teacher = taesd(name)
    teacher.save_pretrained(tmp_path / "teacher")
    DistilledVAE.of(load_autoencoder(tmp_path / "teacher")).save_pretrained(tmp_path / "student")
    student = load_autoencoder(tmp_path / "student")
    photos = [np.asarray(Image.open(KODAK / f"kodim{n}.png"))[:256, :256] for n in ("01", "23")]
    x = torch.from_numpy(np.stack(photos)).movedim(-1, 1).float() / 127.5 - 1
    for each in (teacher, student):
        y = each.decode(teacher.encode(x).latents).sample.clamp(-1, 1)
        psnr = -10 * torch.log10(((x - y) / 2).square().mean(dim=(1, 2, 3)))
        assert float(psnr.mean()) == pytest.approx(kodak, abs=3)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEACHERS)
def test_training_explains_more_of_the_teachers_latents(name, task, tmp_path):
    task = task(name)
    task.begin(0)
    before, _ = task.validate()
    decoder = {key: value.clone() for key, value in task.model.teacher.state_dict().items()}
    values = trained(task)
    after, picture = task.validate()
    assert after["latent_r2"] > before["latent_r2"] + 0.1
    assert set(values) == {"latent", "loss", "gradient_norm", "skipped_steps"} | ({"logvar"} if name == "kl" else set())
    assert all(torch.equal(task.model.teacher.state_dict()[key], value) for key, value in decoder.items())
    assert picture is not None
    task.exports()["model"](tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["latent_r2"] == after["latent_r2"]
    assert (config["latent_space"] is None) == (after["latent_r2"] < LIMIT)


def test_validation_measures_r2_and_both_decodings(task, teachers, photos):
    task = task("kl")
    task.begin(0)
    values, _ = task.validate()
    teacher = load_autoencoder(teachers / "kl")
    # the shorter side of 40 px is resized to 32 px before the crop
    crops = [
        np.asarray(Image.open(path).resize((32, 32), Image.Resampling.LANCZOS))
        for path in sorted(Path(photos).iterdir())[:8]
    ]
    x = torch.from_numpy(np.stack(crops)).movedim(-1, 1).float() / 127.5 - 1
    with torch.no_grad():
        target = teacher.encode(x).latent_dist.mean
        found = task.model.encode(x).latent_dist.mean
        decoded = teacher.decode(target).sample.clamp(-1, 1)
    mean = target.mean(dim=(0, 2, 3), keepdim=True)
    errors, spread = (found - target).square().sum(dim=(0, 2, 3)), (target - mean).square().sum(dim=(0, 2, 3))
    assert values["latent_r2"] == pytest.approx(1 - float(errors.sum() / spread.sum()), abs=2e-2)
    for n in range(4):
        assert values[f"latent_r2_{n}"] == pytest.approx(1 - float(errors[n] / spread[n]), abs=5e-2)
    psnr = -10 * torch.log10(((decoded - x) / 2).square().mean(dim=(1, 2, 3))).mean()
    assert values["teacher_psnr"] == pytest.approx(float(psnr), abs=0.1)


def test_latents_are_normalised_by_channel_over_training_images(task):
    task = task("kl")
    task.begin(0)
    assert task.model.latent_std.shape == (8,)
    assert (task.model.latent_std > 0).all()
    first = task.model.latent_mean.clone()
    task.begin(0)
    assert torch.equal(task.model.latent_mean, first)


def test_the_loss_is_normalised_by_channel(task, teachers):
    """The first loss is of a network that predicts the mean, so it is near 1 whatever the latents' scale."""
    task = task("kl")
    task.begin(0)
    std = task.model.latent_std.clone()
    pixels = torch.cat(list(task.batches(0, 12, 4)))
    with torch.no_grad():
        x = pixels.movedim(-1, 1).float() / 127.5 - 1
        errors = task.model.raw(x) - encode_latents(load_autoencoder(teachers / "kl"), x)
    by_hand = (errors / std.view(1, -1, 1, 1)).square().mean(dim=(0, 2, 3))
    values = task.step(pixels, 0)
    assert float(values["latent"]) == pytest.approx(float(by_hand[:4].mean()), rel=1e-3)
    assert float(values["logvar"]) == pytest.approx(float(by_hand[4:].mean()), rel=1e-3)


def test_pixels_count_through_the_frozen_decoder(task):
    task = task("tiny", "loss.l1.weight=1", "loss.latent.weight=0.5")
    task.begin(0)
    values = trained(task, end=4)
    assert float(values["loss"]) == pytest.approx(0.5 * float(values["latent"]) + float(values["l1"]), rel=1e-5)


def test_a_resumed_training_is_the_same_bit_for_bit(task):
    whole = task("kl", "loop.ema=0.9")
    whole.begin(0)
    trained(whole, end=16)
    first = task("kl", "loop.ema=0.9")
    first.begin(0)
    trained(first, end=8)
    second = task("kl", "loop.ema=0.9")
    second.load(first.state())
    second.begin(0)
    trained(second, start=8, end=16)
    one, other = whole.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)
    one, other = whole.ema.average, second.ema.average
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_without_validation_nothing_is_claimed(task, tmp_path, photos):
    task = task("tiny", val=False)
    task.begin(0)
    task.exports()["model"](tmp_path)
    assert load_autoencoder(tmp_path).config.latent_space is None
    assert "does not say that its latents are those" in closing_line(task.config, str(tmp_path))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["loss.kl.weight=1"], "loss.kl can't be combined with a teacher"),
        (["loss.adversarial.weight=1"], "the decoder is the teacher's"),
        (["model.decoder.layers=1"], "model.decoder can't be combined"),
        (["model.conv1x1=true"], "model.conv1x1 can't be combined"),
        (["model.encoder=dwt", "model.latent_channels=12"], "can't learn from a teacher"),
        (["loss.latent.weight=0"], "loss.latent.weight must not be 0"),
    ],
)
def test_what_a_teacher_excludes(photos, more, message):
    with pytest.raises(UserError, match=message):
        configured(photos, "teacher=t", *more)


def test_other_terms_have_no_weight_unless_given(photos):
    loss = configured(photos, "teacher=t", "loss.l2.weight=2").loss
    assert (loss.latent.weight, loss.l2.weight) == (1, 2)
    assert [loss.l1.weight, loss.lpips.weight, loss.kl.weight, loss.wavelet.weight, loss.adversarial.weight] == [0] * 5
    assert configured(photos).loss.l1.weight == 1


def test_folders_that_are_no_teacher(photos, teachers, tmp_path):
    with pytest.raises(UserError, match="teacher=.*does not exist"):
        first_look.train_vae(configured(photos, f"teacher={tmp_path / 'none'}", f"root={tmp_path}"))
    small = kl(block_out_channels=(8, 8))
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match="downsampling factor of 2"):
        load_teacher(configured(photos, f"teacher={tmp_path / 'small'}"))
    DistilledVAE.of(load_autoencoder(teachers / "tiny")).save_pretrained(tmp_path / "student")
    with pytest.raises(UserError, match="has learned the latents of another"):
        load_teacher(configured(photos, f"teacher={tmp_path / 'student'}"))
    with pytest.raises(UserError, match="has 3 latent channels, not model.latent_channels=12"):
        build_model(configured(photos, f"teacher={teachers / 'vq'}", "model.latent_channels=12"))


# --- another model's decoder, and frozen parts ------------------------------------------------------------------------


def decoder_folder(path):
    torch.manual_seed(3)
    LiteVAE("S", block_out_channels=(8, 8, 8, 8), layers_per_block=1).save_pretrained(path)
    return path


@pytest.mark.parametrize("adaptive", ["false", "true"])
def test_a_frozen_decoder_stays_what_it_was(photos, tmp_path, adaptive):
    given = decoder_folder(tmp_path / "given")
    gan = ["loss.adversarial.start=0", "loss.adversarial.channels=2", f"loss.adversarial.adaptive={adaptive}"]
    config = configured(
        photos, *SMALL_DECODER, f"model.init_decoder={given}", "model.freeze=[decoder]", "loop.ema=0.9", *gan
    )
    task = VaeTask(config, vae_setup(open_source(config.data.train)), 0, 1, CPU)
    task.begin(0)
    encoder = {key: value.clone() for key, value in task.model.encoder.state_dict().items()}
    trained(task, end=8)
    task.exports()["model"](tmp_path / "model")
    wanted, found = (load_autoencoder(folder) for folder in (given, tmp_path / "model"))
    assert all(torch.equal(found.decoder.state_dict()[key], v) for key, v in wanted.decoder.state_dict().items())
    assert any(not torch.equal(found.encoder.state_dict()[key], value) for key, value in encoder.items())
    assert all(parameter.grad is None for parameter in task.model.decoder.parameters())
    learned = sum(p.numel() for p in task.model.encoder.parameters())
    assert sum(p.numel() for p in task.optimizer._parameters) == learned


def test_a_decoder_that_does_not_fit_says_what_to_set(photos, tmp_path, teachers):
    given = decoder_folder(tmp_path / "given")
    with pytest.raises(UserError, match=r"model.decoder.channels=\[8,8,8,8\] model.decoder.layers=1"):
        build_model(configured(photos, "model.decoder.channels=[8, 8, 8, 16]", f"model.init_decoder={given}"))
    with pytest.raises(UserError, match="is a VQModel, not an AutoencoderKL or LiteVAE"):
        build_model(configured(photos, *SMALL_DECODER, f"model.init_decoder={teachers / 'vq'}"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model.freeze=[decoder]"], "would keep random weights"),
        (["model.freeze=[encoder]", "model.init_decoder=d"], "would keep random weights"),
        (["model.freeze=[encoder, decoder]", "model.init=m"], "leaves nothing to train"),
        (["model.freeze=[decoder]", "model.init=m", "model.decoder.norm=batch"], "running statistics"),
        (["model.init=m", "model.init_decoder=d"], "can't be combined with init"),
    ],
)
def test_what_can_not_be_frozen(photos, more, message):
    with pytest.raises(UserError, match=message):
        configured(photos, *more)


# --- the job as a whole -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kl", "tiny"])
def test_a_student_is_trained_by_the_job_and_encodes_a_cache(name, photos, teachers, tmp_path, capsys):
    stages = "stages=[{resolution: 16, images: 16, batch_size: 4}]"
    config = configured(
        photos, f"teacher={teachers / name}", f"root={tmp_path / 'runs'}", "name=student", stages,
        f"data.val.uri={photos}", "ray.workers=1", "ray.cpus_per_worker=1", "loop.ema=0.9",
    )  # fmt: skip
    done = train_vae(config)
    model = load_autoencoder(done["model"])
    assert isinstance(model, DistilledVAE)
    assert model.config.latent_r2 == pytest.approx(done["latent_r2"])
    assert "its latents are not yet those of" in capsys.readouterr().out
    words = [
        f"source.uri={photos}", f"model={done['model']}", f"out={tmp_path / 'cache'}", f"root={tmp_path / 'runs'}",
        "transform.resolution=16", "tracking.enabled=false", "ray.gpu=false", "ray.cpus_per_worker=1",
        "precision=fp32", "dtype=fp32",
    ]  # fmt: skip
    with in_process():
        encode_dataset(load(Encode, None, words))
    found = verify(Verify(cache=str(tmp_path / "cache")))
    assert (found.rows, found.problems, found.general) == (12, {}, [])
    latents = LatentCache(tmp_path / "cache")
    x = torch.from_numpy(np.stack([ImageTransform(16)((photos / f"{n:02}.png").read_bytes()).pixels for n in (0, 7)]))
    x = x.movedim(-1, 1).float() / 127.5 - 1
    with torch.no_grad():
        expected = encode_latents(model, x)
        mean = expected[:, : model.config.latent_channels]
        stored = latents.latents([0, 7], 0, 0, draw="mean", normalize=False)
        torch.testing.assert_close(stored, mean, rtol=1e-3, atol=1e-3)
        theirs = load_autoencoder(teachers / name).decode(mean).sample
        torch.testing.assert_close(model.decode(mean).sample, theirs)
    assert theirs.shape == x.shape
