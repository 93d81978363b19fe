"""Every command and every piece of Python in the pages: its syntax, its options, and at a tiny size what it does."""

import io
import os
import re
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from skimage import data as photos

from pipelines.benchmark.config import Benchmark
from pipelines.diagnostics.config import Doctor
from pipelines.diagnostics.demo import Demo
from pipelines.encoding import speed
from pipelines.encoding.config import Encode, Inspect, Repair, Retry, Verify
from pipelines.evaluation.config import Evaluate, EvaluateComplexity, EvaluateLatents, EvaluateSamples, Sample
from pipelines.experiments.config import Compare, Sweep
from pipelines.runtime import cluster
from pipelines.runtime.cli import load
from pipelines.runtime.commands import SCRIPTS
from pipelines.runtime.schema import fields_of
from pipelines.training import forecast, launch, loop
from pipelines.training.config import TrainLDM, TrainVAE
from tests import pages
from tests.benchmarks.config import Study
from tests.commands import REPO, Result, run_in_this_process
from tests.in_process import as_worker, in_process
from tests.networks import save_squeezenet
from tests.pages import Block, commands, expanded_by_zsh, has_comment, lines_of

ALL = [block for path in pages.PAGES if path.is_file() for block in pages.blocks(path.read_text(), path.name)]
SHELL = [block for block in ALL if block.language in pages.SHELLS]
JOBS = {name: f"{script.module}.py" for name, script in SCRIPTS.items()}  # by their names in the command `litevae`
NO_JOBS = ("completion", "help")  # what else that command does
# Jobs that only parse their options here, because each takes long and is run as a whole by another test.
PARSED_ONLY = {
    "sweep.py": "tests/pipelines/experiments/test_sweep.py",
    "compare_runs.py": "tests/pipelines/experiments/test_compare.py",
    "benchmark.py": "tests/pipelines/benchmark",
    "doctor.py": "tests/jobs/test_doctor.py",
    "demo.py": "tests/jobs/test_demo.py",
    "fetch_weights.py": "it downloads hundreds of megabytes",
    "evaluate.py complexity": "tests/pipelines/evaluation/test_cost.py",
}
# What makes a job tiny, by its script and its action. It stands behind what the page says.
TINY = {
    "train_vae.py": (
        "'stages=[{resolution: 64, images: 8, batch_size: 4}]' model.decoder.channels=[8,8,8,8] model.decoder.layers=1 "
        "loss.lpips.weight=0 loss.adversarial.channels=8 data.loaders=0 data.max_bad=0.5 val_images=2 "
        "loop.compile=false loop.precision=fp32 optim.accumulate=1 begin= model.init= yes=true"
    ),
    "encode_dataset.py": (
        "transform.resolution=64 rows_per_shard=8 batch_size=4 kernels=torch compile=false precision=fp32 "
        "error_budget=1 yes=true"
    ),
    "encode_dataset.py verify": "threads=1",
    "encode_dataset.py repair": "",
    "encode_dataset.py retry": "",
    "encode_dataset.py inspect": "shards=1 rows=1",
    "train_ldm.py": (
        "network=tiny images=8 batch_size=4 sample_images=0 data.resolution=64 data.loaders=0 data.calibrate=4 "
        "data.rows_per_shard=8 loop.compile=false loop.precision=fp32 optim.accumulate=1 yes=true"
    ),
    "sample.py": "images=12 steps=2 batch_size=4 precision=fp32",
    "evaluate.py": "transform.resolution=64 images=4 batch_size=2 precision=fp32 mmd_images=0 resolutions=[]",
    "evaluate.py samples": (
        "transform.resolution=64 images=12 reference_images=12 batch_size=4 squeezenet=squeezenet.pth"
    ),
    "evaluate.py latents": "images=4 subset=2",
}
ALONE = ("ray.workers=1", "ray.min_workers=0", "ray.gpu=false", "ray.cpus_per_worker=1", "ray.wait=0")
WITHOUT_RAY = ("encode_dataset.py verify", "encode_dataset.py inspect", "evaluate.py latents")
WITHOUT_TRACKING = ("encode_dataset.py verify", "encode_dataset.py inspect")
SHOWS = ("--help", "-h", "--help-all", "--print-config")  # options with which a job does nothing else


