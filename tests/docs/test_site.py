"""How pages hang together: links and anchors, on GitHub and in the site; the list of pages; what they quote."""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml

from tests.commands import REPO
from tests.pages import PAGES

SPEC = importlib.util.spec_from_file_location("hooks", REPO / "docs" / "hooks.py")
hooks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hooks)

SITE = yaml.safe_load((REPO / "mkdocs.yml").read_text())


def without_code(markdown: str) -> str:
    fences = re.sub(r"^ *(```|~~~).*?^ *\1 *$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "code", fences)


def headings(markdown: str) -> list[str]:
    fences = re.sub(r"^ *(```|~~~).*?^ *\1 *$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^#{1,6} +(.*?) *$", fences, re.MULTILINE)


def of_github(heading: str) -> str:
    """GitHub's anchor: lower case, without punctuation, each blank a hyphen."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def of_mkdocs(heading: str) -> str:
    """Python-Markdown's anchor: likewise, but several blanks and hyphens are one."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


@cache
def anchors(path: Path) -> set[str]:
    return {of_github(heading) for heading in headings(path.read_text())}


def links(markdown: str) -> list[str]:
    return re.findall(r"\]\(([^()\s]+)(?: \"[^\"]*\")?\)", without_code(markdown))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for link in links(page.read_text()):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            assert link.startswith("https://"), link
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(path), f"{page.name}: {link}: {sorted(anchors(path))}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_anchors_are_the_same_on_github_and_in_the_site(page):
    assert [h for h in headings(page.read_text()) if of_github(h) != of_mkdocs(h)] == []


def in_site() -> set[str]:
    return {name for section in SITE["nav"] for pages in section.values() for page in pages for name in page.values()}


def test_every_page_is_in_the_site():
    assert in_site() == {path.name for path in (REPO / "docs").glob("*.md")} | set(hooks.TOP.values())


def test_the_site_fetches_nothing_and_is_strict():
    assert SITE["theme"]["font"] is False
    assert not any("http" in str(SITE.get(key, "")) for key in ("extra_css", "extra_javascript", "plugins", "theme"))
    assert {*SITE["validation"]["links"].values(), *SITE["validation"]["nav"].values()} == {"warn"}
    assert re.search(r"mkdocs build .*--strict", (REPO / "Makefile").read_text())


@pytest.mark.parametrize(
    ("page", "markdown", "expected"),
    [
        ("SECURITY.md", "[a](docs/cluster.md#jobs) [b](README.md)", "[a](cluster.md#jobs) [b](front-page.md)"),
        ("docs/cluster.md", "[a](../SECURITY.md#ray) [b](scale.md)", "[a](SECURITY.md#ray) [b](scale.md)"),
        ("docs/cluster.md", "[a](#jobs) [b](https://x.org/y)", "[a](#jobs) [b](https://x.org/y)"),
        ("README.md", '![x](docs/samples.png "A title")', '![x](samples.png "A title")'),
        ("README.md", "[![x](docs/samples.png)](docs/index.md)", "[![x](samples.png)](index.md)"),
        ("docs/scale.md", "see [`scale`](../tests/benchmarks/scale.py).", "see `scale`."),
        ("docs/scale.md", "`[a](nothing.md)` and\n```\n[b](nothing.md)\n```\n", None),
    ],
)
def test_links_as_the_site_needs_them(page, markdown, expected):
    assert hooks.rewritten(markdown, page) == (markdown if expected is None else expected)


def test_links_into_the_repository_are_kept_where_it_can_be_read():
    markdown = hooks.rewritten("[x](../litevae/losses.py)", "docs/design.md", "https://example.org/litevae/")
    assert markdown == "[x](https://example.org/litevae/blob/main/litevae/losses.py)"


@pytest.mark.parametrize("link", ["nothing.md", "../nothing.md", "../../other/README.md", 20 * "../" + "etc/passwd"])
def test_a_link_that_leads_nowhere_fails_the_build(link):
    with pytest.raises(hooks.BrokenLink, match="does not exist"):
        hooks.rewritten(f"[x]({link})", "docs/design.md")


def test_the_citation_is_as_github_reads_it():
    command = [Path(sys.executable).with_name("check-jsonschema"), "--builtin-schema", "vendor.citation-file-format"]
    done = subprocess.run([*map(str, command), "CITATION.cff"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    cited = yaml.safe_load((REPO / "CITATION.cff").read_text())
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])


# --- what pages quote from the code ---------------------------------------------------------------------------------


@cache
def texts_of_the_code() -> str:
    """All texts of the product; in an f-string each value is an ellipsis."""
    found = []
    for folder in ("litevae", "pipelines", "jobs"):
        for path in (REPO / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


def quoted_messages() -> list[str]:
    page = (REPO / "docs" / "troubleshooting.md").read_text()
    page = re.sub(r"<!-- said by the shell -->\n```text\n.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    return [
        line
        for text in re.findall(r"^```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
        for line in text.splitlines()
    ]


def test_quoted_messages_are_those_of_the_code():
    messages = quoted_messages()
    assert len(messages) >= 8
    for message in messages:
        for part in filter(None, (part.strip() for part in message.split("…"))):
            assert part in texts_of_the_code() or len(part) < 4, f"{message!r}: {part!r}"


def test_files_that_the_design_names_exist():
    page = (REPO / "docs" / "design.md").read_text()
    files = {path.name for folder in ("litevae", "pipelines", "jobs") for path in (REPO / folder).rglob("*")}
    named = set(re.findall(r"`([\w/]+\.(?:py|cpp|yaml))`", page))
    assert len(named) > 80
    assert {name for name in named if not ((REPO / name).is_file() or name in files)} == set()
    library = {path.name for path in (REPO / "litevae").glob("*.py")} - {"__init__.py"}
    assert library <= named  # none is left out
