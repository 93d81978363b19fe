"""Hooks of MkDocs: bring pages from the top of the repository into the site, and rewrite links between the two.

A link in a page is relative to the page's place in the repository, as GitHub reads it. In the site all pages lie in one
folder. Code and other files of the repository are no part of the site: a link to one becomes a link into the repository
where `repo_url` says where that is, and plain text where it does not.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
# Pages at the top of the repository, by their names in the site. MkDocs takes a README.md for the front page, which
# is docs/index.md here.
TOP = {
    "README.md": "front-page.md",
    "SECURITY.md": "SECURITY.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
_FENCED = re.compile(r"^ *(```|~~~).*?^ *\1 *$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(
    r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^()\s]+)(?P<title>\s+\"[^\"]*\")?\)"
)


class BrokenLink(ValueError):
    """A link to a file that is not in the repository."""


def rewritten(markdown: str, page: str, repo_url: str = "") -> str:
    """Return a page's Markdown with its links as the site needs them.

    Args:
        markdown: the page.
        page: its path in the repository, such as "docs/cluster.md" or "SECURITY.md".
        repo_url: where the repository can be read; empty: links to files that are not in the site become text.

    Raises:
        BrokenLink: if a relative link names a file that does not exist.
    """

    def link(found: re.Match[str]) -> str:
        target, hash_, anchor = found["target"].partition("#")
        if not target or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:|/", target):
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        if path.startswith("..") or not (REPO / path).exists():
            raise BrokenLink(f"{page} links to {found['target']}, which does not exist")
        inside = TOP.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else "")
        text = _LINK.sub(link, found["text"])  # a picture can be the text of a link
        if not inside:
            return f"[{text}]({repo_url.rstrip('/')}/blob/main/{path})" if repo_url else text
        return f"{found['image']}[{text}]({inside}{hash_}{anchor}{found['title'] or ''})"

    # Code is put aside first: what looks like a link there is none.
    kept: list[str] = []

    def keep(found: re.Match[str]) -> str:
        kept.append(found[0])
        return f"\0{len(kept) - 1}\0"

    text = _CODE.sub(keep, _FENCED.sub(keep, markdown))
    text = _LINK.sub(link, text)
    while "\0" in text:
        text = re.sub(r"\0(\d+)\0", lambda found: kept[int(found[1])], text)
    return text


def on_files(files: Any, config: Any) -> Any:
    """Add the pages at the top of the repository to the site."""
    from mkdocs.structure.files import File

    for name, inside in TOP.items():
        files.append(File.generated(config, inside, content=(REPO / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links of a page."""
    from mkdocs.exceptions import PluginError

    name = page.file.src_uri
    places = {inside: top for top, inside in TOP.items()}
    try:
        return rewritten(markdown, places.get(name, f"docs/{name}"), config.repo_url or "")
    except BrokenLink as error:
        raise PluginError(str(error)) from None
