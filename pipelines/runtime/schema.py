"""Building blocks of configs: sections with typed fields, the parts that every job has, and the check of values.

Lengths and intervals of a training are numbers of images, not of steps, so that they do not depend on the batch size.
"""

import dataclasses
import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticUndefined

from litevae.errors import UserError
from pipelines.runtime import near_misses, typed_text

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PathText = Annotated[str, typed_text.IsPath()]  # a file or folder, also s3:// where the field says so


@dataclasses.dataclass(frozen=True)
class Needed:
    """A field that a job refuses when it is empty.

    Attributes:
        example: a value, as it is written on a command line.
        when: the values of other fields with which it is needed; none: always.
        note: how `--help` says when it is needed, where only the job itself can check that.
        meaning: what it is, where its own description needs its section's to be understood.
        usual: whether it is in the first usage line.
    """

    example: str
    when: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    note: str = ""
    meaning: str = ""
    usual: bool = True

    def mark(self) -> str:
        """Return how `--help` says that it is needed."""
        cases = [f"{name}={value}" for name, values in self.when.items() for value in values]
        return self.note or "required" + (f" with {' or '.join(cases)}" if cases else "")


@dataclasses.dataclass(frozen=True)
class Shown:
    """What the short `--help` of a job shows: at most twenty fields, each with an example.

    Attributes:
        needed: the fields that must be given.
        groups: the most used of the others, by heading: {field: example}, or {field: (example, meaning)} where the
            field's own description needs its section's to be understood.
    """

    needed: Mapping[str, Needed] = dataclasses.field(default_factory=dict)
    groups: Mapping[str, Mapping[str, str | tuple[str, str]]] = dataclasses.field(default_factory=dict)

    def examples(self) -> dict[str, str]:
        """Return the examples of all fields that are shown."""
        found = {name: needed.example for name, needed in self.needed.items()}
        for group in self.groups.values():
            found |= {name: value if isinstance(value, str) else value[0] for name, value in group.items()}
        return found


class Section(BaseModel):
    """The base class of config sections. Unknown fields are refused, and values can't be changed."""

    shown: ClassVar[Shown] = Shown()

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, protected_namespaces=())

    @classmethod
    def implied(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the defaults that are others because of the values that are given."""
        return {}


class Ray(Section):
    """How much of the machine or cluster a job takes."""

    workers: Positive = Field(1, description="training or encoding processes; one GPU each where there are GPUs")
    gpu: Literal["auto"] | bool = Field("auto", description="GPUs for the workers; auto: where the cluster has them")
    gpus_per_worker: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="encode, sample, evaluate: below 1, workers share a GPU"
    )
    cpus_per_worker: Count = Field(0, description="CPUs (and torch threads) a worker; 0: share the machine's evenly")
    decode_tasks: Count = Field(
        0,
        description="encode, evaluate: image-decoding tasks at a time, one CPU each; 0: with GPUs the CPUs that the "
        "workers leave, else one for 8 CPUs",
    )
    min_workers: Count = Field(
        0,
        description="training: begin and go on with as few where nodes are missing or lost, and with more as they come "
        "(elastic), up to `workers`; 0: always with `workers`",
    )
    wait: Count = Field(
        0,
        description="seconds to wait for a cluster to have what is asked for, where it grows by itself; with gpu=true",
    )
    worker_labels: dict[str, str] = Field(
        {}, description="workers run on nodes with these labels only (ray start --labels), e.g. {pool: gpu}"
    )
    decode_labels: dict[str, str] = Field({}, description="encode: so do decoding tasks, e.g. {pool: cpu}")

    @model_validator(mode="after")
    def _elastic(self) -> "Ray":
        if self.min_workers > self.workers:
            raise ValueError(f"min_workers={self.min_workers} is more than workers={self.workers}")
        if self.min_workers and self.worker_labels:
            raise ValueError(
                "min_workers and worker_labels can't be combined: Ray counts the free resources of all nodes, also of "
                "those without the labels, and would wait indefinitely. Workers with GPUs need no labels"
            )
        return self


class Tracking(Section):
    """How a run is tracked in MLflow."""

    enabled: bool = Field(True, description="false: metrics go to the run's metrics.jsonl only")
    uri: PathText = Field(
        "", description="tracking server; empty: $MLFLOW_TRACKING_URI, else sqlite in <root>/mlflow.db"
    )
    experiment: str = Field(
        "", description="MLflow experiment; empty: $MLFLOW_EXPERIMENT_NAME or $MLFLOW_EXPERIMENT_ID, else litevae"
    )
    run: str = Field("", description="the run's name there; empty: the job's")
    join: bool = Field(
        True,
        description="log to the run in $MLFLOW_RUN_ID, or to one below it where another job has it; false: always to a "
        "run of its own",
    )
    parent: str = Field("", description="id of the MLflow run that this one is a child of")
    tags: dict[str, str] = Field({}, description="further tags of the run")


class Tracked(Section):
    """The fields that every job has."""

    root: PathText = Field("runs", description="folder for runs and the default MLflow database")
    tracking: Tracking = Tracking()


class Job(Tracked):
    """The fields that every job on Ray has."""

    ray: Ray = Ray()


class LongJob(Job):
    """The fields that every job has which can take days."""

    yes: bool = Field(False, description="begin without asking, also what will take more than a day without a GPU")


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def validate(cls: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Make a config from values. Fields that are not given keep the job's defaults, also in a section given in part.

    Args:
        cls: the config class.
        values: nested values. Text in the place of a number or a switch is read as YAML 1.2 has it.

    Raises:
        UserError: if keys or values are wrong; the message names every wrong field.
    """
    try:
        given = typed_text.typed(cls, values)
        implied = cls.implied(given) if issubclass(cls, Section) else {}
        return cls.model_validate(merged(cls().model_dump(mode="json"), implied, given))
    except ValidationError as error:
        fields: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
        for problem in error.errors():
            fields.setdefault(_path(cls, problem["loc"]), []).append(problem)
        raise UserError("\n".join(_explain(cls, problems) for problems in fields.values())) from None


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    """Merge nested values; later parts override earlier ones."""
    found: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, dict) and isinstance(found.get(key), dict)
            found[key] = merged(found[key], value) if both else value
    return found


