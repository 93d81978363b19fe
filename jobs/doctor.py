"""Check this machine or a Ray cluster before a long run, and say what to fix. The exit code is 1 if a check failed.

python jobs/doctor.py
python jobs/doctor.py root=/shared/runs source.uri=/data/photos model=runs/vae/model out=s3://bucket/cache ray.workers=8
"""

from pipelines.diagnostics.config import Doctor
from pipelines.runtime.cli import main


def run(config: Doctor) -> None:
    # Imported here because it takes seconds, which --help and errors in the command line do without.
    from pipelines.diagnostics.doctor import run

    raise SystemExit(run(config))


if __name__ == "__main__":
    raise SystemExit(main(Doctor, run))
