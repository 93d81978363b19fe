"""Options are what was typed: every field of every job, from the command line and from a YAML file."""

import json
import math
import os
import pwd
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from jobs import encode_dataset
from jobs import evaluate as evaluate_job
from litevae.errors import UserError
from pipelines.benchmark.config import Benchmark
from pipelines.diagnostics.config import Demo, Doctor
from pipelines.encoding.config import Encode, Inspect, Repair, Retry, Verify
from pipelines.evaluation.config import Evaluate, EvaluateComplexity, EvaluateLatents, EvaluateSamples, Sample
from pipelines.experiments.config import Compare, Sweep
from pipelines.runtime import typed_text
from pipelines.runtime.cli import load, main
from pipelines.runtime.schema import dump
from pipelines.training import run_folder
from pipelines.training.config import TrainLDM, TrainVAE
from tests.setups import leave_checkpoint

JOBS = (
    *(TrainVAE, TrainLDM, Encode, Verify, Repair, Retry, Inspect, Sample, Evaluate, EvaluateSamples, EvaluateLatents),
    *(EvaluateComplexity, Sweep, Compare, Doctor, Benchmark, Demo),
)
SECTIONS_OF_SWEEP = {
    "train_vae": TrainVAE, "evaluate": Evaluate, "evaluate_complexity": EvaluateComplexity, "encode_dataset": Encode,
    "train_ldm": TrainLDM, "sample": Sample, "evaluate_samples": EvaluateSamples, "space": TrainVAE,
}  # fmt: skip

# What YAML can write without quotes, and in flow style, too.
PLAIN = (
    *("1.10", "1.1", "2024-10-05", "2024_10_05", "20241005", "2001-12-14 21:59:43", "007", "010", "0o17", "0x10"),
    *("12:30", "190:20:30", "1_000", "1e3", "1e-4", "+5", ".5", "5.", ".inf", ".nan", "-.INF", "on", "off", "yes"),
    *("no", "y", "n", "N", "true", "False", "null", "Null", "~", "=", "<<", "image#1", "a b  c", "~/photos", "0b1"),
    *("C:\\data", "/data/2024-01-01", "/data/a=b", "ünïcödé 照片", "a:b", "a'b", 'a"b', "1.10.0"),
    *("v1.10", "1e999", "__", "-1", "-x", "1_0"),
)  # fmt: skip
# What is something else in YAML, or nothing at all, unless it has quotes.
QUOTED = (
    *("/data/set #2", "run #3", "/data/a: b", "a:", "[2024]/photos", "[a, b]", "[", "{a}/x", "{a: b}", "*.parquet"),
    *("&x", "!x", "!!int 5", "@x", "%20x", "- x", "-", "? x", "?", "'/data/quoted'", '"7"', "| x", "> x", "`x`", "#x"),
    *(": x", " leading", "trailing ", " ", "", "a\nb", "tab\there", "---", "--- x", "...", ",", "a,", "\\n", "'", '"'),
    *("{{ x }}", "\u00a0x", "s3://bucket/a?b=c"),
)  # fmt: skip


