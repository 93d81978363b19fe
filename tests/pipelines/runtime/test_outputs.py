"""Folders that jobs write results to: whether they can be written, and whether another result is there."""

import json
import os

import pytest

from litevae.errors import UserError
from pipelines.benchmark import first_look as of_benchmark
from pipelines.benchmark.config import Benchmark
from pipelines.encoding.config import Inspect
from pipelines.encoding.inspect import inspect
from pipelines.evaluation import first_look
from pipelines.evaluation.config import Evaluate, EvaluateComplexity, EvaluateLatents, EvaluateSamples
from pipelines.runtime import outputs, paths
from pipelines.runtime.cli import load

# --- outputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "/new/folder"])
def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path, below):
    assert paths.check_writable("out", f"{tmp_path}{below}") == f"{tmp_path}{below}"
    assert os.listdir(tmp_path) == []


def unwritable(kind, tmp_path):
    if kind == "a file in the way":
        (tmp_path / "file").touch()
        return f"{tmp_path}/file/out"
    if kind == "a file in its place":
        (tmp_path / "file").touch()
        return f"{tmp_path}/file"
    if kind == "a link to nothing":
        (tmp_path / "link").symlink_to(tmp_path / "gone")
        return f"{tmp_path}/link/out"
    if kind == "a system's folder":
        return "/proc/litevae"
    return f"{tmp_path}/{'x' * 300}/out"


@pytest.mark.parametrize(
    "kind", ["a file in the way", "a file in its place", "a link to nothing", "a system's folder", "a name too long"]
)
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, kind):
    path = unwritable(kind, tmp_path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=r"^out=\S+ can't be written: "):
        paths.check_writable("out", path)
    assert sorted(os.listdir(tmp_path)) == before


