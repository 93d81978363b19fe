"""Typed configs of every job, their YAML presets and command line.

A job is configured by its defaults, then a preset (`--config NAME_OR_FILE`), then overrides (`a.b=value`).
Everything is validated before Ray starts; a wrong key or value is refused with the field's name and what
it allows. Counts of training are in images, not steps, so that they do not change with the batch size.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticUndefined

from litevae.errors import UserError, redact
from pipelines.runtime import shutdown
from pipelines.runtime.logs import say

PRESETS = Path(__file__).resolve().parent.parent / "jobs" / "configs"
SECTIONS = {  # of a recipe
    *("train_vae", "encode_dataset", "train_ldm", "sample", "sweep"),
    *("evaluate", "evaluate_samples", "evaluate_complexity", "benchmark"),
}

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decode = Literal["fast", "pillow", "scaled"]
DECODE = (
    "fast: JPEGs by simplejpeg, resized by PyTorch, 60 dB and more to pillow; pillow: by Pillow alone, as all that was "
    "begun before there was this choice; scaled: as fast, large JPEGs to 1/2, 1/4 or 1/8 in decoding (46 dB)"
)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, protected_namespaces=())


class Source(Section):
    """Where images come from."""

    uri: str = Field(
        "",
        description="local or s3://: a folder tree of images (label = folder), Parquet with images or their paths, "
        "WebDataset tars, or a .txt, .csv or .jsonl list of paths",
    )
    split: str = Field("", description="Parquet as Hugging Face lays it out: the split to take, e.g. train")
    image_column: str = Field(
        "image",
        description="Parquet: column with the encoded image (bytes, a struct with `bytes`) or its path; lists: path",
    )
    id_column: str = Field(
        "id", description="Parquet, lists: column with a stable id; where absent, file name and row number, or the path"
    )
    columns: list[str] = Field(
        [],
        description="further columns to carry into a cache, e.g. [label, caption]; WebDataset: [cls, txt, json.key]",
    )


class Ray(Section):
    """How much of the machine or cluster a job takes."""

    workers: Positive = Field(1, description="training or encoding processes; one GPU each where there are GPUs")
    gpu: Literal["auto"] | bool = Field("auto", description="GPUs for the workers; auto: where the cluster has them")
    gpus_per_worker: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="encode, sample, evaluate: below 1, workers share a GPU"
    )
    cpus_per_worker: Count = Field(0, description="CPUs (and torch threads) a worker; 0: share the machine's evenly")
    decode_tasks: Count = Field(
        0,
        description="encode, evaluate: image-decoding tasks at a time, one CPU each; 0: with GPUs the CPUs that the "
        "workers leave, else one for 8 CPUs",
    )
    min_workers: Count = Field(
        0,
        description="training: begin and go on with as few where nodes are missing or lost, and with more as they come "
        "(elastic), up to `workers`; 0: always with `workers`",
    )
    wait: Count = Field(
        0,
        description="seconds to wait for a cluster to have what is asked for, where it grows by itself; with gpu=true",
    )
    worker_labels: dict[str, str] = Field(
        {}, description="workers run on nodes with these labels only (ray start --labels), e.g. {pool: gpu}"
    )
    decode_labels: dict[str, str] = Field({}, description="encode: so do decoding tasks, e.g. {pool: cpu}")

    @model_validator(mode="after")
    def _elastic(self) -> "Ray":
        if self.min_workers > self.workers:
            raise ValueError(f"min_workers={self.min_workers} is more than workers={self.workers}")
        if self.min_workers and self.worker_labels:
            raise ValueError(
                "min_workers and worker_labels do not go together: Ray counts the room of all nodes, with and without "
                "the labels, and would wait for ever for workers that do not fit. Workers with GPUs need no labels"
            )
        return self


class Tracking(Section):
    """MLflow."""

    enabled: bool = Field(True, description="false: metrics go to the run's metrics.jsonl only")
    uri: str = Field("", description="tracking server; empty: $MLFLOW_TRACKING_URI, else sqlite in <root>/mlflow.db")
    experiment: str = Field("litevae", description="MLflow experiment")
    run: str = Field("", description="the run's name there; empty: the job's")
    parent: str = Field("", description="id of the MLflow run that this one is a child of")
    tags: dict[str, str] = Field({}, description="further tags of the run")


class Tracked(Section):
    """What every job has."""

    root: str = Field("runs", description="folder for runs and the default MLflow database")
    tracking: Tracking = Tracking()


class Job(Tracked):
    """What every job on Ray has."""

    ray: Ray = Ray()


# --- train_vae ------------------------------------------------------------------------------------------------


class Decoder(Section):
    channels: tuple[Positive, ...] = Field(
        (128, 256, 512, 512), description="width per level, finest first; 4 levels: f = 8"
    )
    layers: Positive = Field(2, description="ResBlocks a level, less one (SD-VAE counts so: 2 means 3)")
    norm: Literal["group", "smc", "batch", "instance", "layer", "rms"] = Field(
        "group",
        description="in the ResBlocks; group: as SD-VAE; smc: self-modulated convolution instead (Eq. 3, Table 4); "
        "layer and rms: over the channels of a position; batch: over each worker's images",
    )
    output: Literal["image", "wavelet"] = Field(
        "image", description="wavelet: one Haar level's bands, which the inverse transform makes the image (Appendix G)"
    )

    @model_validator(mode="after")
    def _levels(self) -> "Decoder":
        if len(self.channels) != 4:
            raise ValueError(f"has {len(self.channels)} widths; f = 8 takes exactly 4")
        return self


class VAE(Section):
    encoder: Literal["S", "B", "M", "L", "sd-vae", "vae-small", "dwt", "dwt-2"] = Field(
        "B",
        description="LiteVAE S, B, M, L (Tables 23 and 24); the baselines sd-vae (34.16 M) and vae-small (Table 2); "
        "not learned: dwt (12 latent channels) and dwt-2 (48; Tables 11 and 12)",
    )
    latent_channels: Positive = Field(4, description="n_z: 4 or 12 in the paper")
    wavelet: str = Field("haar", description="any wavelet that ptwt knows; haar takes the fast path")
    downsample: Literal["conv", "pool"] = Field(
        "conv", description="LiteVAE: levels 1 and 2 to f = 8: learned 3x3 conv (matches L's count) or average pooling"
    )
    extractor: Literal["unet", "nafnet"] = Field("unet", description="LiteVAE: feature extraction (Table 18)")
    shared_extractor: bool = Field(False, description="LiteVAE: one extractor for all wavelet levels (Table 19)")
    levels: list[Annotated[int, Field(ge=1, le=3)]] = Field(
        [1, 2, 3], min_length=1, description="LiteVAE: wavelet levels that are looked at (Table 21: [2, 3])"
    )
    aggregator: Literal["unet", "vit"] = Field("unet", description="LiteVAE: feature aggregation (Table 20)")
    vit_grid: Positive = Field(
        16, description="vit: side of the learned grid of positions; 16: 128 px; interpolated at other sizes"
    )
    conv1x1: bool = Field(False, description="1x1 convolutions around the latent (Table 17)")
    decoder: Decoder = Decoder()
    init: str = Field("", description="model folder to start from (its architecture must be this one); empty: random")


class Term(Section):
    weight: Weight = Field(0.0, description="0 costs nothing")
    start: Count = Field(0, description="images seen before the term counts")


class Lpips(Term):
    net: Literal["vgg", "alex", "squeeze"] = Field("vgg", description="backbone")
    weights: str = Field(
        "",
        description="backbone's torchvision checkpoint; empty: torch hub's cache; where there is none, the term is off",
    )


class Features(Term):
    weights: str = Field(
        "", description="a SqueezeNet 1.1 (Caffe) feature file: its feature distance, under its own name"
    )


class Esrgan(Term):
    weights: str = Field("", description="torchvision's VGG19 checkpoint; empty: torch hub's cache")


class Adversarial(Term):
    adaptive: bool = Field(
        False,
        description="Rombach's gradient ratio (Eq. 2) times the weight; the paper found constant better (Table 8)",
    )
    kind: Literal["unet", "patch", "stylegan"] = Field(
        "unet", description="discriminator (Table 10): UNet with two heads, PatchGAN, StyleGAN2's"
    )
    loss: Literal["hinge", "logistic"] = Field("hinge", description="logistic: non-saturating (Table 16)")
    channels: Positive = Field(
        64,
        description="the discriminator's width (the paper leaves it open): 64 is Schonfeld's (2020) UNet, Isola's "
        "PatchGAN (2,765,633 parameters) and StyleGAN2's of 256, 512, ... maps",
    )
    lr: Annotated[float, Field(gt=0)] = Field(1e-4, description="the discriminator's learning rate")
    r1: Weight = Field(
        0.0,
        description="R1 penalty, gamma / 2 of Mescheder (2018): stylegan some 1 to 10; on maps of logits (unet, patch) "
        "it sums over positions, so 1e-5; 0: none, as the paper",
    )
    r1_every: Positive = Field(16, description="steps between R1 penalties, each as many times as heavy (StyleGAN2)")
    lecam: Weight = Field(0.0, description="LeCam regularisation (Tseng 2021); 0: none, as the paper")
    cutmix: Fraction = Field(
        0.0, description="unet: share of steps with CutMix and its consistency (Schonfeld 2020); 0: none, as the paper"
    )
    ratio_every: Count = Field(
        0, description="steps between measurements of the adversarial gradient against the others' (Figure 7); 0: none"
    )

    @model_validator(mode="after")
    def _unet_only(self) -> "Adversarial":
        if self.cutmix and self.kind != "unet":
            raise ValueError(f"cutmix takes a discriminator with a head per pixel: kind=unet, not {self.kind}")
        return self


class Losses(Section):
    """Means over elements in fp32, so the same weights serve every resolution."""

    l1: Term = Term(weight=1.0)
    l2: Term = Term()
    lpips: Lpips = Lpips(weight=1.0)
    features: Features = Features()
    esrgan: Esrgan = Field(
        Esrgan(),
        description="L1 of VGG19's conv5_4 before its activation (Table 14, after Wang 2018): instead of LPIPS",
    )
    ldl: Term = Field(
        Term(), description="locally discriminative learning (Table 15, after Liang 2022); needs loop.ema"
    )
    kl: Term = Field(Term(weight=2.1e-8), description="Rombach's 1e-6 on sums, as a mean over latents at n_z = 4")
    wavelet: Term = Field(
        Term(weight=1.0), description="Charbonnier on H, V, D of one Haar level; weight from open-litevae"
    )
    gaussian: Term = Field(Term(weight=0.5), description="L1 of x - blur(x), 5x5, sigma 1; weight from open-litevae")
    adversarial: Adversarial = Field(
        Adversarial(weight=0.1, start=800_000), description="GAN; the paper leaves weight and start open: ours"
    )


class Stage(Section):
    resolution: Annotated[int, Field(ge=8, multiple_of=8)] = Field(256, description="pixels")
    images: Positive = Field(description="images to train on in this stage")
    batch_size: Positive = Field(16, description="images a step, over all workers")


class TrainData(Section):
    train: Source = Source()
    val: Source = Field(Source(), description="uri empty: no validation")
    resize: Literal["shorter", "none"] = Field(
        "shorter", description="shorter side to the resolution before the crop; none: crop the original pixels"
    )
    crop: Literal["random", "center"] = Field("random", description="training crop; validation is always centred")
    decode: Decode = Field("fast", description=f"{DECODE}; validation is always by Pillow")
    flip: bool = Field(True, description="mirror half of the training images")
    loaders: Count = Field(2, description="decoding threads a worker; 0: between the steps")
    max_bad: Fraction = Field(0.01, description="share of unreadable images that is skipped; above it training stops")


class Optimizer(Section):
    lr: Annotated[float, Field(gt=0)] = Field(1e-4, description="learning rate (paper, Appendix F)")
    betas: tuple[Fraction, Fraction] = Field((0.5, 0.9), description="Adam's betas (paper, Appendix F)")
    weight_decay: Weight = Field(0.0, description="decoupled; 0: Adam")
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="after the warm-up; cosine falls to 0 at the last image"
    )
    warmup: Count = Field(0, description="images of linear warm-up")
    clip: Weight = Field(0.0, description="gradient norm limit; 0: none")
    accumulate: Positive = Field(1, description="micro-batches a step")


class Loop(Section):
    """Precision, averages, and what happens every so many images."""

    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 autocast on GPUs and CPUs that have it in hardware"
    )
    compile: bool = Field(False, description="torch.compile the networks")
    ema: Fraction = Field(0.0, description="decay of the averaged weights per step; 0: no average")
    val_every: Count = Field(100_000, description="images between validations with a picture; 0: only at the end")
    checkpoint_every: Positive = Field(100_000, description="images between checkpoints")
    keep: Positive = Field(2, description="checkpoints kept")
    log_every: Positive = Field(50, description="steps between logged metrics")
    max_restarts: Count = Field(3, description="worker failures survived")
    max_skipped: Positive = Field(
        20, description="steps in a row with NaN or infinite gradients, each of them skipped, after which a run stops"
    )


class TrainVAE(Job):
    """Train a LiteVAE autoencoder."""

    name: str = Field(
        "vae", description="run name; the same name again resumes", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
    )
    seed: Count = Field(0, description="seed of weights, data order, crops and noise")
    data: TrainData = TrainData()
    model: VAE = VAE()
    loss: Losses = Losses()
    optim: Optimizer = Optimizer()
    stages: list[Stage] = Field(
        [Stage(resolution=128, images=1_600_000, batch_size=16), Stage(resolution=256, images=800_000, batch_size=16)],
        min_length=1,
        description="128-tuned of Table 5: 100k steps at 128 px, 50k at 256 px, batch 16",
    )
    loop: Loop = Loop()
    checkpointing: bool = Field(
        False, description="recompute ResBlocks' activations in the backward pass: less memory, slower"
    )
    val_images: Positive = Field(256, description="validation images (the first ones of the source)")
    begin: str = Field(
        "", description="checkpoint folder of another run (runs/<name>/checkpoint-...) that a new run goes on from"
    )

    @model_validator(mode="after")
    def _fits(self) -> "TrainVAE":
        fixed = {"dwt": 12, "dwt-2": 48}.get(self.model.encoder)
        if fixed and self.model.latent_channels != fixed:
            raise ValueError(
                f"model.encoder={self.model.encoder} has {fixed} latent channels: model.latent_channels={fixed}"
            )
        if self.loss.ldl.weight and not self.loop.ema:
            raise ValueError("loss.ldl compares with the averaged model: set loop.ema, e.g. 0.999")
        if self.checkpointing and self.model.decoder.norm == "batch":
            raise ValueError("checkpointing would give running statistics of batch norm each batch twice")
        return self


# --- encode_dataset -------------------------------------------------------------------------------------------


class Transform(Section):
    resolution: Annotated[int, Field(ge=8, multiple_of=8)] = Field(256, description="pixels")
    resize: Literal["shorter", "none"] = Field(
        "shorter", description="shorter side to the resolution before the crop; none: crop the original pixels"
    )


class Views(Transform):
    """What is cut from an image."""

    decode: Decode = Field("fast", description=DECODE)
    crop: Literal["center", "random"] = Field("center", description="random: by (seed, the image's id)")
    crops: Positive = Field(1, description="random crops an image, each a row of the cache")
    flips: bool = Field(False, description="every crop also mirrored, as a row of its own")
    buckets: bool = Field(
        False, description="keep aspect ratios: the bucket that fits, of at most resolution x resolution pixels"
    )
    bucket_step: Annotated[int, Field(ge=8, multiple_of=8)] = Field(
        64, description="sides of buckets are multiples of it"
    )
    seed: Count = Field(0, description="of random crops")

    @model_validator(mode="after")
    def _fits(self) -> "Views":
        if self.crops > 1 and self.crop != "random":
            raise ValueError(f"crops={self.crops} would be the same one {self.crops} times; set crop=random")
        if self.buckets and self.resize == "none":
            raise ValueError("buckets resize images to fit; leave resize=shorter")
        if self.buckets and self.resolution % self.bucket_step:
            raise ValueError(f"resolution={self.resolution} is not a multiple of bucket_step={self.bucket_step}")
        return self


class Encode(Job):
    """Encode images into a latent cache.

    Other things to do with a cache: encode_dataset.py verify | repair | retry | inspect CACHE (each has --help).
    """

    source: Source = Source()
    model: str = Field("", description="model folder: ours, or any autoencoder's of diffusers")
    out: str = Field("", description="cache folder, local or s3://; the same folder again resumes")
    append: bool = Field(False, description="add what is new in the source to a finished cache (also: --append)")
    transform: Views = Views()
    latents: Literal["moments", "mean"] = Field(
        "moments",
        description="the posterior's mean and log-variance, or its mean; autoencoders without one: the latent",
    )
    dtype: Literal["fp16", "bf16", "fp32"] = Field("fp16", description="of what is stored")
    rows_per_shard: Positive = Field(512, description="images a shard: the unit of work, of retry and of resume")
    batch_size: Positive | Literal["auto"] = Field(
        32, description="images a forward pass, halved where a GPU's memory is too small; auto: the largest that fits"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="of the encoder; as in train_vae")
    compile: bool = Field(False, description="torch.compile the encoder")
    kernels: Literal["auto", "native", "torch"] = Field(
        "auto",
        description="native: this project's own for fp32 on CPUs, which a C++ compiler makes at first use; auto: where "
        "they are of use and can be had",
    )
    error_budget: Fraction = Field(0.01, description="share of images that may be quarantined before the job stops")

    @model_validator(mode="after")
    def _one_way(self) -> "Encode":
        if self.compile and self.kernels == "native":
            raise ValueError("kernels=native are compiled already; leave compile=false")
        return self


class Verify(Section):
    """Audit a latent cache: every image once or in quarantine, every byte as it was written."""

    cache: str = Field("", description="cache folder")
    source: bool = Field(True, description="compare row ids with the source's, too; false: the cache alone")
    threads: Positive = Field(8, description="shards read at a time")


class Mend(Job):
    """What repair and retry share."""

    cache: str = Field("", description="cache folder")
    model: str = Field("", description="where the model folder is now; empty: where it was")
    source: str = Field("", description="where the source is now; empty: where it was")


class Repair(Mend):
    """Encode the missing and damaged shards of a latent cache again, and remove files that belong to none."""


class Retry(Mend):
    """Try the quarantined images of a latent cache again."""

    reasons: list[str] = Field([], description="error classes to retry, e.g. [missing, unreadable]; empty: all")


class Inspect(Section):
    """Show what is in a latent cache: counts, statistics, provenance, quarantine; decoded rows beside their sources."""

    cache: str = Field("", description="cache folder")
    out: str = Field("inspection", description="folder for inspection.png and inspection.json")
    shards: Count = Field(8, description="shards to decode and encode again, evenly spaced; 0: only count")
    rows: Positive = Field(2, description="rows of each of them")
    model: str = Field("", description="where the model folder is now; empty: where it was")
    source: str = Field("", description="where the source is now; empty: where it was")


# --- train_ldm ------------------------------------------------------------------------------------------------


class Objective(Section):
    prediction: Literal["epsilon", "v", "flow"] = Field(
        "epsilon", description="epsilon: the noise (the paper, after Rombach); v; flow: rectified flow"
    )
    schedule: Literal["sqrt-linear", "cosine"] = Field(
        "sqrt-linear", description="noise levels of epsilon and v; sqrt-linear: Rombach's 0.0015 to 0.0195"
    )
    zero_snr: bool = Field(False, description="v: the schedule ends in noise alone (arXiv 2305.08891)")
    weighting: Literal["none", "min-snr"] = Field("none", description="epsilon and v: min-SNR (arXiv 2303.09556)")
    gamma: Annotated[float, Field(gt=0)] = Field(5.0, description="of min-SNR")
    times: Literal["uniform", "logit-normal"] = Field(
        "uniform", description="flow: how often each noise level comes; logit-normal as in arXiv 2403.03206"
    )


class OnlineData(Section):
    """mode=online and write-through: images that are encoded in the training loop."""

    source: Source = Source()
    resolution: Annotated[int, Field(ge=16, multiple_of=8)] = Field(256, description="pixels")
    resize: Literal["shorter", "none"] = Field(
        "shorter", description="shorter side to the resolution before the crop; none: crop the original pixels"
    )
    decode: Decode = Field("fast", description=DECODE)
    crop: Literal["center", "random"] = Field("center", description="random: online only, another one each time")
    flip: bool = Field(False, description="mirror half of the images; online only")
    loaders: Count = Field(2, description="decoding threads a worker; 0: between the steps")
    max_bad: Fraction = Field(0.01, description="share of unreadable images that is skipped; above it training stops")
    calibrate: Positive = Field(
        2048, description="images, evenly spaced, that give the latents' mean and std (a cache has those of all)"
    )
    rows_per_shard: Positive = Field(
        512, description="write-through: as in encode_dataset; the first epoch shuffles within 8 shards"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="of the encoder; as in train_vae")


class TrainLDM(Job):
    """Train a latent diffusion model on a latent cache, or on images that are encoded on the way."""

    name: str = Field(
        "ldm", description="run name; the same name again resumes", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
    )
    seed: Count = Field(0, description="seed of weights, data order and noise")
    mode: Literal["cache", "online", "write-through"] = Field(
        "cache",
        description="latents from the cache; from data.source, encoded each time; or that, kept in the cache in the "
        "first epoch and read from it later",
    )
    cache: str = Field("", description="latent cache folder, local or s3://")
    cache_version: Count = Field(
        0, description="an earlier manifest's number, to go on after something was appended; 0: the newest"
    )
    cache_local: str = Field("", description="folder on each node that shards of an s3:// cache are brought to")
    data: OnlineData = OnlineData()
    vae: str = Field(
        "", description="autoencoder's model folder; empty: the one named in the cache's manifest, if it is there"
    )
    network: Literal["ldm-8", "ldm-4", "small", "tiny", "dit-s/2", "dit-b/2", "dit-l/2", "dit-xl/2"] = Field(
        "ldm-8",
        description="UNets: ldm-8 (Rombach's Table 14, 257.7 M), ldm-4 (his FFHQ and CelebA-HQ, 274.1 M), small "
        "(16 M), tiny (2 M); DiT (arXiv 2212.09748): S 33 M, B 130 M, L 458 M, XL 675 M",
    )
    classes: Count = Field(0, description="number of classes; 0: unconditional")
    label: str = Field("label", description="column with the class, an integer; rows without one train unconditionally")
    label_dropout: Fraction = Field(0.1, description="share of labels dropped, for classifier-free guidance")
    objective: Objective = Objective()
    draw: Literal["sample", "mean"] = Field(
        "sample", description="latents drawn anew from the moments each epoch, or their mean"
    )
    images: Positive = Field(48_000_000, description="images to train on (Rombach's LDM-8: 500k steps of 96)")
    batch_size: Positive = Field(96, description="images a step, over all workers")
    optim: Optimizer = Optimizer(lr=9.6e-5, betas=(0.9, 0.999), weight_decay=0.01)
    loop: Loop = Loop(ema=0.9999)
    more_ema: list[Fraction] = Field(
        [], description="decays of further averages, each exported as a model of its own: model-ema-<decay>"
    )
    checkpointing: bool = Field(False, description="recompute activations in the backward pass: less memory, slower")
    sample_images: Count = Field(16, description="images in the picture at each validation")
    sample_steps: Positive = Field(50, description="sampler's steps for that picture")
    sample_guidance: Weight = Field(1.0, description="classifier-free guidance of that picture; 1: none")


# --- sample, evaluate -----------------------------------------------------------------------------------------


class Sample(Job):
    """Sample images from a latent diffusion model."""

    model: str = Field("", description="LDM folder (runs/<name>/model)")
    out: str = Field(
        "samples", description="folder, local or s3://, for the images and grid.png; the same folder again resumes"
    )
    images: Positive = Field(16, description="images to draw; more than before adds to those that are there")
    sampler: Literal["auto", "ddim", "dpm++", "euler", "heun"] = Field(
        "auto", description="ddim or dpm++ for epsilon and v; euler, heun or dpm++ for flow; auto: the first of them"
    )
    steps: Positive = Field(50, description="the sampler's steps; heun computes the network twice a step")
    eta: Fraction = Field(0.0, description="ddim's eta; 0: deterministic")
    classes: list[Count] = Field(
        [], description="of a conditional model: image i is of the i-th of these, in turn; empty: of all its classes"
    )
    guidance: Weight = Field(1.0, description="classifier-free guidance towards the class; 1: none")
    seed: Count = Field(0, description="image i depends on (seed, i) only, whatever the number of workers")
    batch_size: Positive = Field(16, description="images a forward pass; each is a full one, the last too")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="as in train_vae")
    format: Literal["png", "parquet"] = Field(
        "png", description="png/000000.png ..., or parquet/part-000000.parquet ... with id, image, label, seed, number"
    )
    shard: Positive = Field(1024, description="images a Parquet file")


class Evaluate(Job):
    """Measure an autoencoder's reconstructions.

    Other things to judge: evaluate.py samples SAMPLES | latents CACHE | complexity MODELS (each has --help).
    """

    model: str = Field("", description="model folder: ours, or any autoencoder's of diffusers")
    source: Source = Source()
    transform: Transform = Transform()
    resolutions: list[Annotated[int, Field(ge=32)]] = Field(
        [],
        description="further resolutions to measure the same images at, each once (scale dependency, Figures 5 and 8)",
    )
    images: Count = Field(0, description="the first so many images; 0: all")
    mmd_images: Count = Field(
        0,
        description="the first so many of them also give the MMD of latents to a Gaussian (Table 6), in memory; 0: no",
    )
    seed: Count = Field(0, description="of the posterior's and the Gaussian's draws of that, and of its subsets")
    batch_size: Positive = Field(16, description="images a forward pass")
    precision: Literal["auto", "fp32", "bf16"] = Field("fp32", description="as in train_vae")
    lpips: Literal["vgg", "alex", "squeeze"] = Field("vgg", description="LPIPS' backbone")
    lpips_weights: str = Field("", description="as loss.lpips.weights of train_vae; with none LPIPS is left out")
    inception: str = Field("", description="weights of the FID Inception; empty: torch hub's cache; with none no rFID")
    squeezenet: str = Field(
        "",
        description="as loss.features.weights of train_vae: a feature distance and a Frechet distance; empty: left out",
    )
    backbone: str = Field(
        "", description="weights of one more backbone: a feature distance and a Frechet distance under its name"
    )
    backbone_model: str = Field("resnet50", description="its name in torchvision: resnet50, vgg16, ...")
    out: str = Field("evaluation", description="folder for metrics.json, reconstructions.png and feature_maps.png")
    pictures: Positive = Field(8, description="rows of reconstructions.png, evenly spaced over the images")


class EvaluateSamples(Job):
    """Judge generated images by a reference set: FID, Inception Score, precision and recall."""

    samples: Source = Field(Source(), description="generated images, as they are; a sample job's grid.png is none")
    source: Source = Field(Source(), description="the reference set")
    transform: Transform = Field(Transform(), description="of the reference set; generated images have this resolution")
    images: Count = Field(0, description="generated images, evenly spaced; 0: all")
    reference_images: Count = Field(0, description="of the reference set, evenly spaced; 0: all")
    pr_images: Positive = Field(10_000, description="of either set, evenly spaced, for precision and recall; at most")
    batch_size: Positive = Field(32, description="images a forward pass")
    inception: str = Field(
        "", description="weights of the FID Inception; empty: torch hub's cache; with none its numbers are left out"
    )
    squeezenet: str = Field(
        "", description="as loss.features.weights of train_vae: a Frechet distance under its name; empty: left out"
    )
    backbone: str = Field("", description="weights of one more backbone, also for a Frechet distance under its name")
    backbone_model: str = Field("resnet50", description="its name in torchvision: resnet50, vgg16, ...")
    out: str = Field("evaluation-samples", description="folder for metrics.json")


class EvaluateLatents(Tracked):
    """Measure how far a cache's latents are from a standard Gaussian: MMD, as in the paper's Table 6."""

    cache: str = Field("", description="cache folder, local or s3://")
    images: Count = Field(10_000, description="rows, evenly spaced, at most; 0: all")
    subset: Annotated[int, Field(ge=2)] = Field(1000, description="rows an MMD is of; the mean over subsets is shown")
    sigmas: list[Annotated[float, Field(gt=0)]] = Field(
        [25, 50, 100, 250, 500], min_length=1, description="bandwidths of the kernel (Table 6)"
    )
    draw: Literal["sample", "mean"] = Field("sample", description="latents drawn from the moments, or their mean")
    seed: Count = Field(0, description="of the draws, of the subsets and of the Gaussian's draws")
    out: str = Field("evaluation-latents", description="folder for metrics.json")


class EvaluateComplexity(Job):
    """Measure what encoders or decoders cost, one after the other: parameters, MACs, memory and speed (Table 3)."""

    models: list[str] = Field(
        ["sd-vae", "S", "B", "M", "L"],
        min_length=1,
        description="the first is the baseline: encoders as model.encoder of train_vae, with the SD-VAE decoder, or "
        "model folders; also a,b,c",
    )
    latent_channels: Positive = Field(4, description="n_z of models that are not folders")
    part: Literal["encoder", "decoder"] = Field("encoder", description="what is measured")
    batch_size: Positive = Field(32, description="images a forward pass; latency is of one image")
    resolution: Annotated[int, Field(ge=32)] = Field(256, description="pixels")
    repeats: Positive = Field(10, description="timed forward passes; the median counts")
    warmup: Positive = Field(2, description="untimed ones before")
    precision: Literal["auto", "fp32", "bf16"] = Field("fp32", description="as in train_vae")
    compile: bool = Field(False, description="torch.compile what is measured")
    out: str = Field("evaluation-complexity", description="folder for metrics.json")

    @field_validator("models", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value


# --- compare_runs ---------------------------------------------------------------------------------------------


class Compare(Tracked):
    """Compare runs of an MLflow experiment (tracking.experiment): a sweep's, or any by name."""

    sweep: str = Field("", description="a sweep's name; with neither this nor runs: the newest sweep")
    runs: list[str] = Field(
        [], description="names or ids, * for any letters: [a, b], ['vae-*'], ['*']; runs but for the seed are one row"
    )
    unfinished: bool = Field(False, description="also runs that failed, were killed or still run, as rows of their own")
    baseline: str = Field("", description="the row that the others are compared with; empty: the first")
    metrics: list[str] = Field(
        [], description="columns, e.g. [eval/*, train/images_per_second]; empty: eval/*, else val/*, else train/*"
    )
    test: Literal["welch", "paired"] = Field(
        "welch", description="t-test over seeds, two-sided; paired: of the seeds that both rows have"
    )
    curves: list[str] = Field(
        ["val/*", "eval/scale/*", "train/*"], description="metrics drawn over the images seen; eval/scale: over pixels"
    )
    pictures: Count = Field(1024, description="pixels of a row's picture, longer side, at most; 0: no pictures")
    out: str = Field("comparison", description="folder for comparison.html, comparison.md and comparison.json")


