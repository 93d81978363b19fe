"""Make a trained LiteVAE, a latent cache, a diffusion model, pictures and numbers from photos (`make demo`).

python jobs/demo.py root=demo
"""

from pipelines.diagnostics.demo import Demo, demo
from pipelines.runtime.cli import main

if __name__ == "__main__":
    raise SystemExit(main(Demo, demo))
