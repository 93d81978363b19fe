"""Fields of the studies."""

from typing import Annotated, Literal

from pydantic import Field

from pipelines.benchmark.config import Benchmark


class Study(Benchmark):
    """Measure what decided on this project's design: how images are decoded, where train_ldm's latents come from, how
    long OpenMP's threads wait awake, and how far the encode job and the cache reach.
    """

    parts: list[Literal["images", "modes", "threads", "scale"]] = Field(  # type: ignore[assignment]
        ["images", "modes", "threads"],
        min_length=1,
        description="what is measured, in this order; also a,b,c; images: decoding and resizing; modes: of train_ldm; "
        "threads: how long OpenMP's wait awake; scale: plans, commit logs and requests of large data sets, and a model "
        "of time and cost (docs/scale.md)",
    )
    scale_rows: Annotated[int, Field(ge=10_000_000, multiple_of=10_000_000)] = Field(
        10_000_000, description="scale: images of the largest plan that is made; others are a tenth, a hundredth ..."
    )
    scale_gpu_rate: Annotated[float, Field(gt=0)] = Field(
        1000.0, description="scale: images/s that a GPU is taken to encode; measure yours by jobs/benchmark.py"
    )
