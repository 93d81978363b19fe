"""Evaluate an autoencoder's reconstructions, generated images, latents, or the cost of encoders and decoders.

python jobs/evaluate.py model=runs/vae/model source.uri=/data/photos transform.resolution=256
python jobs/evaluate.py samples samples source.uri=/data/photos transform.resolution=256   # FID, precision, recall, IS
python jobs/evaluate.py latents /data/latents                                              # MMD to a Gaussian
python jobs/evaluate.py complexity sd-vae,S,B,M,L batch_size=32                            # MACs, memory, images/s
"""

import sys

from pipelines.evaluation.config import Evaluate, EvaluateComplexity, EvaluateLatents, EvaluateSamples
from pipelines.runtime.cli import main
from pipelines.runtime.schema import Section

ACTIONS: dict[str, tuple[type[Section], str]] = {
    "samples": (EvaluateSamples, "samples.uri"),
    "latents": (EvaluateLatents, "cache"),
    "complexity": (EvaluateComplexity, "models"),
}


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


if __name__ == "__main__":
    action, *rest = sys.argv[1:] or [""]
    if action in ACTIONS:
        raise SystemExit(main(ACTIONS[action][0], run, rest, action, subject=ACTIONS[action][1]))
    raise SystemExit(main(Evaluate, run))
