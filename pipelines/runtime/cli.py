"""The command line of a job: config presets, overrides and `--help`.

The config of a job is made from its defaults, then a preset (`--config NAME_OR_FILE`), then overrides (`a.b=value`).
All values are checked before Ray starts. The error for a wrong key or value names the field and what it allows.
"""

import inspect
import os
import re
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from litevae.errors import UserError, redact
from pipelines.runtime import shutdown, typed_text
from pipelines.runtime.logs import say
from pipelines.runtime.schema import ConfigT, dump, fields_of, unknown_field, validate

PRESETS = Path(__file__).resolve().parents[2] / "jobs" / "configs"
CLOSED = 141  # exit code of a program whose output nobody reads: 128 + SIGPIPE
SECTIONS = {  # the sections that a recipe can have
    *("train_vae", "encode_dataset", "train_ldm", "sample", "sweep"),
    *("evaluate", "evaluate_samples", "evaluate_complexity", "benchmark"),
}
# An override begins with a field's name. A bare word may hold equals signs, too: /data/label=cat.
_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.[^=/]*)?=|=")


def load(cls: type[ConfigT], preset: str | None = None, overrides: list[str] | None = None) -> ConfigT:
    """Build a config from its defaults, then a preset, then overrides.

    Args:
        cls: the config class.
        preset: a name under jobs/configs/, or a YAML file.
        overrides: strings of the form `a.b=value`. A field that is text takes the value as it stands; numbers,
            switches, lists and sections are YAML.

    Raises:
        UserError: if the preset or an override can't be read, or if a key or a value is wrong.
    """
    values: dict[str, Any] = {}
    if preset:
        values = _read_preset(cls, preset)
    for override in overrides or []:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {override!r} is not of the form key=value (try --help)")
        try:
            value = typed_text.parse_option(cls, key, text)
        except yaml.YAMLError as error:
            raise UserError(f"{key}: {text!r} is not valid YAML ({error}); {typed_text.QUOTING}") from None
        _assign(values, key, value)
    return validate(cls, values)


def job_of(cls: type[BaseModel]) -> str:
    """Return the name of the job that takes this config."""
    names = {"TrainVAE": "train_vae", "TrainLDM": "train_ldm", "Encode": "encode_dataset", "Compare": "compare_runs"}
    names |= dict.fromkeys(("Verify", "Repair", "Retry", "Inspect"), "encode_dataset")
    names |= dict.fromkeys(("EvaluateSamples", "EvaluateLatents", "EvaluateComplexity"), "evaluate")
    return names.get(cls.__name__, cls.__name__.lower())


def section_of(cls: type[BaseModel]) -> str:
    """Return the section of a recipe that configures this job."""
    names = {f"Evaluate{what}": f"evaluate_{what.lower()}" for what in ("Samples", "Latents", "Complexity")}
    return names.get(cls.__name__, job_of(cls))


def main(
    cls: type[ConfigT],
    run: Callable[[ConfigT], object],
    argv: list[str] | None = None,
    action: str = "",
    switches: Sequence[str] = (),
    subject: str = "cache",
) -> int:
    """Parse the command line, run the job, and return its exit code.

    Args:
        cls: the config class.
        run: the job.
        argv: the command line without the program; None: `sys.argv`.
        action: the job's subcommand, such as `verify`; empty: none.
        switches: boolean fields that can be given as --field.
        subject: the field that can be given as a bare word after the subcommand.

    Returns:
        0 on success; 2 for a UserError, whose message is printed without a traceback; 130 for Ctrl-C; 143 for SIGTERM;
        141 if nobody reads the job's output any more (`| head`), as for other programs.
    """
    try:
        code = _main(cls, run, sys.argv[1:] if argv is None else argv, action, switches, subject)
        for stream in filter(None, (sys.stdout, sys.stderr)):  # None if the process began without it
            stream.flush()
        return code
    except BrokenPipeError:
        if not _drop_unread():  # another pipe, or a connection
            raise
        return CLOSED


def _drop_unread() -> bool:
    """Return whether nobody reads stdout or stderr any more, and drop what is still to be written to it."""
    found = False
    for stream in filter(None, (sys.stdout, sys.stderr)):
        poll = select.poll()
        poll.register(stream, 0)
        if poll.poll(0):  # an error, or the other end has hung up
            found = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return found


