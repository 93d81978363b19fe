"""Configs: defaults, presets, overrides, and what is said of wrong ones."""

import inspect
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError

import pipelines
from jobs import encode_dataset
from jobs import evaluate as evaluate_job
from litevae.errors import UserError
from pipelines.benchmark.config import Benchmark
from pipelines.diagnostics.config import Doctor
from pipelines.encoding.config import Encode, Inspect, Repair, Retry, Verify
from pipelines.evaluation.config import Evaluate, EvaluateComplexity, EvaluateLatents, EvaluateSamples, Sample
from pipelines.experiments.config import Compare, Sweep
from pipelines.runtime import cli, schema
from pipelines.runtime.cli import PRESETS, load, main, section_of
from pipelines.runtime.schema import dump
from pipelines.training.config import DiffusionObjective, Stage, TrainLDM, TrainVAE

RECORDED = yaml.safe_load((Path(__file__).parents[2] / "data" / "configs.yaml").read_text())
ROOMS = sorted(path.parent.name for path in Path(pipelines.__file__).parent.glob("*/config.py"))
CLASSES = {
    name: cls
    for module in (schema, *(import_module(f"pipelines.{room}.config") for room in ROOMS))
    for name, cls in vars(module).items()
    if inspect.isclass(cls) and issubclass(cls, schema.Section) and cls is not schema.Section
}
JOBS = {"train_vae": TrainVAE, "encode_dataset": Encode, "train_ldm": TrainLDM, "sample": Sample, "evaluate": Evaluate}


