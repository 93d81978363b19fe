"""Config schema of the job benchmark."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from pipelines.runtime.schema import Count, PathText, Positive, Shown, Tracked


class Benchmark(Tracked):
    """Measure this machine, side by side in one run: encoders, decoders, training steps, the encode job, the latent
    loader.
    """

    shown: ClassVar[Shown] = Shown(
        groups={
            "What is measured": {
                "parts": "encoder,encode",
                "models": "sd-vae,S,runs/vae/model",
                "modes": "fast",
                "batch_sizes": "[1, 8]",
                "resolutions": "[256, 512]",
                "precisions": "[bf16]",
                "repeats": "5",
            },
            "The encode job and the loader": {
                "source": "/data/photos",
                "model": "runs/vae/model",
                "encode_images": "4096",
                "loader_rows": "100000",
            },
            "The machine, and the output": {
                "gpu": "false",
                "threads": "8",
                "out": "/data/benchmark",
            },
        },
    )

    parts: list[
        Literal["encoder", "decoder", "tiling", "vae-step", "ldm-step", "ray", "encode", "memory", "loader", "moments"]
    ] = Field(
        ["encoder", "decoder", "vae-step", "ldm-step", "ray", "encode", "loader"],
        min_length=1,
        description="what is measured, in this order; also a,b,c; tiling: memory and differences of LiteVAE in tiles; "
        "ray: what Ray Train adds to training; memory: of the encode job's processes; moments: the error of what a "
        "cache stores, by number format",
    )
    models: list[PathText] = Field(
        ["sd-vae", "taesd", "dc-ae", "S", "B", "M", "L", "pseudocode-B"],
        min_length=1,
        description="of encoder and decoder; the first is the baseline: sd-vae, taesd, dc-ae (diffusers' classes), "
        "LiteVAE's S B M L, B as the paper's pseudocode has it, or model folders; also a,b,c",
    )
    modes: list[Literal["eager", "channels-last", "sliced", "compiled", "fast"]] = Field(
        ["eager", "fast"],
        min_length=1,
        description="of encoder and decoder; fast: as this project's jobs run them; sliced: PyTorch, channels last, "
        "image by image; compiled: the training steps, too; also a,b,c",
    )
    batch_sizes: list[Positive] = Field([1, 32], min_length=1, description="of encoder and decoder")
    resolutions: list[Annotated[int, Field(ge=32, multiple_of=32)]] = Field(
        [256], min_length=1, description="of encoder and decoder, in pixels"
    )
    precisions: list[Literal["fp32", "bf16"]] = Field(
        ["fp32"], min_length=1, description="of encoder and decoder; bf16 where hardware multiplies it"
    )
    repeats: Positive = Field(3, description="timed runs of each contender, in turn; medians count")
    source: PathText = Field("", description="folder of JPEGs, local; empty: scikit-image's photos")
    model: PathText = Field("", description="encode, moments: model folder; empty: LiteVAE-S with random weights")
    encode_images: Annotated[int, Field(ge=32)] = Field(
        256, description="encode, memory: images a run; a GPU takes thousands for a steady rate"
    )
    loader_rows: Annotated[int, Field(ge=1000)] = Field(20_000, description="loader: latents of 8 x 32 x 32")
    step_batch: Positive = Field(4, description="images a training step of the autoencoder")
    step_resolution: Annotated[int, Field(ge=32, multiple_of=32)] = Field(128, description="and their pixels")
    gpu: Literal["auto"] | bool = Field("auto", description="auto: where there is one")
    threads: Count = Field(0, description="CPU threads; 0: one for each core")
    out: PathText = Field(
        "",
        description="folder for benchmark.md and benchmark.json, with every sample; empty: <root>/benchmarks/<time>",
    )
    overwrite: bool = Field(
        False,
        description="replace the result of another config in `out`; false: refuse; that of the same config is always "
        "replaced",
    )

    @field_validator("parts", "models", "modes", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value
