"""The command line of a job: config presets, overrides, actions and `--help`.

The config of a job is made from its defaults, then a preset (`--config NAME_OR_FILE`), then overrides (`a.b=value`).
All values are checked before torch or Ray is imported. The error for a wrong key or value names the field, what it
allows, and what was probably meant.
"""

import os
import re
import select
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from litevae.errors import UserError, redact
from pipelines.runtime import help_text, near_misses, progress, shutdown, typed_text
from pipelines.runtime.commands import command
from pipelines.runtime.logs import say
from pipelines.runtime.schema import ConfigT, Section, check_needed, dump, names_of, takes, validate

PRESETS = Path(__file__).resolve().parents[2] / "jobs" / "configs"
CLOSED = 141  # exit code of a program whose output nobody reads: 128 + SIGPIPE
SECTIONS = {  # the sections that a recipe can have
    *("train_vae", "encode_dataset", "train_ldm", "sample", "sweep"),
    *("evaluate", "evaluate_samples", "evaluate_complexity", "benchmark"),
}
# An override begins with a field's name. A bare word may hold equals signs, too: /data/label=cat.
_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.[^=/]*)?=|=")
_OPTIONS = ("--config", "--print-config", "--help", "--help-all")


@dataclass(frozen=True)
class Action:
    """What else a job does: the command is `JOB ACTION SUBJECT`, and options may stand before, between and behind.

    Attributes:
        config: the config class.
        subject: the field that is given as a bare word.
        switches: overrides that can be given as options: `append=true` as --append.
    """

    config: type[Section]
    subject: str = "cache"
    switches: tuple[str, ...] = ()

    def place(self) -> str:
        """Return what stands for the subject in a usage line: CACHE."""
        return self.subject.partition(".")[0].upper()


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
    names["Weights"] = "fetch_weights"
    names |= dict.fromkeys(("Verify", "Repair", "Retry", "Inspect"), "encode_dataset")
    names |= dict.fromkeys(("EvaluateSamples", "EvaluateLatents", "EvaluateComplexity"), "evaluate")
    return names.get(cls.__name__, cls.__name__.lower())


def continues(cls: type[BaseModel]) -> bool:
    """Return whether the same command, given again after it was stopped, goes on where the job was."""
    begin_anew = ("Verify", "Inspect", "Doctor", "Benchmark", "Compare")
    return not cls.__name__.startswith(("Evaluate", *begin_anew))


def section_of(cls: type[BaseModel]) -> str:
    """Return the section of a recipe that configures this job, or this action of a job."""
    names = {f"Evaluate{what}": f"evaluate_{what.lower()}" for what in ("Samples", "Latents", "Complexity")}
    names |= {name: name.lower() for name in ("Verify", "Repair", "Retry", "Inspect")}
    return names.get(cls.__name__, job_of(cls))


def main(
    cls: type[ConfigT],
    run: Callable[[ConfigT], object],
    argv: Sequence[str] | None = None,
    *,
    actions: Mapping[str, Action] | None = None,
    switches: Sequence[str] = (),
    look: Callable[[ConfigT], object] | None = None,
) -> int:
    """Parse the command line, run the job, and return its exit code.

    Nothing that takes time is imported here. `look` imports neither torch nor Ray, so that mistakes which it finds are
    answered within a second; `run` imports what the job needs.

    Args:
        cls: the config class of the job itself.
        run: the job; it is called with the config of the job, or of its action.
        argv: the command line without the program; None: `sys.argv`.
        actions: what else the job does, by the word on the command line.
        switches: overrides of the job itself that can be given as options: `append=true` as --append.
        look: checks what can be known without torch and Ray; called with the config before the job begins.

    Returns:
        0 on success; 2 for a UserError, whose message is printed without a traceback; 130 for Ctrl-C; 143 for SIGTERM;
        141 if nobody reads the job's output any more (`| head`), as for other programs.
    """
    arguments = sys.argv[1:] if argv is None else argv
    return guarded(lambda: _main(cls, run, arguments, actions or {}, switches, look))