def script_of(words: list[str]) -> tuple[str, list[str]] | None:
    """Return a job's script and its arguments, if these words run a job by its file or by the console script."""
    if len(words) > 1 and Path(words[0]).name in ("python", "python3") and words[1].startswith("jobs/"):
        return words[1].removeprefix("jobs/"), words[2:]
    if len(words) > 1 and words[0] == "litevae" and not words[1].startswith("-") and words[1] not in NO_JOBS:
        return JOBS.get(words[1], f"{words[1]}.py"), words[2:]
    return None


def parsed(script: str, words: list[str]) -> Result:
    """Give a job its command line, without running it: it prints its config or its help."""
    for place, word in enumerate(words[:-1]):
        if word == "--config" and words[place + 1].endswith(".yaml"):  # a file that the reader has, and we do not
            words = [*words[:place], *words[place + 2 :]]
    shows = any(word in SHOWS for word in words)
    return run_in_this_process(f"jobs/{script}", *words, *[] if shows else ["--print-config"])


def all_commands(block: Block) -> Iterator[list[str]]:
    """Yield the commands of a block, and the ones that other commands are given behind `--`, as by `ray job submit`."""
    for line in lines_of(block):
        for words in commands(line):
            yield words
            if "--" in words:
                yield words[words.index("--") + 1 :]


def wrong_options(block: Block) -> list[str]:
    """Return the commands of a block that their jobs do not understand, with what these say."""
    wrong = []
    for words in all_commands(block):
        if words[1:3] == ["-m", "tests.benchmarks"]:
            load(Study, None, words[3:])
        if (job := script_of(words)) is None:
            continue
        script, arguments = job
        if not (REPO / "jobs" / script).is_file():
            wrong.append(f"{shlex.join(words)}: there is no jobs/{script}")
        elif (done := parsed(script, arguments)).code:
            wrong.append(f"{shlex.join(words)}: {done.output}")
    return wrong


def unknown_targets(block: Block) -> list[str]:
    """Return the `make` commands of a block whose target the Makefile does not have."""
    wrong = []
    for words in all_commands(block):
        if words[0] == "make":
            options = [word for word in words[1:] if not word.startswith("-")]
            done = subprocess.run(["make", "-n", *options], cwd=REPO, capture_output=True, text=True)
            wrong += [f"{shlex.join(words)}: {done.stderr}"] if done.returncode else []
    return wrong


# --- syntax and options -----------------------------------------------------------------------------------------


def test_there_are_commands_and_python_in_the_pages():
    assert len(SHELL) > 40
    assert {"README.md", "cluster.md", "sources.md", "CONTRIBUTING.md"} <= {block.page for block in SHELL}
    assert any(block.language == "python" for block in ALL)
    assert {words[0] for block in SHELL for words in all_commands(block)} >= {"python", "make", "ray", "kubectl"}


def test_commands_are_fenced():
    assert not [str(block) for block in ALL if not block.fenced]


def test_what_is_not_run_says_why():
    assert not [str(block) for block in ALL if block.why_not is not None and len(block.why_not.split()) < 2]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shells_can_read_the_commands(shell):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    for block in SHELL:
        script = "\n".join(lines_of(block)) if block.language == "console" else block.text
        done = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}: {done.stderr}"


def test_zsh_passes_on_what_is_typed():
    found = {str(block): [word for line in lines_of(block) for word in expanded_by_zsh(line)] for block in SHELL}
    scripts = {str(block) for block in SHELL if block.why_not and "() {" in block.text}  # a function, not only words
    assert not {place: words for place, words in found.items() if words and place not in scripts}


def test_commands_can_be_pasted_into_zsh():
    lines = {
        str(block): [line for line in lines_of(block) if has_comment(line)] for block in SHELL if not block.why_not
    }
    assert not {place: found for place, found in lines.items() if found}, "zsh passes `# ...` on as arguments"


