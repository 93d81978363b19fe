"""The paper's tables as data: a few numbers copied once more from the paper, and configs that build at every scale."""

import re

import pytest

from litevae.autoencoder import count_parameters
from litevae.errors import UserError
from pipelines.encoding.config import Encode
from pipelines.evaluation.config import Evaluate, EvaluateSamples, Sample
from pipelines.experiments import paper
from pipelines.runtime.schema import merged, validate
from pipelines.training.config import TrainLDM, TrainVAE
from pipelines.training.vae import build_model

TRAINED = [(name, row) for name, table in paper.tables().items() if table.kind != "complexity" for row in table.rows]


def trained(name, row, scale) -> TrainVAE:
    table = paper.tables()[name]
    return validate(TrainVAE, paper.scaled(table, table.rows[row], scale)["train_vae"])


# Typed in from the paper (arXiv 2405.14477), table by table: the numbers of its rows, from the top to the bottom.
PRINTED = {
    "1": (
        "rfid lpips psnr ssim",
        [
            (0.88, 0.089, 28.08, 0.85), (0.74, 0.085, 28.36, 0.85),
            (0.47, 0.109, 28.16, 0.81), (0.41, 0.117, 28.33, 0.82),
            (4.54, 0.164, 24.25, 0.69), (4.40, 0.164, 24.49, 0.71),
            (0.94, 0.069, 29.25, 0.86), (0.94, 0.069, 29.45, 0.87),
            (0.89, 0.160, 25.83, 0.73), (0.87, 0.157, 26.02, 0.74),
            (0.23, 0.073, 30.41, 0.86), (0.23, 0.072, 30.91, 0.88),
        ],
    ),
    "2a": (
        "params_m rfid lpips psnr ssim",
        [
            (34.16, 0.95, 0.069, 29.25, 0.86), (1.03, 1.11, 0.075, 29.12, 0.86), (6.75, 0.94, 0.069, 29.55, 0.87),
            (32.75, 0.79, 0.064, 29.68, 0.87), (41.42, 0.74, 0.062, 29.94, 0.88),
        ],
    ),
    "2b": (
        "params_m rfid lpips psnr ssim",
        [(34.16, 4.54, 0.164, 24.25, 0.69), (6.75, 5.27, 0.175, 24.10, 0.69), (6.75, 4.40, 0.164, 24.49, 0.71)],
    ),
    "3": (
        "params_m memory_mb images_per_s",
        [(34.16, 8860, 68), (1.03, 1324, 384), (6.75, 3155, 129), (32.75, 12130, 42.24), (41.425, 12130, 41.6)],
    ),
    "4": ("rfid lpips psnr ssim", [(1.01, 0.07, 29.24, 0.86), (0.97, 0.07, 29.32, 0.87)]),
    "5": (
        "rfid lpips psnr ssim",
        [(0.75, 0.153, 26.10, 0.73), (0.97, 0.162, 25.90, 0.72), (0.73, 0.147, 26.22, 0.74)],
    ),
    "6": (
        "mmd/25 mmd/50 mmd/100 mmd/250 mmd/500",  # the paper has a column for each model, here as its row
        [(8.67, 28.90, 10.77, 1.78, 0.44), (1.44, 7.94, 5.14, 1.09, 0.28)],
    ),
    "7": ("fid", [(8.11,), (8.03,), (5.92,), (5.73,)]),
    "8": ("rfid lpips psnr ssim", [(1.01, 0.07, 29.24, 0.86), (1.01, 0.07, 29.33, 0.87)]),
    "9": (
        "rfid lpips psnr ssim",
        [(0.99, 0.070, 29.33, 0.86), (0.99, 0.070, 29.64, 0.87), (0.96, 0.069, 29.73, 0.88)],
    ),
    "10": (
        "rfid lpips psnr ssim",
        [(1.01, 0.070, 29.24, 0.86), (1.38, 0.065, 29.51, 0.87), (1.61, 0.063, 29.61, 0.87)],
    ),
    "11": ("rfid", [(0.85,), (0.70,), (1.64,), (1.71,)]),
    "12": ("rfid", [(0.80,), (1.65,), (0.32,)]),
    "13": ("fid", [(12.51,), (8.03,)]),
    "14": ("rfid lpips psnr ssim", [(0.99, 0.071, 29.33, 0.86), (0.78, 0.071, 28.53, 0.84)]),
    "15": ("rfid lpips psnr ssim", [(0.99, 0.071, 29.33, 0.86), (0.98, 0.071, 29.33, 0.87)]),
    "16": ("rfid lpips psnr ssim", [(0.99, 0.071, 29.33, 0.86), (1.00, 0.068, 29.67, 0.88)]),
    "17": ("rfid lpips psnr ssim", [(2.04, 0.190, 25.61, 0.72), (0.87, 0.157, 26.02, 0.74)]),
    "18": ("rfid lpips psnr ssim", [(0.94, 0.069, 29.55, 0.87), (0.93, 0.069, 29.36, 0.87)]),
    "19": ("rfid lpips psnr ssim", [(0.75, 0.153, 26.10, 0.73), (0.78, 0.154, 26.05, 0.73)]),
    "20": ("params_m rfid lpips psnr ssim", [(1.69, 0.94, 0.069, 29.25, 0.86), (0.84, 0.92, 0.070, 29.44, 0.87)]),
    "21": ("rfid lpips psnr ssim", [(0.87, 0.157, 26.02, 0.74), (1.20, 0.17, 26.04, 0.74)]),
    "22": (
        "rfid lpips psnr ssim",
        [(0.67, 0.150, 26.01, 0.74), (0.89, 0.161, 25.83, 0.73), (0.69, 0.151, 25.97, 0.73)],
    ),
    "figure-5": ("", [(), ()]),
    "figure-8": ("", [(), ()]),
}  # fmt: skip

