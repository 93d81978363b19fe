"""Config fields about images: where they come from, and which views are cut from them."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from litevae.image_metadata import MAX_PIXELS
from pipelines.runtime.schema import Count, PathText, Positive, Section

Decode = Literal["fast", "pillow", "scaled"]
DECODE = (
    "fast: JPEGs by simplejpeg, resized by PyTorch, 60 dB and more to pillow; pillow: by Pillow alone, as all that was "
    "begun before there was this choice; scaled: as fast, large JPEGs to 1/2, 1/4 or 1/8 in decoding (46 dB)"
)


LARGEST = "largest image that is read, in pixels; decoding takes up to 10 bytes of memory for each"


class Source(Section):
    """Where images come from."""

    uri: PathText = Field(
        "",
        description="local or s3://: a folder tree of images (label = folder), Parquet with images or their paths, "
        "WebDataset tars, or a .txt, .csv or .jsonl list of paths",
    )
    split: str = Field(
        "",
        description="the split to take, e.g. train, where folders or files are named as splits; all: every one",
    )
    image_column: str = Field(
        "image",
        description="Parquet: column with the encoded image (bytes, a struct with `bytes`) or its path; lists: path",
    )
    id_column: str = Field(
        "id", description="Parquet, lists: column with a stable id; where absent, file name and row number, or the path"
    )
    ids: Literal["stored", "unique"] = Field(
        "stored",
        description="Parquet, lists: unique: ids from file and row number, where the stored ones, or paths, repeat",
    )
    tar_rows: Literal["samples", "images"] = Field(
        "samples",
        description="WebDataset: a row for each sample, whose name ends at its first dot; or for each image, whose "
        "name ends at its last dot",
    )
    columns: list[str] = Field(
        [],
        description="further columns to carry into a cache, e.g. [label, caption]; WebDataset: [cls, txt, json.key]",
    )


class Transform(Section):
    """How an image is brought to a size."""

    resolution: Annotated[int, Field(ge=8, multiple_of=8)] = Field(256, description="side of the images in pixels")
    resize: Literal["shorter", "none"] = Field(
        "shorter", description="shorter side to the resolution before the crop; none: crop the original pixels"
    )
    max_pixels: Positive = Field(MAX_PIXELS, description=LARGEST)


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
            raise ValueError(f"crops={self.crops} would give the same crop {self.crops} times; set crop=random")
        if self.buckets and self.resize == "none":
            raise ValueError("buckets need resize=shorter, because images are resized to cover their bucket")
        if self.buckets and self.resolution % self.bucket_step:
            raise ValueError(f"resolution={self.resolution} is not a multiple of bucket_step={self.bucket_step}")
        return self
