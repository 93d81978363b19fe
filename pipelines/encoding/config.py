"""Config fields of encode_dataset and of its commands for an existing cache: verify, repair, retry and inspect."""

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.data.config import Source, Views
from pipelines.runtime.schema import Count, Fraction, Job, LongJob, Needed, PathText, Positive, Section, Shown

TAKEOVER = "begin although another driver is at work on the cache; each shard counts once, but may be encoded twice"


class Encode(LongJob):
    """Encode images into a latent cache."""

    shown: ClassVar[Shown] = Shown(
        needed={
            "source.uri": Needed("/data/photos"),
            "model": Needed("runs/vae/model"),
            "out": Needed("/data/cache"),
        },
        groups={
            "Images": {
                "source.split": "train",
                "source.columns": "[label, caption]",
                "transform.resolution": "512",
                "transform.crop": "random",
                "transform.flips": "true",
                "transform.buckets": "true",
                "append": "true",
                "changed": "encode",
            },
            "What is stored": {
                "latents": "mean",
                "dtype": "bf16",
                "rows_per_shard": "1024",
            },
            "Speed and faults": {
                "batch_size": "auto",
                "precision": "fp32",
                "ray.workers": "8",
                "error_budget": "0.05",
                "yes": "true",
            },
        },
    )

    source: Source = Source()
    model: PathText = Field("", description="model folder: ours, or any autoencoder's of diffusers")
    out: PathText = Field("", description="cache folder, local or s3://; the same folder again resumes")
    append: bool = Field(False, description="add what is new in the source to a finished cache (also: --append)")
    changed: Literal["refuse", "keep", "encode"] = Field(
        "refuse",
        description="with append, what becomes of inputs that were written again since they were listed: encode: their "
        "shards are encoded again; keep: their latents stay",
    )
    transform: Views = Views()
    latents: Literal["moments", "mean"] = Field(
        "moments",
        description="moments: the posterior's mean and log-variance; mean: its mean; of autoencoders without a "
        "posterior: the latent",
    )
    dtype: Literal["fp16", "bf16", "fp32"] = Field("fp16", description="number format of what is stored")
    rows_per_shard: Positive = Field(512, description="images a shard: the unit of work, of retry and of resume")
    batch_size: Positive | Literal["auto"] = Field(
        32, description="images a forward pass, halved where a GPU's memory is too small; auto: the largest that fits"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of the encoder; auto: bf16 where hardware has it"
    )
    compile: bool = Field(False, description="torch.compile the encoder")
    kernels: Literal["auto", "native", "torch", "sliced"] = Field(
        "auto",
        description="native: this project's own for fp32 on CPUs, which a C++ compiler makes at first use; torch: "
        "PyTorch's; sliced: PyTorch's, a batch's images one by one; auto: on CPUs the fastest, measured for a second",
    )
    error_budget: Fraction = Field(0.01, description="share of images that may be quarantined before the job stops")
    takeover: bool = Field(False, description=TAKEOVER)

    @model_validator(mode="after")
    def _one_way(self) -> "Encode":
        if self.compile and self.kernels == "native":
            raise ValueError("kernels=native are compiled already; leave compile=false")
        if self.precision == "bf16" and self.kernels == "native":
            raise ValueError("kernels=native compute in fp32; leave precision=auto, or kernels=auto")
        return self


class Verify(Section):
    """Audit a latent cache: every image once or in quarantine, every byte as it was written."""

    shown: ClassVar[Shown] = Shown(
        needed={"cache": Needed("/data/cache")},
        groups={"Audit": {"source": "contents", "threads": "16"}},
    )

    cache: PathText = Field("", description="cache folder")
    source: Literal["none", "ids", "contents"] = Field(
        "ids",
        description="also compare the cache with its source; ids: its rows have the ids that are listed; contents: its "
        "images are those that were encoded, which reads them all (also: --source)",
    )
    threads: Positive = Field(8, description="shards read at a time")

    @field_validator("source", mode="before")
    @classmethod
    def _as_switch(cls, value: Any) -> Any:
        return {"true": "contents", "false": "none"}.get(str(value).lower(), value)


_MOVED = {"model": "/models/vae", "source": "/mnt/photos", "max_pixels": "500000000", "ray.workers": "8"}


class MaintainCache(Job):
    """What repair and retry share."""

    cache: PathText = Field("", description="cache folder")
    model: PathText = Field("", description="where the model folder is now; empty: where it was")
    source: PathText = Field("", description="where the source is now; empty: where it was")
    max_pixels: Count = Field(0, description="largest image that is read, in pixels; 0: as before")
    error_budget: Fraction | None = Field(
        None, description="share of images that may stay in quarantine; null: what was last agreed to for the cache"
    )
    takeover: bool = Field(False, description=TAKEOVER)


class Repair(MaintainCache):
    """Encode the missing and damaged shards of a latent cache again, and remove files that belong to none."""

    shown: ClassVar[Shown] = Shown(
        needed={"cache": Needed("/data/cache")},
        groups={"Repair": {"contents": "true"} | _MOVED},
    )

    contents: bool = Field(
        False, description="also the shards whose images in the source are others now, which reads all images"
    )


class Retry(MaintainCache):
    """Try the quarantined images of a latent cache again."""

    shown: ClassVar[Shown] = Shown(
        needed={"cache": Needed("/data/cache")},
        groups={"Retry": {"reasons": "[missing, unreadable]"} | _MOVED},
    )

    reasons: list[str] = Field([], description="error classes to retry, e.g. [missing, unreadable]; empty: all")


class Inspect(Section):
    """Show what is in a latent cache: counts, statistics, provenance, quarantine; decoded rows beside their sources."""

    shown: ClassVar[Shown] = Shown(
        needed={"cache": Needed("/data/cache")},
        groups={
            "What is shown": {
                "shards": "0",
                "rows": "4",
                "out": "/data/inspection",
                "model": "/models/vae",
                "source": "/mnt/photos",
            }
        },
    )

    cache: PathText = Field("", description="cache folder")
    out: PathText = Field("inspection", description="folder for inspection.png and inspection.json")
    shards: Count = Field(8, description="shards to decode and encode again, evenly spaced; 0: only count")
    rows: Positive = Field(2, description="rows of each of them")
    model: PathText = Field("", description="where the model folder is now; empty: where it was")
    source: PathText = Field("", description="where the source is now; empty: where it was")
