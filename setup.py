"""The packages of the wheel, which pyproject.toml can't describe.

In the repository the jobs are the packages `jobs` and `pipelines`. These names are too common to be taken in
everybody's environment, so the wheel holds them as `litevae_jobs.jobs` and `litevae_jobs.pipelines`, and its modules
import each other by these names. They are real modules there, found in every process without a changed `sys.path`: also
in the workers of Ray, which import by name what they are sent, and also where another package is called `pipelines`.

An editable install (`pip install -e .`) leaves everything as it is in the repository.
"""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HOME = "litevae_jobs"
NESTED = ("jobs", "pipelines")
EDITABLE = "editable_wheel" in sys.argv  # the command that `pip install -e` gives
PREFIX = "" if EDITABLE else f"{HOME}."
# The ways in which the code names a module: `from pipelines.data import source`, and "pipelines.benchmark.models" or
# f"jobs.{name}" for `import_module`.
NAMED = re.compile(rf"""(^\s*from |["'])({"|".join(NESTED)})(?=[. ])""", re.MULTILINE)


class BuildPy(build_py):
    """Copies the modules, and changes the names of nested packages in them."""

    def run(self) -> None:
        if not self.editable_mode:  # all of the folder goes into the wheel, also what an earlier build has left there
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        if not self.editable_mode:
            about = '"""The jobs of litevae, which the command `litevae` runs, and their pipelines on Ray."""\n'
            Path(self.build_lib, HOME, "__init__.py").write_text(about)

    def build_module(self, module: str, module_file: str, package: str) -> Any:
        built = super().build_module(module, module_file, package)
        if not self.editable_mode:
            file = Path(built[0])
            file.write_text(NAMED.sub(rf"\g<1>{HOME}.\g<2>", file.read_text("utf-8")), "utf-8")
        return built


nested = find_packages(include=[*NESTED, *(f"{name}.*" for name in NESTED)])
setup(
    packages=find_packages(include=["litevae", "litevae.*"]) + [PREFIX + name for name in nested],
    package_dir={} if EDITABLE else {f"{HOME}.{name}": name for name in NESTED},
    package_data={
        "litevae": ["native.cpp", "py.typed"],
        f"{PREFIX}jobs": ["configs/*.yaml"],
        f"{PREFIX}pipelines.experiments": ["compare.html", "paper.yaml"],
    },
    include_package_data=False,  # what is named above is all
    cmdclass={"build_py": BuildPy},
)