def leaves(cls: type[BaseModel], prefix: str = ""):
    """Yield (dotted name, annotation, metadata) of every field that is no section; of lists of sections `name.[]`."""
    for name, field in cls.model_fields.items():
        kind = field.annotation
        if cls is Sweep and name in SECTIONS_OF_SWEEP:
            continue
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from leaves(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind, field.metadata


def members(kind: Any) -> list[Any]:
    if get_origin(kind) is Annotated:
        return members(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [member for part in get_args(kind) for member in members(part)]
    return [kind]


def pattern_of(metadata: list[Any]) -> str:
    return next((item.pattern for item in metadata if getattr(item, "pattern", None)), "")


def value_of(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


def as_file(folder: Path, values: dict[str, str]) -> str:
    """Write {dotted name: YAML} as nested block mappings, and return the path."""
    if any(name.partition(".")[0] in SECTIONS_OF_SWEEP for name in values):  # without this it would be others' recipe
        values = {f"sweep.{name}": text for name, text in values.items()}
    tree: dict[str, Any] = {}
    for name, text in values.items():
        *parents, last = name.split(".")
        section = tree
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = text

    def lines(section, depth=0):
        for key, value in section.items():
            if isinstance(value, dict):
                yield f"{'  ' * depth}{key}:"
                yield from lines(value, depth + 1)
            else:
                yield f"{'  ' * depth}{key}: {value}"

    path = folder / "options.yaml"
    path.write_text("\n".join(lines(tree)) + "\n", encoding="utf-8")
    return str(path)


def both_ways(cls, folder, field_texts: dict[str, str], quoted: bool = False, written: dict[str, str] | None = None):
    """The config of these options by command line, and by file."""
    yield "command line", load(cls, None, [f"{name}={text}" for name, text in field_texts.items()])
    written = written or {name: json.dumps(text) if quoted else text for name, text in field_texts.items()}
    yield "file", load(cls, as_file(folder, written))


HOME = "/home/somebody"
# Every text field of every job is a path, in which ~ is a home folder, or stands here.
NO_PATHS = {
    *("tracking.experiment", "tracking.run", "tracking.parent", "name", "model.wavelet", "label", "split", "reasons"),
    *("image_column", "id_column", "columns", "backbone_model", "table", "rows", "sweep", "runs", "baseline"),
    *("metrics", "curves"),
}


@pytest.fixture(autouse=True)
def _at_home(monkeypatch):
    monkeypatch.setenv("HOME", HOME)


def text_fields(cls):
    """Yield (name, whether it is a list) of every field that is text or a list of it."""
    for name, kind, _ in leaves(cls):
        (first, *_) = members(kind)
        if first is str:
            yield name, False
        elif get_origin(first) is list and members(get_args(first)[0]) == [str]:
            yield name, True


def is_path(name):
    return not {name, name.rpartition(".")[2]} & NO_PATHS


@pytest.mark.parametrize("cls", JOBS)
def test_a_tilde_is_a_home_folder_in_paths_and_nowhere_else(cls, tmp_path):
    """From the command line and from a file; a shell leaves it as it is in quotes and behind `key=`."""
    for name, many in text_fields(cls):
        if name == "name":
            continue  # it has a pattern that no such text fits
        more = {"baseline": "row"} if name == "sweep" else {}  # a file of it alone would be a recipe of the job sweep
        for text, found in {
            "~": HOME,
            "~/a b": f"{HOME}/a b",
            "~root/a": f"{pwd.getpwnam('root').pw_dir}/a",
            "~nobody-at-all/a": "~nobody-at-all/a",
            "a/~": "a/~",
            "./~/a": "./~/a",
            "s3://bucket/~/a": "s3://bucket/~/a",
        }.items():
            given = json.dumps([text, "x"]) if many else text
            expected = found if is_path(name) else text
            for way, config in both_ways(cls, tmp_path, {name: given} | more, quoted=not many):
                assert value_of(config, name) == ([expected, "x"] if many else expected), (way, name)


def test_a_tilde_in_lists_with_commas_and_in_the_sections_of_a_sweep(tmp_path):
    found = []
    assert main(Evaluate, found.append, ["complexity", "S,~/vae"], actions=evaluate_job.ACTIONS) == 0
    assert found[-1].models == ["S", f"{HOME}/vae"]
    assert main(Encode, found.append, ["verify", "~/cache"], actions=encode_dataset.ACTIONS) == 0
    assert found[-1].cache == f"{HOME}/cache"
    config = load(Sweep, None, ["space.model.init=[~/a, b]", "train_vae.loss.lpips.weights=~/vgg.pth"])
    assert config.space == {"model": {"init": [f"{HOME}/a", "b"]}}
    assert config.train_vae == {"loss": {"lpips": {"weights": f"{HOME}/vgg.pth"}}}


def test_a_preset_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("seed: 7\n")
    assert load(TrainVAE, "~/mine.yaml").seed == 7


@pytest.mark.usefixtures("no_home")
@pytest.mark.parametrize("path", ["~/photos", "~/"])
def test_a_tilde_without_a_home_folder(path):
    with pytest.raises(UserError, match=f"{path}: there is no home folder; set HOME, or write the path without ~"):
        load(Encode, None, [f"source.uri={path}", "model=m", "out=o"])
    assert typed_text.expanded("~nobody-at-all/photos") == "~nobody-at-all/photos"


# Of these, a training takes one at most.
INSTEAD_OF_INIT = {"model.init_decoder", "teacher"}


@pytest.mark.parametrize("cls", JOBS)
def test_text_arrives_as_it_was_typed(cls, tmp_path):
    fields = {name: pattern_of(metadata) for name, kind, metadata in leaves(cls) if members(kind) == [str]}
    assert fields
    for text in PLAIN + QUOTED:
        fitting = {name: text for name, pattern in fields.items() if re.search(pattern, text)}
        for names in ({*fitting} - INSTEAD_OF_INIT, *({name} for name in {*fitting} & INSTEAD_OF_INIT)):
            together = {name: text for name in fitting if name in names}
            for way, config in both_ways(cls, tmp_path, together, quoted=text in QUOTED):
                found = {name: value_of(config, name) for name in together}
                home = text.replace("~", HOME, 1) if text[:1] == "~" else text
                assert found == {name: home if is_path(name) else text for name in together}, (way, text)
        for name in fields.keys() - fitting.keys():
            for preset, overrides in ((None, [f"{name}={text}"]), (as_file(tmp_path, {name: json.dumps(text)}), [])):
                with pytest.raises(UserError, match=rf"^{name}: string should match") as error:
                    load(cls, preset, overrides)
                assert f"(got {text!r})" in str(error.value)


CHANNELS = {"dwt": "12", "dwt-2": "48"}  # the only ones that these encoders have


def choices_of(kind: Any) -> list[str]:
    return [choice for member in members(kind) if get_origin(member) is Literal for choice in get_args(member)]


@pytest.mark.parametrize("cls", JOBS)
def test_choices_lists_and_maps_of_text_arrive_as_they_were_typed(cls, tmp_path):
    for name, kind, _ in leaves(cls):
        (first, *_) = members(kind)
        for choice in choices_of(kind):
            given = {name: choice} | ({"model.latent_channels": CHANNELS[choice]} if choice in CHANNELS else {})
            for way, config in both_ways(cls, tmp_path, given):
                assert value_of(config, name) == choice, way
        if get_origin(first) is list and members(get_args(first)[0]) == [str]:
            plain = [text for text in PLAIN if "," not in text]
            block = "".join(f"\n{'  ' * name.count('.')}- {text}" for text in plain)
            home = [text.replace("~", HOME, 1) if text[:1] == "~" and is_path(name) else text for text in plain]
            for way, config in both_ways(cls, tmp_path, {name: f"[{', '.join(plain)}]"}, written={name: block}):
                assert value_of(config, name) == home, way
            (found, other) = both_ways(cls, tmp_path, {name: json.dumps(QUOTED, ensure_ascii=False)})
            assert value_of(found[1], name) == value_of(other[1], name) == [*QUOTED]
        if get_origin(first) is dict:
            given = {text.replace(" ", "-"): text for text in PLAIN if text != "<<"}
            shown = "{" + ", ".join(f"{key}: {text}" for key, text in given.items()) + "}"
            for way, config in both_ways(cls, tmp_path, {name: shown}):
                assert value_of(config, name) == given, way
            assert value_of(load(cls, None, [f"{name}.version=1.10", f"{name}.on=#2"]), name) == {
                "version": "1.10", "on": "#2",
            }  # fmt: skip


NO_NUMBERS = (
    *("1_000", "12:30", "1:0.5", "0b11", "2024-10-05", "on", "no", "true", "inf", "nan", "Infinity", "1 000", "0o8"),
    *("null", "~", "", "٣", "½", "1e", "e5", "fast", "5%", "1k", "0xg", "+", "1.2.3", "5_", "1__0", "0_1", "１"),
)  # fmt: skip
NO_SWITCHES = ("on", "off", "ON", "yes", "no", "Yes", "y", "n", "t", "f", "", "~", "null", "tRUE", "2024-10-05", "1_0")


@pytest.mark.parametrize("cls", JOBS)
def test_what_only_yaml_1_1_takes_for_a_number_or_a_switch_is_refused(cls, tmp_path):
    """Under each field's name, with the text, from the command line and from a file; all mistakes at once."""
    numbers, switches, lists, optional = [], [], [], []
    for name, kind, _ in leaves(cls):
        parts = members(kind)
        if NoneType in parts:
            optional.append(name)
        if {int, float} & {*parts}:
            numbers.append(name)
        elif bool in parts:
            switches.append(name)
        elif get_origin(parts[0]) in (list, tuple) and {int, float} & {*members(get_args(parts[0])[0])}:
            lists.append(name)
    assert numbers + switches
    for names, texts in ((numbers, NO_NUMBERS), (switches, NO_SWITCHES), (lists, NO_NUMBERS)):
        for text in texts if names else ():
            if names is lists and not text:
                continue  # [] is an empty list
            nothing = optional if text in ("null", "~", "") else []
            given = {name: f"[{text}]" if names is lists else text for name in names if name not in nothing}
            for preset, overrides in (
                (None, [f"{name}={value}" for name, value in given.items()]),
                (as_file(tmp_path, given), []),
            ):
                with pytest.raises(UserError) as error:
                    load(cls, preset, overrides)
                lines = str(error.value).splitlines()
                for name in given:
                    found = [line for line in lines if re.match(rf"{re.escape(name)}[.:]", line)]
                    assert found, (name, text)
                    assert f"(got {text!r})" in found[0]


def test_stages_are_read_by_their_fields():
    for text in ("1_000", "on", "12:30"):
        with pytest.raises(
            UserError, match=rf"stages\.0\.images: .*\(got {text!r}\); numbers are written as in YAML 1.2"
        ):
            load(TrainVAE, None, [f"stages=[{{images: {text}}}]"])
    (stage,) = load(TrainVAE, None, ["stages=[{images: 1e3, resolution: 0x40, batch_size: 010}]"]).stages
    assert (stage.images, stage.resolution, stage.batch_size) == (1000, 64, 10)


@pytest.mark.parametrize(
    ("cls", "name", "text", "value"),
    [
        (TrainVAE, "seed", "010", 10),  # YAML 1.1: 8
        (TrainVAE, "seed", "0o17", 15),
        (TrainVAE, "seed", "0x1F", 31),
        (TrainVAE, "seed", "+5", 5),
        (TrainVAE, "seed", "1e3", 1000),
        (TrainVAE, "seed", "5.0", 5),
        (TrainVAE, "seed", " 5 ", 5),
        (TrainVAE, "seed", "5 # of the first run", 5),
        (TrainVAE, "seed", '"5"', 5),
        (TrainVAE, "optim.lr", "1e-4", 1e-4),
        (TrainVAE, "optim.lr", "1E-4", 1e-4),
        (TrainVAE, "optim.lr", "1.e-4", 1e-4),
        (TrainVAE, "optim.lr", ".5", 0.5),
        (TrainVAE, "optim.lr", "5.", 5.0),
        (TrainVAE, "optim.lr", "08", 8.0),
        (TrainVAE, "optim.clip", ".inf", math.inf),
        (TrainVAE, "optim.betas", "[0.9, 9e-1]", (0.9, 0.9)),
        (TrainVAE, "model.levels", "[01, 2]", [1, 2]),
        (TrainVAE, "checkpointing", "True", True),
        (TrainVAE, "checkpointing", "FALSE", False),
        (TrainVAE, "checkpointing", "1", True),
        (TrainVAE, "ray.gpu", "auto", "auto"),
        (TrainVAE, "ray.gpu", "true", True),
        (Encode, "batch_size", "auto", "auto"),
        (Encode, "batch_size", "064", 64),
        (Encode, "source", "{uri: 2024-10-05, columns: [no, 1.10], split: null}", None),
        (Sample, "classes", "[0x10, 1e1]", [16, 10]),
        (Sweep, "seeds", "[0, 1]", [0, 1]),
    ],
)
def test_numbers_switches_lists_and_sections_are_yaml_1_2(cls, name, text, value, tmp_path):
    for way, config in both_ways(cls, tmp_path, {name: text}):
        found = value_of(config, name)
        if name == "source":
            found, value = (found.uri, found.columns, found.split), ("2024-10-05", ["no", "1.10"], "null")
        assert (type(found), found) == (type(value), value), way


@pytest.mark.parametrize("section", SECTIONS_OF_SWEEP)
def test_the_sections_of_a_sweep_are_read_as_those_of_its_jobs(section, tmp_path):
    """Which pydantic does not know, since they hold what is given alone."""
    cls, space = SECTIONS_OF_SWEEP[section], section == "space"

    def given(text):
        return f"[{text}]" if space else text

    texts = [name for name, kind, _ in leaves(cls) if members(kind) == [str]]
    numbers = [name for name, kind, _ in leaves(cls) if {int, float} & {*members(kind)}]
    switches = [name for name, kind, _ in leaves(cls) if members(kind) == [bool]]
    for text in PLAIN[::3] + (() if space else QUOTED[::3]):
        options = {f"{section}.{name}": given(text) for name in texts}
        written = {name: json.dumps(text) if text in QUOTED else value for name, value in options.items()}
        for way, config in both_ways(Sweep, tmp_path, options, written=written):
            for name in texts:
                home = text.replace("~", HOME, 1) if text[:1] == "~" and is_path(name) else text
                assert value_of(getattr(config, section), name) == ([home] if space else home), (way, name)
    for name in numbers:
        for way, config in both_ways(Sweep, tmp_path, {f"{section}.{name}": given("1e-4")}):
            assert value_of(getattr(config, section), name) == ([1e-4] if space else 1e-4), way
        for text in ("1_000", "12:30", "on", "2024-10-05"):
            for preset, overrides in (
                (None, [f"{section}.{name}={given(text)}"]),
                (as_file(tmp_path, {f"{section}.{name}": given(text)}), []),
            ):
                with pytest.raises(UserError, match=rf"{section}: .*{re.escape(name)}={text}: no number and no switch"):
                    load(Sweep, preset, overrides)
    for name in switches:
        with pytest.raises(UserError, match=rf"{section}: .*{re.escape(name)}=yes: no number and no switch"):
            load(Sweep, None, [f"{section}.{name}={given('yes')}"])
        found = value_of(getattr(load(Sweep, None, [f"{section}.{name}={given('true')}"]), section), name)
        assert found == ([True] if space else True)


def test_a_choice_of_texts_is_drawn_as_it_was_typed():
    space = load(
        Sweep, None, ["space={model.init: {choice: [1.10, no]}, optim: {lr: {loguniform: [1e-5, 0.1]}}}"]
    ).space
    assert space == {"model.init": {"choice": ["1.10", "no"]}, "optim": {"lr": {"loguniform": [1e-5, 0.1]}}}


class Unions(BaseModel):
    """What no job has yet."""

    either: float | str = 0.0
    perhaps: str | None = None
    count: int | None = None
    some: Literal["auto"] | int = 1
    path: Path = Path()
    many: list[str] | str = ""
    table: dict[str, int] = {}
    pair: tuple[str, int] = ("", 0)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("either", "1.1", 1.1), ("either", "1.10", "1.10"), ("either", "007", "007"), ("either", "0x10", "0x10"),
        ("either", "12:30", "12:30"), ("either", "[a]", "[a]"), ("either", "7", 7.0), ("either", "on", "on"),
        ("perhaps", "null", "null"), ("perhaps", "~", "~"), ("perhaps", "1.10", "1.10"), ("perhaps", "", ""),
        ("count", "null", None), ("count", "~", None), ("count", "7", 7),
        ("some", "auto", "auto"), ("some", "7", 7), ("path", "2024-01-01", Path("2024-01-01")),
        ("path", "a #2", Path("a #2")),
        ("many", "1.10", "1.10"), ("many", "[1.10, no]", ["1.10", "no"]), ("many", "a: b", "a: b"),
        ("table", "{1: 010}", {"1": 10}), ("pair", "[007, 007]", ("007", 7)),
    ],
)  # fmt: skip
def test_unions_are_decided_by_their_types(name, text, value):
    values = {name: typed_text.parse_option(Unions, name, text)}
    found = getattr(Unions.model_validate(typed_text.typed(Unions, values)), name)
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize("text", ["1_000", "on", "12:30", "null"])
def test_a_choice_or_a_number_is_no_other_text(text):
    assert repr(typed_text.typed(Unions, {"some": text})["some"]) == repr(text)
    with pytest.raises(ValueError, match="some"):
        Unions.model_validate(typed_text.typed(Unions, {"some": text}))


@pytest.mark.parametrize("cls", JOBS)
def test_a_printed_config_is_read_as_the_same(cls, tmp_path, capsys):
    fields = [name for name, kind, metadata in leaves(cls) if members(kind) == [str] and not pattern_of(metadata)]
    fields = [name for name in fields if name not in INSTEAD_OF_INIT]
    texts = PLAIN + QUOTED
    for first in range(0, len(texts), len(fields)):
        config = load(cls, None, [f"{name}={text}" for name, text in zip(fields, texts[first:], strict=False)])
        (tmp_path / "printed.yaml").write_text(dump(config))
        assert load(cls, str(tmp_path / "printed.yaml")) == config


def test_quotes_and_tags_in_a_file(tmp_path):
    """Of text in quotes, in blocks, behind tags and anchors only the text counts."""
    path = tmp_path / "mine.yaml"
    path.write_bytes(
        "\ufefflabel: '1.10'\r\ncache: >-\r\n  /data/set\r\n  two\r\nvae: !!str 007\r\n"
        "cache_local: &a 1.10\r\ndata: {source: {uri: *a, split: }}\r\nseed: '5' # five\r\n".encode()
    )
    config = load(TrainLDM, str(path))
    assert (config.label, config.cache, config.vae, config.cache_local) == ("1.10", "/data/set two", "007", "1.10")
    assert (config.data.source.uri, config.data.source.split, config.seed) == ("1.10", "", 5)
    path.write_text("optim: &o {lr: 1e-3, clip: 1}\nloop: {ema: 0.5}\n", encoding="utf-16")
    assert load(TrainLDM, str(path)).optim.lr == 1e-3
    path.write_text("data:\n  train: &t {uri: 1.10, split: no}\n  val: {<<: *t, split: yes}\n")
    data = load(TrainVAE, str(path)).data
    assert (data.train.uri, data.train.split, data.val.uri, data.val.split) == ("1.10", "no", "1.10", "yes")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b", "'name' is there twice"),
        ("optim: {lr: 1, lr: 2}", "'lr' is there twice"),
        ("begin: &x", "&x names nothing"),
        ("begin: *.parquet", "put quotes around text"),
        ("begin: /data/a: b", "put quotes around text"),
        ("begin: @x", "put quotes around text"),
        ("begin: [2024]/photos", "put quotes around text"),
        ("begin: !x", "put quotes around text"),
        ("begin: !!python/name:os.system x", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("begin: \x07", "not valid YAML"),
        ("begin: {a}", r"begin: .*valid string.*YAML reads a section here: put quotes around text"),
        ("begin: [2024]", r"begin: .*valid string.*YAML reads a list here: put quotes around text"),
        ("just words", "expected `key: value` lines at the top, found text"),
        ("data: &a {train: *a}", r"data\.train"),
        ("stages: &a [*a]", r"stages\.0"),
    ],
)
def test_files_that_are_no_options(text, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load(TrainVAE, str(path))


def test_quotes_do_what_the_message_says(tmp_path):
    path = tmp_path / "mine.yaml"
    for text in ("*.parquet", "/data/a: b", "@x", "[2024]/photos", "!x", "{a}", "&x", "/data/set #2"):
        path.write_text(f"begin: '{text}'\n")
        assert load(TrainVAE, str(path)).begin == text


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("source.columns=caption", r"source\.columns: .*valid list \(got 'caption'\); a list is written \[a, b\]"),
        ("source.columns=[label", r"source\.columns: '\[label' is not valid YAML"),
        ("source.columns=[a: b]", r"source\.columns\.0: .*YAML reads a section here: put quotes"),
        ("transform=256", r"transform: .*\(got '256'\); a section is written {a: b}"),
        ("source=*x", "source: .* is not valid YAML"),
        ("tracking.tags=a", r"tracking\.tags: .*\(got 'a'\); a section is written {a: b}"),
        ("transform.flips=on", r"transform\.flips: .*\(got 'on'\); a switch is true or false"),
        ("transform.seed=1_000", r"transform\.seed: .*\(got '1_000'\); numbers are written as in YAML 1.2: 1000,"),
        ("transform.seed=[1]", r"transform\.seed: "),
        ("source.urk=*x", r"unknown config key 'source\.urk'; did you mean 'source\.uri=\*x'"),
    ],
)
def test_options_that_are_none(option, message):
    with pytest.raises(UserError, match=message):
        load(Encode, None, [option])


