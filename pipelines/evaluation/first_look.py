"""What can be known about an evaluation or a sampling without PyTorch and Ray, so that mistakes are answered at once.

Each function returns where the results will be.
"""

import os

from litevae import storage
from litevae.errors import UserError
from pipelines.data.first_look import check_file, check_folder, check_model, check_source
from pipelines.evaluation.config import Evaluate, EvaluateComplexity, EvaluateLatents, EvaluateSamples, Sample
from pipelines.runtime import mlflow_run, paths
from pipelines.runtime.outputs import Output, check_output, name_of

RESULT = "metrics.json"


def evaluate(cfg: Evaluate) -> Output:
    """Check what is known at once about an evaluation of reconstructions.

    Raises:
        UserError: if the model, the images or files of weights are not there, or the output folder can't be written or
            holds another evaluation.
    """
    check_model("model", cfg.model)
    check_source(cfg.source)
    for name in ("lpips_weights", "inception", "squeezenet", "backbone"):
        check_file(name, getattr(cfg, name))
    return _output(cfg, f"reconstruction-{name_of(cfg.model)}-{cfg.transform.resolution}px")


def samples(cfg: EvaluateSamples) -> Output:
    """Check what is known at once about an evaluation of generated images; raises as `evaluate`."""
    if not cfg.samples.uri:
        raise UserError("samples.uri is empty; give the folder of a sample job: evaluate.py samples FOLDER")
    check_source(cfg.samples, "samples")
    check_source(cfg.source)
    for name in ("inception", "squeezenet", "backbone"):
        check_file(name, getattr(cfg, name))
    paths.check_local("root", cfg.root)  # features of the reference set are kept there
    return _output(cfg, f"samples-{name_of(cfg.samples.uri)}-{cfg.transform.resolution}px")


def latents(cfg: EvaluateLatents) -> Output:
    """Check what is known at once about an evaluation of latents.

    Raises:
        UserError: if the cache is not there, or the output folder can't be written or holds another evaluation.
    """
    if not cfg.cache:
        raise UserError("cache is empty; give a latent cache: evaluate.py latents FOLDER")
    folder = storage.absolute(cfg.cache)
    if not storage.is_remote(folder) and not os.path.isdir(folder):
        raise UserError(f"cache={cfg.cache}: latent cache {folder} does not exist; jobs/encode_dataset.py writes one")
    return _output(cfg, f"latents-{name_of(cfg.cache)}")


def complexity(cfg: EvaluateComplexity) -> Output:
    """Check what is known at once about a measurement of cost.

    Raises:
        UserError: if the output folder can't be written or holds another measurement.
    """
    return _output(cfg, f"complexity-{cfg.part}-{cfg.resolution}px")


def sample(cfg: Sample) -> str:
    """Check what is known at once about a job that draws images, and return its output folder.

    Raises:
        UserError: if the model is not there, or the output folder can't be written.
    """
    if not cfg.model:
        raise UserError("model is empty; give the folder of a latent diffusion model: model=runs/ldm/model")
    check_folder("model", cfg.model, "runs/ldm/model")
    if not os.path.isfile(os.path.join(cfg.model, "ldm.json")):
        raise UserError(
            f"model: {cfg.model} holds no latent diffusion model: it has no ldm.json (train_ldm writes it last)"
        )
    mlflow_run.check_place(cfg)
    return paths.check_writable("out", cfg.out)


def _output(cfg: Evaluate | EvaluateSamples | EvaluateLatents | EvaluateComplexity, name: str) -> Output:
    mlflow_run.check_place(cfg)
    return check_output(cfg, os.path.join(cfg.root, "evaluations", name), RESULT)