def guarded(call: Callable[[], int]) -> int:
    """Return what `call` returns, or the exit code for what it raises; see `main`."""
    try:
        code = _with_message(call)
        for stream in filter(None, (sys.stdout, sys.stderr)):  # None if the process began without it
            stream.flush()
        return code
    except BrokenPipeError:
        if not _drop_unread():  # another pipe, or a connection
            raise
        return CLOSED


def _with_message(call: Callable[[], int]) -> int:
    """Return what `call` returns; after a UserError or a signal say so, and return the exit code for it."""
    try:
        return call()
    except UserError as error:
        say(f"error: {error}", "ERROR")
        return 2
    except KeyboardInterrupt as error:
        stopped = error if isinstance(error, shutdown.Stopped) else shutdown.Stopped()
        say(stopped.text(continues=False), "ERROR")
        return stopped.code


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


def show(text: str) -> None:
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


@dataclass
class _Words:
    """A command line, sorted by what its words are."""

    overrides: list[str]
    options: list[tuple[str, str]]  # those that are not below, with the word behind, which may be a value
    bare: list[str]
    preset: str | None = None
    show: bool = False
    topic: str | None = None  # of --help; "": the short help
    every_field: bool = False


def _main(
    cls: type[Any],
    run: Callable[[Any], object],
    arguments: Sequence[str],
    actions: Mapping[str, Action],
    switches: Sequence[str],
    look: Callable[[Any], object] | None,
) -> int:
    """Do the work of `main`, which see."""
    words = _sorted(arguments, actions)
    name = next((word for word in words.bare if word in actions), "")
    action = actions[name] if name else Action(cls, "", tuple(switches))
    called = f"{command(job_of(cls))} {name}".rstrip()
    if words.every_field:
        show(help_text.every_field(action.config))
        return 0
    if words.topic is not None:
        topic = words.topic
        show(help_text.fields(action.config, topic) if topic else _usage(action, called, {} if name else actions))
        return 0
    if name:
        words.bare.remove(name)
    config = _read(action, name, words, actions, called)
    if words.show:
        show(redact(dump(config)).removesuffix("\n"))
        return 0
    if look is not None:
        check_needed(config)
        look(config)
    say(progress.first_line(job_of(action.config), config))
    from pipelines.runtime import cluster  # imported here because it needs pyarrow, which help and mistakes do not

    cluster.set_environment()
    try:
        with shutdown.on_sigterm():
            run(config)
    except KeyboardInterrupt as error:
        stopped = error if isinstance(error, shutdown.Stopped) else shutdown.Stopped()
        say(stopped.text(continues(action.config)), "ERROR")
        return stopped.code
    return 0


def _sorted(arguments: Sequence[str], actions: Mapping[str, Action]) -> _Words:
    """Sort the words of a command line.

    Raises:
        UserError: if --config names nothing.
    """
    words = _Words([], [], [])
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--config":
            if not rest:
                raise UserError("--config needs a preset's name or a YAML file")
            words.preset = rest.pop(0)
        elif word.startswith("--config="):
            words.preset = word.partition("=")[2]
        elif word == "--print-config":
            words.show = True
        elif word == "--help-all":
            words.every_field = True
        elif word in ("--help", "-h"):
            topic = rest[0] if rest and rest[0] not in actions and not rest[0].startswith("--") else ""
            words.topic = words.topic or topic
        elif word.startswith("--help="):
            words.topic = word.partition("=")[2]
        elif word.startswith("-"):
            words.options.append((word, rest[0] if rest and not rest[0].startswith("-") else ""))
        elif _OVERRIDE.match(word):
            words.overrides.append(word)
        else:
            words.bare.append(word)
    return words