def test_bytes_of_a_path_that_are_no_text_arrive():
    config = load(Encode, None, ["source.uri=" + os.fsdecode(b"/data/\xff #2")])
    assert os.fsencode(config.source.uri) == b"/data/\xff #2"


def test_bare_words_are_what_was_typed(tmp_path):
    found = []
    for word in (
        "/data/cache #2",
        "2024-10-05",
        "1.10",
        "/data/label=cat/cache",
        "*.x",
        "[a]",
        "../a=b",
        "a: b",
        "007",
    ):
        assert main(Encode, found.append, ["verify", word], actions=encode_dataset.ACTIONS) == 0
        assert found[-1].cache == word
        assert main(Evaluate, found.append, ["samples", word], actions=evaluate_job.ACTIONS) == 0
        assert found[-1].samples.uri == word
    for words, models in (("S,007,1.10,a #2", ["S", "007", "1.10", "a #2"]), ("[S, 'a,b']", ["S", "a,b"])):
        assert main(Evaluate, found.append, ["complexity", words], actions=evaluate_job.ACTIONS) == 0
        assert found[-1].models == models
    assert main(Encode, found.append, ["verify", "threads=010", "/data/x"], actions=encode_dataset.ACTIONS) == 0
    assert (found[-1].threads, found[-1].cache) == (10, "/data/x")


