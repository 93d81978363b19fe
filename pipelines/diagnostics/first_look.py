"""What can be known about the doctor's config without PyTorch and Ray, so that mistakes are answered at once."""

import os

from litevae.errors import UserError
from pipelines.diagnostics.config import Doctor
from pipelines.runtime import paths


def doctor(config: Doctor) -> None:
    """Check that the report can be written, before checks that take a minute.

    Raises:
        UserError: if its folder does not exist or can't be written, or a folder is where the file should be.
    """
    paths.output_path("root", config.root)
    if config.out:
        paths.output_path("out", config.out, remote=True)
    if not config.report:
        return
    report = os.path.abspath(config.report)
    if not os.path.isdir(os.path.dirname(report)):
        raise UserError(f"report={config.report}: its folder does not exist")
    if os.path.isdir(report):
        raise UserError(
            f"report={config.report} is a folder; give a file, such as {os.path.join(report, 'doctor.json')}"
        )
    paths.check_local("report", os.path.dirname(report))