def flatten(values: dict[str, Any], number_sections: bool = False) -> dict[str, Any]:
    """Flatten nested dicts to {dotted name: value}.

    Args:
        values: nested config values.
        number_sections: whether the items of a list of sections are numbered (`stages.0.images`). If not, every list is
            kept as a value.
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        if number_sections and isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            found |= {f"{key}.{name}": item for name, item in flatten(value, number_sections).items()}
        else:
            found[str(key)] = value
    return found


def dump(config: BaseModel) -> str:
    """Return the resolved config as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def values_to_keep(config: BaseModel) -> dict[str, Any]:
    """Return the resolved config as plain values, for files and other processes.

    The tracking section is left out, because it may hold a password and does not change what is computed.
    """
    return config.model_dump(mode="json", exclude={"tracking"})


def check_needed(config: Section) -> None:
    """Check that the fields are given without which the job can't begin; a job calls it before it imports torch.

    Raises:
        UserError: if some are empty; the message names all of them, with an example each.
    """
    lines = []
    meanings = {name: text for name, _, _, text in fields_of(type(config))}
    for name, needed in config.shown.needed.items():
        asked = all(str(value_of(config, other)) in values for other, values in needed.when.items())
        if asked and not needed.note and not value_of(config, name):
            case = "".join(f" with {other}={value_of(config, other)}" for other in needed.when)
            lines.append(
                f"{name} is empty{case}; give it, e.g. {name}={needed.example} ({needed.meaning or meanings[name]})"
            )
    if lines:
        raise UserError("\n".join(lines))