# What a row trains at the paper's scale: stages as (resolution, thousands of steps of 16) by Appendix F and, for Tables
# 5, 19 and 22, Section 5; the latent's channels; the encoder; what else its table is about.
IMAGENET_128, IMAGENET_256, FFHQ_128, FFHQ_256 = [(128, 200)], [(256, 100)], [(128, 100)], [(256, 100)]
FULL_256, FULL_128, TUNED_128 = [(256, 150)], [(128, 150)], [(128, 100), (256, 50)]
ADAPTIVE = {"loss.adversarial.adaptive": True, "loss.adversarial.weight": 1.0}  # Equation 2 has the factor 1/2
PLAIN = {"loss.gaussian.weight": 0, "loss.wavelet.weight": 0}
RATIO = {"loss.adversarial.ratio_every": 50}  # Figure 7
TRAININGS = {
    "1": [
        (FFHQ_128, 4, "sd-vae", {}), (FFHQ_128, 4, "B", {}), (FFHQ_256, 4, "sd-vae", {}), (FFHQ_256, 4, "B", {}),
        (IMAGENET_128, 4, "sd-vae", {}), (IMAGENET_128, 4, "B", {}), (IMAGENET_128, 12, "sd-vae", {}),
        (IMAGENET_128, 12, "B", {}), (IMAGENET_256, 4, "sd-vae", {}), (IMAGENET_256, 4, "B", {}),
        (IMAGENET_256, 12, "sd-vae", {}), (IMAGENET_256, 12, "B", {}),
    ],
    "2a": [(IMAGENET_128, 12, encoder, {}) for encoder in ("sd-vae", "S", "B", "M", "L")],
    "2b": [(IMAGENET_128, 4, encoder, {}) for encoder in ("sd-vae", "vae-small", "B")],
    "4": [(IMAGENET_128, 12, "B", ADAPTIVE | PLAIN | more) for more in ({}, {"model.decoder.norm": "smc"})],
    "5": [(stages, 4, "B", {}) for stages in (FULL_256, FULL_128, TUNED_128)],
    "6": [(IMAGENET_256, 4, encoder, {}) for encoder in ("sd-vae", "B")],
    "7": [(FFHQ_256, 4, encoder, {}) for encoder in ("sd-vae", "B", "sd-vae", "B")],
    "8": [(IMAGENET_128, 12, "B", PLAIN | RATIO | more) for more in (ADAPTIVE, {})],
    "9": [(IMAGENET_128, 12, "B", more) for more in (PLAIN, {"loss.wavelet.weight": 0}, {})],
    "10": [
        (IMAGENET_128, 12, "B", ADAPTIVE | PLAIN | more)
        for more in ({}, {"loss.adversarial.kind": "stylegan"}, {"loss.adversarial.kind": "patch"})
    ],
    "11": [(FFHQ_256, 4, "sd-vae", {}), (FFHQ_256, 12, "dwt", {})] * 2,
    "12": [(IMAGENET_256, 4, "sd-vae", {}), (IMAGENET_256, 12, "dwt", {}), (IMAGENET_256, 48, "dwt-2", {})],
    "13": [(FFHQ_256, 12, "dwt", {}), (FFHQ_256, 4, "B", {})],
    "14": [(IMAGENET_128, 12, "B", PLAIN | m) for m in ({}, {"loss.lpips.weight": 0, "loss.esrgan.weight": 1.0})],
    "15": [(IMAGENET_128, 12, "B", PLAIN | {"loop.ema": 0.999} | more) for more in ({}, {"loss.ldl.weight": 1.0})],
    "16": [(IMAGENET_128, 12, "B", PLAIN | more) for more in ({}, {"loss.adversarial.loss": "logistic"})],
    "17": [(IMAGENET_256, 4, "B", more) for more in ({"model.conv1x1": True}, {})],
    "18": [(IMAGENET_128, 12, "B", more) for more in ({}, {"model.extractor": "nafnet"})],
    "19": [(FULL_256, 4, "B", more) for more in ({}, {"model.shared_extractor": True})],
    "20": [(IMAGENET_128, 12, "B", more) for more in ({}, {"model.aggregator": "vit"})],
    "21": [(IMAGENET_256, 4, "B", more) for more in ({}, {"model.levels": [2, 3]})],
    "22": [(stages, 4, "sd-vae", {}) for stages in (FULL_256, FULL_128, TUNED_128)],
    "figure-5": [(IMAGENET_256, 4, encoder, {}) for encoder in ("sd-vae", "B")],
    "figure-8": [(IMAGENET_128, 12, "B", more) for more in ({}, {"model.decoder.norm": "smc"})],
}  # fmt: skip


