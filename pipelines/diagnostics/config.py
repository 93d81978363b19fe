"""Config schema of the job doctor."""

from typing import Annotated

from pydantic import Field

from pipelines.data.config import Source, Transform
from pipelines.runtime.schema import Job, Positive


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
