"""Config fields of sample and of the commands of evaluate."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from pipelines.data.config import Source, Transform
from pipelines.runtime.schema import Count, Fraction, Job, Needed, PathText, Positive, Shown, Tracked, Weight

OVERWRITE = "replace the result of another config in `out`; false: refuse; that of the same config is always replaced"


class Sample(Job):
    """Sample images from a latent diffusion model."""

    shown: ClassVar[Shown] = Shown(
        needed={"model": Needed("runs/ldm/model")},
        groups={
            "Images": {
                "images": "64",
                "classes": "[207, 360]",
                "guidance": "4",
                "seed": "1",
            },
            "Sampler": {
                "sampler": "heun",
                "steps": "25",
                "eta": "1",
                "batch_size": "64",
                "precision": "fp32",
            },
            "Output": {
                "out": "/data/samples",
                "format": "parquet",
                "shard": "4096",
                "ray.workers": "8",
            },
        },
    )

    model: PathText = Field("", description="LDM folder (runs/<name>/model)")
    out: PathText = Field(
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
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where hardware has it")
    format: Literal["png", "parquet"] = Field(
        "png", description="png/000000.png ..., or parquet/part-000000.parquet ... with id, image, label, seed, number"
    )
    shard: Positive = Field(1024, description="images a Parquet file")


class Evaluate(Job):
    """Measure an autoencoder's reconstructions."""

    shown: ClassVar[Shown] = Shown(
        needed={"model": Needed("runs/vae/model"), "source.uri": Needed("/data/photos-val")},
        groups={
            "Images": {
                "source.split": "val",
                "transform.resolution": "512",
                "resolutions": "[128, 512]",
                "images": "5000",
                "mmd_images": "1000",
            },
            "What is measured": {
                "lpips": "alex",
                "lpips_weights": "/models/vgg16-397923af.pth",
                "inception": "/models/inception.pth",
                "backbone": "/models/resnet50.pth",
                "backbone_model": "resnet50",
            },
            "Speed and output": {
                "batch_size": "64",
                "precision": "bf16",
                "ray.workers": "8",
                "out": "/data/evaluation",
                "pictures": "16",
            },
        },
    )

    model: PathText = Field("", description="model folder: ours, or any autoencoder's of diffusers")
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
    equivariance_images: Count = Field(
        0,
        description="the first so many of them also give PSNR after latents were made smaller and rotated (EQ-VAE); 0: "
        "no",
    )
    batch_size: Positive = Field(16, description="images a forward pass")
    precision: Literal["auto", "fp32", "bf16"] = Field("fp32", description="auto: bf16 where hardware has it")
    lpips: Literal["vgg", "alex", "squeeze"] = Field("vgg", description="LPIPS' backbone")
    lpips_weights: PathText = Field("", description="as loss.lpips.weights of train_vae; with none LPIPS is left out")
    inception: PathText = Field(
        "", description="weights of the FID Inception; empty: torch hub's cache; with none no rFID"
    )
    squeezenet: PathText = Field(
        "",
        description="as loss.features.weights of train_vae: a feature distance and a Frechet distance; empty: left out",
    )
    backbone: PathText = Field(
        "", description="weights of one more backbone: a feature distance and a Frechet distance under its name"
    )
    backbone_model: str = Field("resnet50", description="its name in torchvision: resnet50, vgg16, ...")
    out: PathText = Field(
        "",
        description="folder for metrics.json, reconstructions.png and feature_maps.png; empty: "
        "<root>/evaluations/reconstruction-<model>-<resolution>px",
    )
    overwrite: bool = Field(False, description=OVERWRITE)
    verbose: bool = Field(False, description="show how each number was measured, as metrics.json says it")
    pictures: Positive = Field(8, description="rows of reconstructions.png, evenly spaced over the images")


