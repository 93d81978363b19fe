"""Config schema of the job doctor."""

from typing import Annotated, ClassVar

from pydantic import Field

from pipelines.data.config import Source, Transform
from pipelines.runtime.schema import Job, PathText, Positive, Section, Shown


class Doctor(Job):
    """Check this machine, or the Ray cluster, before a long run: what is wrong with it, and what to do.

    Exit code 0: nothing failed; 1: something did. What is left empty is not looked at.
    """

    shown: ClassVar[Shown] = Shown(
        groups={
            "What is looked at, where it is given": {
                "source.uri": "/data/photos",
                "model": "runs/vae/model",
                "out": "s3://bucket/cache",
                "root": "/shared/runs",
            },
            "How": {
                "ray.workers": "8",
                "transform.resolution": "512",
                "images": "256",
                "batch_size": "64",
                "limit": "300",
                "report": "/tmp/doctor.json",
            },
        },
    )

    source: Source = Field(Source(), description="images: are they there on every node, and how fast are they decoded?")
    transform: Transform = Field(Transform(), description="what they are decoded and encoded at")
    model: PathText = Field("", description="model folder: is it the same on every node, and how fast does it encode?")
    out: PathText = Field(
        "", description="folder of a latent cache to be, local or s3://: can nodes write it together?"
    )
    images: Positive = Field(64, description="images that every node decodes, evenly spaced")
    batch_size: Positive = Field(32, description="images of the forward passes that every node is timed with")
    limit: Annotated[int, Field(ge=5)] = Field(120, description="seconds a check may take, after which it has failed")
    report: PathText = Field("", description="file for all findings as JSON")


class Demo(Job):
    """Photos in, a trained autoencoder, a latent cache, a diffusion model, pictures and numbers out."""

    shown: ClassVar[Shown] = Shown(
        groups={"The demo": {"root": "/data/demo", "preset": "demo-gpu", "ray.workers": "2", "ray.gpu": "false"}}
    )

    root: PathText = Field("demo", description="folder for all that the demo makes; the same folder again resumes")
    preset: PathText = Field(
        "", description="a preset or YAML file in place of `demo` (`demo-gpu` where there is a GPU)"
    )


class Weights(Section):
    """Fetch the published weights of LPIPS (VGG16, 528 MB) and of FID (Inception, 91 MB) into torch hub's folder.

    Files that are there already are left as they are. Without a network, each file's address and place are printed.
    """

    force: bool = Field(False, description="fetch again what is there, but is not the published file")
