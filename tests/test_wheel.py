"""The wheel, installed in an environment without the repository: what it holds, and that library and jobs work there.

Nothing is downloaded: the environment sees the packages that the project depends on where the tests have them, but not
the project itself.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.commands import REPO

pytestmark = pytest.mark.slow

SOURCES = ("litevae", "pipelines", "jobs", "pyproject.toml", "setup.py", "README.md", "LICENSE")
DATA = {"py.typed", "native.cpp", "compare.html", "paper.yaml", *(f.name for f in (REPO / "jobs/configs").iterdir())}

USE = """
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import litevae

assert sys.prefix in litevae.__file__, litevae.__file__
torch.manual_seed(0)
size = {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1}
litevae.LiteVAE(size="S", **size).save_pretrained("model")
Path("photos").mkdir()
for n in range(4):
    pixels = np.random.default_rng(n).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(f"photos/{n}.png")
"""

READ = """
import numpy as np
import torch
from PIL import Image

import litevae
from litevae.cache import LatentCache

cache = LatentCache("cache")
assert len(cache) == 4
model = litevae.load_autoencoder("model")
for n in range(4):
    pixels = torch.from_numpy(np.asarray(Image.open(f"photos/{cache.row(n)['id']}")).copy())
    with torch.no_grad():
        mean = model.encode(pixels.permute(2, 0, 1)[None] / 127.5 - 1).latent_dist.mean
    torch.testing.assert_close(cache.latents([n], 0, 0, "mean", normalize=False), mean, atol=1e-2, rtol=1e-2)
print("read")
"""


def done(*words, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [*map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from the source distribution, as `python -m build` does; and that one."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        copy = shutil.copytree if (REPO / name).is_dir() else shutil.copy
        copy(REPO / name, source / name)
    done(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=source)
    assert len(list(out.glob("*.tar.gz"))) == 1
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The `bin` of an environment with the wheel and the dependencies, and without the repository."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    done(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps"]
    done(*pip, wheel, cwd=folder.parent)
    # The other packages come after that: pip must not take the project's installation beside them for this one. Files
    # .pth in that folder are not read, so that the project itself stays out.
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


@pytest.fixture
def place(tmp_path) -> Path:
    """A working folder with a package and a module of other people, which must not be taken for the project's."""
    (tmp_path / "pipelines").mkdir()
    for name in ("pipelines/__init__.py", "jobs.py"):
        (tmp_path / name).write_text("raise ImportError('this is not of litevae')\n")
    return tmp_path


def test_the_wheel_takes_no_name_but_litevaes(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        code = [archive.read(name).decode() for name in names if name.endswith(".py")]
        (top,) = (archive.read(name).decode().split() for name in names if name.endswith("top_level.txt"))
    packages = {name.partition("/")[0] for name in names}
    assert {name for name in packages if not name.endswith(".dist-info")} == {*top} == {"litevae", "litevae_jobs"}
    assert not [line for text in code for line in re.findall(r"^ *(?:from|import) (?:jobs|pipelines)\b.*", text, re.M)]
    held = {name.removeprefix("litevae_jobs/") for name in names}
    for package in ("litevae", "pipelines", "jobs"):
        assert {str(path.relative_to(REPO)) for path in (REPO / package).rglob("*.py")} <= held
    assert {Path(name).name for name in names} >= DATA


def test_an_editable_install_leaves_the_packages_as_they_are(tmp_path):
    for name in SOURCES:
        (tmp_path / name).symlink_to(REPO / name)
    code = "import sys; from setuptools import build_meta; print(build_meta.build_editable('out'))"
    (tmp_path / "out").mkdir()
    done(sys.executable, "-c", code, cwd=tmp_path)
    (made,) = (tmp_path / "out").glob("*.whl")
    with zipfile.ZipFile(made) as archive:
        (finder,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("_finder.py"))
    (mapping,) = (line for line in finder.splitlines() if line.startswith("MAPPING"))
    found = yaml.safe_load(mapping.partition(" = ")[2])
    assert found == {name: str(REPO / name) for name in ("jobs", "litevae", "pipelines")}


def test_the_command_says_what_there_is(installed, place):
    assert "\n  train-vae " in done(installed / "litevae", cwd=place)
    assert done(installed / "litevae", "--version", cwd=place).startswith("litevae ")
    assert "data.train.uri" in done(installed / "litevae", "completion", "bash", cwd=place)
    presets = done(installed / "litevae", "train-vae", "--config", "small", "--print-config", cwd=place)
    assert yaml.safe_load(presets)["model"]


def test_the_library_and_a_job_on_rays_workers(installed, place):
    (place / "use.py").write_text(USE)
    (place / "read.py").write_text(READ)
    safe = [installed / "python", "-P"]  # or the folder of the script would come first, and what lies there is found
    done(*safe, "use.py", cwd=place)
    settings = ["transform.resolution=32", "rows_per_shard=2", "batch_size=2", "precision=fp32", "kernels=torch"]
    here = ["ray.gpu=false", "ray.cpus_per_worker=1", "tracking.enabled=false", "root=runs"]
    words = ["source.uri=photos", "model=model", "out=cache", *settings, *here]
    shown = done(installed / "litevae", "encode-dataset", *words, cwd=place)
    assert "images encoded        4" in shown
    assert "cache: sound" in done(installed / "litevae", "encode-dataset", "verify", "cache", cwd=place)
    assert done(*safe, "read.py", cwd=place) == "read\n"
