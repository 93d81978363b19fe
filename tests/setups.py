"""The setups that training workers get, for tests that act as a worker."""

import zipfile
from pathlib import Path

from pipelines.runtime.mlflow_server import RunHandle
from pipelines.training import ldm
from pipelines.training.run_files import STATE
from pipelines.training.worker_setup import LatentData, LdmSetup, VaeSetup


def untracked(folder="") -> RunHandle:
    """Return the handle of a run without an MLflow server: its metrics are kept in a file in the folder."""
    return RunHandle("", None, "test", str(folder))


def leave_checkpoint(folder) -> Path:
    """Leave the file of a checkpoint in a run's folder, without a state in it, and return its folder."""
    checkpoint = Path(folder, "checkpoint-000000000008")
    checkpoint.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(checkpoint / STATE, "w") as file:  # as PyTorch's own are
        file.writestr("data.pkl", b"")
    return checkpoint


def vae_setup(source, val=None, folder="", **more) -> VaeSetup:
    given = {"config": {}, "data": source.uri, "handle": untracked(folder), "lpips": False}
    return VaeSetup(folder=str(folder), source=source, val=val, **given | more)


def ldm_setup(config, folder="", **more) -> LdmSetup:
    """Return the setup for the config's mode. With mode=write-through the cache that the run fills is started, too."""
    kinds = {"cache": ldm.cached_latents, "online": ldm.online_latents, "write-through": ldm.write_through_latents}
    latents: LatentData = kinds[config.mode](config)
    if config.mode == "write-through":
        latents = ldm.begin_cache(config, latents)
    given = {"config": {}, "data": latents.data, "handle": untracked(folder)}
    return LdmSetup(folder=str(folder), latents=latents, **given | more)