# --- benchmark ------------------------------------------------------------------------------------------------


class Benchmark(Tracked):
    """Measure this machine, side by side in one run: encoders, decoders, training steps, decoding of images, the encode
    job, the latent loader.
    """

    parts: list[
        Literal["encoder", "decoder", "vae-step", "ldm-step", "ray"]
        | Literal["images", "encode", "memory", "loader", "modes", "threads", "scale"]
    ] = Field(
        ["encoder", "decoder", "vae-step", "ldm-step", "ray", "images", "encode", "loader"],
        min_length=1,
        description="what is measured, in this order; also a,b,c; ray: what Ray Train adds to training; memory: of the "
        "encode job's processes; modes: of train_ldm; threads: how long OpenMP's wait awake; scale: plans, commit logs "
        "and requests of large data sets, and a model of time and cost (docs/scale.md)",
    )
    models: list[str] = Field(
        ["sd-vae", "taesd", "dc-ae", "S", "B", "M", "L", "pseudocode-B"],
        min_length=1,
        description="of encoder and decoder; the first is the baseline: sd-vae, taesd, dc-ae (diffusers' classes), "
        "LiteVAE's S B M L, B as the paper's pseudocode has it, or model folders; also a,b,c",
    )
    modes: list[Literal["eager", "channels-last", "compiled", "fast"]] = Field(
        ["eager", "fast"],
        min_length=1,
        description="of encoder and decoder; fast: as this project's jobs run them; compiled: "
        "the training steps, too; also a,b,c",
    )
    batch_sizes: list[Positive] = Field([1, 32], min_length=1, description="of encoder and decoder")
    resolutions: list[Annotated[int, Field(ge=32, multiple_of=32)]] = Field(
        [256], min_length=1, description="of encoder and decoder, in pixels"
    )
    precisions: list[Literal["fp32", "bf16"]] = Field(
        ["fp32"], min_length=1, description="of encoder and decoder; bf16 where hardware multiplies it"
    )
    repeats: Positive = Field(3, description="timed runs of each contender, in turn; medians count")
    source: str = Field("", description="folder of JPEGs, local; empty: scikit-image's photos")
    model: str = Field("", description="encode: model folder; empty: LiteVAE-S with random weights")
    encode_images: Annotated[int, Field(ge=32)] = Field(
        256, description="encode, memory: images a run; a GPU takes thousands for a steady rate"
    )
    loader_rows: Annotated[int, Field(ge=1000)] = Field(20_000, description="loader: latents of 8 x 32 x 32")
    scale_rows: Annotated[int, Field(ge=10_000_000, multiple_of=10_000_000)] = Field(
        10_000_000, description="scale: images of the largest plan that is made; others are a tenth, a hundredth ..."
    )
    scale_gpu_rate: Annotated[float, Field(gt=0)] = Field(
        1000.0, description="scale: images/s that a GPU is taken to encode; measure yours by part encoder"
    )
    step_batch: Positive = Field(4, description="images a training step of the autoencoder")
    step_resolution: Annotated[int, Field(ge=32, multiple_of=32)] = Field(128, description="and their pixels")
    gpu: Literal["auto"] | bool = Field("auto", description="auto: where there is one")
    threads: Count = Field(0, description="CPU threads; 0: one for each core")
    out: str = Field("benchmark", description="folder for benchmark.md and benchmark.json, with every sample")

    @field_validator("parts", "models", "modes", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value


# --- doctor -----------------------------------------------------------------------------------------------------


class Doctor(Job):
    """Check this machine, or the Ray cluster, before a long run: what is wrong with it, and what to do.

    Exit code 0: nothing failed; 1: something did. What is left empty is not looked at.
    """

    source: Source = Field(Source(), description="images: are they there on every node, and how fast are they decoded?")
    transform: Transform = Field(Transform(), description="what they are decoded and encoded at")
    model: str = Field("", description="model folder: is it the same on every node, and how fast does it encode?")
    out: str = Field("", description="folder of a latent cache to be, local or s3://: can nodes write it together?")
    images: Positive = Field(64, description="images that every node decodes, evenly spaced")
    batch_size: Positive = Field(32, description="images of the forward passes that every node is timed with")
    limit: Annotated[int, Field(ge=5)] = Field(120, description="seconds a check may take, after which it has failed")
    report: str = Field("", description="file for all findings as JSON")


# --- sweep ------------------------------------------------------------------------------------------------------


class Sweep(Job):
    """Train and evaluate many autoencoders: a table of the paper, or any fields of train_vae.

    What all trials have in common is given in sections named as jobs: train_vae.optim.lr=2e-4,
    evaluate.squeezenet=FILE ... Trainings are kept in <root>/trained under the hash of their config, so that rows and
    tables that have one in common train it once.
    """

    name: str = Field(
        "",
        description="of the sweep; the same name again resumes; empty: table-<table>-<scale>, or sweep",
        pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$",
    )
    table: str = Field("", description="table of the paper: 1, 2a, 2b, 3 to 22, figure-5, figure-8; empty: `space`")
    rows: list[str] = Field([], description="rows of the table, also as patterns: ['LiteVAE*']; empty: all")
    scale: Literal["paper", "small", "smoke"] = Field(
        "small",
        description="of a table: the paper's resolutions and steps; half and 1/50 of them with a smaller decoder; two "
        "steps, to see that it runs",
    )
    seeds: list[Count] = Field([0], min_length=1, description="every row or point is trained with each of them")
    data: TrainData = Field(TrainData(), description="of all trials; evaluation is on data.val")
    train_vae: dict[str, Any] = Field({}, description="of all trials, e.g. train_vae.loss.lpips.weights=FILE")
    evaluate: dict[str, Any] = Field({}, description="of all evaluations, e.g. evaluate.images=1000")
    evaluate_complexity: dict[str, Any] = Field({}, description="of table 3, e.g. evaluate_complexity.batch_size=8")
    encode_dataset: dict[str, Any] = Field({}, description="of tables 7 and 13")
    train_ldm: dict[str, Any] = Field({}, description="of tables 7 and 13, e.g. train_ldm.images=1000000")
    sample: dict[str, Any] = Field({}, description="of tables 7 and 13")
    evaluate_samples: dict[str, Any] = Field({}, description="of tables 7 and 13, e.g. evaluate_samples.inception=FILE")
    space: dict[str, Any] = Field(
        {},
        description="fields of train_vae to vary: a list of values, or {uniform: [a, b]}, {loguniform: [a, b]}, "
        "{randint: [a, b]}; e.g. space.loss.wavelet.weight=[0,0.1,1] 'space.optim.lr={loguniform: [1e-5, 1e-3]}'",
    )
    search: Literal["grid", "random", "optuna"] = Field(
        "grid", description="grid: every combination of lists; random, optuna: `trials` points"
    )
    trials: Positive = Field(8, description="points of random and optuna, and the population of pbt")
    scheduler: Literal["none", "asha", "pbt"] = Field(
        "none", description="asha stops poor trials early; pbt lets them go on from better ones with other values"
    )
    metric: Literal["psnr", "ssim"] = Field("psnr", description="what is best: of validations, and of the evaluation")
    every: Count = Field(
        0, description="asha, pbt: images between looks at the trials (validations); 0: an eighth of the run"
    )
    concurrent: Count = Field(0, description="trials at a time; 0: as many as GPUs hold, one without")


# --- reading ----------------------------------------------------------------------------------------------------

ConfigT = TypeVar("ConfigT", bound=BaseModel)


def load(cls: type[ConfigT], preset: str | None = None, overrides: list[str] | None = None) -> ConfigT:
    """Defaults, then preset (a name under jobs/configs/ or a YAML file), then `a.b=value` overrides."""
    values: dict[str, Any] = {}
    if preset:
        values = _read_preset(cls, preset)
    for override in overrides or []:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {override!r} is not of the form key=value (try --help)")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{key}: {text!r} is not valid YAML ({error})") from None
        _assign(values, key, "" if value is None and text == "" else value)
    return validate(cls, values)


