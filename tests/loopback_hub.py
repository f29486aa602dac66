"""A Hub on 127.0.0.1 that the unmodified huggingface_hub, transformers and datasets clients talk to.

    with LoopbackHub() as hub:
        subprocess.run(command, env=hub.environment(tmp_path))  # a process of its own: HF_ENDPOINT, an empty cache
        hub.adopt_clients(monkeypatch, tmp_path)                # or this process, whose clients are already imported
        HfApi().create_repo("user/model", private=True)
        hub.fail("PUT /lfs/", status=503, times=1)              # what a client must survive
        hub.fail("PUT /lfs/", drop_after=1000)                  # the line is cut after 1000 bytes of the upload

It owns repositories, commits, branches and tags in memory, and the HTTP face of them. Large files go through git LFS.
The real Hub takes them by Xet, which this server does not speak: the clients run with HF_HUB_DISABLE_XET=1, so chunk
deduplication and Xet's own retries are not exercised here. Files are served directly, where the real Hub redirects
large ones to a CDN.

Source: the requests that huggingface_hub 1.3 to 2.4 makes, read from its `hf_api.py`, `_commit_api.py`, `lfs.py`,
`file_download.py`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_loopbackLOOPBACKloopback"
USER = "user"
# The Hub decides by .gitattributes and by size (10 MB); these suffixes are in the file it puts into new repositories.
LFS_SUFFIXES = {".safetensors", ".bin", ".parquet", ".arrow", ".npy", ".png", ".pt", ".onnx", ".gz", ".zip"}
LFS_BYTES = 10_000_000


@dataclass(frozen=True)
class Blob:
    """A file's content and how the Hub stores it."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        content = self.content
        if self.lfs:
            pointer = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
            )
            content = pointer.encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass
class Commit:
    oid: str
    title: str
    parents: list[str]
    files: dict[str, Blob]
    date: str = "2026-01-01T00:00:00.000Z"


@dataclass
class Repo:
    """One repository: commits by id, branches and tags pointing at them, and its large-file store."""

    kind: str  # model, dataset or space
    id: str
    private: bool
    settings: dict = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(
        default_factory=dict
    )  # sha256 -> content, also what no commit refers to (yet, any more)

    def commit(self, files: dict[str, Blob], title: str, parents: list[str]) -> Commit:
        listing = json.dumps(
            [sorted((path, blob.git_oid) for path, blob in files.items()), title, parents, len(self.commits)]
        )
        commit = Commit(hashlib.sha1(listing.encode()).hexdigest(), title, parents, files)
        self.commits[commit.oid] = commit
        return commit

    def resolve(self, revision: str) -> Commit | None:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(oid)

    def history(self, commit: Commit) -> list[Commit]:
        found = [commit]
        while found[-1].parents:
            found.append(self.commits[found[-1].parents[0]])
        return found


@dataclass
class Fault:
    """What to do with the next `times` requests that match: answer `status`, or drop the connection."""

    pattern: re.Pattern
    status: int | None
    times: int
    drop_after: int | None
    headers: dict[str, str]