def _read(action: Action, name: str, words: _Words, actions: Mapping[str, Action], called: str) -> Any:
    """Return the config that a command line gives.

    Args:
        action: what is to be done: the job itself, or one of its actions.
        name: the action's name; empty: the job itself.
        words: the command line.
        actions: the job's actions.
        called: the command as the user called it, with the action.

    Raises:
        UserError: if a word is none of what may be given, or a value is wrong.
    """
    overrides = []
    for option, value in words.options:
        switch = next((each for each in action.switches if option == f"--{each.partition('=')[0]}"), None)
        if switch is None:
            raise UserError(_unknown_option(action.config, option, value, called))
        overrides.append(switch)
    if words.bare and not (name and action.subject):
        raise UserError(_unknown_word(words.bare[0], name, actions, called))
    if len(words.bare) > 1:
        raise UserError(f"{called} takes one {action.place()}, but {', '.join(words.bare)} are given")
    overrides += [f"{action.subject}={word}" for word in words.bare]
    return load(action.config, words.preset, overrides + words.overrides)


def _unknown_option(cls: type[Section], option: str, value: str, called: str) -> str:
    """Return the message for an option that does not exist; it may be a field, written as others write options."""
    option, equals, given = option.partition("=")
    field = option.lstrip("-").replace("-", "_")
    value = given if equals else "" if _OVERRIDE.match(value) else value
    if field in names_of(cls):
        meant = f"fields are given as key=value; did you mean {field}={value or '...'}?"
    elif hint := near_misses.field_hint(field, names_of(cls), value, lambda name: takes(cls, name, value)):
        meant = f"fields are given as key=value{hint}"
    elif close := near_misses.nearest(option, _OPTIONS):
        meant = f"did you mean {close[0]}?"
    else:
        meant = "there are --config, --print-config and --help; fields are given as key=value"
    return f"unknown option {option}: {meant} ({called} --help)"


def _unknown_word(word: str, name: str, actions: Mapping[str, Action], called: str) -> str:
    """Return the message for a bare word where none can be."""
    if not actions or name:
        return f"override {word!r} is not of the form key=value ({called} --help)"
    if close := near_misses.nearest(word, actions):
        meant = f"did you mean {called} {close[0]} {actions[close[0]].place()}?"
    else:
        meant = ", ".join(f"{called} {action} {actions[action].place()}" for action in actions)
    return f"{word!r} is neither key=value nor one of the actions {', '.join(actions)}: {meant}"


def _usage(action: Action, called: str, actions: Mapping[str, Action]) -> str:
    """Return the text of `--help`."""
    others = {name: (other.place(), other.config) for name, other in actions.items()}
    return help_text.short(action.config, called, others, action.subject, action.switches, presets(action.config))


def presets(cls: type[BaseModel]) -> list[str]:
    """Return the names of the recipes that have a section for this job."""
    # A section is found by its first line, since YAML takes longer to read than everything else that --help does.
    start = re.compile(rf"^{re.escape(section_of(cls))}:", re.MULTILINE)
    return sorted(path.stem for path in PRESETS.glob("*.yaml") if start.search(path.read_text()))


def _read_preset(cls: type[BaseModel], name: str) -> dict[str, Any]:
    """Read the values of a preset.

    A recipe (jobs/configs/NAME.yaml, or any YAML file whose keys are jobs) gives the section of this job. Any other
    YAML file is taken as a whole.
    """
    named, section = PRESETS / f"{name}.yaml", section_of(cls)
    # `folder/mine` is not the preset of the neighbouring file `folder/mine.yaml`.
    path = named if Path(name).name == name and named.is_file() else Path(typed_text.expanded(name))
    if not path.is_file():
        known = presets(cls)
        close = near_misses.nearest(name, known)
        hint = f"; did you mean {close[0]}?" if close else ""
        if not known:
            raise UserError(
                f"--config {name} is no file; no preset is for {section}: give a YAML file of fields, or leave it out"
            )
        raise UserError(f"--config {name} is neither a preset ({', '.join(known)}) nor a file{hint}")
    values = _read_yaml(path)
    if section not in values and (path == named or (values and values.keys() <= SECTIONS)):
        known = presets(cls)
        has = f"presets with one are {', '.join(known)}" if known else f"no preset is for {section}"
        raise UserError(f"--config {name} has no section {section}, only {', '.join(values)}; {has}")
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
