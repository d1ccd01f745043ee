"""A Hub on loopback: what huggingface_hub asks of one when it pushes and pulls, over repositories in memory.

``with HubServer() as hub`` serves; ``hub.env(cache)`` are the variables under which another process talks to it, and
``hub.redirect(monkeypatch, cache)`` makes this process do so.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "loopback" * 4


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    """Commits in their order; a branch names one."""

    private: bool = False
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "") -> str:
        """Adds or replaces ``files``; returns the commit's id."""
        before = self.at(branch)
        whole = (before.files if before else {}) | files
        oid = hashlib.sha1(f"{len(self.commits)}{sorted(whole)}{message}".encode()).hexdigest()
        self.commits.append(Commit(oid, message, whole))
        self.branches[branch] = oid
        return oid

    def at(self, revision: str) -> Commit | None:
        oid = self.branches.get(revision, revision)
        return next((c for c in self.commits if c.oid == oid), None)


class HubServer:
    """Attributes: ``repos`` by id; ``requests``, the (method, path) of each; ``fail``, a status for every request, to play a broken Hub."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.fail: int | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def repo(self, repo_id: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repo:
        """The repository, made where it is missing; ``files`` become a commit."""
        repo = self.repos.setdefault(repo_id, Repo(private, branches={}))
        if not repo.commits:
            repo.commit({".gitattributes": b""}, message="initial commit")
        if files:
            repo.commit(files)
        return repo

    def env(self, cache: Path, token: str | None = TOKEN) -> dict[str, str]:
        """The environment of a process that is to talk to this server."""
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        extra = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"}
        return plain | extra | ({"HF_TOKEN": token} if token else {})

    def run(self, code: str, cache: Path, token: str | None = TOKEN, **env: str) -> subprocess.CompletedProcess[str]:
        """Runs Python code in a process that talks to this server, in the repository's root."""
        root = Path(__file__).resolve().parent.parent
        return subprocess.run(
            [sys.executable, "-c", code], cwd=root, env=self.env(cache, token) | env, capture_output=True, text=True, timeout=120
        )

    def redirect(self, monkeypatch: Any, cache: Path, token: str | None = TOKEN) -> None:
        """Makes huggingface_hub talk to this server from this process, for one test."""
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        if token:
            monkeypatch.setenv("HF_TOKEN", token)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    # Plumbing --------------------------------------------------------------------------------------------------
    def _answer(self, status: int, body: Any = b"", headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _missing(self, code: str, commit: str | None = None) -> None:
        self._answer(404, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code} | ({"X-Repo-Commit": commit} if commit else {}))

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        body = self._body()
        if self.hub.fail is not None:
            self._answer(self.hub.fail, {"error": "the Hub is out of order"})
            return
        writes = self.command not in ("GET", "HEAD") and path != "/api/validate-yaml"
        if writes and not path.startswith("/lfs/") and not self._authorised():
            self._answer(401, {"error": "Invalid credentials"})
            return
        for method, pattern, name in _ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                getattr(self, name)(*match.groups(), body=body)
                return
        self._answer(404, {"error": f"no route {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, repo_id: str) -> Repo | None:
        repo = self.hub.repos.get(repo_id)
        return None if repo is not None and repo.private and not self._authorised() else repo

    # Push ------------------------------------------------------------------------------------------------------
    def create(self, body: bytes) -> None:
        tree = json.loads(body)
        repo_id = f"{tree.get('organization') or 'someone'}/{tree['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            self._answer(409, answer | {"error": "You already created this model repo"})
            return
        self.hub.repo(repo_id, private=tree.get("private") is True or tree.get("visibility") == "private")
        self._answer(200, answer)

    def branch(self, repo_id: str, branch: str, body: bytes) -> None:
        repo = self.hub.repos[repo_id]
        if branch in repo.branches:
            self._answer(409, {"error": "Reference already exists"})
            return
        repo.branches[branch] = repo.branches["main"]
        self._answer(200, {})

    def validate(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        errors = [] if content.startswith("---\n") else [{"message": "no YAML header"}]
        self._answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, repo_id: str, revision: str, body: bytes) -> None:
        names = [f["path"] for f in json.loads(body)["files"]]
        modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
        self._answer(200, {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]})

    def lfs_batch(self, repo_id: str, body: bytes) -> None:
        objects = []
        for item in json.loads(body)["objects"]:
            actions = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}, "verify": {"href": f"{self.hub.url}/lfs/verify"}}
            objects.append(item if item["oid"] in self.hub.blobs else item | {"actions": actions})
        self._answer(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def lfs_put(self, oid: str, body: bytes) -> None:
        self.hub.blobs[oid] = body
        self._answer(200 if hashlib.sha256(body).hexdigest() == oid else 400)

    def lfs_verify(self, body: bytes) -> None:
        self._answer(200 if json.loads(body)["oid"] in self.hub.blobs else 404, {})

    def commit(self, repo_id: str, revision: str, body: bytes) -> None:
        repo = self.hub.repos[repo_id]
        files, message = {}, ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        oid = repo.commit(files, revision, message)
        self._answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}"})

    # Pull ------------------------------------------------------------------------------------------------------
    def info(self, repo_id: str, revision: str | None = None, *, body: bytes = b"") -> None:
        repo = self._repo(repo_id)
        commit = repo.at(revision or "main") if repo else None
        if repo is None or commit is None:
            self._missing("RepoNotFound" if repo is None else "RevisionNotFound")
            return
        siblings = [{"rfilename": name} for name in commit.files]
        self._answer(200, {"id": repo_id, "sha": commit.oid, "private": repo.private, "siblings": siblings, "tags": []})

    def tree(self, repo_id: str, revision: str, body: bytes) -> None:
        repo = self._repo(repo_id)
        commit = repo.at(revision) if repo else None
        if commit is None:
            self._missing("RepoNotFound" if repo is None else "RevisionNotFound")
            return
        files = [{"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for p, c in commit.files.items()]
        self._answer(200, files)

    def resolve(self, repo_id: str, revision: str, path: str, body: bytes) -> None:
        repo = self._repo(repo_id)
        commit = repo.at(revision) if repo else None
        if commit is None:
            self._missing("RepoNotFound" if repo is None else "RevisionNotFound")
        elif path not in commit.files:
            self._missing("EntryNotFound", commit.oid)
        else:
            content = commit.files[path]
            headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Content-Length": str(len(content))}
            if path.endswith(".safetensors"):
                headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content))}
            self._answer(200, content, headers)


_ID = r"([^/]+/[^/]+)"
_ROUTES = [
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("POST", rf"/api/models/{_ID}/branch/(.+)", "branch"),
    ("POST", rf"/api/models/{_ID}/preupload/(.+)", "preupload"),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("POST", "/lfs/verify", "lfs_verify"),
    ("PUT", "/lfs/([0-9a-f]{64})", "lfs_put"),
    ("POST", rf"/api/models/{_ID}/commit/(.+)", "commit"),
    ("GET", rf"/api/models/{_ID}", "info"),
    ("GET", rf"/api/models/{_ID}/revision/(.+)", "info"),
    ("GET", rf"/api/models/{_ID}/tree/([^/]+)", "tree"),
    ("GET", rf"/{_ID}/resolve/([^/]+)/(.+)", "resolve"),
    ("HEAD", rf"/{_ID}/resolve/([^/]+)/(.+)", "resolve"),
]