def value_of(config: BaseModel, name: str) -> Any:
    """Return the value of a field, by its dotted name."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


@cache
def fields_of(cls: type[BaseModel]) -> tuple[tuple[str, str, str, str], ...]:
    """Return (dotted name, type, default, description) of every field of a config, as text."""
    return tuple(_fields_of(cls))


def _fields_of(
    cls: type[BaseModel], prefix: str = "", instance: BaseModel | None = None
) -> Iterator[tuple[str, str, str, str]]:
    """Yield what `fields_of` returns; the defaults of a section are those of its instance in the config."""
    for name, field in cls.model_fields.items():
        default = getattr(instance, name) if instance is not None else field.default
        if isinstance(default, BaseModel):
            if field.description:
                yield f"{prefix}{name}", "section", "...", field.description
            yield from _fields_of(type(default), f"{prefix}{name}.", default)
            continue
        shown = (
            "required"
            if default is PydanticUndefined
            else yaml.safe_dump(_plain(default), default_flow_style=True, width=10**6)
            .strip()
            .removesuffix("...")
            .strip()
        )
        yield f"{prefix}{name}", typed_text.kind_of(field), shown, field.description or ""


def names_of(cls: type[BaseModel]) -> list[str]:
    """Return the dotted names of all fields and sections of a config; what every job has comes last."""
    found: dict[str, None] = {}
    for name, *_ in fields_of(cls):
        parts = name.split(".")
        found |= {".".join(parts[:count]): None for count in range(1, len(parts) + 1)}
    return sorted(found, key=lambda name: name.partition(".")[0] in ("root", "tracking", "ray"))


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def unknown_field(cls: type[BaseModel], name: str, value: str = "") -> str:
    """Return the error message for a field that does not exist, with what was probably meant.

    Args:
        cls: the config class.
        name: the name that was given.
        value: the text that was given for it, if any.
    """
    hint = near_misses.field_hint(name, names_of(cls), value, lambda field: takes(cls, field, value))
    return f"unknown config key {name!r}{hint} (--help-all lists all)"


def takes(cls: type[BaseModel], name: str, value: str) -> bool:
    """Return whether a field takes this text."""
    values: Any = value
    for part in reversed(name.split(".")):
        values = {part: values}
    try:
        cls.model_validate(merged(cls().model_dump(mode="json"), typed_text.typed(cls, values)))
    except ValidationError as error:
        path = tuple(name.split("."))
        return not any(problem["loc"][: len(path)] == path for problem in error.errors())
    return True


def _explain(cls: type[BaseModel], problems: Sequence[Mapping[str, Any]]) -> str:
    """Turn what pydantic says of one field into one line for people."""
    path, given = _path(cls, problems[0]["loc"]), problems[0]["input"]
    name = ".".join(map(str, path)) or "config"
    if problems[0]["type"] == "extra_forbidden":
        rest, value = _only_value(given)  # a.b.c=1 where there is no a.b
        return unknown_field(cls, ".".join([name, *rest]), value)
    # For a field of several types pydantic has a problem with each of them.
    message = ", or ".join(problem["msg"][0].lower() + problem["msg"][1:] for problem in problems)
    if problems[0]["type"] not in ("missing", "value_error"):
        message += f" (got {given!r})"
    advice = next(filter(None, (_advice(problem["type"], given) for problem in problems)), "")
    words = typed_text.choices(cls, path) if problems[0]["type"] != "value_error" else []
    text = given.text if isinstance(given, typed_text.Misread) else given
    return f"{name}: {message}{near_misses.value_hint(text, words) or _other_level(cls, name, given) or advice}"


def _other_level(cls: type[BaseModel], name: str, given: Any) -> str:
    """Return the hint for a value that is a level too high or too low: the same word is a section in one job, and a
    value in another. Empty for other mistakes.
    """
    rest, value = _only_value(given)
    if rest and name in names_of(cls) and takes(cls, name, value):
        return f"; did you mean {shlex.quote(f'{name}={value}')}?"
    if isinstance(given, str) and given:
        for field in (f"{name}.{part}" for part in ("uri", "train.uri", "source.uri", "init")):
            if field in names_of(cls):
                return f"; did you mean {shlex.quote(f'{field}={given}')}?"
    return ""


def _only_value(given: Any) -> tuple[list[str], str]:
    """Return the keys to the one text that nested sections hold, and this text; without one, no keys and no text."""
    keys: list[str] = []
    while isinstance(given, dict) and len(given) == 1 and len(keys) < 10:  # a section of YAML may hold itself
        ((key, given),) = given.items()
        keys.append(str(key))
    return (keys, given) if isinstance(given, str) and given else ([], "")


def _path(cls: type[BaseModel], place: Sequence[Any]) -> tuple[Any, ...]:
    """Return the parts of a field's name, without what pydantic adds for the type of a union that it tried."""
    return tuple(place[:-1] if place and typed_text.is_union(cls, place[:-1]) else place)


def _advice(problem: str, given: Any) -> str:
    """Return what to write instead of a value that pydantic refuses, or an empty text."""
    if problem == "string_type" and isinstance(given, list | dict):
        return f"; YAML reads a {'list' if isinstance(given, list) else 'section'} here: {typed_text.QUOTING}"
    if isinstance(given, str | typed_text.Misread) and problem in typed_text.ADVICE:
        return f"; {typed_text.ADVICE[problem]}"
    return ""
