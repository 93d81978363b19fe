"""The script that completes the words of the command `litevae` in bash or zsh (`litevae completion bash`).

The script holds all words itself, so that nothing has to be started when a key is pressed.
"""

from collections.abc import Iterator
from importlib import import_module

from litevae.errors import UserError
from pipelines.runtime import cli, near_misses, typed_text
from pipelines.runtime.cli import Action
from pipelines.runtime.commands import LITEVAE, SCRIPTS
from pipelines.runtime.schema import fields_of

_DATA = """\
# Completion of {litevae}'s jobs, actions, fields and values. To have it in every new shell:
# {install}
_litevae_jobs() {{ printf '%s\\n' {jobs}; }}
_litevae_actions() {{ case "$1" in
{actions}
esac; }}
_litevae_options() {{ case "$1" in
{options}
esac; }}
_litevae_presets() {{ case "$1" in
{presets}
esac; }}
_litevae_fields() {{ case "$1" in
{fields}
esac; }}
_litevae_values() {{ case "$1=$2" in
{values}
esac; }}
_litevae_is_path() {{ case "$1=$2" in
{paths}
*) return 1 ;;
esac; }}
# Prints the fields that begin as $2 does, up to the next dot: as files are completed folder by folder.
_litevae_next() {{
    local field rest
    _litevae_fields "$1" | while IFS= read -r field; do
        rest="${{field#"$2"}}"
        [[ "$field" == "$2$rest" ]] || continue
        case "$rest" in
            *.*) printf '%s\\n' "$2${{rest%%.*}}." ;;
            *) printf '%s=\\n' "$field" ;;
        esac
    done | sort -u
}}
"""
_BASH = """\
_litevae() {
    local line="${COMP_LINE:0:COMP_POINT}" cur prev word what values field
    local -a words
    read -ra words <<< "$line"
    [[ "$line" == *[[:space:]] ]] && words+=("")
    cur="${words[${#words[@]}-1]}"
    prev="${words[${#words[@]}-2]}"
    COMPREPLY=()
    if ((${#words[@]} < 3)); then
        COMPREPLY=($(compgen -W "$(_litevae_jobs)" -- "$cur"))
        return
    fi
    what="${words[1]}"
    for word in "${words[@]:2:${#words[@]}-3}"; do
        if [[ " $(_litevae_actions "${words[1]}" | tr '\\n' ' ') " == *" $word "* ]]; then
            what="${words[1]} $word"
            break
        fi
    done
    local IFS=$'\\n'
    if [[ "$prev" == --config ]]; then
        compopt -o filenames
        COMPREPLY=($(compgen -W "$(_litevae_presets "$what")" -- "$cur"; compgen -f -- "$cur"))
    elif [[ "$cur" == -* ]]; then
        COMPREPLY=($(compgen -W "$(_litevae_options "$what")" -- "$cur"))
    elif [[ "$cur" == *=* ]]; then
        field="${cur%%=*}"
        values="$(_litevae_values "$what" "$field")"
        if [[ -n "$values" ]]; then
            COMPREPLY=($(compgen -W "$values" -- "${cur#*=}"))
        elif _litevae_is_path "$what" "$field"; then
            compopt -o filenames
            COMPREPLY=($(compgen -f -- "${cur#*=}"))
        fi
        # Where = does not end a word for readline, the whole word is replaced.
        [[ "$COMP_WORDBREAKS" == *=* ]] || COMPREPLY=("${COMPREPLY[@]/#/$field=}")
    else
        COMPREPLY=($(_litevae_next "$what" "$cur"))
        if [[ "$prev" == --help ]]; then
            COMPREPLY=("${COMPREPLY[@]%=}")
        fi
        if [[ "$what" == "${words[1]}" && "$prev" != --help ]]; then
            COMPREPLY+=($(compgen -W "$(_litevae_actions "$what")" -- "$cur"))
        fi
        if [[ "$what" == *" "* ]]; then
            compopt -o filenames
            COMPREPLY+=($(compgen -f -- "$cur"))
        fi
        [[ ${#COMPREPLY[@]} == 1 && "${COMPREPLY[0]}" == *[.=] ]] && compopt -o nospace
    fi
}
complete -F _litevae litevae
"""
_ZSH = """\
_litevae() {
    local cur="${words[CURRENT]}" prev="${words[CURRENT-1]}" what word field
    local -a found
    if ((CURRENT == 2)); then
        compadd -- $(_litevae_jobs)
        return
    fi
    what="${words[2]}"
    for word in "${(@)words[3,CURRENT-1]}"; do
        if [[ " $(_litevae_actions "${words[2]}" | tr '\\n' ' ') " == *" $word "* ]]; then
            what="${words[2]} $word"
            break
        fi
    done
    if [[ "$prev" == --config ]]; then
        compadd -- $(_litevae_presets "$what")
        _files
    elif [[ "$cur" == -* ]]; then
        compadd -- $(_litevae_options "$what")
    elif [[ "$cur" == *=* ]]; then
        field="${cur%%=*}"
        compset -P '*='
        found=($(_litevae_values "$what" "$field"))
        if ((${#found})); then
            compadd -a found
        elif _litevae_is_path "$what" "$field"; then
            _files
        fi
    else
        found=($(_litevae_next "$what" "$cur"))
        if [[ "$prev" == --help ]]; then
            found=("${(@)found%=}")
        fi
        compadd -S '' -a found
        if [[ "$what" == "${words[2]}" && "$prev" != --help ]]; then
            compadd -- $(_litevae_actions "$what")
        fi
        if [[ "$what" == *" "* ]]; then
            _files
        fi
    fi
}
typeset -f compdef >/dev/null || { autoload -Uz compinit && compinit; }
compdef _litevae litevae
"""
SHELLS = {
    "bash": (_BASH, f"echo 'eval \"$({LITEVAE} completion bash)\"' >> ~/.bashrc"),
    "zsh": (_ZSH, f"echo 'eval \"$({LITEVAE} completion zsh)\"' >> ~/.zshrc"),
}


