"""Read text by the type of the field that it is for: the same rules for a command line and for YAML files.

- A field that is text takes its text as it was typed: `name=1.10`, `out=/data/2024-01-01`, `source.uri=/data/set #2`.
- A field that is a path has a leading `~` or `~user` replaced, since a shell leaves it in quotes and after `key=`.
- YAML is read only for numbers, switches, lists and sections, and there as YAML 1.2 has it. What only YAML 1.1 knows
  (`1_000`, `12:30`, `on`, dates, the octal `010`) is refused, or read as version 1.2 does.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from litevae.errors import UserError

# The core schema of YAML 1.2.
_SWITCHES = {word: word.lower() == "true" for word in ("true", "True", "TRUE", "false", "False", "FALSE")}
_NULLS = ("null", "Null", "NULL", "~", "")
_NUMBERS = (
    (re.compile(r"[-+]?[0-9]+"), int),
    (re.compile(r"0o[0-7]+"), lambda text: int(text[2:], 8)),
    (re.compile(r"0x[0-9a-fA-F]+"), lambda text: int(text[2:], 16)),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    (re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"), lambda text: float(text.replace(".", ""))),
)
_MERGE = "tag:yaml.org,2002:merge"
_PLAIN_NUMBERS = "numbers are written as in YAML 1.2: 1000, 0.1, 1e-4, 0x10, without _ or :"
ADVICE = {  # for text, by pydantic's name of the problem
    "bool_type": "a switch is true or false",
    "int_type": _PLAIN_NUMBERS,
    "float_type": _PLAIN_NUMBERS,
    "list_type": "a list is written [a, b]",
    "tuple_type": "a list is written [a, b]",
    "dict_type": "a section is written {a: b}",
    "model_type": "a section is written {a: b}",
}
QUOTING = "put quotes around text that holds any of # : , [ ] { } & * ! ? | > % @"


@dataclass(frozen=True)
class SectionOf:
    """A mark on a field of type `dict[str, Any]`: its values are values of another config class.

    Attributes:
        config: that class.
        space: whether a field is given as the values to choose from, `[a, b]` or `{loguniform: [a, b]}`.
    """

    config: type[BaseModel]
    space: bool = False


@dataclass(frozen=True)
class IsPath:
    """A mark on text that is a local path, or may be one: a leading `~` is replaced, see `schema.PathText`."""


@dataclass(frozen=True)
class _Draws:
    """The type of what a search space gives for a field: a list of values of this type, or {kind of draw: list}."""

    kind: Any
    drawn: bool = False


@dataclass(frozen=True)
class Misread:
    """Text in the place of a number or a switch that is none. As text, pydantic would read some of it: 1_000, on."""

    text: str

    def __repr__(self) -> str:
        return repr(self.text)


class _TextLoader(yaml.SafeLoader):
    """Reads YAML into lists, dicts and text: every scalar is the text that was written."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - as the base class declares it

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        if anchor is not None and not node.value and not node.style:
            raise yaml.composer.ComposerError(None, None, f"&{anchor} names nothing", node.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value == "<<" and not key.style:
                    key.tag = _MERGE
                elif key.value in seen:
                    raise yaml.composer.ComposerError(None, None, f"{key.value!r} is there twice", key.start_mark)
                seen.add(key.value)
        return node


def parse(text: str | bytes) -> Any:
    """Return the lists, dicts and texts of a YAML document; None if it is empty.

    Raises:
        yaml.YAMLError: if it is no YAML, if a key is there twice, or if it has tags that YAML itself does not define.
    """
    loader = _TextLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def parse_option(config: type[BaseModel], key: str, text: str) -> Any:
    """Return what the text of `key=text` says: the text itself, or the list or section that it is in YAML.

    Args:
        config: the class of the config.
        key: dotted name of a field.
        text: the text after the equals sign.

    Raises:
        yaml.YAMLError: if the field takes no text, and this is no YAML.
    """
    kind: Any = config
    for name in key.split("."):
        kind = _child(kind, name)
    takes = {_shape(part) for part in _alternatives(kind)}
    if takes <= {"choice", "none"} or ("text" in takes and not takes & {"list", "section"}):
        return text
    try:
        value = parse(text)
    except yaml.YAMLError:
        if takes & {"list", "any"} and not text.lstrip().startswith(("[", "- ")):
            return text
        raise
    if isinstance(value, list) or (isinstance(value, dict) and "list" not in takes):
        return value
    # A single word in the place of a list stays as it was typed. For a number, YAML has removed spaces and comments.
    return value if isinstance(value, str) and takes <= {"number", "switch", "choice", "none"} else text


def typed(kind: Any, value: Any) -> Any:
    """Return a value in which every text is read by the type of its place; what is not text stays as it is.

    Args:
        kind: the type: a config class, or any annotation of a field.
        value: text, or lists and dicts with text in them.

    Returns:
        The value. Text that its place does not take is a `Misread`.
    """
    if kind is Any:
        return value
    if isinstance(value, str):
        return _typed_text(_alternatives(kind), value)
    if isinstance(value, list | tuple):
        kinds = _items(kind, len(value))
        return [typed(each, item) for each, item in zip(kinds, value, strict=True)]
    if isinstance(value, dict):
        return {key: typed(_child(kind, key), item) for key, item in value.items()}
    return value


def choices(config: type[BaseModel], path: Sequence[Any]) -> list[str]:
    """Return the words that a field may have as its value; none for a field that takes any text, or only numbers.

    Args:
        config: the class of the config.
        path: the parts of the field's dotted name; for an item of a list also its number.
    """
    kind: Any = config
    for name in path:
        kind = _items(kind, 1)[0] if isinstance(name, int) else _child(kind, name)
    parts = _alternatives(kind)
    if len(parts) == 1 and _shape(parts[0]) == "list":
        parts = _alternatives(_items(kind, 1)[0])
    found = [str(word) for part in parts if get_origin(part) is Literal for word in get_args(part)]
    return found + ["true", "false"] * (bool in parts)


def is_union(config: type[BaseModel], path: Sequence[Any]) -> bool:
    """Return whether a field, by the parts of its name, may have values of more than one type."""
    kind: Any = config
    for name in path:
        kind = _items(kind, 1)[0] if isinstance(name, int) else _child(kind, name)
    return len(_alternatives(kind)) > 1


def kind_of(field: FieldInfo) -> str:
    """Return for people what a field takes: its choices, or its type and limits."""
    if any(isinstance(mark, SectionOf | IsPath) for mark in field.metadata):
        return _kind(Annotated[field.annotation, *field.metadata])
    return _kind(field.annotation, field.metadata)


def _kind(kind: Any, metadata: Sequence[Any] = ()) -> str:
    """Return for people what a type takes, see `kind_of`."""
    origin = get_origin(kind)
    if origin is Annotated:
        inner, *marks = get_args(kind)
        if any(isinstance(mark, IsPath) for mark in marks):
            return "path"
        return _kind(inner, [*marks, *metadata])
    if origin in (Union, UnionType):
        return " | ".join(_kind(part) for part in get_args(kind))
    if origin is Literal:
        return " | ".join(map(str, get_args(kind)))
    if origin in (list, tuple):
        items = [part for part in get_args(kind) if part is not ...]
        item = _kind(items[0])
        several = re.sub(r"(number|path|text|section)", r"\1s", item)
        return f"list of ({item})" if " | " in item else f"list of {several}"
    if (isinstance(kind, type) and issubclass(kind, BaseModel)) or origin is dict:
        return "section"
    name = {bool: "true | false", int: "whole number", float: "number", str: "text"}.get(kind, "value")
    marks = [each for mark in metadata for each in (getattr(mark, "metadata", None) or [mark])]
    limits = [
        f"{sign} {limit:g}"
        for mark in marks
        for sign, attribute in ((">=", "ge"), (">", "gt"), ("<=", "le"), ("multiple of", "multiple_of"))
        if (limit := getattr(mark, attribute, None)) is not None
    ]
    return " ".join([name, *limits])


def takes_path(config: type[BaseModel], name: str) -> bool:
    """Return whether a field, by its dotted name, is a path or a list of paths."""
    kind: Any = config
    for part in name.split("."):
        kind = _child(kind, part)
    return any(isinstance(part, IsPath) or _is_path_list(part) for part in _alternatives(kind))


def expanded(path: str) -> str:
    """Return a path with a leading `~` or `~user` replaced by that folder; `~nobody` stays, as in a shell.

    Raises:
        UserError: if it is in the home folder, and there is none: HOME is not set, and the system does not know the
            user, as in a container that runs under any number.
    """
    found = os.path.expanduser(path) if path.startswith("~") else path
    if found == path and path.partition("/")[0] == "~":
        raise UserError(f"{path}: there is no home folder; set HOME, or write the path without ~")
    return found


def number(text: str) -> int | float | None:
    """Return the number that the text is in YAML 1.2, or None."""
    for pattern, read in _NUMBERS:
        if pattern.fullmatch(text):
            try:
                return read(text)
            except ValueError:  # more digits than Python converts
                return None
    return None


def check_read(values: Any) -> Any:
    """Return the values of a section whose fields pydantic does not know, see `SectionOf`.

    Raises:
        ValueError: if a number or a switch in them is none.
    """
    if found := [f"{name}={text.text}" for name, text in _misread(values)]:
        raise ValueError(f"{', '.join(found)}: no number and no switch; {_PLAIN_NUMBERS}; a switch is true or false")
    return values


def _misread(value: Any, path: str = "") -> Iterator[tuple[str, Misread]]:
    """Yield the dotted name and the text of every `Misread` in a value."""
    if isinstance(value, Misread):
        yield path, value
    elif isinstance(value, list):
        for item in value:
            yield from _misread(item, path)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _misread(item, f"{path}.{key}" if path else str(key))


def _typed_text(parts: list[Any], text: str) -> Any:
    """Return the text, or the number, switch or None that it is where only those are taken."""
    shapes = {_shape(part) for part in parts}
    if any(isinstance(part, IsPath) for part in parts):
        return expanded(text)
    if any(_is_path_list(part) for part in parts):
        return ",".join(map(expanded, text.split(",")))  # a list that may be written a,b,c
    if any(text in get_args(part) for part in parts if get_origin(part) is Literal):
        return text
    found = number(text)
    if "text" in shapes:  # beside text, only what is written as numbers are shown is a number: 1.1, not 1.10
        return found if "number" in shapes and str(found) == text else text
    if "switch" in shapes and text in _SWITCHES:
        return _SWITCHES[text]
    if "none" in shapes and text in _NULLS:
        return None
    if shapes & {"number", "switch"}:
        return Misread(text) if found is None else found
    return text


def _is_path_list(part: Any) -> bool:
    """Return whether a type is a list of paths."""
    return _shape(part) == "list" and any(isinstance(each, IsPath) for each in _alternatives(_items(part, 1)[0]))


def _alternatives(kind: Any) -> list[Any]:
    """Return the members of a union; of another type, that type."""
    if isinstance(kind, FieldInfo):
        marks = [mark for mark in kind.metadata if isinstance(mark, SectionOf | IsPath)]
        return [*marks] if marks else _alternatives(kind.annotation)
    if get_origin(kind) is Annotated:
        inner, *marks = get_args(kind)
        return [mark for mark in marks if isinstance(mark, IsPath)] or _alternatives(inner)
    if get_origin(kind) in (Union, UnionType):
        return [part for member in get_args(kind) for part in _alternatives(member)]
    return [kind]


def _shape(part: Any) -> str:
    """Return what one type takes: text, choice, number, switch, none, list, section, or any."""
    origin = get_origin(part) or part
    if origin is Literal:
        return "choice" if all(isinstance(choice, str) for choice in get_args(part)) else "number"
    if isinstance(part, SectionOf) or origin is dict:
        return "section"
    if isinstance(part, _Draws):
        return "any"
    if isinstance(part, IsPath):
        return "text"
    if isinstance(origin, type):
        for shape, types in (
            ("text", (str, Path)),
            ("switch", (bool,)),
            ("number", (int, float)),
            ("none", (NoneType,)),
            ("list", (list, tuple, set, frozenset)),
            ("section", (BaseModel,)),
        ):
            if issubclass(origin, types):
                return shape
    return "any"


def _child(kind: Any, key: str) -> Any:
    """Return the type of a field of a section, or of the values of a dict."""
    for part in _alternatives(kind):
        if isinstance(part, SectionOf):
            return _in_space(part.config, key) if part.space else part.config.model_fields.get(key, Any)
        if isinstance(part, _Draws):
            return Any if part.drawn else _Draws(part.kind if key == "choice" else float, drawn=True)
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part.model_fields.get(key, Any)
        if get_origin(part) is dict:
            return get_args(part)[1]
    return Any


def _in_space(config: type[BaseModel], key: str) -> Any:
    """Return the type of a field of a search space, whose name may be dotted."""
    kind: Any = config
    for name in key.split("."):
        kind = _child(kind, name)
    for part in _alternatives(kind):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return SectionOf(part, space=True)
    return _Draws(kind)


def _items(kind: Any, count: int) -> list[Any]:
    """Return the types of `count` items of a list."""
    for part in _alternatives(kind):
        if isinstance(part, _Draws):
            return [part.kind] * count
        arguments = get_args(part)
        if _shape(part) == "list" and arguments:
            fixed = get_origin(part) is tuple and arguments[-1] is not ...
            return ([*arguments] + [Any] * count)[:count] if fixed else [arguments[0]] * count
    return [Any] * count
