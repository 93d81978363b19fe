"""The command `litevae`, also `python -m litevae`: it runs the jobs, if what they need is installed."""

import sys
from importlib import import_module
from importlib.util import find_spec

NEEDED = ("pydantic", "yaml", "ray", "mlflow")  # modules of the extra `jobs` that no job does without


def main() -> int:
    """Run the job that the command line names, and return its exit code."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        print(f"error: the jobs need {', '.join(missing)}: pip install 'litevae[jobs]'", file=sys.stderr)
        return 2
    return int(import_module("jobs.main").main())


if __name__ == "__main__":
    raise SystemExit(main())