def flat(values, prefix=""):
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def changes(cls, values):
    """What a config has other than the job's defaults, by dotted name."""
    defaults = flat(cls().model_dump(mode="json"))
    return {
        key: value
        for key, value in flat(validate(cls, values).model_dump(mode="json")).items()
        if defaults[key] != value
    }


@pytest.mark.parametrize("name", PRINTED)
def test_the_numbers_are_the_papers(name):
    metrics, rows = PRINTED[name]
    table = paper.table(name)
    assert table.metrics == metrics.split()
    expected = [dict(zip(table.metrics, numbers, strict=True)) for numbers in rows]
    assert [row.paper for row in table.rows.values()] == expected


@pytest.mark.parametrize("name", TRAININGS)
def test_rows_train_what_the_paper_trained(name):
    table = paper.table(name)
    assert len(table.rows) == len(TRAININGS[name])
    for row, (stages, channels, encoder, more) in zip(table.rows.values(), TRAININGS[name], strict=True):
        found = changes(TrainVAE, paper.scaled(table, row, "paper")["train_vae"])
        kl = {12: {"loss.kl.weight": 6.3e-8}}.get(channels, {}) if encoder in ("sd-vae", "B", "S", "M", "L") else {}
        own = {"model.encoder": encoder, "model.latent_channels": channels}
        whole = [
            {"resolution": resolution, "images": 16_000 * thousands, "batch_size": 16}
            for resolution, thousands in stages
        ]
        expected = changes(TrainVAE, nested(own | kl | more | {"stages": whole}))
        assert found == expected, row.name
        assert row.at == (128 if stages in (IMAGENET_128, FFHQ_128) else 256)