class EvaluateSamples(Job):
    """Judge generated images by a reference set: FID, Inception Score, precision and recall."""

    shown: ClassVar[Shown] = Shown(
        needed={
            "samples.uri": Needed("samples", meaning="generated images, e.g. the folder of a sample job"),
            "source.uri": Needed("/data/photos", meaning="the reference set: a folder, Parquet, WebDataset or a list"),
        },
        groups={
            "Images": {
                "transform.resolution": "512",
                "source.split": "train",
                "images": "5000",
                "reference_images": "5000",
                "pr_images": "5000",
            },
            "What is measured": {
                "inception": "/models/inception.pth",
                "backbone": "/models/resnet50.pth",
                "backbone_model": "resnet50",
            },
            "Speed and output": {
                "batch_size": "64",
                "ray.workers": "8",
                "out": "/data/evaluation",
            },
        },
    )

    samples: Source = Field(Source(), description="generated images, as they are; a sample job's grid.png is none")
    source: Source = Field(Source(), description="the reference set")
    transform: Transform = Field(Transform(), description="of the reference set; generated images have this resolution")
    images: Count = Field(0, description="generated images, evenly spaced; 0: all")
    reference_images: Count = Field(0, description="of the reference set, evenly spaced; 0: all")
    pr_images: Positive = Field(10_000, description="of either set, evenly spaced, for precision and recall; at most")
    batch_size: Positive = Field(32, description="images a forward pass")
    inception: PathText = Field(
        "", description="weights of the FID Inception; empty: torch hub's cache; with none its numbers are left out"
    )
    squeezenet: PathText = Field(
        "", description="as loss.features.weights of train_vae: a Frechet distance under its name; empty: left out"
    )
    backbone: PathText = Field(
        "", description="weights of one more backbone, also for a Frechet distance under its name"
    )
    backbone_model: str = Field("resnet50", description="its name in torchvision: resnet50, vgg16, ...")
    out: PathText = Field(
        "", description="folder for metrics.json; empty: <root>/evaluations/samples-<samples>-<resolution>px"
    )
    overwrite: bool = Field(False, description=OVERWRITE)
    verbose: bool = Field(False, description="show how each number was measured, as metrics.json says it")


class EvaluateLatents(Tracked):
    """Measure how far a cache's latents are from a standard Gaussian: MMD, as in the paper's Table 6."""

    shown: ClassVar[Shown] = Shown(
        needed={"cache": Needed("/data/cache")},
        groups={
            "What is measured": {
                "images": "50000",
                "subset": "2000",
                "sigmas": "[50, 100]",
                "draw": "mean",
                "seed": "1",
                "out": "/data/evaluation",
            },
        },
    )

    cache: PathText = Field("", description="cache folder, local or s3://")
    images: Count = Field(10_000, description="rows, evenly spaced, at most; 0: all")
    subset: Annotated[int, Field(ge=2)] = Field(1000, description="rows an MMD is of; the mean over subsets is shown")
    sigmas: list[Annotated[float, Field(gt=0)]] = Field(
        [25, 50, 100, 250, 500], min_length=1, description="bandwidths of the kernel (Table 6)"
    )
    draw: Literal["sample", "mean"] = Field("sample", description="latents drawn from the moments, or their mean")
    seed: Count = Field(0, description="of the draws, of the subsets and of the Gaussian's draws")
    out: PathText = Field("", description="folder for metrics.json; empty: <root>/evaluations/latents-<cache>")
    overwrite: bool = Field(False, description=OVERWRITE)
    verbose: bool = Field(False, description="show how each number was measured, as metrics.json says it")


class EvaluateComplexity(Job):
    """Measure what encoders or decoders cost, one after the other: parameters, MACs, memory and speed (Table 3)."""

    shown: ClassVar[Shown] = Shown(
        groups={
            "What is measured": {
                "models": "S,B,runs/vae/model",
                "part": "decoder",
                "latent_channels": "12",
                "batch_size": "8",
                "resolution": "512",
                "precision": "bf16",
                "compile": "true",
                "repeats": "30",
                "out": "/data/evaluation",
            },
        },
    )

    models: list[PathText] = Field(
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
    precision: Literal["auto", "fp32", "bf16"] = Field("fp32", description="auto: bf16 where hardware has it")
    compile: bool = Field(False, description="torch.compile what is measured")
    out: PathText = Field(
        "", description="folder for metrics.json; empty: <root>/evaluations/complexity-<part>-<resolution>px"
    )
    overwrite: bool = Field(False, description=OVERWRITE)
    verbose: bool = Field(False, description="show how each number was measured, as metrics.json says it")

    @field_validator("models", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value