@pytest.mark.parametrize("name", ["2024-10-05", "1.10", "set #2", "a: b.yaml", "[a]", "a=b", "007"])
def test_a_presets_path_is_what_was_typed(name, tmp_path):
    (tmp_path / name).write_text("seed: 7\n")
    (tmp_path / f"{name}.yaml").write_text("seed: 8\n")  # another file
    found = []
    for words in (["--config", f"{tmp_path}/{name}"], [f"--config={tmp_path}/{name}"]):
        assert main(TrainVAE, found.append, words) == 0
        assert found[-1].seed == 7


# --- what earlier versions kept ---------------------------------------------------------------------------------


def test_a_sweep_of_an_earlier_version_goes_on(tmp_path):
    """It kept 1e-4 as text, which YAML 1.1 takes for that; a number that differs is refused as before."""
    words = ["space.optim.lr=[1e-4, 0.5]", "train_vae.loss.kl.weight=1e-8", "space.loss.l1.weight.uniform=[1e-3, 1]"]
    config = load(Sweep, None, words)
    run_folder.open_run(str(tmp_path / "now"), config, ())
    kept = yaml.safe_load((tmp_path / "now" / "config.yaml").read_text())
    assert kept["space"]["optim"]["lr"] == [1e-4, 0.5]
    kept["space"] = {"optim": {"lr": ["1e-4", 0.5]}, "loss": {"l1": {"weight": {"uniform": ["1e-3", 1]}}}}
    kept["train_vae"] = {"loss": {"kl": {"weight": "1e-8"}}}
    (tmp_path / "then").mkdir()
    (tmp_path / "then" / "config.yaml").write_text(yaml.safe_dump(kept))
    leave_checkpoint(tmp_path / "then")
    assert run_folder.open_run(str(tmp_path / "then"), config, ())
    with pytest.raises(UserError, match=r"space\.optim\.lr: was \['1e-4', 0\.5\], is \[0\.0002, 0\.5\]"):
        run_folder.open_run(str(tmp_path / "then"), load(Sweep, None, ["space.optim.lr=[2e-4, 0.5]", *words[1:]]), ())