class Answer(Exception):
    """Ends a request with this status."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


class LoopbackHub:
    """The server, its repositories and the faults it will inject. Use as a context manager."""

    def __init__(self, token: str = TOKEN, user: str = USER):
        self.token, self.user = token, user
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[tuple[str, str, int]] = []  # (method, path, status); status 0: the connection was dropped
        self.lock = threading.RLock()
        self._faults: list[Fault] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(
        self, home: Path, *, token: str | None = TOKEN, base: dict[str, str] | None = None
    ) -> dict[str, str]:
        """Environment of a process whose Hub is this one, with its caches under `home` (empty at first)."""
        environment = dict(os.environ if base is None else base)
        for name in [name for name in environment if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))]:
            del environment[name]
        environment.update(
            HF_ENDPOINT=self.url, HF_HOME=str(home), HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1"
        )
        environment.update(HF_HUB_DISABLE_PROGRESS_BARS="1", NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
        if token is not None:
            environment["HF_TOKEN"] = token
        return environment

    def adopt_clients(self, monkeypatch, home: Path, *, token: str | None = TOKEN) -> None:
        """Points this process' already imported clients here: they read HF_ENDPOINT once, at import."""
        from huggingface_hub import HfFileSystem, constants, hf_api

        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        for name, value in self.environment(home, token=token, base={}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HOME", str(home))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)
        HfFileSystem.clear_instance_cache()
        if datasets := sys.modules.get("datasets"):
            monkeypatch.setattr(datasets.config, "HF_ENDPOINT", self.url)
            monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
            monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")

    def fail(
        self,
        pattern: str,
        *,
        status: int | None = None,
        times: int = 1,
        drop_after: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Spoils the next `times` requests whose "METHOD /path?query" matches the regular expression `pattern`.

        status: answer that. drop_after: read (upload) or send (download) so many bytes of the body, then cut the line.
        """
        assert (status is None) != (drop_after is None), "a fault answers a status or drops the connection"
        with self.lock:
            self._faults.append(Fault(re.compile(pattern), status, times, drop_after, headers or {}))

    def forgive(self) -> None:
        """Forgets all faults."""
        with self.lock:
            self._faults.clear()

    def take_fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self._faults:
                if fault.times > 0 and fault.pattern.search(request):
                    fault.times -= 1
                    return fault
        return None

    def repo(self, repo_id: str, kind: str = "model") -> Repo:
        return self.repos[kind, repo_id]

    def add_repo(self, repo_id: str, kind: str = "model", *, private: bool = False) -> Repo:
        """A new repository with the one commit that the Hub makes itself."""
        with self.lock:
            repo = self.repos[kind, repo_id] = Repo(kind, repo_id, private)
            attributes = "".join(f"*{s} filter=lfs diff=lfs merge=lfs -text\n" for s in sorted(LFS_SUFFIXES)).encode()
            repo.branches["main"] = repo.commit({".gitattributes": Blob(attributes, False)}, "initial commit", []).oid
            return repo

    def add_file(self, repo_id: str, path: str, content: bytes, kind: str = "model", revision: str = "main") -> str:
        """Commits a file from the server's side and returns the commit's id."""
        with self.lock:
            repo = self.repos.get((kind, repo_id)) or self.add_repo(repo_id, kind)
            head = repo.resolve(revision)
            blob = Blob(content, is_large(path, len(content)))
            repo.branches[revision] = repo.commit({**head.files, path: blob}, f"add {path}", [head.oid]).oid
            return repo.branches[revision]

    def files(self, repo_id: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """What the revision holds: path -> content, without the Hub's own .gitattributes."""
        with self.lock:
            files = self.repos[kind, repo_id].resolve(revision).files
            return {path: blob.content for path, blob in sorted(files.items()) if path != ".gitattributes"}


def is_large(path: str, size: int) -> bool:
    return PurePosixPath(path).suffix in LFS_SUFFIXES or size > LFS_BYTES


@pytest.fixture
def loopback_hub():
    with LoopbackHub() as hub:
        yield hub


class _Handler(BaseHTTPRequestHandler):
    """One connection. `hub` is set by the server that made the class."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._handle()

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD

    def _handle(self) -> None:
        request = f"{self.command} {self.path}"
        fault = self.hub.take_fault(request)
        if fault and fault.drop_after is not None and self.command in ("PUT", "POST"):
            self.rfile.read(min(fault.drop_after, int(self.headers.get("Content-Length") or fault.drop_after)))
            return self._hang_up()
        self._drop_after = fault.drop_after if fault else None
        self.body = self._read_body()
        try:
            if fault and fault.status is not None:
                raise Answer(fault.status, f"injected {fault.status}", headers=fault.headers)
            with self.hub.lock:
                status, content, headers = self._route()
        except Answer as answer:
            status, headers = answer.status, {"Content-Type": "application/json", **answer.headers}
            content = json.dumps({"error": answer.message}).encode()
        self._send(status, content, headers)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.hub.requests.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self._drop_after is not None:
            self.wfile.write(content[: self._drop_after])
            self.wfile.flush()
            return self._hang_up(logged=True)
        self.wfile.write(content)

    def _hang_up(self, logged: bool = False) -> None:
        if not logged:
            self.hub.requests.append((self.command, self.path, 0))
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    # -- what the requests mean: (status, body, headers)

    def _route(self) -> tuple[int, bytes, dict[str, str]]:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        path = url.path
        if path == "/api/whoami-v2":
            self._need_token()
            return _json(
                {"type": "user", "name": self.hub.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}}
            )
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create_repo()
        if path == "/api/repos/delete":
            self._need_token()
            wanted = self._json_body()
            repo = self._repo(
                wanted.get("type") or "model", f"{wanted.get('organization') or self.hub.user}/{wanted['name']}"
            )
            del self.hub.repos[repo.kind, repo.id]
            return 200, b"OK", {}
        if match := re.fullmatch(r"/lfs/(\w+)/([^/]+/[^/]+)/([0-9a-f]{64})", path):
            return self._receive_lfs(self._repo(match[1], match[2], signed=True), match[3])
        if match := re.fullmatch(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._lfs_batch(self._repo(match[1] or "model", match[2]))
        if match := re.fullmatch(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(self._repo(match[1] or "model", match[2]), unquote(match[3]), unquote(match[4]))
        if match := re.fullmatch(r"/api/(model|dataset|space)s/([^/]+/[^/]+?)(?:/([a-z-]+)(?:/(.+))?)?", path):
            repo = self._repo(match[1], match[2])
            return self._repo_api(repo, match[3] or "info", match[4] or "")
        raise Answer(404, f"the loopback Hub has no {self.command} {path}")

    def _repo_api(self, repo: Repo, verb: str, rest: str) -> tuple[int, bytes, dict[str, str]]:
        revision, _, inner = rest.partition("/")
        revision, inner = unquote(revision), unquote(inner)
        match self.command, verb:
            case "GET", "info" | "revision":
                return _json(self._info(repo, self._commit(repo, revision or "main")))
            case "GET", "tree":
                return self._tree(self._commit(repo, revision), inner)
            case "POST", "paths-info":
                return self._paths_info(self._commit(repo, revision))
            case "GET", "refs":
                return _json(
                    {
                        "branches": [_ref("heads", *item) for item in repo.branches.items()],
                        "tags": [_ref("tags", *item) for item in repo.tags.items()],
                        "converts": [],
                        "pullRequests": [],
                    }
                )
            case "GET", "commits":
                return _json([_commit_info(commit) for commit in repo.history(self._commit(repo, revision))])
            case "POST", "preupload":
                return self._preupload(repo, revision)
            case "POST", "commit":
                return self._receive_commit(repo, revision)
            case "POST", "branch":
                self._need_token()
                if revision in repo.branches:
                    raise Answer(409, f"Reference already exists: {revision}")
                repo.branches[revision] = self._commit(repo, self._json_body().get("startingPoint") or "main").oid
                return _json({})
            case "DELETE", "branch":
                self._need_token()
                if revision == "main":
                    raise Answer(403, "main cannot be deleted")
                if repo.branches.pop(revision, None) is None:
                    raise Answer(404, f"no branch {revision}", "RevisionNotFound")
                return _json({})
            case "POST", "tag":
                self._need_token()
                tag = self._json_body()["tag"]
                if tag in repo.tags:
                    raise Answer(409, f"Tag reference exists already: {tag}")
                repo.tags[tag] = self._commit(repo, revision).oid
                return _json({})
            case "DELETE", "tag":
                self._need_token()
                if repo.tags.pop(revision, None) is None:
                    raise Answer(404, f"no tag {revision}", "RevisionNotFound")
                return _json({})
            case "POST", "super-squash":
                self._need_token()
                head = self._commit(repo, revision)
                repo.branches[revision] = repo.commit(head.files, self._json_body()["message"], []).oid
                return _json({})
            case "GET", "lfs-files":
                return _json([_lfs_info(repo, oid, content) for oid, content in repo.lfs.items()])
            case "POST", "lfs-files":
                self._need_token()
                for oid in self._json_body()["deletions"]["sha"]:
                    repo.lfs.pop(oid, None)
                return _json({})
            case "PUT", "settings":
                self._need_token()
                wanted = self._json_body()
                repo.settings.update(wanted)
                if "private" in wanted or "visibility" in wanted:
                    repo.private = wanted.get("private", wanted.get("visibility") == "private")
                return _json({})
            case "GET", "auth-check":
                return _json({})
        raise Answer(404, f"the loopback Hub has no {self.command} {verb}")

    def _create_repo(self) -> tuple[int, bytes, dict[str, str]]:
        self._need_token()
        wanted = self._json_body()
        kind = wanted.get("type") or "model"
        repo_id = f"{wanted.get('organization') or self.hub.user}/{wanted['name']}"
        if repo_id.split("/")[0] != self.hub.user:
            raise Answer(403, f"You don't have the rights to create a {kind} under the namespace of {repo_id}")
        prefix = "" if kind == "model" else f"{kind}s/"
        where = {"url": f"{self.hub.url}/{prefix}{repo_id}", "name": repo_id}
        if (kind, repo_id) in self.hub.repos:
            return _json({"error": f"You already created this {kind} repo: {repo_id}", **where}, status=409)
        private = wanted.get("private", wanted.get("visibility") == "private")
        self.hub.add_repo(repo_id, kind, private=bool(private)).settings.update(wanted)
        return _json(where)

    def _info(self, repo: Repo, commit: Commit) -> dict:
        siblings = [
            {"rfilename": path, "size": len(blob.content), "blobId": blob.git_oid, **_lfs_pointer(blob)}
            for path, blob in sorted(commit.files.items())
        ]
        tags = ["gpt2repro"] if repo.kind == "model" else []
        return {
            "_id": repo.id.replace("/", "-"), "id": repo.id, "modelId": repo.id, "author": repo.id.split("/")[0],
            "sha": commit.oid, "private": repo.private, "gated": False, "disabled": False, "tags": tags,
            "downloads": 0, "likes": 0, "createdAt": commit.date, "lastModified": commit.date, "siblings": siblings,
        }  # fmt: skip

    def _tree(self, commit: Commit, folder: str) -> tuple[int, bytes, dict[str, str]]:
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict] = {}
        for path, blob in sorted(commit.files.items()):
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                entries[prefix + "/".join(parts[:depth])] = _folder_info(commit, prefix + "/".join(parts[:depth]))
            if recursive or len(parts) == 1:
                entries[path] = _file_info(commit, path, blob)
        if folder and not entries:
            raise Answer(404, f"{folder} does not exist on {commit.oid}", "EntryNotFound")
        return _json(list(entries.values()))

    def _paths_info(self, commit: Commit) -> tuple[int, bytes, dict[str, str]]:
        if "json" in self.headers.get("Content-Type", ""):
            paths = self._json_body()["paths"]
        else:
            paths = parse_qs(self.body.decode())["paths"]
        entries = []
        for path in paths:
            if path in commit.files:
                entries.append(_file_info(commit, path, commit.files[path]))
            elif any(name.startswith(f"{path}/") for name in commit.files):
                entries.append(_folder_info(commit, path))
        return _json(entries)

    def _preupload(self, repo: Repo, revision: str) -> tuple[int, bytes, dict[str, str]]:
        self._need_token()
        present = self._commit(repo, revision).files
        files = []
        for wanted in self._json_body()["files"]:
            path = wanted["path"]
            mode = "lfs" if is_large(path, wanted["size"]) else "regular"
            known = {"oid": present[path].etag} if path in present else {}
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        return _json({"files": files})

    def _lfs_batch(self, repo: Repo) -> tuple[int, bytes, dict[str, str]]:
        self._need_token()
        objects = []
        for wanted in self._json_body()["objects"]:
            item = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in repo.lfs:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{repo.kind}/{repo.id}/{wanted['oid']}"}}
            objects.append(item)
        return _json({"transfer": "basic", "objects": objects})

    def _receive_lfs(self, repo: Repo, oid: str) -> tuple[int, bytes, dict[str, str]]:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Answer(400, f"the content uploaded does not have the sha256 {oid}")
        repo.lfs[oid] = self.body
        return 200, b"", {"ETag": f'"{oid}"'}

    def _receive_commit(self, repo: Repo, revision: str) -> tuple[int, bytes, dict[str, str]]:
        self._need_token()
        if revision not in repo.branches:
            raise Answer(404, f"no branch {revision}", "RevisionNotFound")
        head = repo.commits[repo.branches[revision]]
        files, title = dict(head.files), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit", head.oid) != head.oid:
                    raise Answer(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in repo.lfs:
                    raise Answer(400, f"{value['path']}: no large file {value['oid']} was uploaded")
                files[value["path"]] = Blob(repo.lfs[value["oid"]], True)
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Answer(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
            elif key == "deletedFolder":
                prefix = value["path"].rstrip("/") + "/"
                if not any(path.startswith(prefix) for path in files):
                    raise Answer(404, f"A file with this name doesn't exist: {prefix}", "EntryNotFound")
                files = {path: blob for path, blob in files.items() if not path.startswith(prefix)}
        commit = repo.commit(files, title, [head.oid])
        repo.branches[revision] = commit.oid
        prefix = "" if repo.kind == "model" else f"{repo.kind}s/"
        commit_url = f"{self.hub.url}/{prefix}{repo.id}/commit/{commit.oid}"
        return _json({"success": True, "commitOid": commit.oid, "commitUrl": commit_url, "hookOutput": ""})

    def _resolve(self, repo: Repo, revision: str, path: str) -> tuple[int, bytes, dict[str, str]]:
        commit = self._commit(repo, revision)
        if path not in commit.files:
            raise Answer(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.oid})
        blob = commit.files[path]
        size = len(blob.content)
        headers = {"ETag": f'"{blob.etag}"', "X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(size)}
        wanted = self.headers.get("Range")
        if self.command == "HEAD":
            return 200, b"", {**headers, "Content-Length": str(size)}
        if not wanted:
            return 200, blob.content, headers
        first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted).groups()
        start = int(first) if first else max(0, size - int(last))
        stop = min(size, int(last) + 1) if first and last else size
        if start >= size:
            raise Answer(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return 206, blob.content[start:stop], headers

    # -- who asks, and for what

    def _authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _need_token(self) -> None:
        if not self._authorized():
            raise Answer(401, "Invalid credentials in Authorization header")

    def _repo(self, kind: str, repo_id: str, *, signed: bool = False) -> Repo:
        """The repository, if it exists and the caller may see it; a signed upload URL needs no token."""
        repo = self.hub.repos.get((kind, repo_id))
        if repo is None or (repo.private and not signed and not self._authorized()):
            status = 404 if self._authorized() else 401
            raise Answer(status, "Repository not found", "RepoNotFound")
        return repo

    def _commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.resolve(revision)
        if commit is None:
            raise Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def _json_body(self) -> dict:
        return json.loads(self.body or b"{}")


def _json(value: object, status: int = 200) -> tuple[int, bytes, dict[str, str]]:
    return status, json.dumps(value).encode(), {"Content-Type": "application/json; charset=utf-8"}


def _ref(folder: str, name: str, oid: str) -> dict:
    return {"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": oid}


def _lfs_pointer(blob: Blob) -> dict:
    size = len(blob.content)
    return {"lfs": {"oid": blob.sha256, "sha256": blob.sha256, "size": size, "pointerSize": 134}} if blob.lfs else {}


def _file_info(commit: Commit, path: str, blob: Blob) -> dict:
    last = {"id": commit.oid, "title": commit.title, "date": commit.date}
    info = {"type": "file", "path": path, "oid": blob.git_oid, "size": len(blob.content), "lastCommit": last}
    return {**info, **_lfs_pointer(blob)}


def _folder_info(commit: Commit, path: str) -> dict:
    last = {"id": commit.oid, "title": commit.title, "date": commit.date}
    return {
        "type": "directory",
        "path": path,
        "oid": hashlib.sha1(path.encode()).hexdigest(),
        "size": 0,
        "lastCommit": last,
    }


def _commit_info(commit: Commit) -> dict:
    return {"id": commit.oid, "title": commit.title, "message": "", "date": commit.date, "authors": [{"user": USER}]}


def _lfs_info(repo: Repo, oid: str, content: bytes) -> dict:
    names = [path for c in repo.commits.values() for path, blob in c.files.items() if blob.lfs and blob.sha256 == oid]
    info = {"fileOid": oid, "oid": oid, "size": len(content), "ref": None}
    return {
        **info,
        "filename": names[0] if names else "",
        "pushedAt": time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime()),
    }
