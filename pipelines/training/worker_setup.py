"""Data classes that the driver passes to the workers of a training."""

from dataclasses import dataclass
from typing import Any

from litevae.cache import Shape
from pipelines.data.source import Source
from pipelines.encoding.plan import CachePlan
from pipelines.runtime.mlflow_server import RunHandle


@dataclass(frozen=True, kw_only=True)
class TrainSetup:
    """What every worker of a training gets from the driver.

    Attributes:
        config: the run's config as plain values, as `values_to_keep` returns them.
        folder: the run's folder, in which the checkpoints are kept.
        data: URI of the images or latents, which names them in the tracked run.
        begin: folder of another run's checkpoint with which a new run begins; "": none.
        handle: the run in MLflow.
        threads: CPU threads of each worker.
        live: whether the driver writes to a terminal, where progress is shown as a bar.
        gpu: whether the workers have GPUs.
        nodes: the number of nodes in Ray. If there is more than one, Ray may give notice that some will be taken away.
    """

    config: dict[str, Any]
    folder: str
    data: str
    begin: str = ""
    handle: RunHandle
    threads: int = 1
    live: bool = False
    gpu: bool = False
    nodes: int = 1


@dataclass(frozen=True, kw_only=True)
class VaeSetup(TrainSetup):
    """What every worker of train_vae gets.

    Attributes:
        source: the training images.
        val: the validation images; None: no validation.
        lpips: whether the LPIPS term is on. It is off if its weights were not found.
    """

    source: Source
    val: Source | None
    lpips: bool


@dataclass(frozen=True)
class LatentData:
    """The origin of the latents of train_ldm.

    Attributes:
        data: URI of the cache, or of the images that are encoded during training.
        images: number of rows of the cache, or of images.
        shape: shape of a latent, (n_z, h, w).
        vae: the autoencoder's folder.
        fingerprint: hash of the autoencoder, as `litevae.any_autoencoder.fingerprint` returns it.
        about: a description of the latents for the log.
        cache: the cache that is read (mode=cache) or filled (mode=write-through); "" with mode=online.
        version: number of the manifest of the cache that is read; None in the other modes.
        source: the images of mode=online; None in the other modes.
        plan: the plan of the cache that mode=write-through fills; None in the other modes.
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
        latents: the origin of the latents.
    """

    latents: LatentData