def _show(text: str) -> None:
    """Print what was asked for to stdout.

    Raises:
        UserError: if it can't be written, for example because the disk is full.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest when it ends
        raise UserError(f"the output can't be written: {error.strerror}") from None


def _main(
    cls: type[ConfigT],
    run: Callable[[ConfigT], object],
    arguments: Sequence[str],
    action: str,
    switches: Sequence[str],
    subject: str,
) -> int:
    """Do the work of `main`, which see."""
    try:
        if help_at := [place for place, word in enumerate(arguments) if word in ("--help", "-h")]:
            topic = next(iter(arguments[help_at[0] + 1 :]), "")
            _show(fields_text(cls, topic) if topic else usage(cls, action, subject))
            return 0
        preset, overrides, show = None, [], False
        rest = iter(arguments)
        for argument in rest:
            if argument == "--config":
                preset = next(rest, None)
                if preset is None:
                    raise UserError("--config needs a preset's name or a YAML file")
            elif argument.startswith("--config="):
                preset = argument.partition("=")[2]
            elif argument == "--print-config":
                show = True
            elif argument.removeprefix("--") in switches and argument.startswith("--"):
                overrides.append(f"{argument[2:]}=true")
            elif action and not argument.startswith("-") and not _OVERRIDE.match(argument):
                overrides.append(f"{subject}={argument}")
            elif argument.startswith("-"):
                raise UserError(
                    f"unknown option {argument}; there are --config, --print-config and --help; fields are key=value"
                )
            else:
                overrides.append(argument)
        config = load(cls, preset, overrides)
        if show:
            _show(redact(dump(config)).removesuffix("\n"))
            return 0
        with shutdown.on_sigterm():
            run(config)
        return 0
    except UserError as error:
        say(f"error: {error}", "ERROR")
        return 2
    except KeyboardInterrupt as error:
        stopped = error if isinstance(error, shutdown.Stopped) else shutdown.Stopped()
        say(str(stopped), "ERROR")
        return stopped.code


def usage(cls: type[BaseModel], action: str = "", subject: str = "cache") -> str:
    """Return the text of `--help`; arguments as for `main`."""
    job, named = job_of(cls), subject.partition(".")[0].upper()
    words = f"{job}.py {action} {named}" if action else f"{job}.py [--config PRESET_OR_FILE.yaml]"
    lines = [
        inspect.cleandoc(cls.__doc__ or ""),
        "",
        f"usage: python jobs/{words} [--print-config] [key=value ...]",
        f"       python jobs/{job}.py{f' {action}' if action else ''} --help FIELD, or --help SECTION: some of these",
        *([f"presets: {', '.join(_presets(cls))}"] if section_of(cls) in SECTIONS else []),
        "",
    ]
    return "\n".join([*lines, fields_text(cls)])


def fields_text(cls: type[BaseModel], topic: str = "") -> str:
    """List the fields of a config with their types, defaults and meanings.

    The job's own fields come first, then those that every job has.

    Args:
        cls: the config class.
        topic: one field (`loop.ema`) or a section (`loop`); empty: all fields.

    Raises:
        UserError: if there is no such field.
    """
    fields = sorted(fields_of(cls), key=lambda field: _common(field[0]))  # the sort keeps the order within each group
    topic = topic.partition("=")[0].rstrip(".")
    chosen = [field for field in fields if not topic or field[0] == topic or field[0].startswith(f"{topic}.")]
    if not chosen:
        raise UserError(f"--help {topic}: {unknown_field(topic, [name for name, *_ in fields])}")
    lines = []
    for name, kind, default, text in chosen:
        lines.append(f"  {name} = {default}    ({kind})")
        if text:
            lines.append(f"      {text}")
    return "\n".join(lines)


def _common(name: str) -> int:
    """Return the sort key of a field in `--help`: 0 for the job's own fields, 1 and more for those of every job."""
    sections = ("root", "ray", "tracking")
    first = name.partition(".")[0]
    return sections.index(first) + 1 if first in sections else 0


def _presets(cls: type[BaseModel]) -> list[str]:
    """Return the names of the recipes that have a section for this job."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml") if section_of(cls) in _read_yaml(path))


def _read_preset(cls: type[BaseModel], name: str) -> dict[str, Any]:
    """Read the values of a preset.

    A recipe (jobs/configs/NAME.yaml, or any YAML file whose keys are jobs) gives the section of this job. Any other
    YAML file is taken as a whole.
    """
    named = PRESETS / f"{name}.yaml"
    # `folder/mine` is not the preset of the neighbouring file `folder/mine.yaml`.
    path = named if Path(name).name == name and named.is_file() else Path(name)
    if not path.is_file():
        raise UserError(f"--config {name} is neither a preset ({', '.join(_presets(cls)) or 'none'}) nor a file")
    values, section = _read_yaml(path), section_of(cls)
    if section not in values and (path == named or (values and values.keys() <= SECTIONS)):
        raise UserError(f"--config {name} has no section {section}; it has {', '.join(values)}")
    if section not in values:
        return values
    if not isinstance(values[section] or {}, dict):
        raise UserError(f"{path}: expected `key: value` lines under {section}")
    return values[section] or {}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = typed_text.parse(path.read_bytes())
    except yaml.YAMLError as error:
        advice = "save it as UTF-8" if isinstance(error, yaml.reader.ReaderError) else typed_text.QUOTING
        raise UserError(f"{path}: not valid YAML: {error}; {advice}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        found = "text" if isinstance(values, str) else f"a {type(values).__name__}"
        raise UserError(f"{path}: expected `key: value` lines at the top, found {found}")
    return values


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a dotted key in nested dicts."""
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UserError(f"{key}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    values[last] = value