def test_defaults_are_the_papers():
    config = load(TrainVAE)
    assert (config.optim.lr, config.optim.betas) == (1e-4, (0.5, 0.9))  # Appendix F
    assert [(s.resolution, s.images // s.batch_size) for s in config.stages] == [(128, 100_000), (256, 50_000)]
    assert (config.model.encoder, config.model.latent_channels) == ("B", 4)


def flat(values, prefix=""):
    """Values by dotted name. An empty section is a value."""
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return found


def values_of(config: BaseModel):
    return flat(config.model_dump(mode="json"))


def bare(schema):
    """Of a JSON schema what it allows, without defaults and words."""
    if isinstance(schema, dict):
        words = ("title", "description", "default", "$defs")
        return {key: bare(value) for key, value in schema.items() if key not in words}
    return [bare(item) for item in schema] if isinstance(schema, list) else schema


@pytest.mark.parametrize("job", RECORDED["defaults"])
def test_defaults_are_those_recorded(job):
    expected, cls = RECORDED["defaults"][job], CLASSES[job]
    if job != "Job" and issubclass(cls, schema.Job):
        expected = RECORDED["defaults"]["Job"] | expected
    assert values_of(cls()) == expected


def test_all_jobs_are_recorded():
    of_jobs = {name for name, cls in CLASSES.items() if issubclass(cls, schema.Tracked)} | {"Verify", "Inspect"}
    assert RECORDED["defaults"].keys() == of_jobs - {"Tracked", "LongJob", "MaintainCache"}


@pytest.mark.parametrize("name", CLASSES)
def test_fields_allow_what_is_recorded(name):
    cls = CLASSES[name]
    fields = {
        field: bare(cls.model_json_schema()["properties"][field])
        for field in cls.__annotations__
        if field in cls.model_fields
    }
    assert {key: value for key, value in fields.items() if [*value] != ["$ref"]} == RECORDED["limits"].get(name, {})


def test_a_stage_has_a_size():
    stage = Stage(images=5)
    assert (stage.resolution, stage.batch_size) == (256, 16)
    assert TrainLDM().objective == DiffusionObjective()


def test_configs_do_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        Sample().steps = 3


@pytest.mark.parametrize(
    ("cls", "overrides", "message"),
    [
        (TrainVAE, ["ray.workers=2", "ray.min_workers=3"], "min_workers=3 is more than workers=2"),
        (
            TrainVAE,
            ["ray.min_workers=1", "ray.worker_labels={a: b}"],
            "min_workers and worker_labels can't be combined",
        ),
        (TrainVAE, ["loss.adversarial.cutmix=0.5", "loss.adversarial.kind=patch"], "kind=unet, not patch"),
        (TrainVAE, ["model.encoder=dwt"], "dwt has 12 latent channels"),
        (TrainVAE, ["model.encoder=dwt-2", "model.latent_channels=12"], "dwt-2 has 48 latent channels"),
        (TrainVAE, ["loss.ldl.weight=1"], r"set loop\.ema"),
        (TrainVAE, ["checkpointing=true", "model.decoder.norm=batch"], "batch norm's statistics"),
        (Encode, ["transform.crops=2"], "crops=2 would give the same crop 2 times"),
        (Encode, ["transform.buckets=true", "transform.resize=none"], "buckets need resize=shorter"),
        (Encode, ["transform.buckets=true", "transform.resolution=96"], "not a multiple of bucket_step=64"),
        (Encode, ["compile=true", "kernels=native"], "leave compile=false"),
    ],
)
def test_fields_that_do_not_go_together(cls, overrides, message):
    with pytest.raises(UserError, match=message):
        load(cls, None, overrides)


@pytest.mark.parametrize(
    ("cls", "overrides"),
    [
        (TrainVAE, ["ray.workers=2", "ray.min_workers=2"]),
        (TrainVAE, ["ray.worker_labels={a: b}"]),
        (TrainVAE, ["loss.adversarial.cutmix=0.5"]),
        (TrainVAE, ["loss.adversarial.kind=patch"]),
        (TrainVAE, ["model.encoder=dwt", "model.latent_channels=12"]),
        (TrainVAE, ["loss.ldl.weight=1", "loop.ema=0.9"]),
        (TrainVAE, ["model.decoder.norm=batch"]),
        (TrainVAE, ["checkpointing=true"]),
        (Encode, ["transform.crops=2", "transform.crop=random"]),
        (Encode, ["transform.buckets=true", "transform.resolution=128"]),
        (Encode, ["transform.resize=none"]),
        (Encode, ["transform.resolution=96"]),
        (Encode, ["compile=true"]),
        (Encode, ["kernels=native"]),
    ],
)
def test_fields_that_go_together(cls, overrides):
    load(cls, None, overrides)


@pytest.mark.parametrize("cls", [EvaluateComplexity, Benchmark])
def test_lists_may_be_written_with_commas(cls):
    assert load(cls, None, ["models=S,B"]).models == load(cls, None, ["models=[S, B]"]).models == ["S", "B"]


def test_overrides_go_before_the_preset_and_the_preset_before_defaults(tmp_path):
    preset = tmp_path / "mine.yaml"
    preset.write_text("optim: {lr: 3.0e-4}\nname: mine\n")
    config = load(TrainVAE, str(preset), ["name=other", "loss.kl.start=5", "data.train.columns=[a, b]"])
    assert (config.optim.lr, config.name, config.optim.betas) == (3e-4, "other", (0.5, 0.9))
    assert config.loss.kl.weight == TrainVAE().loss.kl.weight  # a section given in part keeps the rest
    assert config.data.train.columns == ["a", "b"]


def test_numbers_as_people_write_them():
    assert load(TrainVAE, None, ["optim.lr=1e-3"]).optim.lr == 1e-3
    assert load(TrainVAE, None, ["name=7"]).name == "7"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.l3.weight=1", r"unknown config key 'loss\.l3\.weight'"),
        ("optim.lrr=1", r"unknown config key 'optim\.lrr'; did you mean optim\.lr=1\?"),
        ("optim.lr=fast", r"optim\.lr: .*valid number.*'fast'"),
        ("optim.lr=-1", r"optim\.lr: .*greater than 0"),
        ("model.encoder=XL", r"model\.encoder: .*'S', 'B', 'M', 'L', 'sd-vae'.*'XL'"),
        ("stages=[{resolution: 100, images: 5}]", r"stages\.0\.resolution: .*multiple of 8"),
        ("model.decoder.channels=[8, 8]", r"model\.decoder: .*exactly 4"),
        ("name=../elsewhere", "name: "),
        ("seed", "not of the form key=value"),
        ("optim.lr.x=1", r"optim\.lr"),
        ("data=[", "not valid YAML"),
    ],
)
def test_a_wrong_override_is_named(override, message):
    with pytest.raises(UserError, match=message):
        load(TrainVAE, None, [override])


