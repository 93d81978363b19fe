"""The text of `--help`, `--help-all` and `--help PREFIX`."""

import inspect
import shutil
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from litevae.errors import UserError
from pipelines.runtime.schema import Section, fields_of, names_of, unknown_field

WIDEST = 100  # columns; longer lines are hard to read
_LEFT = 32  # columns of names and examples
_COMMON = ("root", "ray", "tracking")  # what every job has, in this order behind the job's own


def short(
    cls: type[Section],
    command: str,
    actions: Mapping[str, tuple[str, type[Section]]],
    subject: str = "",
    switches: Sequence[str] = (),
    presets: Sequence[str] = (),
) -> str:
    """Return the text of `--help`: how the job is called, and the fields that are used most, with an example each.

    Args:
        cls: the config class.
        command: the command as the user called it, with the action if there is one.
        actions: the job's actions by name: what is given behind each, and its config class; empty: none.
        subject: the field that a bare word gives; empty: none.
        switches: overrides that may be given as --field.
        presets: names of the presets that have a section for this job.
    """
    width = _width()
    lines = [*_wrapped(_about(cls), width), ""]
    needed = [f"{name}={_quoted(each.example)}" for name, each in cls.shown.needed.items() if each.usual]
    given = [subject.partition(".")[0].upper()] if subject else []
    given += [word for word in needed if word.partition("=")[0] != subject]
    given += ["[--config NAME|FILE]" if presets else "[--config FILE]", "[FIELD=VALUE ...]"]
    lines += _filled("usage:", [command, *given], width)
    for action, (place, _) in actions.items():
        lines += _filled("", [f"{command} {action} {place}".rstrip(), "[FIELD=VALUE ...]"], width)
    kinds = {name: (kind, default, text) for name, kind, default, text in fields_of(cls)}
    if examples := cls.shown.examples():
        lines += ["", *_wrapped("Each field with an example, what it means, and [its choices; its default]:", width)]
    if cls.shown.needed:
        lines += ["", "Required:"]
        for name, each in cls.shown.needed.items():
            kind, default, text = kinds[name]
            mark = each.mark() if each.when or each.note else ""
            lines += _field(name, each.example, (kind, default, each.meaning or text), width, mark)
    for heading, group in cls.shown.groups.items():
        lines += ["", f"{heading}:"]
        for name, shown in group.items():
            kind, default, text = kinds[name]
            example, text = (shown, text) if isinstance(shown, str) else shown
            lines += _field(name, example, (kind, default, text), width)
    if actions:
        lines += ["", "Actions (each has its own --help):"]
        for action, (place, config) in actions.items():
            lines += _entry(f"{action} {place}".rstrip(), _about(config).partition("\n")[0], width)
    lines += ["", "Options:"]
    if presets:
        lines += _entry("--config NAME|FILE", f"begin with a preset ({', '.join(presets)}) or a YAML file", width)
    else:
        lines += _entry("--config FILE", "begin with the fields in a YAML file; no preset is for this", width)
    for switch in switches:
        lines += _entry(f"--{switch.partition('=')[0]}", f"the same as {switch}", width)
    lines += _entry("--print-config", "print all fields with their values, and end", width)
    sections = Counter(name.partition(".")[0] for name in kinds if "." in name and not _rank(name))
    part = sections.most_common(1)[0][0] if sections else [*(examples or kinds)][-1]
    lines += _entry(f"--help {part}", "a section, a field, or all that begin so", width)
    lines += _entry("--help-all", f"all {len([1 for kind, *_ in kinds.values() if kind != 'section'])} fields", width)
    return "\n".join(lines)


def every_field(cls: type[Section]) -> str:
    """Return the text of `--help-all`: all fields by section, the job's own first."""
    return "\n".join([*_wrapped(_about(cls), _width()), "", fields(cls)])


def fields(cls: type[Section], topic: str = "") -> str:
    """List fields of a config with their types, defaults and meanings.

    Args:
        cls: the config class.
        topic: a field (`loop.ema`), a section (`loop`), the beginning of either (`loss.adv`), or the last part of a
            field's or a section's name (`lr`, `kl`); empty: all fields.

    Raises:
        UserError: if there is no such field.
    """
    found = _by_section(cls)
    topic = topic.partition("=")[0].strip("-.").replace("-", "_")
    chosen = _chosen([name for name, *_ in found], topic)
    if not chosen:
        raise UserError(f"--help {topic}: {unknown_field(cls, topic)}")
    width, lines, section = _width(), [], None
    for name, kind, default, text in found:
        if name not in chosen:
            continue
        if kind == "section" and default == "...":  # a section with a meaning of its own
            continue
        parent = name.rpartition(".")[0] or ("of every job" if _rank(name) else "of the job itself")
        if parent != section:
            lines += ["", *_wrapped(_heading(cls, parent), width)]
            section = parent
        head = f"  {name} = {default}    ({_marked(cls, name, kind)})"
        lines += textwrap.wrap(head, width, subsequent_indent=" " * 6, break_long_words=False, break_on_hyphens=False)
        lines += _wrapped(text, width, 6)
    return "\n".join(lines).strip("\n")


