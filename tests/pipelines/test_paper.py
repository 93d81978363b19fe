"""The paper's tables as data: a few numbers copied once more from the paper, and configs that build at every scale."""

import re

import pytest

from litevae.autoencoder import count_parameters
from litevae.errors import UserError
from pipelines import paper
from pipelines.config import Encode, Evaluate, EvaluateSamples, Sample, TrainLDM, TrainVAE, validate
from pipelines.train_vae import build_model

TRAINED = [(name, row) for name, table in paper.tables().items() if table.kind != "complexity" for row in table.rows]


def trained(name, row, scale) -> TrainVAE:
    table = paper.tables()[name]
    return validate(TrainVAE, paper.scaled(table, table.rows[row], scale)["train_vae"])


def test_the_numbers_are_the_papers():
    def row(table, name):
        return paper.table(table).rows[name].paper

    assert row("1", "ImageNet 256, n_z 12: LiteVAE") == {"rfid": 0.23, "lpips": 0.072, "psnr": 30.91, "ssim": 0.88}
    assert row("2b", "VAE-Small") == {"params_m": 6.75, "rfid": 5.27, "lpips": 0.175, "psnr": 24.10, "ssim": 0.69}
    assert row("3", "LiteVAE-M") == {"params_m": 32.75, "memory_mb": 12130, "images_per_s": 42.24}
    assert row("6", "SD-VAE")["mmd/50"] == 28.90
    assert row("7", "CelebA-HQ: LiteVAE") == {"fid": 5.73}
    assert row("10", "PatchGAN") == {"rfid": 1.61, "lpips": 0.063, "psnr": 29.61, "ssim": 0.87}
    assert row("20", "ViT")["params_m"] == 0.84
    assert row("22", "128-tuned") == {"rfid": 0.69, "lpips": 0.151, "psnr": 25.97, "ssim": 0.73}


def test_every_table_of_results_is_there():
    numbers = {re.sub(r"\D", "", name) for name in paper.tables() if name[0].isdigit()}
    assert numbers == {str(n) for n in range(1, 23)}


@pytest.mark.parametrize("scale", ["paper", "small", "smoke"])
@pytest.mark.parametrize(("name", "row"), TRAINED)
def test_rows_make_configs_of_all_their_jobs(name, row, scale):
    table = paper.tables()[name]
    values = paper.scaled(table, table.rows[row], scale)
    jobs = [("train_vae", TrainVAE), ("evaluate", Evaluate)]
    if table.kind == "ldm":
        jobs += [("encode_dataset", Encode), ("train_ldm", TrainLDM), ("sample", Sample)]
        jobs += [("evaluate_samples", EvaluateSamples)]
    configs = {job: validate(cls, values[job]) for job, cls in jobs}
    last = configs["train_vae"].stages[-1].resolution
    assert configs["evaluate"].transform.resolution >= last
    if scale == "paper":
        assert all(stage.batch_size == 16 for stage in configs["train_vae"].stages)
        assert configs["train_vae"].model.decoder.channels == (128, 256, 512, 512)


def test_rows_of_a_table_differ_in_what_it_is_about():
    group, smc = (trained("4", row, "paper") for row in ("Group Norm", "SMC"))
    assert (group.model.decoder.norm, smc.model.decoder.norm) == ("group", "smc")
    assert group.model_copy(update={"model": smc.model}) == smc
    losses = [trained("9", row, "paper").loss for row in paper.table("9").rows]
    assert [(loss.gaussian.weight > 0, loss.wavelet.weight > 0) for loss in losses] == [
        (False, False), (True, False), (True, True),
    ]  # fmt: skip
    tuned = trained("5", "128-tuned", "paper")
    assert [(s.resolution, s.images // s.batch_size) for s in tuned.stages] == [(128, 100_000), (256, 50_000)]
    assert tuned == TrainVAE()  # what train_vae does where nothing is said
    table = paper.table("7")
    drawn = [validate(Sample, paper.scaled(table, row, "paper")["sample"]) for row in table.rows.values()]
    assert [(sample.images, sample.steps, sample.eta) for sample in drawn] == [(50_000, 200, 1.0)] * 2 + [
        (50_000, 200, 0.0)
    ] * 2
    adaptive = trained("8", "Adaptive", "paper").loss.adversarial
    assert (adaptive.adaptive, adaptive.weight) == (True, 1.0)


def test_scales_set_sizes_and_lengths():
    small, smoke = (trained("5", "128-tuned", scale) for scale in ("small", "smoke"))
    assert [(s.resolution, s.images) for s in small.stages] == [(64, 32_000), (128, 16_000)]
    assert [(s.resolution, s.images // s.batch_size) for s in smoke.stages] == [(32, 2), (64, 2)]
    assert small.loss.adversarial.start == 12_000
    assert trained("20", "ViT", "small").model.vit_grid == 8


def test_printed_parameters_are_those_of_the_models():
    for name, row in [("2b", "VAE-Small"), ("2b", "LiteVAE-B"), ("2a", "LiteVAE-S"), ("20", "ViT"), ("20", "UNet")]:
        model = build_model(trained(name, row, "paper"))
        part = model.encoder.aggregator if name == "20" else model.encoder
        printed = paper.tables()[name].rows[row].paper["params_m"]
        assert count_parameters(part) / 1e6 == pytest.approx(printed, abs=0.011)


def test_what_is_not_there_is_named():
    with pytest.raises(UserError, match=r"table=25: there are 1, 2a, 2b, 3, .*figure-8"):
        paper.table("25")
    with pytest.raises(UserError, match="table 9 has no 'PatchGAN'; it has Baseline, "):
        paper.chosen(paper.table("9"), ["PatchGAN"])
    chosen = paper.chosen(paper.table("1"), ["FFHQ*", "*n_z 12: VAE"])
    assert [row.name[:8] for row in chosen] == ["FFHQ 128"] * 2 + ["FFHQ 256"] * 2 + ["ImageNet"] * 2
