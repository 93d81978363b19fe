"""Config fields of encode_dataset and of its commands for an existing cache: verify, repair, retry and inspect."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.data.config import Source, Views
from pipelines.runtime.schema import Count, Fraction, Job, Positive, Section


class Encode(Job):
    """Encode images into a latent cache.

    Other things to do with a cache: encode_dataset.py verify | repair | retry | inspect CACHE (each has --help).
    """

    source: Source = Source()
    model: str = Field("", description="model folder: ours, or any autoencoder's of diffusers")
    out: str = Field("", description="cache folder, local or s3://; the same folder again resumes")
    append: bool = Field(False, description="add what is new in the source to a finished cache (also: --append)")
    changed: Literal["refuse", "keep", "encode"] = Field(
        "refuse",
        description="with append, what becomes of inputs that were written again since they were listed: encode: their "
        "shards are encoded again; keep: their latents stay",
    )
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


class MaintainCache(Job):
    """What repair and retry share."""

    cache: str = Field("", description="cache folder")
    model: str = Field("", description="where the model folder is now; empty: where it was")
    source: str = Field("", description="where the source is now; empty: where it was")
    max_pixels: Count = Field(0, description="largest image that is read, in pixels; 0: as before")


class Repair(MaintainCache):
    """Encode the missing and damaged shards of a latent cache again, and remove files that belong to none."""

    contents: bool = Field(
        False, description="also the shards whose images in the source are others now, which reads all images"
    )


class Retry(MaintainCache):
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