def nested(values):
    found = {}
    for key, value in values.items():
        *parents, last = key.split(".")
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return found


def test_kl_weighs_the_same_for_every_number_of_channels():
    """Rombach's 1e-6 times a sum over the latent, beside means over an image's 3 x 64 values for each position of the
    latent: as a mean over n_z channels it is n_z / 192 of that."""
    assert TrainVAE().loss.kl.weight == pytest.approx(1e-6 * 4 / 192, rel=0.01)
    assert trained("1", "ImageNet 128, n_z 12: VAE", "paper").loss.kl.weight == pytest.approx(1e-6 * 12 / 192, rel=0.01)


def test_what_tables_are_about():
    tables = paper.tables()
    kinds = {name: table.kind for name, table in tables.items() if table.kind != "vae"}
    assert kinds == {"3": "complexity", "7": "ldm", "13": "ldm"}
    assert {name: table.part for name, table in tables.items() if table.part != "encoder"} == {
        "20": "encoder.aggregator"
    }
    scales = {name: table.scales for name, table in tables.items() if table.scales}
    assert scales == {"figure-5": [0.5, 1.5, 2], "figure-8": [0.5, 1.5, 2]}
    assert [row.model for row in tables["3"].rows.values()] == ["sd-vae", "S", "B", "M", "L"]
    needs = {(name, row.name): row.needs for name, table in tables.items() for row in table.rows.values() if row.needs}
    assert needs == {("14", "LPIPS"): "lpips", ("14", "ESRGAN"): "esrgan"}
    assert [*tables["1"].rows] == [
        f"{data}, n_z {channels}: {model}"
        for data, channels in [
            ("FFHQ 128", 4), ("FFHQ 256", 4), ("ImageNet 128", 4), ("ImageNet 128", 12), ("ImageNet 256", 4),
            ("ImageNet 256", 12),
        ]
        for model in ("VAE", "LiteVAE")
    ]  # fmt: skip
    assert [*tables["2a"].rows] == ["VAE", "LiteVAE-S", "LiteVAE-B", "LiteVAE-M", "LiteVAE-L"]
    assert [*tables["22"].rows] == [*tables["5"].rows] == ["256-full", "128-full", "128-tuned"]


def test_tables_of_evaluations_and_samples():
    def job(name, row, job, scale="paper"):
        return paper.scaled(paper.table(name), paper.table(name).rows[row], scale)[job]

    assert job("6", "SD-VAE", "evaluate") == {"mmd_images": 10_000, "transform": {"resolution": 256}}
    assert job("figure-5", "VAE", "evaluate") == {"transform": {"resolution": 256}, "resolutions": [128, 384, 512]}
    assert job("figure-8", "SMC", "evaluate") == {"transform": {"resolution": 128}, "resolutions": [64, 192, 256]}
    assert job("1", "FFHQ 128, n_z 4: VAE", "evaluate") == {"transform": {"resolution": 128}}
    drawn = {"images": 50_000, "batch_size": 64, "steps": 200}
    assert job("13", "non-learned", "sample") == drawn | {"eta": 1.0}
    assert job("7", "FFHQ: LDM", "sample") == drawn | {"eta": 1.0}
    assert job("7", "CelebA-HQ: LiteVAE", "sample") == drawn | {"eta": 0.0}
    for name in ("encode_dataset", "evaluate_samples"):
        assert job("7", "FFHQ: LDM", name) == {"transform": {"resolution": 256}}
        assert job("7", "FFHQ: LDM", name, "small")["transform"] == {"resolution": 128}
    assert job("7", "FFHQ: LDM", "train_ldm") == {}
    assert job("figure-5", "VAE", "evaluate", "small")["resolutions"] == [64, 192, 256]
    # 64 px times 1/2, which is 32 anyway, times 3/2 and times 2
    assert job("figure-5", "VAE", "evaluate", "smoke")["resolutions"] == [32, 96, 128]
    assert job("figure-8", "SMC", "evaluate", "smoke") | {"images": 0} == {
        "images": 0, "batch_size": 4, "pictures": 4, "transform": {"resolution": 32}, "resolutions": [48, 64],
    }  # fmt: skip


