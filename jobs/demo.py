"""Make a trained LiteVAE, a latent cache, a diffusion model, pictures and numbers from photos (`make demo`).

python jobs/demo.py root=demo
"""

from collections.abc import Sequence

from pipelines.diagnostics.config import Demo
from pipelines.runtime import cli

CONFIG = Demo


def run(config: Demo) -> None:
    # Imported here because it takes seconds, which --help and errors in the command line do without.
    from pipelines.diagnostics.demo import demo

    demo(config)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(CONFIG, run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
