"""What can be known about a training without PyTorch and Ray, so that mistakes are answered at once."""

import os
from pathlib import Path

from litevae import hub, storage, weight_files
from litevae.errors import UserError
from pipelines.data.first_look import check_file, check_model, check_source
from pipelines.runtime import mlflow_run, paths
from pipelines.training import may_change, run_folder
from pipelines.training.config import TrainLDM, TrainVAE
from pipelines.training.run_files import STATE, TRAINED, found_of


def train_vae(config: TrainVAE) -> TrainVAE:
    """Check what is known at once about a run of train_vae.

    Returns:
        The config, in which models of the Hugging Face Hub are named with their commit (see `_with_commits`).

    Raises:
        UserError: if the run's folder can't be written or holds another run, or if images, models, checkpoints or
            weights are not where the config says.
    """
    folder = paths.check_local("root", os.path.join(config.root, config.name))
    mlflow_run.check_place(config)
    check_source(config.data.train, "data.train")
    if config.data.val.uri:
        check_source(config.data.val, "data.val")
    config = _with_commits(config, folder)
    run_folder.check_run(folder, config, may_change.VAE)
    for name, model in models(config).items():
        check_model(name, model)
    check_weights(config, folder)
    # A run with its own checkpoints no longer needs `begin`, which the other run may have deleted (`loop.keep`).
    if config.begin and not checkpoints(folder) and not os.path.isfile(os.path.join(config.begin, STATE)):
        raise UserError(
            f"begin={config.begin} is not a checkpoint folder of a run (it has no {STATE}); give a folder "
            f"such as runs/<name>/checkpoint-000000800000 (loop.keep decides how many a run keeps)"
        )
    return config


def models(config: TrainVAE) -> dict[str, str]:
    """Return the models that a config names, by the dotted name of the field."""
    given = {"model.init": config.model.init, "model.init_decoder": config.model.init_decoder}
    return {name: model for name, model in (given | {"teacher": config.teacher}).items() if model}


def _with_commits(config: TrainVAE, folder: str) -> TrainVAE:
    """Return the config with the commit of each model that it names as on the Hugging Face Hub.

    So all nodes see the same weights, and so does a run that is resumed: where it names the model of the run in the
    folder without a commit, it keeps the one that this run began with.

    Raises:
        UserError: if a model can't be had.
    """
    before = run_folder.stored(folder) if found_of(folder, TRAINED) else {}
    found = {}
    for name, model in models(config).items():
        earlier = str(before.get(name, ""))
        if not hub.is_name(model) or model == earlier:  # a run of an older version kept the name without a commit
            continue
        if hub.is_pinned(earlier) and not hub.is_pinned(model) and earlier.partition("@")[0] == model.partition("@")[0]:
            found[name] = earlier
        else:
            check_model(name, model)  # its message names the field
            found[name] = hub.pinned(model)
    inner = {name.removeprefix("model."): model for name, model in found.items() if name != "teacher"}
    own = {"teacher": found["teacher"]} if "teacher" in found else {}
    return config.model_copy(update={"model": config.model.model_copy(update=inner), **own})


def train_ldm(config: TrainLDM) -> None:
    """Check what is known at once about a run of train_ldm.

    Raises:
        UserError: if the run's folder can't be written or holds another run, if the cache, images or autoencoder are
            not where the config says, or if the config contradicts itself.
    """
    folder = paths.check_local("root", os.path.join(config.root, config.name))
    mlflow_run.check_place(config)
    if len({f"{decay:g}" for decay in (config.loop.ema, *config.more_ema)}) <= len(config.more_ema):
        raise UserError(f"more_ema={config.more_ema} must not repeat a decay, nor that of loop.ema={config.loop.ema:g}")
    if config.mode == "cache":
        _check_cache(config.cache)
    else:
        check_source(config.data.source, "data.source")
        if not config.vae:
            raise UserError(f"vae is empty; mode={config.mode} needs an autoencoder: vae=FOLDER")
    if config.mode == "write-through":
        if not config.cache:
            raise UserError("cache is empty; give the folder that mode=write-through fills: cache=/data/cache")
        if config.data.crop != "center" or config.data.flip:
            raise UserError(
                "mode=write-through keeps one row an image: set data.crop=center and data.flip=false, or take "
                "mode=online"
            )
        paths.check_writable("cache", config.cache)
    if config.vae:
        check_model("vae", config.vae)
    run_folder.check_run(folder, config, may_change.LDM_CACHED if config.mode == "cache" else may_change.LDM)


def _check_cache(cache: str) -> None:
    """Check that a latent cache is given and, if it is local, that there is a finished one."""
    if not cache:
        raise UserError("cache is empty; give a latent cache: cache=/data/cache (jobs/encode_dataset.py writes one)")
    folder = storage.absolute(cache)
    if storage.is_remote(folder):
        return
    if not os.path.isdir(folder):
        raise UserError(f"cache={cache} does not exist; jobs/encode_dataset.py writes one")
    there = os.listdir(folder)
    if "manifest.json" not in there and "plan.json" not in there:
        raise UserError(f"cache={cache} is not a latent cache: it has no manifest.json")


def checkpoints(folder: str) -> list[Path]:
    """Return the state files of the checkpoints in a run's folder."""
    return found_of(folder, TRAINED[:1])


def check_weights(config: TrainVAE, folder: str) -> None:
    """Check that the files of weights that the loss needs are there; they are not read.

    Args:
        config: the run's config.
        folder: the run's folder.

    Raises:
        UserError: if a file that is named is missing, or one that is not named and that the run can't do without.
    """
    loss = config.loss
    for name in ("lpips", "features", "esrgan"):
        term = getattr(loss, name)
        if term.weight:
            check_file(f"loss.{name}.weights", term.weights)
    if loss.features.weight and not loss.features.weights:
        raise UserError("loss.features.weight needs the network's weights: loss.features.weights=FILE")
    if lpips_is_missing(config) and lpips_is_required(config, folder):
        raise UserError(
            f"LPIPS, which is part of the loss (loss.lpips.weight={loss.lpips.weight:g}), has no weights: "
            f"{weight_files.in_hub(weight_files.LPIPS[loss.lpips.net])} does not exist. Fetch them with "
            f"`make weights`, or name the file with loss.lpips.weights=FILE. Or train without LPIPS, which gives worse "
            f"images: loss.lpips.weight=0, or loss.lpips.required=false to use it only where its weights are"
        )


def lpips_is_missing(config: TrainVAE) -> bool:
    """Return whether LPIPS has a weight in the loss, but no file of its backbone's weights."""
    term = config.loss.lpips
    return bool(term.weight) and not term.weights and not weight_files.in_hub(weight_files.LPIPS[term.net]).is_file()


def lpips_is_required(config: TrainVAE, folder: str) -> bool:
    """Return whether a run is refused where LPIPS' weights are missing.

    A run that was begun before there was this choice goes on as it was.
    """
    older = bool(found_of(folder, TRAINED)) and "loss.lpips.required" not in run_folder.stored(folder)
    return config.loss.lpips.required and not older
