"""Building blocks of configs: sections with typed fields, the parts that every job has, and the check of values.

Lengths and intervals of a training are numbers of images, not of steps, so that they do not depend on the batch size.
"""

import difflib
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticUndefined

from litevae.errors import UserError
from pipelines.runtime import typed_text

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """The base class of config sections. Unknown fields are refused, and values can't be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, protected_namespaces=())


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
    uri: str = Field("", description="tracking server; empty: $MLFLOW_TRACKING_URI, else sqlite in <root>/mlflow.db")
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

    root: str = Field("runs", description="folder for runs and the default MLflow database")
    tracking: Tracking = Tracking()


class Job(Tracked):
    """The fields that every job on Ray has."""

    ray: Ray = Ray()


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
        return cls.model_validate(merged(cls().model_dump(mode="json"), typed_text.typed(cls, values)))
    except ValidationError as error:
        raise UserError("\n".join(_explain(cls, dict(problem)) for problem in error.errors())) from None


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


def fields_of(
    cls: type[BaseModel], prefix: str = "", instance: BaseModel | None = None
) -> Iterator[tuple[str, str, str, str]]:
    """Yield (dotted name, type, default, description) of every field of a config, as text."""
    for name, field in cls.model_fields.items():
        default = getattr(instance, name) if instance is not None else field.default
        if isinstance(default, BaseModel):
            if field.description:
                yield f"{prefix}{name}", "section", "...", field.description
            yield from fields_of(type(default), f"{prefix}{name}.", default)
            continue
        shown = (
            "required"
            if default is PydanticUndefined
            else yaml.safe_dump(_plain(default), default_flow_style=True, width=10**6)
            .strip()
            .removesuffix("...")
            .strip()
        )
        yield f"{prefix}{name}", _kind(field.annotation, field.metadata), shown, field.description or ""


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _kind(annotation: Any, metadata: list[Any]) -> str:
    """Return the text for the type of a field: its choices, or its type and limits."""
    alternatives = [a for part in get_args(annotation) for a in (get_args(part) or [part])]
    if choices := [a for a in alternatives if isinstance(a, str)]:
        return " | ".join(choices + ["true | false"] * (bool in alternatives))
    kind = getattr(annotation, "__name__", None) or str(annotation).replace("typing.", "")
    if "[" in str(annotation):
        kind = re.sub(r"pipelines\.\w+\.\w+\.", "", str(annotation)).split("[")[0] + " of values"
    limits = [
        f"{sign} {value}"
        for item in metadata
        for sign, attribute in ((">=", "ge"), (">", "gt"), ("<=", "le"), ("multiple of", "multiple_of"))
        if (value := getattr(item, attribute, None)) is not None
    ]
    return " ".join([kind, *limits])


def unknown_field(name: str, known: list[str]) -> str:
    """Return the error message for a field that does not exist, with the most similar name that does."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"unknown config key {name!r}" + (f"; did you mean {close[0]!r}?" if close else "") + " (--help lists all)"


def _explain(cls: type[BaseModel], problem: dict[str, Any]) -> str:
    """Turn an error of pydantic into one line for people."""
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return unknown_field(path, [name for name, *_ in fields_of(cls)])
    message = problem["msg"][0].lower() + problem["msg"][1:]
    given = problem["input"]
    if problem["type"] not in ("missing", "value_error"):
        message += f" (got {given!r})"
    return f"{path or 'config'}: {message}{_advice(problem['type'], given)}"


def _advice(problem: str, given: Any) -> str:
    """Return what to write instead of a value that pydantic refuses, or an empty text."""
    if problem == "string_type" and isinstance(given, list | dict):
        return f"; YAML reads a {'list' if isinstance(given, list) else 'section'} here: {typed_text.QUOTING}"
    if isinstance(given, str | typed_text.Misread) and problem in typed_text.ADVICE:
        return f"; {typed_text.ADVICE[problem]}"
    return ""
