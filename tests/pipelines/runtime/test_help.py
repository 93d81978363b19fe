"""The text of --help, --help-all and --help PREFIX of every job and action."""

import importlib
import re
import shlex

import pytest
import yaml

from jobs import main as console
from pipelines.runtime import help_text
from pipelines.runtime.cli import PRESETS, load
from pipelines.runtime.commands import SCRIPTS
from pipelines.runtime.schema import check_needed, fields_of, names_of
from tests.commands import run_in_this_process

WORDS = [[name] for name in SCRIPTS] + [
    [name, action]
    for name, script in SCRIPTS.items()
    for action in getattr(importlib.import_module(f"jobs.{script.module}"), "ACTIONS", {})
]


def config_of(words):
    module = importlib.import_module(f"jobs.{SCRIPTS[words[0]].module}")
    return module.ACTIONS[words[1]].config if words[1:] else module.CONFIG


def shown(capsys, *words):
    assert console.main(words) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


every_job = pytest.mark.parametrize("words", WORDS, ids=" ".join)


@every_job
def test_the_fields_that_are_shown_exist_and_their_examples_are_taken(words):
    cls = config_of(words)
    examples = cls.shown.examples()
    known = [name for name, kind, default, _ in fields_of(cls) if (kind, default) != ("section", "...")]
    assert 3 <= len(examples) <= 20 or len(known) < 8
    for name, example in examples.items():
        assert name in known
        load(cls, None, [f"{name}={example}"])
    in_groups = [name for group in cls.shown.groups.values() for name in group]
    assert len(in_groups) + len(cls.shown.needed) == len(examples)  # none is there twice


@every_job
@pytest.mark.parametrize("columns", [80, 100, 200])
def test_the_short_help_fits_the_terminal(words, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = shown(capsys, *words, "--help")
    widest = min(columns, 100)
    for line in text.splitlines():
        # Only what is one word, an example, may be longer.
        assert len(line) <= widest or len(shlex.split(line)) == 1, line
    assert len(text.splitlines()) < 120
    assert max(map(len, text.splitlines())) > widest - 20  # the width is used


@every_job
def test_the_short_help_has_usage_required_fields_and_examples(words, capsys):
    cls = config_of(words)
    text = shown(capsys, *words, "--help")
    assert f"\nusage: litevae {' '.join(words)} " in text
    required = text.partition("\nRequired:\n")[2].partition("\n\n")[0]
    assert bool(required) == bool(cls.shown.needed)
    for name in cls.shown.needed:
        assert re.search(rf"^  {re.escape(name)}=", required, re.MULTILINE)
    for name, example in cls.shown.examples().items():
        quoted = re.search(rf"^  {re.escape(name)}=(.*?)(  |$)", text, re.MULTILINE)
        assert quoted, name
        assert shlex.split(quoted[1]) == [example]  # as a shell reads it
    order = [text.index(f"\n{heading}:") for heading in ["Required"] * bool(required) + [*cls.shown.groups, "Options"]]
    assert order == sorted(order)
    meanings = {name: (default, about) for name, _, default, about in fields_of(cls)}
    flat = " ".join(text.split())
    for group in cls.shown.groups.values():
        for name, given in group.items():
            default, about = meanings[name]
            assert " ".join((about if isinstance(given, str) else given[1]).split()) in flat
            if default not in ("''", "[]", "{}") and len(default) < 40:
                assert re.search(rf"default {re.escape(default)}[\];]", flat), name
    for option in ("--print-config", "--help-all", "--config "):
        assert f"\n  {option}" in text


@every_job
def test_presets_are_offered_where_there_are_some(words, capsys):
    section = {"evaluate samples": "evaluate_samples", "evaluate latents": "evaluate_latents"}.get(" ".join(words))
    section = section or (words[1] if words[1:] else SCRIPTS[words[0]].module)
    have = sorted(path.stem for path in PRESETS.glob("*.yaml") if section in yaml.safe_load(path.read_text()))
    text = " ".join(shown(capsys, *words, "--help").split())
    if have:
        assert "[--config NAME|FILE]" in text
        assert f"a preset ({', '.join(have)}) or a YAML file" in text
    else:
        assert "[--config FILE]" in text
        assert "no preset is for this" in text
        for name, message in (("demo", "no preset is for"), ("nope", "--config nope is no file; no preset is for")):
            if not (name == "demo" and words == ["demo"]):
                assert console.main([*words, "--config", name]) == 2
                assert message in capsys.readouterr().err


@every_job
def test_all_fields_are_in_the_long_help(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    cls = config_of(words)
    text = shown(capsys, *words, "--help-all")
    assert all(len(line) <= 100 for line in text.splitlines())
    names = re.findall(r"^  ([\w.]+) = ", text, re.MULTILINE)
    known = [name for name, kind, default, _ in fields_of(cls) if (kind, default) != ("section", "...")]
    assert sorted(names) == sorted(known)
    common = [name for name in names if name.partition(".")[0] in ("root", "ray", "tracking")]
    assert names[len(names) - len(common) :] == common  # behind the job's own
    assert [*dict.fromkeys(name.partition(".")[0] for name in common)] == [
        part for part in ("root", "ray", "tracking") if part in cls.model_fields
    ]
    sections = [name.rpartition(".")[0] for name in names]
    runs = [part for at, part in enumerate(sections) if at == 0 or sections[at - 1] != part]
    assert len([part for part in runs if part]) == len({part for part in runs if part})  # each section is in one piece
    for name, needed in cls.shown.needed.items():
        assert f"({needed.mark()}; " in re.search(rf"^  {re.escape(name)} = .*(\n      .*)?", text, re.MULTILINE)[0]


@pytest.mark.parametrize(
    ("topic", "names"),
    [
        ("loop.ema", ["loop.ema"]),
        ("loop", None),  # all of the section
        ("loop.", None),
        ("loss.adversarial.r1", ["loss.adversarial.r1", "loss.adversarial.r1_every"]),
        ("loss.adversarial.lr", ["loss.adversarial.lr"]),
        ("optim.lr=3", ["optim.lr"]),
        ("optim.b", ["optim.betas"]),
        ("lr", ["loss.adversarial.lr", "optim.lr"]),
        ("latent_", ["model.latent_channels"]),
        ("latent", ["loss.latent.weight", "loss.latent.start"]),  # a section within another
        ("--optim.lr", ["optim.lr"]),
    ],
)
def test_help_of_a_beginning(topic, names, capsys):
    text = shown(capsys, "train-vae", f"--help={topic}")
    found = re.findall(r"^  ([\w.]+) = ", text, re.MULTILINE)
    if names is None:
        config = importlib.import_module("pipelines.training.config")
        names = [f"loop.{name}" for name in config.Loop.model_fields]
    if topic == "loss.adversarial.r1":  # a field of just this name is meant alone
        names = names[:1]
    assert found == names
    if not topic.startswith("--"):
        assert shown(capsys, "train-vae", "--help", topic) == text


def test_help_of_a_field_says_what_it_takes(capsys):
    text = shown(capsys, "train-vae", "--help", "loop.ema")
    assert "  loop.ema = 0.0    (number >= 0 <= 1)\n      decay of the averaged weights per step" in text
    for topic, kind in {
        "optim.lr": "(number > 0)",
        "model.downsample": "(conv | pool)",
        "ray.gpu": "(auto | true | false)",
        "model.levels": "(list of whole numbers >= 1 <= 3)",
        "begin": "(path)",
        "name": "(text)",
        "stages": "(list of sections)",
        "tracking.tags": "(section)",
        "data.train.uri": "(required; path)",
        "seed": "(whole number >= 0)",
    }.items():
        assert kind in " ".join(shown(capsys, "train-vae", "--help", topic).split())


def test_help_of_what_is_not_there(capsys):
    assert console.main(["train-ldm", "--help", "loop.emma"]) == 2
    assert "unknown config key 'loop.emma'; did you mean 'loop.ema'?" in capsys.readouterr().err


def test_actions_are_listed_and_have_help_wherever_the_word_stands(capsys):
    text = shown(capsys, "encode-dataset", "--help")
    for action in ("verify", "repair", "retry", "inspect"):
        assert f"litevae encode-dataset {action} CACHE [FIELD=VALUE ...]" in text
        assert re.search(rf"^  {action} CACHE {{2,}}[A-Z]", text, re.MULTILINE)
        own = shown(capsys, "encode-dataset", action, "--help")
        assert own != text
        for words in ([action, "-h"], ["--help", action], ["out=/x", "-h", action]):
            assert shown(capsys, "encode-dataset", *words) == own
    assert "source = ids" in shown(capsys, "encode-dataset", "verify", "--help", "source")


def test_the_width_of_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "10")
    assert help_text._width() == 40
    monkeypatch.setenv("COLUMNS", "1000")
    assert help_text._width() == 100


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=lambda script: script.module)
def test_a_script_names_itself_as_it_was_called(script):
    done = run_in_this_process(f"jobs/{script.module}.py", "--help")
    assert done.code == 0
    assert f"\nusage: python jobs/{script.module}.py " in done.output
    assert "litevae " not in done.output