def test_inspect_tries_its_output_before_it_decodes(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^out=\S+/file can't be written: "):
        inspect(load(Inspect, None, [f"cache={tmp_path}/none", f"out={tmp_path}/file"]))


def test_an_s3_folder_is_tried(monkeypatch):
    done = []

    def put(path, data):
        if "locked" in path:
            raise UserError("s3://locked: access denied")
        done.append(("put", path))

    monkeypatch.setattr(paths.storage, "put", put)
    monkeypatch.setattr(paths.storage, "remove", lambda path: done.append(("remove", path)))
    assert paths.check_writable("out", "s3://bucket/samples/") == "s3://bucket/samples"
    assert [what for what, _ in done] == ["put", "remove"]
    assert done[0][1] == done[1][1]
    with pytest.raises(UserError, match="out=s3://locked/x can't be written: s3://locked: access denied"):
        paths.check_writable("out", "s3://locked/x")


# --- results --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/vae/model", "vae"),
        ("/a/runs/ldm/model-ema-0.99/", "ldm-ema-0.99"),
        ("sd-vae", "sd-vae"),
        ("model", "model"),
        ("s3://bucket/cache", "cache"),
        ("/a/b c", "b-c"),
        ("/", "nothing"),
        ("/x/..", "nothing"),
    ],
)
def test_names_of_results(path, name):
    assert outputs.name_of(path) == name


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder, also the working one, with photos/, a model folder runs/vae/model and a cache."""
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "cache", "runs/vae/model"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (tmp_path / "runs/vae/model" / name).write_text("{}")
    return tmp_path


# Of each job: first look, config, words that it needs, a word that makes it another measurement, and its folder.
JOBS = {
    "evaluate": (
        *(first_look.evaluate, Evaluate, ["model=runs/vae/model", "source.uri=photos"], "images=3"),
        "reconstruction-vae-256px",
    ),
    "samples": (
        *(first_look.samples, EvaluateSamples, ["samples.uri=photos", "source.uri=photos"], "pr_images=5"),
        "samples-photos-256px",
    ),
    "latents": (first_look.latents, EvaluateLatents, ["cache=cache"], "subset=10", "latents-cache"),
    "complexity": (first_look.complexity, EvaluateComplexity, [], "repeats=3", "complexity-encoder-256px"),
}


def wrote(output, config, name="metrics.json"):
    os.makedirs(output.folder, exist_ok=True)
    with open(os.path.join(output.folder, name), "w") as file:
        json.dump({"config": outputs.measured(config)}, file)


@pytest.mark.parametrize("job", JOBS)
def test_a_result_is_replaced_only_by_that_of_the_same_config(place, job):
    look, cls, words, other, folder = JOBS[job]
    config = load(cls, None, words)
    output = look(config)
    assert output == (f"{place}/runs/evaluations/{folder}", "")
    assert not (place / "runs/evaluations").exists()
    wrote(output, config)
    # The same measurement: elsewhere run, otherwise written.
    absolute = [word.replace("=photos", f"={place}/photos").replace("=cache", f"={place}/cache") for word in words]
    again = look(load(cls, None, [*absolute, "tracking.enabled=false", f"root={place}/runs"]))
    assert again.folder == output.folder
    assert again.replaced.startswith("; they replace those of the same config of 20")
    changed = load(cls, None, [*words, other])
    field, _, value = other.partition("=")
    with pytest.raises(UserError) as error:
        look(changed)
    assert f"{output.folder} holds the result of another config of 20" in str(error.value)
    assert f"  {field}: was " in str(error.value)
    assert f", is {value}\n" in str(error.value)
    assert "Give another folder with out=..., or replace it with overwrite=true" in str(error.value)
    replaced = look(load(cls, None, [*words, other, "overwrite=true"]))
    assert replaced.folder == output.folder
    assert "; they replace those of another config of 20" in replaced.replaced
    assert look(load(cls, None, [*words, other, "out=elsewhere"])) == (f"{place}/elsewhere", "")


@pytest.mark.parametrize("text", ["{}", "[1]", "not JSON"])
def test_a_result_that_does_not_say_what_it_is_is_not_replaced_unasked(place, text):
    words = ["part=decoder", "out=here"]
    (place / "here").mkdir()
    (place / "here" / "metrics.json").write_text(text)
    with pytest.raises(UserError, match=r"holds metrics\.json of 20.*, which does not say how it was measured"):
        first_look.complexity(load(EvaluateComplexity, None, words))
    first_look.complexity(load(EvaluateComplexity, None, [*words, "overwrite=true"]))


def test_a_field_that_is_newer_than_a_result_counts_as_its_default(place):
    config = load(EvaluateComplexity, None, ["out=here"])
    kept = outputs.measured(config)
    del kept["compile"]
    (place / "here").mkdir()
    (place / "here" / "metrics.json").write_text(json.dumps({"config": kept}))
    assert first_look.complexity(config).replaced
    with pytest.raises(UserError, match="compile: was False, is True"):
        first_look.complexity(load(EvaluateComplexity, None, ["out=here", "compile=true"]))


@pytest.mark.parametrize("job", JOBS)
def test_results_are_local(place, job):
    look, cls, words, *_ = JOBS[job]
    with pytest.raises(UserError, match="out=s3://bucket/x: only local paths can be written here"):
        look(load(cls, None, [*words, "out=s3://bucket/x"]))


def test_where_the_results_go_is_said(place, capsys):
    output = first_look.complexity(load(EvaluateComplexity))
    assert output.announce("evaluate complexity") == output.folder
    assert f"evaluate complexity: results go to {output.folder}\n" in capsys.readouterr().out


def test_each_benchmark_has_a_folder_of_its_own_unless_one_is_given(place):
    assert of_benchmark.benchmark(load(Benchmark)).folder.startswith(f"{place}/runs/benchmarks/20")
    config = load(Benchmark, None, ["out=here", "parts=loader"])
    wrote(of_benchmark.benchmark(config), config, "benchmark.json")
    assert of_benchmark.benchmark(config).replaced
    with pytest.raises(UserError, match=r"parts: was \['loader'\], is \['encoder'\]"):
        of_benchmark.benchmark(load(Benchmark, None, ["out=here", "parts=encoder"]))


def test_a_read_only_database_is_named_at_once(place):
    (place / "file").touch()
    for words, field in ((["root=file"], "root"), (["tracking.uri=sqlite:///file/mlflow.db"], "tracking.uri")):
        with pytest.raises(UserError, match=rf"{field}=\S+ can't be written: \S+/file is not a folder"):
            first_look.complexity(load(EvaluateComplexity, None, ["out=here", *words]))
    first_look.complexity(load(EvaluateComplexity, None, ["out=here", "root=file", "tracking.enabled=false"]))