@pytest.mark.parametrize("page", sorted({block.page for block in SHELL}))
def test_every_option_exists(page):
    assert not [line for block in SHELL if block.page == page for line in wrong_options(block)]


@pytest.mark.parametrize("page", sorted({block.page for block in SHELL}))
def test_every_target_of_make_exists(page):
    assert not [line for block in SHELL if block.page == page for line in unknown_targets(block)]


CONFIGS = (
    *(TrainVAE, TrainLDM, Encode, Verify, Repair, Retry, Inspect, Sample, Evaluate, EvaluateSamples, EvaluateLatents),
    *(EvaluateComplexity, Sweep, Compare, Benchmark, Doctor, Demo, Study),
)
FREE = ("space", "train_vae", "evaluate", "evaluate_complexity", "encode_dataset", "train_ldm", "sample")  # of sweeps
# Names in examples of data, of arguments in Python, and of a field that the design adds.
NO_FIELDS = {
    "key",
    "breed",
    "year",
    "weights_only",
    "class_labels",
    "guidance_scale",
    "version",
    "loss.charbonnier.weight",
}


def test_fields_that_are_named_in_the_text_exist():
    known = {name for config in CONFIGS for name, *_ in fields_of(config)}
    known |= {name.rpartition(".")[2] for name in known}  # `r1` in a line about the section loss.adversarial
    known |= {".".join(name.split(".")[:depth]) for name in known for depth in (1, 2)}  # sections
    wrong = []
    dicts = (*FREE, "ray.worker_labels", "ray.decode_labels", "tracking.tags")
    for page in pages.PAGES:
        code = re.findall(
            r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.M | re.S)
        )
        for key in re.findall(r"(?<![\w./?-])([a-z][a-z0-9_]*(?:\.[a-z0-9_]+)*)=(?!=)", "\n".join(code)):
            if not any(key.startswith(f"{name}.") for name in dicts) and key not in known | NO_FIELDS:
                wrong.append(f"{page.name}: {key}")
    assert not wrong, "; ".join(wrong)


def test_python_can_be_compiled():
    for block in ALL:
        if block.language == "python":
            compile(block.text, str(block), "exec")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("python jobs/train_vae.py data.train.url=/data/photos", "data.train.url"),
        ("make setup && python jobs/sample.py model=a stepps=2", "stepps"),
        ("ray job submit --working-dir . -- python jobs/encode_dataset.py sorce.uri=a", "sorce"),
        ("python jobs/train_everything.py", "train_everything.py"),
        ("litevae evaluate samples a sampels=2", "sampels"),
        ("python jobs/encode_dataset.py verify /c --force", "--force"),
    ],
)
def test_a_wrong_option_in_a_page_is_noticed(command, says):
    (block,) = pages.blocks(f"```bash\n{command}\n```\n")
    (line,) = wrong_options(block)
    assert says in line


def test_a_wrong_target_in_a_page_is_noticed():
    (block,) = pages.blocks("```bash\nmake lint && make everything PART=1/2\n```\n")
    (line,) = unknown_targets(block)
    assert "everything" in line


# --- run ----------------------------------------------------------------------------------------------------------


