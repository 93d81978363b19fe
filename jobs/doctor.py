"""Check this machine or a Ray cluster before a long run, and say what to fix. The exit code is 1 if a check failed.

python jobs/doctor.py
python jobs/doctor.py root=/shared/runs source.uri=/data/photos model=runs/vae/model out=s3://bucket/cache ray.workers=8
"""

from collections.abc import Sequence

from pipelines.diagnostics.config import Doctor
from pipelines.runtime import cli

CONFIG = Doctor


def look(config: Doctor) -> None:
    from pipelines.diagnostics import first_look

    first_look.doctor(config)


def run(config: Doctor) -> None:
    # Imported here because it takes seconds, which --help and errors in the command line do without.
    from pipelines.diagnostics import doctor

    raise SystemExit(doctor.run(config))


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(CONFIG, run, argv, look=look)


if __name__ == "__main__":
    raise SystemExit(main())