def test_what_smaller_scales_set():
    """Ours, recorded once more: what a scale sets of the jobs beside stages."""
    small = changes(TrainVAE, paper.scaled(paper.table("5"), paper.table("5").rows["256-full"], "small")["train_vae"])
    assert small == {
        "stages": [{"resolution": 128, "images": 48_000, "batch_size": 32}],
        "model.decoder.channels": [64, 128, 256, 256], "model.decoder.layers": 1,
        "loss.adversarial.channels": 32, "loss.adversarial.start": 12_000,
        "optim.lr": 3e-4, "optim.warmup": 3200, "optim.clip": 1.0,
        "loop.ema": 0.999, "loop.val_every": 16_000, "loop.checkpoint_every": 32_000,
    }  # fmt: skip
    smoke = changes(TrainVAE, paper.scaled(paper.table("5"), paper.table("5").rows["256-full"], "smoke")["train_vae"])
    assert smoke == {
        "stages": [{"resolution": 64, "images": 8, "batch_size": 4}],
        "model.decoder.channels": [16, 16, 16, 16], "model.decoder.layers": 1,
        "loss.adversarial.channels": 4, "loss.adversarial.start": 0, "loss.lpips.required": False,
        "loop.ema": 0.9, "loop.log_every": 1, "loop.precision": "fp32", "data.loaders": 0, "val_images": 4,
    }  # fmt: skip
    drawn = {"small": {"images": 2000, "steps": 50}, "smoke": {"images": 12, "steps": 2, "eta": 0.0}}
    assert {scale: paper.at_scale(scale, "sample") for scale in drawn} == {
        "small": drawn["small"] | {"batch_size": 64}, "smoke": drawn["smoke"] | {"batch_size": 4},
    }  # fmt: skip
    assert paper.at_scale("small", "train_ldm") == {
        "network": "small", "images": 640_000, "batch_size": 64,
        "optim": {"lr": 3e-4, "warmup": 6400, "clip": 1.0}, "loop": {"ema": 0.999},
    }  # fmt: skip
    assert paper.at_scale("smoke", "train_ldm") == {
        "network": "tiny", "images": 16, "batch_size": 4, "sample_images": 4, "sample_steps": 2,
        "loop": {"log_every": 1, "precision": "fp32"},
    }  # fmt: skip
    assert paper.at_scale("smoke", "evaluate_complexity") == {
        "batch_size": 2, "resolution": 64, "repeats": 2, "warmup": 1,
    }  # fmt: skip
    assert paper.at_scale("smoke", "encode_dataset") == {"rows_per_shard": 16}
    assert paper.at_scale("smoke", "evaluate") == {"images": 12, "batch_size": 4, "pictures": 4}
    assert paper.at_scale("paper", "train_vae") == paper.at_scale("small", "evaluate") == {}


def test_settings_are_merged_and_leave_what_they_are_of():
    first, second = {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}, {"a": {"c": {"f": 3}}, "e": [2], "g": {"h": 1}}
    assert merged(first, second) == {"a": {"b": 1, "c": {"d": 2, "f": 3}}, "e": [2], "g": {"h": 1}}
    assert first == {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}
    assert merged({"a": 1}, {"a": {"b": 2}}) == {"a": {"b": 2}}
    assert paper.table("Table-9") is paper.table("t9") is paper.table("9")


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
    with pytest.raises(UserError, match=r"table=25 does not exist; there are 1, 2a, 2b, 3, .*figure-8"):
        paper.table("25")
    with pytest.raises(UserError, match="table 9 has no 'PatchGAN'; it has Baseline, "):
        paper.chosen(paper.table("9"), ["PatchGAN"])
    chosen = paper.chosen(paper.table("1"), ["FFHQ*", "*n_z 12: VAE"])
    assert [row.name[:8] for row in chosen] == ["FFHQ 128"] * 2 + ["FFHQ 256"] * 2 + ["ImageNet"] * 2