# --- what a job needs -------------------------------------------------------------------------------------------


@every_job
def test_what_is_required_is_asked_for_with_an_example_that_works(words):
    cls = config_of(words)
    asked = [name for name, needed in cls.shown.needed.items() if not needed.note]
    empty = [name for name in asked if all("" in values or load(cls).model_dump().get(field) in values
             for field, values in cls.shown.needed[name].when.items())]  # fmt: skip
    if not empty:
        check_needed(load(cls))
        return
    with pytest.raises(ValueError) as error:
        check_needed(load(cls))
    lines = str(error.value).splitlines()
    assert [line.partition(" is empty")[0] for line in lines] == empty
    examples = [re.search(r"give it, e\.g\. (\S+) \(", line)[1] for line in lines]
    check_needed(load(cls, None, examples))


def test_what_is_required_depends_on_other_fields():
    cls = config_of(["train-ldm"])
    for mode, needed in {
        "cache": ["cache"],
        "online": ["data.source.uri", "vae"],
        "write-through": ["cache", "data.source.uri", "vae"],
    }.items():
        with pytest.raises(ValueError) as error:
            check_needed(load(cls, None, [f"mode={mode}"]))
        lines = str(error.value).splitlines()
        assert [line.partition(" ")[0] for line in lines] == needed
        assert all(f" is empty with mode={mode}; give it, e.g. " in line for line in lines)


def test_names_of_sections_and_fields():
    names = names_of(config_of(["train-vae"]))
    assert {"data", "data.train", "data.train.uri", "loss.kl", "ray", "ray.gpu"} <= {*names}
    assert len(names) == len({*names})
    assert names.index("begin") < names.index("root")
