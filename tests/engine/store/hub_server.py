"""A stand-in of the Hugging Face Hub on loopback: the requests that our use of its client makes.

Repositories are lists of commits, each a mapping of path -> bytes. Zip files take the way of large
files (an upload of its own, a redirect to another host), the others that of regular ones.
`python -m tests.engine.store.hub_server` runs one for commands in other terminals.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants
import pytest

TOKEN = "hf_canaryToken"
PAGE = 7
"""Entries of one page of a listing."""


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)


@dataclass
class Hub:
    repos: dict[str, Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    """sha256 -> bytes of uploaded large files."""
    requests: list[str] = field(default_factory=list)
    """Method and path of each request."""
    uploads: int = 0
    """Large files that were sent."""
    fail_after: int = -1
    """Writing requests that still succeed; -1 = all."""
    ignored: tuple[str, ...] = ()
    """Beginnings of paths that a .gitignore of the repository names."""
    port: int = 0

    def head(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        found = self.repos[repo]
        return found.commits[found.branches[branch]]

    def commit(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        found = self.repos[repo]
        text = f"{repo} {branch} {len(found.commits)}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        found.commits[sha], found.branches[branch] = files, sha
        return sha


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = self._chunks()
        url = urlsplit(self.path)
        path = url.path
        self.hub.requests.append(f"{self.command} {path}")
        if self.command in ("POST", "PUT") and "validate-yaml" not in path:
            if self.hub.fail_after == 0:
                return self.answer(403, {"error": "stopped"})
            self.hub.fail_after -= self.hub.fail_after > 0
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path == "/api/repos/create":
            return self._create(json.loads(body), allowed)
        if path == "/api/validate-yaml":
            bad = "license: no-such-license" in json.loads(body)["content"]
            found = {"errors": [{"message": '"license" must be one of'}] if bad else []}
            return self.answer(400 if bad else 200, {**found, "warnings": []})
        if path.startswith("/large/"):
            return self._large(path.removeprefix("/large/"), body)
        match = re.match(r"/(?:api/)?datasets/([\w.-]+/[\w.-]+?)(\.git)?(/.*)?$", path)
        repo = self.hub.repos.get(match[1]) if match else None
        if match is None or repo is None or (repo.private and not allowed):
            return self.answer(401, {"error": "no"}, X_Error_Code="RepoNotFound")
        verb, _, rest = (match[3] or "/").lstrip("/").partition("/")
        if self.command == "POST" and not allowed:
            return self.answer(403, {"error": "no right"})
        if verb == "info":
            return self._batch(json.loads(body))
        revision, _, below = rest.partition("/")
        revision, below = unquote(revision) or "main", unquote(below)
        if verb == "branch":
            repo.branches.setdefault(below or revision, repo.branches["main"])
            return self.answer(200, {})
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            return self.answer(404, {"error": "no"}, X_Error_Code="RevisionNotFound")
        if verb in ("", "revision"):
            return self.answer(200, {"id": match[1], "sha": sha, "private": repo.private})
        if verb == "tree":
            return self._tree(repo.commits[sha], below, parse_qs(url.query))
        if verb == "resolve":
            return self._resolve(repo.commits[sha], below)
        if verb == "preupload":
            return self._preupload(json.loads(body)["files"])
        return self._commit(match[1], revision, sha, body.decode().splitlines())

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def _chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _create(self, body: dict[str, Any], allowed: bool) -> None:
        name = f"{body['organization']}/{body['name']}"
        if not allowed:
            return self.answer(401, {"error": "no token"})
        address = f"http://127.0.0.1:{self.hub.port}/datasets/{name}"
        if name in self.hub.repos:
            return self.answer(409, {"error": "exists", "url": address})
        self.hub.repos[name] = Repo(private=body.get("visibility") == "private")
        self.hub.commit(name, {".gitattributes": b"*.zip filter=lfs"})
        return self.answer(200, {"url": address, "name": name})

    def _tree(self, files: dict[str, bytes], folder: str, query: dict[str, list[str]]) -> None:
        inside = f"{folder}/" if folder else ""
        names = sorted(name for name in files if name.startswith(inside))
        if folder and not names:
            return self.answer(404, {"error": "no"}, X_Error_Code="EntryNotFound")
        rows: dict[str, dict[str, Any]] = {}
        for name in names:
            first, *rest = name.removeprefix(inside).split("/")
            if rest:
                rows[inside + first] = {"type": "directory", "path": inside + first, "oid": "0"}
            if not rest or query.get("recursive", ["false"])[0].lower() == "true":
                size = len(files[name])
                rows[name] = {"type": "file", "path": name, "size": size, "oid": "0"}
        start = int(query.get("cursor", ["0"])[0])
        page = list(rows.values())[start : start + PAGE]
        more = {}
        if start + PAGE < len(rows):
            recursive = query.get("recursive", ["false"])[0]
            link = f"{self.path.split('?')[0]}?recursive={recursive}&cursor={start + PAGE}"
            more["Link"] = f'<http://127.0.0.1:{self.hub.port}{link}>; rel="next"'
        return self.answer(200, page, **more)

    def _resolve(self, files: dict[str, bytes], name: str) -> None:
        if name not in files:
            return self.answer(404, {"error": "no"}, X_Error_Code="EntryNotFound")
        if name.endswith(".zip"):
            sha = hashlib.sha256(files[name]).hexdigest()
            self.hub.large.setdefault(sha, files[name])
            # Another origin, which must not see the token.
            where = f"http://localhost:{self.hub.port}/large/{sha}?Signature=canary"
            return self.answer(302, Location=where)
        return self._part(files[name])

    def _part(self, data: bytes) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match is None:
            return self.answer(200, data)
        start, end = int(match[1]), min(int(match[2]) + 1, len(data))
        if start >= len(data):
            return self.answer(416)
        return self.answer(
            206, data[start:end], Content_Range=f"bytes {start}-{end - 1}/{len(data)}"
        )

    def _preupload(self, files: list[dict[str, Any]]) -> None:
        modes = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["path"].endswith(".zip") else "regular",
                "shouldIgnore": each["path"].startswith(self.hub.ignored or "/"),
                "oid": None,
            }
            for each in files
        ]
        return self.answer(200, {"files": modes})

    def _batch(self, body: dict[str, Any]) -> None:
        found = []
        for each in body["objects"]:
            where = f"http://127.0.0.1:{self.hub.port}/large/{each['oid']}"
            have = each["oid"] in self.hub.large
            found.append({**each, **({} if have else {"actions": {"upload": {"href": where}}})})
        return self.answer(200, {"transfer": "basic", "objects": found})

    def _large(self, sha: str, body: bytes) -> None:
        if self.command == "PUT":
            assert hashlib.sha256(body).hexdigest() == sha
            self.hub.large[sha] = body
            self.hub.uploads += 1
            return self.answer(200)
        assert "Authorization" not in self.headers, "the token went to another host"
        return self._part(self.hub.large[sha])

    def _commit(self, name: str, branch: str, parent: str, lines: list[str]) -> None:
        files = dict(self.hub.repos[name].commits[parent])
        for line in lines:
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header" and value.get("parentCommit", parent) != parent:
                return self.answer(412, {"error": "A commit has happened since"})
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.hub.commit(name, files, branch)
        return self.answer(
            200,
            {
                "commitUrl": f"http://127.0.0.1:{self.hub.port}/datasets/{name}/commit/{sha}",
                "commitOid": sha,
            },
        )


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a Hub."""
    hub = Hub()
    handler = type("Bound", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Run a Hub; the client of this process uses it, with a token."""
    with serving() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{hub.port}")
        patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield hub


def main() -> None:
    """Run a Hub until it is interrupted; print the variables that commands use it with."""
    with serving() as hub, suppress(KeyboardInterrupt):
        address = f"HF_ENDPOINT=http://127.0.0.1:{hub.port}"
        print(f"export {address} HF_TOKEN={TOKEN} HF_HUB_DISABLE_XET=1", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