def test_every_mistake_is_listed_at_once():
    with pytest.raises(UserError) as error:
        load(TrainVAE, None, ["optim.lr=fast", "sead=1", "loop.keep=0"])
    assert len(str(error.value).splitlines()) == 3


def test_presets_that_are_no_presets(tmp_path):
    shipped = "celebahq-256, demo, demo-gpu, ffhq-256, imagenet-256, small, teacher"
    with pytest.raises(UserError, match=rf"--config nope is neither a preset \({shipped}\) nor a file$"):
        load(TrainVAE, "nope")
    (tmp_path / "recipe.yaml").write_text("sample: {steps: 20}\ntrain_vae:\n")
    assert load(Sample, str(tmp_path / "recipe.yaml")).steps == 20
    assert load(TrainVAE, str(tmp_path / "recipe.yaml")) == TrainVAE()
    has = rf"no section train_ldm, only sample, train_vae; presets with one are {shipped.removesuffix(', teacher')}$"
    with pytest.raises(UserError, match=has):
        load(TrainLDM, str(tmp_path / "recipe.yaml"))
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(UserError, match="found a list"):
        load(TrainVAE, str(tmp_path / "list.yaml"))
    (tmp_path / "code.yaml").write_text("name: !!python/object/apply:os.getcwd []")
    with pytest.raises(UserError, match="not valid YAML"):
        load(TrainVAE, str(tmp_path / "code.yaml"))
    (tmp_path / "latin.yaml").write_bytes(b"root: /data/caf\xe9\n")
    with pytest.raises(UserError, match="not valid YAML: .*x00e9(?s:.*); save it as UTF-8$"):
        load(TrainVAE, str(tmp_path / "latin.yaml"))


RECIPES = [
    (path.stem, section) for path in sorted(PRESETS.glob("*.yaml")) for section in yaml.safe_load(path.read_text())
]


def test_what_is_evaluated_is_decoded_by_pillow():
    assert (load(TrainVAE).data.decode, load(Encode).transform.decode) == ("fast", "fast")
    for cls in (Evaluate, EvaluateSamples):
        with pytest.raises(UserError, match=r"transform\.decode"):
            load(cls, None, ["transform.decode=fast"])


@pytest.mark.parametrize(("name", "section"), RECIPES)
def test_shipped_presets_are_valid(name, section):
    (cls,) = (cls for cls in (*JOBS.values(), EvaluateSamples) if section_of(cls) == section)
    found, defaults = values_of(load(cls, name)), values_of(cls())
    changed = {field: value for field, value in found.items() if defaults.get(field) != value}
    assert changed == RECORDED["presets"][name][section]
    assert changed


@pytest.mark.parametrize("job", JOBS)
def test_dumps_load_again(job, capsys):
    cls = JOBS[job]
    assert main(cls, lambda config: pytest.fail("it ran"), ["--print-config"]) == 0
    assert cls.model_validate(yaml.safe_load(capsys.readouterr().out)) == cls() == load(cls, None, [])
    assert dump(cls()).startswith("root: runs")


def test_exit_codes(capsys):
    def refuse(config):
        raise UserError("no such thing; make one")

    def interrupt(config):
        raise KeyboardInterrupt

    assert main(Sample, lambda config: None, []) == 0
    assert main(Sample, refuse, []) == 2
    assert capsys.readouterr().err == "error: no such thing; make one\n"
    assert main(Sample, refuse, ["--verbose"]) == 2
    assert "unknown option --verbose" in capsys.readouterr().err
    assert main(Sample, interrupt, []) == 130


