"""A stand-in for the HTTP API of the Hugging Face Hub, on loopback: what huggingface_hub 2.4 asks of it."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


class Hub:
    """Repositories with their commits, and the requests that came.

    Attributes:
        url: where it listens.
        commits: files by repository and commit.
        refs: commits by (repository, branch or tag).
        asked: "METHOD /path" of each request.
        status: an HTTP status to answer everything with; 0: answer properly.
    """

    def __init__(self) -> None:
        self.url = ""
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.refs: dict[tuple[str, str], str] = {}
        self.asked: list[str] = []
        self.status = 0

    def put(self, repo: str, folder: Path, revision: str = "main") -> str:
        """Commit all files of a folder, and return the commit."""
        return self.commit(repo, {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }, revision)  # fmt: skip

    def commit(self, repo: str, files: dict[str, bytes], revision: str = "main") -> str:
        about = repr((repo, revision, sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items())))
        commit = hashlib.sha1(about.encode()).hexdigest()
        self.commits.setdefault(repo, {})[commit] = files
        self.refs[repo, revision] = commit
        return commit

    def at(self, repo: str, revision: str) -> str | None:
        """Return the commit of a branch, a tag or a commit."""
        return revision if revision in self.commits.get(repo, {}) else self.refs.get((repo, revision))


_API = re.compile(
    r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>revision|tree|preupload|commit)/(?P<revision>[^/]+))?"
)
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, body: Any, status: int = 200, **headers: str) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def missing(self, code: str, status: int = 404) -> None:
            self.answer({"error": code}, status, X_Error_Code=code)

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            if hub.status:
                return self.missing("", hub.status)
            api, file = _API.fullmatch(path), _FILE.fullmatch(path)
            match = api or file
            if match is None:
                return self.missing("EntryNotFound")
            if match["repo"] not in hub.commits:
                return self.missing("RepoNotFound", 401)  # the Hub does not tell private ones from none
            commit = hub.at(match["repo"], match["revision"] or "main")
            if commit is None:
                return self.missing("RevisionNotFound")
            files = hub.commits[match["repo"]][commit]
            if file:
                data = files.get(file["file"])
                if data is None:
                    return self.missing("EntryNotFound")
                etag = f'"{hashlib.sha1(data).hexdigest()}"'
                return self.answer(data, ETag=etag, X_Repo_Commit=commit)
            if match["what"] == "tree":
                return self.answer([
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ])  # fmt: skip
            return self.answer({
                "id": match["repo"], "sha": commit, "siblings": [{"rfilename": name} for name in files], "tags": [],
            })  # fmt: skip

        do_HEAD = do_GET

        def do_POST(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"POST {path}")
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if path == "/api/repos/create":
                asked = json.loads(body)
                repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
                hub.commits.setdefault(repo, {})
                if (repo, "main") not in hub.refs:
                    hub.commit(repo, {})
                return self.answer({"url": f"{hub.url}/{repo}"})
            if path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            match = _API.fullmatch(path)
            if match and match["what"] == "preupload":
                return self.answer({"files": [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]})  # fmt: skip
            if match and match["what"] == "commit":
                repo, revision = match["repo"], match["revision"]
                files = dict(hub.commits[repo][hub.refs[repo, revision]])
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                commit = hub.commit(repo, files, revision)
                return self.answer({"commitUrl": f"{hub.url}/{repo}/commit/{commit}", "commitOid": commit})
            return self.missing("EntryNotFound")

    return Handler


@contextmanager
def running() -> Iterator[Hub]:
    """Serve a Hub on loopback."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use(hub: Hub, cache: Path, patch: pytest.MonkeyPatch, offline: bool = False) -> None:
    """Point huggingface_hub, in this process and in those it starts, to a Hub and to an own cache."""
    from huggingface_hub import constants, hf_api

    from litevae import hub as names

    patch.setenv("HF_ENDPOINT", hub.url)
    patch.setenv("HF_HUB_CACHE", str(cache))
    patch.setenv("HF_HUB_OFFLINE", str(int(offline)))
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(hf_api.api, "endpoint", hub.url)  # of the functions that are not methods, which diffusers calls
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", offline)
    patch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    names._download.cache_clear()