def script(shell: str) -> str:
    """Return the script of a shell.

    Raises:
        UserError: if there is none for this shell.
    """
    if shell not in SHELLS:
        close = near_misses.nearest(shell, SHELLS)
        raise UserError(f"completion is for {' and '.join(SHELLS)}: {LITEVAE} completion {[*close, *SHELLS][0]}")
    code, install = SHELLS[shell]
    jobs = {name: import_module(f"jobs.{each.module}") for name, each in SCRIPTS.items()}
    does = {name: dict(getattr(module, "ACTIONS", {})) for name, module in jobs.items()}
    has: dict[str, Action] = {}
    for name, module in jobs.items():
        has[name] = Action(module.CONFIG, "", tuple(getattr(module, "SWITCHES", ())))
        has |= {f"{name} {action}": each for action, each in does[name].items()}
    data = _DATA.format(
        litevae=LITEVAE,
        install=install,
        jobs=" ".join([*SCRIPTS, "completion", "help", "--help", "--version"]),
        actions=_cases(
            {name: list(actions) for name, actions in does.items()} | {"completion": [*SHELLS], "help": [*SCRIPTS]}
        ),
        options=_cases({name: _options(each) for name, each in has.items()}),
        presets=_cases({name: cli.presets(each.config) for name, each in has.items()}),
        fields=_cases({name: list(_names(each)) for name, each in has.items()}),
        values=_cases(dict(_values(has))),
        paths="\n".join(f'"{name}={field}") ;;' for name, each in has.items() for field in _paths(each)),
    )
    return f"{data}{code}".removesuffix("\n")


def _options(action: Action) -> list[str]:
    """Return the options of a job or of an action."""
    switches = [f"--{switch.partition('=')[0]}" for switch in action.switches]
    return ["--config", "--help", "--help-all", "--print-config", *switches]


def _names(action: Action) -> Iterator[str]:
    """Yield the fields that can be given."""
    return (name for name, kind, default, _ in fields_of(action.config) if (kind, default) != ("section", "..."))


def _paths(action: Action) -> Iterator[str]:
    """Yield the fields that are paths."""
    return (name for name in _names(action) if typed_text.takes_path(action.config, name))


def _values(has: dict[str, Action]) -> Iterator[tuple[str, list[str]]]:
    """Yield, for each field that has choices, `job=field` and these."""
    for name, action in has.items():
        for field in _names(action):
            if found := typed_text.choices(action.config, field.split(".")):
                yield f"{name}={field}", found


def _cases(found: dict[str, list[str]]) -> str:
    """Return the branches of a shell's `case` that print words; cases with the same words share a branch."""
    shared: dict[tuple[str, ...], list[str]] = {}
    for case, words in found.items():
        if words:
            shared.setdefault(tuple(words), []).append(f'"{case}"')
    return "\n".join(f"{'|'.join(cases)}) printf '%s\\n' {' '.join(words)} ;;" for words, cases in shared.items())
