"""What the workers of a training get from the driver."""

from dataclasses import dataclass
from typing import Any

from litevae.cache import Shape
from pipelines.data.source import Source
from pipelines.encoding.plan import CachePlan
from pipelines.runtime.mlflow_server import RunHandle


@dataclass(frozen=True, kw_only=True)
class TrainSetup:
    """What every worker of a training gets.

    Attributes:
        config: the run's config as plain values, as `values_to_keep` gives them.
        folder: the run's folder, which takes the checkpoints.
        data: URI of the images or latents, by which the tracked run names them.
        begin: folder of another run's checkpoint that a new run begins with; "": none.
        handle: the tracked run.
        threads: CPU threads of each worker.
        live: whether the driver writes to a terminal, where progress is a bar.
        nodes: how many nodes Ray knows; of more than one, some may be taken away with a notice.
    """

    config: dict[str, Any]
    folder: str
    data: str
    begin: str = ""
    handle: RunHandle
    threads: int = 1
    live: bool = False
    nodes: int = 1


@dataclass(frozen=True, kw_only=True)
class VaeSetup(TrainSetup):
    """What every worker of train_vae gets.

    Attributes:
        source: the training images.
        val: the validation images, where there are any.
        lpips: whether the LPIPS term is on: its weights were found.
    """

    source: Source
    val: Source | None
    lpips: bool


@dataclass(frozen=True)
class LatentData:
    """Where the latents of train_ldm come from.

    Attributes:
        data: URI of the cache, or of the images that are encoded on the way.
        images: rows of the cache, or images.
        shape: of a latent, (n_z, h, w).
        vae: the autoencoder's folder.
        fingerprint: the autoencoder's, as `litevae.autoencoder.fingerprint` gives it.
        about: the same in words, for people.
        cache: the cache that is read (mode=cache) or filled (write-through).
        version: number of the cache's manifest, where it is read.
        source: the images of mode=online.
        plan: that of the cache which mode=write-through fills.
    """

    data: str
    images: int
    shape: Shape
    vae: str
    fingerprint: str
    about: str
    cache: str = ""
    version: int | None = None
    source: Source | None = None
    plan: CachePlan | None = None


@dataclass(frozen=True, kw_only=True)
class LdmSetup(TrainSetup):
    """What every worker of train_ldm gets.

    Attributes:
        latents: where they come from.
    """

    latents: LatentData
