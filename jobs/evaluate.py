"""Evaluate an autoencoder's reconstructions, generated images, latents, or the cost of encoders and decoders.

python jobs/evaluate.py model=runs/vae/model source.uri=/data/photos transform.resolution=256
python jobs/evaluate.py samples samples source.uri=/data/photos transform.resolution=256   # FID, precision, recall, IS
python jobs/evaluate.py latents /data/latents                                              # MMD to a Gaussian
python jobs/evaluate.py complexity sd-vae,S,B,M,L batch_size=32                            # MACs, memory, images/s
"""

from collections.abc import Sequence

from pipelines.evaluation.config import Evaluate, EvaluateComplexity, EvaluateLatents, EvaluateSamples
from pipelines.runtime import cli
from pipelines.runtime.cli import Action
from pipelines.runtime.schema import Section

CONFIG = Evaluate
ACTIONS = {
    "samples": Action(EvaluateSamples, "samples.uri"),
    "latents": Action(EvaluateLatents, "cache"),
    "complexity": Action(EvaluateComplexity, "models"),
}


def look(config: Section) -> None:
    from pipelines.evaluation import first_look

    looks = {
        Evaluate: first_look.evaluate,
        EvaluateSamples: first_look.samples,
        EvaluateLatents: first_look.latents,
        EvaluateComplexity: first_look.complexity,
    }
    looks[type(config)](config)  # type: ignore[operator]


def run(config: Section) -> None:
    # Imported here because it takes seconds, which --help and errors in the command line do without.
    from pipelines.evaluation import (
        cost,
        generated,
        latent_mmd,
        reconstruction,
    )

    does = {
        Evaluate: reconstruction.evaluate,
        EvaluateSamples: generated.samples,
        EvaluateLatents: latent_mmd.mmd,
        EvaluateComplexity: cost.complexity,
    }
    does[type(config)](config)  # type: ignore[operator]


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(CONFIG, run, argv, actions=ACTIONS, look=look)


if __name__ == "__main__":
    raise SystemExit(main())
