"""What can be known about a job on a cache without PyTorch and Ray, so that mistakes are answered at once."""

import os

from litevae import storage
from litevae.errors import UserError
from pipelines.data.first_look import check_model, check_source
from pipelines.encoding import at_work
from pipelines.encoding.config import Encode, Inspect, MaintainCache, Verify
from pipelines.runtime import paths
from pipelines.runtime.schema import Section


def check(config: Section) -> None:
    """Check what is known at once about a job on a cache.

    Raises:
        UserError: if the images, the model or the cache are not where the config says, or if the output can't be
            written.
    """
    if isinstance(config, Encode):
        check_source(config.source)
        check_model("model", config.model)
        at_work.check(paths.check_writable("out", config.out), config.takeover)
    elif isinstance(config, Verify | Inspect | MaintainCache):
        _check_cache(config.cache)
        if not isinstance(config, Verify) and config.model:
            check_model("model", config.model)
    if isinstance(config, MaintainCache):
        at_work.check(paths.output_path("cache", config.cache, remote=True), config.takeover)
    if isinstance(config, Inspect):
        paths.check_writable("out", paths.output_path("out", config.out))


def _check_cache(cache: str) -> None:
    """Check that a cache is given and, if it is local, that something was encoded there."""
    if not cache:
        raise UserError("give a cache folder")
    folder = storage.absolute(cache)
    if storage.is_remote(folder):
        return
    if not os.path.isdir(folder):
        raise UserError(f"latent cache {folder} does not exist")
    if "plan.json" not in os.listdir(folder):
        raise UserError(f"{folder} is not a latent cache: it has no plan.json")
