"""Mistakes that are answered at once: before PyTorch, Ray and MLflow are imported, which takes seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "ray", "mlflow", "diffusers")

# Runs every command of argv[1] in one process, and prints for each: exit code, stderr, and what heavy was imported.
CHILD = f"""
import contextlib, io, json, runpy, sys
answers = []
for job, *words in json.loads(sys.argv[1]):
    sys.argv = [job, *words]
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown):
        try:
            runpy.run_path(f"jobs/{{job}}.py", run_name="__main__")
        except SystemExit as end:
            code = end.code
    answers.append([code, shown.getvalue(), [name for name in {HEAVY} if name in sys.modules]])
print(json.dumps(answers))
"""

PHOTOS, VAE = "data.train.uri={place}/photos", "model={place}/vae"
OFF = "loss.lpips.weight=0"
SWEEP = ("data.train.uri={place}/photos", "data.val.uri={place}/photos")
# A command, and what its one message says. {place} is a folder with photos/, a model folder vae/ and a file `file`.
MISTAKES = {
    "train_vae: no source": (["train_vae", OFF], "data.train.uri is empty; give it, e.g. data.train.uri=/data/photos"),
    "train_vae: source": (["train_vae", OFF, "data.train.uri=/nowhere"], "data.train.uri=/nowhere does not exist"),
    "train_vae: val": (["train_vae", OFF, PHOTOS, "data.val.uri=/nowhere"], "data.val.uri=/nowhere does not exist"),
    "train_vae: hub": (
        ["train_vae", OFF, "data.train.uri=imagenet-1k"],
        "hf download --repo-type dataset imagenet-1k --local-dir imagenet-1k",
    ),
    "train_vae: root": (["train_vae", OFF, PHOTOS, "root={place}/file/runs"], "file is not a folder"),
    "train_vae: init": (["train_vae", OFF, PHOTOS, "model.init={place}/photos"], "it has no config.json and no "),
    "train_vae: begin": (["train_vae", OFF, PHOTOS, "begin=/nowhere"], "begin=/nowhere is not a checkpoint folder"),
    "train_vae: LPIPS": (["train_vae", PHOTOS], "`make weights`"),
    "train_vae: weights": (
        ["train_vae", PHOTOS, "loss.lpips.weights=/nowhere.pth"],
        "loss.lpips.weights: no weights file at /nowhere.pth",
    ),
    "train_vae: tracking": (["train_vae", OFF, PHOTOS, "tracking.uri=databricks"], "Databricks is not supported"),
    "train_ldm: no cache": (["train_ldm"], "cache is empty with mode=cache; give it, e.g. cache=/data/cache"),
    "train_ldm: cache": (["train_ldm", "cache=/nowhere"], "cache=/nowhere does not exist"),
    "train_ldm: no cache there": (["train_ldm", "cache={place}/photos"], "is not a latent cache: it has no manifest"),
    "train_ldm: vae": (["train_ldm", "mode=online", "data.source.uri={place}/photos"], "vae is empty"),
    "train_ldm: flip": (
        ["train_ldm", "mode=write-through", "data.source.uri={place}/photos", "vae={place}/vae", "cache={place}/new",
         "data.flip=true"],
        "set data.crop=center and data.flip=false",
    ),
    "train_ldm: more_ema": (["train_ldm", "cache={place}/x", "more_ema=[0.9999]"], "must not repeat a decay"),
    "sample: model": (["sample", "model={place}/vae"], "it has no ldm.json"),
    "sample: hub": (
        ["sample", "model=CompVis/ldm-celebahq-256"],
        "hf download CompVis/ldm-celebahq-256 --local-dir ldm-celebahq-256, then model=ldm-celebahq-256",
    ),
    "evaluate: no model": (["evaluate"], "model is empty; give it, e.g. model=runs/vae/model"),
    "evaluate: hub": (
        ["evaluate", "model=stabilityai/sd-vae-ft-mse", "source.uri={place}/photos"],
        "model=stabilityai/sd-vae-ft-mse does not exist; models are folders on disk",
    ),
    "evaluate: source": (["evaluate", VAE, "source.uri=/nowhere"], "source.uri=/nowhere does not exist"),
    "evaluate: weights": (
        ["evaluate", VAE, "source.uri={place}/photos", "inception=/no.pth"], "inception: no weights file at /no.pth"
    ),
    "evaluate: out": (
        ["evaluate", VAE, "source.uri={place}/photos", "out={place}/file"],
        "out={place}/file can't be written: {place}/file is not a folder",
    ),
    "evaluate samples": (["evaluate", "samples", "/nowhere", "source.uri=/x"], "samples.uri=/nowhere does not exist"),
    "evaluate samples: out": (
        ["evaluate", "samples", "{place}/photos", "source.uri={place}/photos", "out={place}/file/out"],
        "out={place}/file/out can't be written",
    ),
    "evaluate latents": (["evaluate", "latents", "/nowhere"], "latent cache /nowhere does not exist"),
    "evaluate latents: out": (["evaluate", "latents", "{place}/photos", "out=/proc/x"], "out=/proc/x can't be written"),
    "evaluate complexity": (["evaluate", "complexity", "out={place}/file"], "can't be written"),
    "sweep: nothing": (["sweep"], "give either table=... (of the paper) or space.FIELD=..."),
    "sweep: table": (["sweep", "table=99"], "table=99 does not exist; there are 1, 2a"),
    "sweep: rows": (["sweep", "table=9", "rows=[Nothing]", *SWEEP], "table 9 has no 'Nothing'"),
    "sweep: data": (["sweep", "table=9"], "give data.train.uri=... to train on"),
    "sweep: source": (["sweep", "table=9", *SWEEP, "data.val.uri=/nowhere"], "data.val.uri=/nowhere does not exist"),
    "sweep: root": (["sweep", "table=9", *SWEEP, "root={place}/file"], "{place}/file is not a folder"),
    "compare_runs": (["compare_runs", "out={place}/file/out"], "out={place}/file/out can't be written"),
    "benchmark: out": (["benchmark", "out={place}/file"], "out={place}/file can't be written"),
    "benchmark: photos": (["benchmark", "source=/nowhere"], "source=/nowhere does not exist"),
    "doctor": (["doctor", "report={place}/missing/doctor.json"], "its folder does not exist"),
    "doctor: folder": (["doctor", "report={place}/photos"], "report={place}/photos is a folder; give a file"),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    (place / "file").touch()
    (place / "photos").mkdir()
    (place / "vae").mkdir()
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (place / "vae" / name).write_text("{}")
    return place


@pytest.fixture(scope="module")
def answers(place):
    commands = []
    for words, _ in MISTAKES.values():
        given = [word.replace("{place}", str(place)) for word in words]
        own = [] if any(word.startswith("root=") for word in given) else [f"root={place}/runs"]
        commands.append([*given, *own])
    environment = os.environ | {"TORCH_HOME": str(place / "torch"), "PYTHONPATH": str(REPO)}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "hub")}
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(commands)],
        cwd=REPO, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(MISTAKES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_before_the_heavy_imports(answers, place, mistake):
    code, shown, imported = answers[mistake]
    assert code == 2, shown
    assert shown.startswith("error: ")
    assert shown.count("error: ") == 1
    assert MISTAKES[mistake][1].replace("{place}", str(place)) in shown
    assert imported == []


def test_mistakes_leave_nothing(answers, place):
    assert sorted(path.name for path in place.iterdir()) == ["file", "photos", "vae"]
    assert not [*(place / "photos").iterdir()]
