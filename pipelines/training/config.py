"""Config schemas of the jobs train_vae and train_ldm."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from litevae.image_metadata import MAX_PIXELS
from pipelines.data.config import DECODE, LARGEST, Decode, Source
from pipelines.runtime.schema import Count, Fraction, LongJob, Needed, PathText, Positive, Section, Shown, Weight


class Decoder(Section):
    """The decoder, which is that of SD-VAE unless `norm` or `output` say otherwise."""

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
            raise ValueError(f"has {len(self.channels)} widths; f = 8 needs exactly 4")
        return self


class VAE(Section):
    """The architecture of the autoencoder."""

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
    init: PathText = Field(
        "", description="model folder to start from (its architecture must be this one); empty: random"
    )
    init_decoder: PathText = Field(
        "", description="model folder of an AutoencoderKL or LiteVAE whose decoder to start from; empty: random"
    )
    freeze: list[Literal["encoder", "decoder"]] = Field(
        [], description="parts that are not trained, with the 1x1 convolution next to them"
    )

    @model_validator(mode="after")
    def _frozen(self) -> "VAE":
        if self.init and self.init_decoder:
            raise ValueError("init_decoder can't be combined with init, which gives the decoder too")
        learned = {"encoder", "decoder"} - ({"encoder"} if self.encoder in ("dwt", "dwt-2") else set())
        if self.freeze and learned <= set(self.freeze):
            raise ValueError(f"freeze={self.freeze} leaves nothing to train")
        if "decoder" in self.freeze and self.decoder.norm == "batch":
            raise ValueError("freeze=[decoder] can't keep the running statistics of decoder.norm=batch")
        return self


class Term(Section):
    """A term of the loss."""

    weight: Weight = Field(0.0, description="0 costs nothing")
    start: Count = Field(0, description="images seen before the term counts")


class Lpips(Term):
    """LPIPS, a perceptual distance."""

    net: Literal["vgg", "alex", "squeeze"] = Field("vgg", description="backbone")
    weights: PathText = Field(
        "",
        description="backbone's torchvision checkpoint; empty: torch hub's cache, which `make weights` fills",
    )
    required: bool = Field(
        True, description="refuse to train where the weights are missing; false: train without the term, and say so"
    )


class Features(Term):
    """The distance of features of another network."""

    weights: PathText = Field(
        "", description="a SqueezeNet 1.1 (Caffe) feature file: its feature distance, under its own name"
    )


class Esrgan(Term):
    """The perceptual loss of ESRGAN, on features of VGG19."""

    weights: PathText = Field("", description="torchvision's VGG19 checkpoint; empty: torch hub's cache")


class Adversarial(Term):
    """The adversarial term, and its discriminator."""

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
            raise ValueError(f"cutmix needs a discriminator with a head per pixel: kind=unet, not {self.kind}")
        return self


class Equivariance(Section):
    """Training for latents that can be scaled and rotated (EQ-VAE, arXiv 2502.09509); the paper has none."""

    share: Fraction = Field(
        0.0,
        description="share of steps in which the latents are made smaller and rotated before they are decoded, and all "
        "terms compare with the images that underwent the same; EQ-VAE: 0.5; 0: none",
    )
    smaller: Fraction = Field(
        0.25,
        description="share of the other steps, where `share` is not 0, whose images are made smaller before they are "
        "encoded, as EQ-VAE does",
    )
    smallest: Annotated[float, Field(gt=0, le=1)] = Field(0.25, description="smallest scale of either")


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
    latent: Term = Field(
        Term(weight=1.0), description="with a teacher: squared error of its latents (means), in std of each channel"
    )
    logvar: Term = Field(
        Term(weight=0.1), description="with a teacher that has them: squared error of log-variances, likewise"
    )


class Stage(Section):
    """A stage of training: a resolution, and how many images are trained on at it."""

    resolution: Annotated[int, Field(ge=8, multiple_of=8)] = Field(256, description="pixels")
    images: Positive = Field(description="images to train on in this stage")
    batch_size: Positive = Field(16, description="images a step, over all workers")


class TrainData(Section):
    """Images to train and validate on, and how they are read."""

    train: Source = Source()
    val: Source = Field(Source(), description="uri empty: no validation")
    resize: Literal["shorter", "none"] = Field(
        "shorter", description="shorter side to the resolution before the crop; none: crop the original pixels"
    )
    crop: Literal["random", "center"] = Field("random", description="training crop; validation is always centred")
    decode: Decode = Field("fast", description=f"{DECODE}; validation is always by Pillow")
    max_pixels: Positive = Field(MAX_PIXELS, description=LARGEST)
    flip: bool = Field(True, description="mirror half of the training images")
    loaders: Count = Field(2, description="decoding threads a worker; 0: between the steps")
    max_bad: Fraction = Field(0.01, description="share of unreadable images that is skipped; above it training stops")


class Optimizer(Section):
    """Adam or AdamW, and the schedule of its learning rate."""

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


class TrainVAE(LongJob):
    """Train a LiteVAE autoencoder."""

    shown: ClassVar[Shown] = Shown(
        needed={"data.train.uri": Needed("/data/photos")},
        groups={
            "Images": {
                "data.val.uri": ("/data/photos-val", "images to validate on, as data.train.uri; empty: no validation"),
                "data.resize": "none",
            },
            "Model": {
                "model.encoder": "S",
                "model.latent_channels": "12",
                "model.init": "runs/vae/model",
            },
            "Loss": {
                "loss.lpips.weight": ("0", "weight of LPIPS, the perceptual distance; 0: without it"),
                "loss.lpips.weights": "/models/vgg16-397923af.pth",
                "loss.adversarial.weight": ("0", "weight of the discriminator's term; 0: no discriminator"),
            },
            "Length and steps": {
                "stages": (
                    "[{resolution: 256, images: 800000, batch_size: 16}]",
                    "resolution, length and batch size of each stage of training; lengths are numbers of images",
                ),
                "optim.lr": "2e-4",
                "loop.precision": "bf16",
                "loop.ema": "0.999",
                "checkpointing": "true",
            },
            "The run": {
                "name": "faces",
                "root": "/shared/runs",
                "loop.checkpoint_every": "50000",
                "ray.workers": "8",
                "yes": "true",
            },
        },
    )

    name: str = Field(
        "vae", description="run name; the same name again resumes", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
    )
    seed: Count = Field(0, description="seed of weights, data order, crops and noise")
    data: TrainData = TrainData()
    model: VAE = VAE()
    loss: Losses = Losses()
    equivariance: Equivariance = Equivariance()
    optim: Optimizer = Optimizer()
    teacher: PathText = Field(
        "",
        description="model folder of an autoencoder whose latents the encoder learns and whose decoder it keeps; the "
        "weights of other terms than loss.latent and loss.logvar are then 0 unless given",
    )
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
    begin: PathText = Field(
        "", description="checkpoint folder of another run (runs/<name>/checkpoint-...) that a new run goes on from"
    )

    @classmethod
    def implied(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """With a teacher, the terms on pixels are off unless they are given a weight."""
        terms = Losses.model_fields.keys() - {"latent", "logvar"}
        return {"loss": {name: {"weight": 0.0} for name in sorted(terms)}} if values.get("teacher") else {}

    @model_validator(mode="after")
    def _known_before_it_is_frozen(self) -> "TrainVAE":
        sources = {"decoder": self.model.init or self.model.init_decoder or self.begin or self.teacher}
        sources["encoder"] = self.model.init or self.begin
        for part in self.model.freeze:
            if not sources[part]:
                known = "model.init" + (", model.init_decoder" if part == "decoder" else "")
                raise ValueError(f"model.freeze=[{part}] would keep random weights: give {known} or begin")
        return self

    @model_validator(mode="after")
    def _taught(self) -> "TrainVAE":
        if not self.teacher:
            return self
        for name, why in (
            ("kl", "the teacher has set the scale of its latents"),
            ("ldl", "it needs two trained models that decode"),
            ("adversarial", "the decoder is the teacher's and not trained, and the encoder must not leave its latents"),
        ):
            if getattr(self.loss, name).weight:
                raise ValueError(f"loss.{name} can't be combined with a teacher: {why}; set loss.{name}.weight=0")
        if self.equivariance.share:
            raise ValueError(
                "equivariance can't be combined with a teacher, which has set the latents; set equivariance.share=0"
            )
        if not self.loss.latent.weight:
            raise ValueError("with a teacher loss.latent.weight must not be 0: its latents are what is learned")
        plain = VAE()
        for name in ("decoder", "conv1x1", "init", "init_decoder", "freeze"):
            if getattr(self.model, name) != getattr(plain, name):
                raise ValueError(
                    f"model.{name} can't be combined with a teacher, which gives the decoder; leave it out"
                )
        if self.model.encoder in ("dwt", "dwt-2"):
            raise ValueError(f"model.encoder={self.model.encoder} can't learn from a teacher; take S, B, M or L")
        return self

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
            raise ValueError("checkpointing would count each batch twice in batch norm's statistics; set it to false")
        return self


class DiffusionObjective(Section):
    """What the diffusion model predicts, and how its noise levels are chosen and weighted."""

    prediction: Literal["epsilon", "v", "flow"] = Field(
        "epsilon", description="epsilon: the noise (the paper, after Rombach); v; flow: rectified flow"
    )
    schedule: Literal["sqrt-linear", "cosine"] = Field(
        "sqrt-linear", description="noise levels of epsilon and v; sqrt-linear: Rombach's 0.0015 to 0.0195"
    )
    zero_snr: bool = Field(False, description="v: the schedule ends in noise alone (arXiv 2305.08891)")
    weighting: Literal["none", "min-snr"] = Field(
        "none", description="epsilon and v: min-SNR (arXiv 2303.09556); with zero_snr gamma limits SNR + 1"
    )
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
    max_pixels: Positive = Field(MAX_PIXELS, description=LARGEST)
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
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of the encoder; auto: bf16 where hardware has it"
    )


class TrainLDM(LongJob):
    """Train a latent diffusion model on a latent cache, or on images that are encoded on the way."""

    shown: ClassVar[Shown] = Shown(
        needed={
            "cache": Needed("/data/cache", {"mode": ("cache", "write-through")}),
            "data.source.uri": Needed("/data/photos", {"mode": ("online", "write-through")}, usual=False),
            "vae": Needed("runs/vae/model", {"mode": ("online", "write-through")}, usual=False),
        },
        groups={
            "Latents": {
                "mode": "online",
                "data.resolution": ("512", "online, write-through: side of the images in pixels"),
                "draw": "mean",
            },
            "Model": {
                "network": "dit-b/2",
                "objective.prediction": "flow",
                "classes": "1000",
            },
            "Length and steps": {
                "images": "24000000",
                "batch_size": "256",
                "optim.lr": "1e-4",
                "loop.precision": "bf16",
                "loop.ema": "0.999",
                "checkpointing": "true",
            },
            "The run": {
                "name": "faces",
                "root": "/shared/runs",
                "loop.checkpoint_every": "50000",
                "ray.workers": "8",
                "yes": "true",
            },
        },
    )

    name: str = Field(
        "ldm", description="run name; the same name again resumes", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
    )
    seed: Count = Field(0, description="seed of weights, data order and noise")
    mode: Literal["cache", "online", "write-through"] = Field(
        "cache",
        description="cache: latents from the cache; online: images of data.source, encoded each time; write-through: "
        "those, kept in the cache in the first epoch and read from it later",
    )
    cache: PathText = Field("", description="latent cache folder, local or s3://")
    cache_version: Count = Field(
        0, description="an earlier manifest's number, to go on after something was appended; 0: the newest"
    )
    cache_local: PathText = Field("", description="folder on each node that shards of an s3:// cache are brought to")
    data: OnlineData = OnlineData()
    vae: PathText = Field(
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
    objective: DiffusionObjective = DiffusionObjective()
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
