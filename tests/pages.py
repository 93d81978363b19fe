"""Read the project's Markdown pages: their code blocks, and the commands in them.

A block that no test runs has a comment before it that says why: `<!-- no-test: needs a Kubernetes cluster -->`.
"""

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
PAGES = [
    *(REPO / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((REPO / "docs").glob("*.md")),
    *sorted((REPO / "infra").rglob("README*")),
]
SHELLS = ("bash", "sh", "console")
_MARK = re.compile(r"<!--\s*no-test\b:?\s*(.*?)\s*-->")
_FENCE = re.compile(r"( *)(```+|~~~+)\s*([\w+-]*)")
# First words of an indented block that make it one of commands.
_COMMANDS = ("python ", "litevae ", "make ", "pip ", "ray ", "export ", "kubectl ", "aws ", "helm ", "docker ", "git ")
_OPERATORS = frozenset("();<>|&")


@dataclass(frozen=True)
class Block:
    """A code block of a page.

    Attributes:
        page: name of the page's file.
        line: number of the block's first line of code.
        language: what stands behind the fence; "bash" for an indented block of commands, else "".
        text: the code.
        why_not: why no test runs it; None if tests do.
        fenced: False for an indented block.
    """

    page: str
    line: int
    language: str
    text: str
    why_not: str | None = None
    fenced: bool = True

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(markdown: str, page: str = "page.md") -> list[Block]:
    """Return the code blocks of a page, in order."""
    found, lines, number = [], markdown.splitlines(), 0
    why_not: str | None = None
    before = ""  # the last line that is neither blank nor indented: where it begins a list, what follows goes on in it
    while number < len(lines):
        line = lines[number]
        if fence := _FENCE.match(line):
            indent, mark, language = fence.groups()
            end = number + 1
            while end < len(lines) and lines[end].strip() != mark:
                end += 1
            text = "\n".join(each.removeprefix(indent) for each in lines[number + 1 : end]) + "\n"
            found.append(Block(page, number + 2, language, text, why_not))
            number, why_not, before = end + 1, None, mark
            continue
        blank_before = not number or not lines[number - 1].strip()
        if line.startswith("    ") and blank_before and not re.match(r"\s*([-*+]|\d+\.)\s", before):
            end = number
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            text = textwrap.dedent("\n".join(lines[number:end])).strip("\n") + "\n"
            language = "bash" if text.startswith(_COMMANDS) else ""
            found.append(Block(page, number + 1, language, text, why_not, fenced=False))
            number, why_not, before = end, None, line
            continue
        if mark_found := _MARK.search(line):
            why_not = mark_found[1]
        elif line.strip():
            why_not, before = None, before if line[0] == " " else line
        number += 1
    return found


def lines_of(block: Block) -> list[str]:
    """Return the commands of a block, one line each.

    Continued lines, and lines within quotes, are joined. The prompts of a console are removed, and here-documents.
    """
    text = re.sub(r"\\\n\s*", " ", block.text)
    text = re.sub(r"(<<'?(\w+)'?.*\n)(?s:.*?)^\2$", r"\1", text, flags=re.MULTILINE)
    lines = [line.strip() for line in text.splitlines()]
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    whole: list[str] = []
    for line in lines:
        if whole and _is_open(whole[-1]):
            whole[-1] += f" {line}"
        elif line and not line.startswith("#"):
            whole.append(line)
    return whole


def _is_open(line: str) -> bool:
    """Return whether a line ends within quotes."""
    try:
        shlex.split(without_comment(line))
    except ValueError:
        return True
    return False


def commands(line: str) -> Iterator[list[str]]:
    """Yield the words of each command in a line of shell code, with quotes removed.

    Commands end at `&&`, `;`, `|` and `&`; a redirection ends the words of its command.
    """
    lexer = shlex.shlex(without_comment(line), posix=True, punctuation_chars="();<>|&")
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    redirected = False
    for word in lexer:
        if _OPERATORS.issuperset(word):
            redirected = word[0] in "<>"
            if not redirected:
                if words:
                    yield words
                words = []
        elif not redirected:
            words.append(word)
    if words:
        yield words


def expanded_by_zsh(line: str) -> list[str]:
    """Return the words of a line of shell code that zsh would expand or refuse, though they are not quoted.

    zsh ends a command with "no matches found" where a pattern (`[`, `*`, `?`) matches no file; bash passes it on.
    Braces with a comma or two dots are expanded by both; `=word` at the beginning, and `~` behind `=`, by one of them.
    """
    found = []
    for word in _raw_words(line):
        bare = _without_quoted(word)
        pattern = re.search(r"[\[*?]", bare) and bare not in ("[", "[[")
        braces = re.search(r"(?<!\$)\{[^}]*(,|\.\.)", bare)
        if pattern or braces or re.match(r"=\w", bare) or re.search(r"(^~[^/]|=~)", bare):
            found.append(word)
    return found


def has_comment(line: str) -> bool:
    """Return whether a command has a comment behind it.

    Typed into zsh there are no comments unless `interactivecomments` is set: `#` and all words behind it are arguments.
    """
    return without_comment(line) != line


def without_comment(line: str) -> str:
    """Return a line without its comment: from a `#` that begins a word on. (shlex takes one within a word, too.)"""
    quote, before = "", " "
    for place, letter in enumerate(line):
        if quote:
            quote = "" if letter == quote and (quote == "'" or before != "\\") else quote
        elif letter in "'\"":
            quote = letter
        elif letter == "#" and before.isspace():
            return line[:place].rstrip()
        before = letter
    return line


def _raw_words(line: str) -> list[str]:
    """Split a line at unquoted blanks and operators; quotes are kept, and a comment is left out."""
    words, word, quote = [], "", ""
    line = without_comment(line)
    for place, letter in enumerate(line):
        if quote:
            word += letter
            if letter == quote and (quote == "'" or line[place - 1] != "\\"):
                quote = ""
        elif letter in "'\"":
            quote, word = letter, word + letter
        elif letter.isspace() or letter in _OPERATORS:
            words.append(word)
            word = ""
        else:
            word += letter
    return [word for word in [*words, word] if word]


def _without_quoted(word: str) -> str:
    """Return a word without its quoted parts and without `${...}`, `$?` and `$*`, which are no patterns."""
    word = re.sub(r"'[^']*'|\"(\\.|[^\"])*\"|\\.", "Q", word)
    return re.sub(r"\$\{[^}]*\}|\$[?*@#!]", "V", word)