def test_words_of_the_command_line(tmp_path):
    """What --config, switches, actions and bare words come to, in any order."""
    (tmp_path / "mine.yaml").write_text("append: false\nmodel: m\n")
    found = []
    preset = ["--config", str(tmp_path / "mine.yaml")]
    job = {"actions": encode_dataset.ACTIONS, "switches": encode_dataset.SWITCHES}
    assert main(Encode, found.append, [*preset, "--append", "dtype=fp32"], **job) == 0
    assert main(Encode, found.append, [f"--config={preset[1]}"], **job) == 0
    assert [(job.append, job.model, job.dtype) for job in found] == [(True, "m", "fp32"), (False, "m", "fp16")]
    (tmp_path / "threads.yaml").write_text("threads: 3\n")
    preset = ["--config", str(tmp_path / "threads.yaml")]
    for words in (
        ["verify", "folder", *preset, "--source"],
        [*preset, "verify", "--source", "folder"],
        ["--source", *preset, "verify", "folder"],
        ["folder", *preset, "verify", "--source"],
        ["verify", "cache=folder", "source=contents", *preset],
    ):
        assert main(Encode, found.append, words, **job) == 0
        assert found[-1] == Verify(cache="folder", threads=3, source="contents"), words
    assert main(Encode, found.append, ["verify", "verify"], **job) == 0  # a cache that is named as an action
    assert found[-1].cache == "verify"
    assert main(Evaluate, found.append, ["images=5", "samples", "drawn"], actions=evaluate_job.ACTIONS) == 0
    assert (found[-1].samples.uri, found[-1].images) == ("drawn", 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config"], "--config needs a preset's name"),
        (["folder"], "'folder' is neither key=value nor one of the actions verify, repair, retry, inspect: "),
        (["append"], "'append' is neither key=value nor one of the actions"),
        (["verfy", "/cache"], "did you mean python jobs/encode_dataset.py verify CACHE?"),
        (["verify", "--append"], "unknown option --append: "),
        (["--source"], "unknown option --source"),
        (["verify", "a", "b"], "verify takes one CACHE, but a, b are given"),
        (["=3"], "override '=3' is not of the form"),
        (["--confg", "x"], "unknown option --confg: did you mean --config?"),
    ],
)
def test_words_that_are_none(arguments, message, capsys):
    job = {"actions": encode_dataset.ACTIONS, "switches": encode_dataset.SWITCHES}
    assert main(Encode, lambda job: pytest.fail("it ran"), arguments, **job) == 2
    assert message in capsys.readouterr().err


def test_a_bare_word_where_a_job_has_no_actions(capsys):
    assert main(Sample, lambda job: pytest.fail("it ran"), ["folder"]) == 2
    assert "override 'folder' is not of the form key=value" in capsys.readouterr().err


def test_printed_configs_hide_passwords(capsys):
    words = ["--print-config", "tracking.uri=https://me:secret@host/"]
    assert main(Sample, lambda job: pytest.fail("it ran"), words) == 0
    shown = capsys.readouterr().out
    assert "secret" not in shown
    assert "host" in shown


def test_what_is_kept_of_a_config():
    kept = schema.values_to_keep(load(Sample, None, ["steps=3", "tracking.uri=https://me:secret@host/"]))
    assert (kept["steps"], kept["root"]) == (3, "runs")
    assert "tracking" not in kept


@pytest.mark.parametrize(
    ("cls", "job", "section"),
    [
        (TrainVAE, "train_vae", "train_vae"),
        (TrainLDM, "train_ldm", "train_ldm"),
        (Encode, "encode_dataset", "encode_dataset"),
        (Verify, "encode_dataset", "verify"),
        (Repair, "encode_dataset", "repair"),
        (Retry, "encode_dataset", "retry"),
        (Inspect, "encode_dataset", "inspect"),
        (Sample, "sample", "sample"),
        (Evaluate, "evaluate", "evaluate"),
        (EvaluateSamples, "evaluate", "evaluate_samples"),
        (EvaluateLatents, "evaluate", "evaluate_latents"),
        (EvaluateComplexity, "evaluate", "evaluate_complexity"),
        (Compare, "compare_runs", "compare_runs"),
        (Sweep, "sweep", "sweep"),
        (Doctor, "doctor", "doctor"),
        (Benchmark, "benchmark", "benchmark"),
    ],
)
def test_commands_and_their_sections(cls, job, section):
    assert (cli.job_of(cls), section_of(cls)) == (job, section)