@contextmanager
def jobs_in_process() -> Iterator[None]:
    """Run jobs without Ray inside the block; Ray Train's worker is this process."""

    def start(config, *more, **others):
        return cluster.Placement(workers=1, gpu=False, threads=1)

    def fit(worker, setup, placement, config, callbacks=()):
        result = worker({"setup": replace(setup, threads=1, live=False, nodes=1)})
        return result | {"model": os.path.join(setup.folder, "model"), "tracking": "none"}

    def work(task, config, name, setup):
        with as_worker():
            return loop.run(task(config, setup, 0, 1, torch.device("cpu")), name, config, setup, 0, 1)

    with pytest.MonkeyPatch.context() as patch, in_process():
        patch.setattr(cluster, "start", start)
        patch.setattr(launch, "fit", fit)
        patch.setattr(launch, "work", work)
        patch.setattr(
            forecast, "say_duration", lambda *given, **more: None
        )  # it measures steps, which has its own tests
        patch.setattr(speed, "announce", lambda *given, **more: None)  # likewise
        yield


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the data that the pages speak of: a few small photos, with texts beside them."""
    tile = photos.astronaut()
    for n in range(16):
        picture = Image.fromarray(tile[8 * n : 8 * n + 96, 16 * n : 16 * n + 96])
        for folder in FOLDERS:
            path = tmp_path / folder / "ab"[n % 2] / f"{n:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
            path.with_suffix(".txt").write_text(f"photo {n}")
    files = sorted((tmp_path / "data/photos").rglob("*.png"))
    (tmp_path / "data/list.csv").write_text(
        "path,caption\n" + "".join(f"{file},photo {n}\n" for n, file in enumerate(files))
    )
    table = {"jpg": [file.read_bytes() for file in files], "caption": [file.stem for file in files]}
    (tmp_path / "data/parquet").mkdir()
    pq.write_table(pa.table(table | {"label": list(range(len(files)))}), tmp_path / "data/parquet/0.parquet")
    (tmp_path / "data/tars").mkdir()
    with tarfile.open(tmp_path / "data/tars/000.tar", "w") as tar:
        for n, file in enumerate(files):
            for suffix, data in (("png", file.read_bytes()), ("txt", b"a photo"), ("json", b'{"width": 96}')):
                member = tarfile.TarInfo(f"{n:04d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    save_squeezenet(tmp_path / "squeezenet.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


FOLDERS = ("data/photos", "data/photos-val", "data/set/train", "data/set/val", "data/ffhq")


def here(text: str, place: Path) -> str:
    """Return a command's word, or a piece of Python, with the pages' folders replaced by those of this test."""
    return re.sub(r"(?<![\w.])/(?=(data|scratch|shared)/)", f"{place}/", text).replace(
        "s3://bucket/", f"{place}/bucket/"
    )


def tiny(script: str, words: list[str], place: Path) -> list[str] | None:
    """Return a job's arguments with everything made small; None for a job that only parses its options here."""
    action = words[0] if words and f"{script} {words[0]}" in TINY | dict.fromkeys(PARSED_ONLY) else ""
    what = f"{script} {action}".strip()
    if what in PARSED_ONLY:
        return None
    more = shlex.split(TINY[what])
    more += [] if what in WITHOUT_RAY else ALONE
    more += [] if what in WITHOUT_TRACKING else ["tracking.enabled=false"]
    return [*(here(word, place) for word in words), *more]


def run_block(block: Block, place: Path, names: dict[str, object]) -> None:
    """Run a block of commands or of Python; what is not a command of this project is only read."""
    if block.language == "python":
        exec(compile(here(block.text, place), str(block), "exec"), names)
        return
    for line in lines_of(block):
        for words in commands(line):
            if (job := script_of(words)) is None or any(word in SHOWS for word in words):
                continue
            if (arguments := tiny(*job, place)) is not None:
                done = run_in_this_process(f"jobs/{job[0]}", *arguments)
                assert done.code == 0, f"{block}: {shlex.join([job[0], *arguments])}\n{done.output[-4000:]}"


RUN = [block for block in ALL if block.why_not is None and block.language in (*pages.SHELLS, "python")]


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({block.page for block in RUN}))
def test_a_page_can_be_followed_from_its_top_to_its_end(page, place):
    """Its commands run one after the other in one folder, each at a tiny size, and so does its Python."""
    names: dict[str, object] = {"__name__": "page"}
    with jobs_in_process():
        for block in RUN:
            if block.page == page:
                run_block(block, place, names)


@pytest.mark.slow
def test_a_command_that_fails_is_noticed(place):
    (block,) = pages.blocks("```bash\npython jobs/evaluate.py model=runs/vae/model source.uri=/data/photos\n```\n")
    with jobs_in_process(), pytest.raises(AssertionError, match="does not exist"):
        run_block(block, place, {})


def test_all_that_is_only_parsed_is_run_by_another_test():
    for test in PARSED_ONLY.values():
        assert not test.startswith("tests/") or (REPO / test).exists()