def _by_section(cls: type[Section]) -> list[tuple[str, str, str, str]]:
    """Return the fields of a config, those of a section one after the other: the job's own, then what every job has."""
    found = list(fields_of(cls))
    parents = list(dict.fromkeys(name.rpartition(".")[0] for name, *_ in found))

    def place(field: tuple[str, str, str, str]) -> tuple[int, bool, int]:
        parent = field[0].rpartition(".")[0]
        return _rank(field[0]), bool(parent), parents.index(parent)

    return sorted(found, key=place)  # the sort keeps the order within each section


def _chosen(names: Sequence[str], topic: str) -> set[str]:
    """Return the names that a topic of `--help` means."""
    for means in (
        lambda name: not topic or name == topic or name.startswith(f"{topic}."),
        lambda name: name.startswith(topic),
        lambda name: name.rpartition(".")[2] == topic or f".{topic}." in name,
        lambda name: f".{topic}" in name,
    ):
        if found := {name for name in names if means(name)}:
            return found
    return set()


def _heading(cls: type[Section], section: str) -> str:
    """Return the heading of a section: its name, and what it is about."""
    if section not in names_of(cls):
        return f"{section}:"
    text = next((text for name, kind, _, text in fields_of(cls) if name == section and kind == "section"), "")
    config: Any = cls
    for part in section.split("."):
        config = type(config.model_fields[part].default)
    return f"{section}: {text or _about(config).partition(chr(10))[0]}"


def _marked(cls: type[Section], name: str, kind: str) -> str:
    """Return the type of a field, behind the mark of a required one."""
    needed = cls.shown.needed.get(name)
    return f"{needed.mark()}; {kind}" if needed else kind


def _field(name: str, example: str, about: tuple[str, str, str], width: int, mark: str = "") -> list[str]:
    """Return the lines of a field in the short help: an example, then what it is, its choices and its default."""
    kind, default, text = about
    # The description of a list or a number says what it takes, and that of an empty default what this means.
    facts = [mark, kind if "|" in kind and kind != "true | false" and not kind.startswith("list") else ""]
    if not mark and default not in ("''", "[]", "{}"):
        facts.append(f"default {default}" if len(default) <= 40 else "default: see --print-config")
    shown = "; ".join(filter(None, facts))
    return _entry(f"{name}={_quoted(example)}", f"{text} [{shown}]" if shown else text, width)


def _quoted(example: str) -> str:
    """Return an example in quotes, if shells would read it in another way."""
    if not set(example) & set(" []{}*?~"):
        return example
    return f'"{example}"' if "'" in example else f"'{example}'"


def _entry(left: str, right: str, width: int) -> list[str]:
    """Return lines with a word on the left and its meaning on the right, or below it if the word is long."""
    text = textwrap.wrap(right, max(20, width - _LEFT), break_long_words=False, break_on_hyphens=False)
    head = f"  {left}"
    if text and len(head) <= _LEFT - 2:
        head, text = f"{head:<{_LEFT}}{text[0]}", text[1:]
    return [head, *(f"{'':<{_LEFT}}{line}" for line in text)]


def _filled(head: str, words: Sequence[str], width: int) -> list[str]:
    """Return words on as few lines as hold them, none of them broken."""
    lines: list[str] = []
    line = f"{head:<6} {words[0]}"
    for word in words[1:]:
        if len(line) + 1 + len(word) > width:
            lines.append(line)
            line = f"{'':<10} {word}"
        else:
            line += f" {word}"
    return [*lines, line]


def _wrapped(text: str, width: int, indent: int = 0) -> list[str]:
    """Return text on lines of this width; an empty line stays."""
    lines: list[str] = []
    for paragraph in text.split("\n\n") if text else []:
        filled = textwrap.wrap(
            " ".join(paragraph.split()), max(20, width - indent), break_long_words=False, break_on_hyphens=False
        )
        lines += ([""] if lines else []) + [f"{'':<{indent}}{line}" for line in filled]
    return lines


def _about(cls: type[BaseModel]) -> str:
    """Return the docstring of a config."""
    return inspect.cleandoc(cls.__doc__ or "")


def _rank(name: str) -> int:
    """Return the place of a field's group: 0 for the job's own fields, 1 and more for those that every job has."""
    first = name.partition(".")[0]
    return _COMMON.index(first) + 1 if first in _COMMON else 0


def _width() -> int:
    """Return the columns of the terminal, as far as lines are good to read."""
    return max(40, min(shutil.get_terminal_size().columns, WIDEST))