def test_a_runs_own_config_opens_it_again(tmp_path):
    config = load(TrainVAE, None, ["name=1.10", "data.train.uri=/data/set #2", "data.train.split=on", "optim.lr=1e-5"])
    run_folder.open_run(str(tmp_path), config, ())
    again = load(TrainVAE, str(tmp_path / "config.yaml"))
    assert again == config
    assert run_folder.open_run(str(tmp_path), again, ())


# --- an output that nobody reads --------------------------------------------------------------------------------


@contextmanager
def unread() -> Iterator[None]:
    """Stdout is a pipe whose other end is closed. What is left in it goes nowhere, as Python finds it when it ends."""
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "w") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        yield
        stream.flush()


@pytest.mark.parametrize("words", [["--help"], ["--help", "loop"], ["--print-config"]])
def test_help_that_nobody_reads_is_no_error(words, capfd):
    with unread():
        assert main(TrainVAE, lambda config: pytest.fail("it ran"), words) == 141
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("flush", [True, False])
def test_a_job_whose_output_nobody_reads_ends_quietly(flush, capfd):
    with unread():
        assert main(TrainVAE, lambda config: print("line", flush=flush), []) == 141
    assert capfd.readouterr().err == ""


def test_another_pipe_that_breaks_is_an_error(monkeypatch):
    def lose(config):
        raise BrokenPipeError("a connection")

    with open(os.devnull, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        with pytest.raises(BrokenPipeError):
            main(TrainVAE, lose, [])


def test_output_that_has_no_room_or_no_place(monkeypatch, capfd):
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert main(TrainVAE, print, ["--help"]) == 2
        full.flush()
    assert capfd.readouterr().err == "error: the output can't be written: No space left on device\n"
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it where a process begins with it closed
    assert main(TrainVAE, print, ["--help"]) == 0