def validate(cls: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """The config, or a UserError naming every wrong field. What is not given keeps the job's default, also
    where a section is given in part."""
    try:
        return cls.model_validate(_merge(cls().model_dump(mode="json"), values))
    except ValidationError as error:
        raise UserError("\n".join(_explain(cls, dict(problem)) for problem in error.errors())) from None


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    return base | {
        key: _merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in over.items()
    }


def job_of(cls: type[BaseModel]) -> str:
    """The command that takes this config."""
    names = {"TrainVAE": "train_vae", "TrainLDM": "train_ldm", "Encode": "encode_dataset", "Compare": "compare_runs"}
    names |= dict.fromkeys(("Verify", "Repair", "Retry", "Inspect"), "encode_dataset")
    names |= dict.fromkeys(("EvaluateSamples", "EvaluateLatents", "EvaluateComplexity"), "evaluate")
    return names.get(cls.__name__, cls.__name__.lower())


def section_of(cls: type[BaseModel]) -> str:
    """Where a recipe has it."""
    names = {f"Evaluate{what}": f"evaluate_{what.lower()}" for what in ("Samples", "Latents", "Complexity")}
    return names.get(cls.__name__, job_of(cls))


def dump(config: BaseModel) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def values_to_keep(config: BaseModel) -> dict[str, Any]:
    """The resolved config as plain values, for files and other processes: without where it is tracked, which may hold a
    password and does not change what is computed."""
    return config.model_dump(mode="json", exclude={"tracking"})


def main(
    cls: type[ConfigT],
    run: Callable[[ConfigT], object],
    argv: list[str] | None = None,
    action: str = "",
    switches: Sequence[str] = (),
    subject: str = "cache",
) -> int:
    """Parse the command line, run, and turn a UserError into one message and exit code 2, Ctrl-C or SIGTERM into 130
    or 143.

    Args:
        action: a job's second word (`verify`).
        subject: field that may be given as a bare word after it.
        switches: boolean fields that may be given as --field.
    """
    arguments = sys.argv[1:] if argv is None else argv
    try:
        if "--help" in arguments or "-h" in arguments:
            print(usage(cls, action, subject))
            return 0
        preset, overrides, show = None, [], False
        rest = iter(arguments)
        for argument in rest:
            if argument == "--config":
                preset = next(rest, None)
                if preset is None:
                    raise UserError("--config wants a preset's name or a YAML file")
            elif argument.startswith("--config="):
                preset = argument.partition("=")[2]
            elif argument == "--print-config":
                show = True
            elif argument.removeprefix("--") in switches and argument.startswith("--"):
                overrides.append(f"{argument[2:]}=true")
            elif action and "=" not in argument and not argument.startswith("-"):
                overrides.append(f"{subject}={argument}")
            elif argument.startswith("-"):
                raise UserError(
                    f"unknown option {argument}; there are --config, --print-config and --help; fields are key=value"
                )
            else:
                overrides.append(argument)
        config = load(cls, preset, overrides)
        if show:
            print(redact(dump(config)), end="")
            return 0
        with shutdown.on_sigterm():
            run(config)
        return 0
    except UserError as error:
        say(f"error: {error}", "ERROR")
        return 2
    except KeyboardInterrupt as error:
        stopped = error if isinstance(error, shutdown.Stopped) else shutdown.Stopped()
        say(str(stopped), "ERROR")
        return stopped.code


def usage(cls: type[BaseModel], action: str = "", subject: str = "cache") -> str:
    job, named = job_of(cls), subject.partition(".")[0].upper()
    words = f"{job}.py {action} {named}" if action else f"{job}.py [--config PRESET_OR_FILE.yaml]"
    lines = [
        inspect.cleandoc(cls.__doc__ or ""),
        "",
        f"usage: python jobs/{words} [--print-config] [key=value ...]",
        *([f"presets: {', '.join(_presets(cls))}"] if section_of(cls) in SECTIONS else []),
        "",
    ]
    for name, kind, default, text in _fields(cls):
        lines.append(f"  {name} = {default}    ({kind})")
        if text:
            lines.append(f"      {text}")
    return "\n".join(lines)


def _fields(
    cls: type[BaseModel], prefix: str = "", instance: BaseModel | None = None
) -> Iterator[tuple[str, str, str, str]]:
    for name, field in cls.model_fields.items():
        default = getattr(instance, name) if instance is not None else field.default
        if isinstance(default, BaseModel):
            if field.description:
                yield f"{prefix}{name}", "section", "...", field.description
            yield from _fields(type(default), f"{prefix}{name}.", default)
            continue
        shown = (
            "required"
            if default is PydanticUndefined
            else yaml.safe_dump(_plain(default), default_flow_style=True, width=10**6)
            .strip()
            .removesuffix("...")
            .strip()
        )
        yield f"{prefix}{name}", _kind(field.annotation, field.metadata), shown, field.description or ""


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _kind(annotation: Any, metadata: list[Any]) -> str:
    alternatives = [a for part in get_args(annotation) for a in (get_args(part) or [part])]
    if choices := [a for a in alternatives if isinstance(a, str)]:
        return " | ".join(choices + ["true | false"] * (bool in alternatives))
    kind = getattr(annotation, "__name__", None) or str(annotation).replace("typing.", "")
    if "[" in str(annotation):
        kind = str(annotation).replace("pipelines.config.", "").split("[")[0] + " of values"
    limits = [
        f"{sign} {value}"
        for item in metadata
        for sign, attribute in ((">=", "ge"), (">", "gt"), ("<=", "le"), ("multiple of", "multiple_of"))
        if (value := getattr(item, attribute, None)) is not None
    ]
    return " ".join([kind, *limits])


def _presets(cls: type[BaseModel]) -> list[str]:
    """Recipes with a section for the job."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml") if section_of(cls) in _read_yaml(path))


def _read_preset(cls: type[BaseModel], name: str) -> dict[str, Any]:
    """Of a recipe, the job's section: jobs/configs/NAME.yaml, or any YAML file with sections of jobs; of another file,
    all of it."""
    path = named if (named := PRESETS / f"{name}.yaml").is_file() else Path(name)
    if not path.is_file():
        raise UserError(f"--config {name}: neither a preset ({', '.join(_presets(cls)) or 'none'}) nor a file")
    values, section = _read_yaml(path), section_of(cls)
    if section not in values and (path == named or (values and values.keys() <= SECTIONS)):
        raise UserError(f"--config {name} has nothing for {section}; it is for {', '.join(values)}")
    if section not in values:
        return values
    if not isinstance(values[section] or {}, dict):
        raise UserError(f"{path}: expected `key: value` lines under {section}")
    return values[section] or {}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines at the top, found a {type(values).__name__}")
    return values


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UserError(f"{key}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    values[last] = value


def _explain(cls: type[BaseModel], problem: dict[str, Any]) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        import difflib

        known = [name for name, *_ in _fields(cls)]
        close = difflib.get_close_matches(path, known, n=1, cutoff=0.4)
        return (
            f"unknown config key {path!r}" + (f"; did you mean {close[0]!r}?" if close else "") + " (--help lists all)"
        )
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{path or 'config'}: {message}" + (
        "" if problem["type"] in ("missing", "value_error") else f" (got {problem['input']!r})"
    )
