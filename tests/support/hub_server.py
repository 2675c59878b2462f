"""A small Hugging Face Hub on 127.0.0.1, and the real client pointed at it, for tests.

    def client(hub, monkeypatch, cache: Path, token: str | None = None, offline: bool = False)

Example:
    @pytest.fixture(params=["regular", "lfs"])
    def hub(request, monkeypatch, tmp_path):
        with Hub(mode=request.param, tokens={"hf_right"}) as server:
            client(server, monkeypatch, tmp_path / "cache", token="hf_right")
            yield server

    def test_push(hub):
        HfApi().create_repo("user/pets")
        HfApi().upload_file(repo_id="user/pets", path_in_repo="a.txt", path_or_fileobj=b"a")
        assert hub.files("user/pets")["a.txt"] == b"a"
        assert hub.commits("user/pets")[-1].title.startswith("Upload a.txt")

- Plain huggingface_hub, timm and transformers calls then go to the server, in this process and in
  processes it starts; `client` may be called again, to log out or to go offline. Outside a test,
  `pytest.MonkeyPatch.context()` gives the `monkeypatch`. No other host can be reached from this
  process: a try fails, stands in `hub.strays`, and fails the test when the server is closed.
- The server knows no xet, so the client runs without it. The client does not wait between retries.
- Every write needs a token of `hub.tokens`. A private repository looks missing without one. A gated
  one lets in `hub.gate(repo, granted={...})` only.
- `hub.cut(...)` breaks transfers; the client retries downloads, PUT and some POST requests up to 5
  times by itself, so pass `times=50` where it must fail in the end, and `hub.mend()` after.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

from support.hub_client import client

_JSON = "application/json; charset=utf-8"

__all__ = ["Hub", "client"]


class Hub:
    """A Hub in memory. Use as a context manager; `url` is its address."""

    def __init__(
        self, mode: str = "regular", tokens: Iterable[str] = (), user: str = "user"
    ) -> None:
        assert mode in ("regular", "lfs")
        self.mode, self.tokens, self.user = mode, set(tokens), user
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.strays: list[str] = []
        self.cuts: list[list[Any]] = []
        self.lock = threading.RLock()
        self._closing: list[Callable[[], object]] = []
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        # The default poll of half a second would be the time that every test waits at its end.
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close()
        assert kind is not None or not self.strays, f"reached for other hosts: {self.strays}"

    def close(self) -> None:
        """Stop the server, as if the Hub were down."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
        while self._closing:
            self._closing.pop()()

    def create(self, repo: str, files: dict[str, bytes] | None = None, **kw: bool) -> Repo:
        """Make a repository without a client; `private=True` is allowed."""
        with self.lock:
            self.repos[repo] = Repo(repo, **kw)
        for path, data in (files or {}).items():
            self.swap(repo, path, data)
        return self.repos[repo]

    def commits(self, repo: str, revision: str = "main") -> list[Commit]:
        """Return the commits of a branch, oldest first."""
        with self.lock:
            return list(self.repos[repo].log(revision))[::-1]

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Return what a branch or commit holds."""
        with self.lock:
            return {k: file.data for k, file in self.repos[repo].at(revision).files.items()}

    def swap(self, repo: str, path: str, data: bytes, revision: str = "main") -> Commit:
        """Replace one file in a new commit, behind the client's back."""
        with self.lock:
            new = {path: File(data, self.is_lfs(path, len(data)))}
            found = self.repos[repo]
            return found.add(revision, f"swap {path}", {**found.at(revision).files, **new})

    def gate(self, repo: str, granted: Iterable[str] = ()) -> None:
        """Make a repository gated, open to these tokens only."""
        self.repos[repo].granted = set(granted)

    def cut(self, method: str, substring: str, after_bytes: int, times: int = 1) -> None:
        """Break the connection of the next `times` requests whose path has this text.

        GET: no byte of the file from position `after_bytes` on is sent, so a resumed download
        gets none. Other methods: the connection closes once that many bytes of the body are read.
        """
        self.cuts.append([method, substring, after_bytes, times])

    def mend(self) -> None:
        """Break no more connections."""
        self.cuts.clear()

    def fresh_cache(self) -> Path:
        """Return a new empty folder, gone when the server closes."""
        folder = tempfile.mkdtemp(prefix="hub-cache-")
        self._closing.append(lambda: shutil.rmtree(folder, ignore_errors=True))
        return Path(folder)

    def on_close(self, action: Callable[[], object]) -> None:
        """Call something when the server closes."""
        self._closing.append(action)

    def is_lfs(self, path: str, size: int) -> bool:
        return self.mode == "lfs" and size > 0 and path.endswith(".safetensors")

    def due_cut(self, method: str, path: str) -> int | None:
        with self.lock:
            for entry in self.cuts:
                if entry[0] == method and entry[1] in path and entry[3] > 0:
                    entry[3] -= 1
                    return int(entry[2])
        return None


# --- what it holds -----------------------------------------------------------------------------

ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)(?:^|\n)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_RELATIONS = ("adapter", "finetune", "quantized", "merge")
_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_count = itertools.count()


class HubError(Exception):
    """An answer that is no success: status, X-Error-Code, message, further headers."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


@dataclass(frozen=True)
class File:
    """Content of one path, and whether it is kept in LFS."""

    data: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n"
        return f"{text}size {len(self.data)}\n".encode()

    @property
    def oid(self) -> str:
        blob = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        """What preupload and download name the content by."""
        return self.sha256 if self.lfs else self.oid

    def item(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = {"type": "file", "oid": self.oid, "path": path}
        found["size"] = len(self.data)
        if self.lfs:
            lfs = {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
            found["lfs"] = lfs
        return found


@dataclass(frozen=True)
class Commit:
    """One commit: its id, its title and the whole tree."""

    oid: str
    title: str
    date: str
    files: Mapping[str, File]
    parent: Commit | None = None


@dataclass
class Repo:
    """A repository. `granted` is None, or the tokens that a gated one lets in."""

    id: str
    private: bool = False
    granted: set[str] | None = None
    heads: dict[str, Commit] = field(default_factory=dict)
    known: dict[str, Commit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.add("main", "initial commit", {".gitattributes": File(ATTRIBUTES)})

    def at(self, revision: str) -> Commit:
        """Return a commit by branch, pull request or full id."""
        found = self.heads.get(revision) or self.known.get(revision)
        if found is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def add(self, branch: str, title: str, files: Mapping[str, File]) -> Commit:
        """Put a commit with this tree on a branch."""
        now = datetime.now(timezone.utc)
        date = now.strftime("%Y-%m-%dT%H:%M:%S.") + f"{now.microsecond // 1000:03d}Z"
        oid = hashlib.sha1(f"{self.id} {next(_count)}".encode()).hexdigest()
        commit = Commit(oid, title, date, dict(files), self.heads.get(branch))
        self.heads[branch] = self.known[oid] = commit
        return commit

    def log(self, revision: str) -> Iterator[Commit]:
        """Walk from a commit to the first one."""
        commit: Commit | None = self.at(revision)
        while commit is not None:
            yield commit
            commit = commit.parent

    def info(self, commit: Commit) -> dict[str, Any]:
        first = list(self.log(commit.oid))[-1]
        readme = commit.files.get("README.md", File(b"")).data.decode(errors="replace")
        card = front_matter(readme)
        card = card if isinstance(card, dict) else {}
        known = {k: card[k] for k in ("library_name", "pipeline_tag") if k in card}
        return known | {
            "_id": hashlib.sha1(self.id.encode()).hexdigest()[:24],
            "id": self.id,
            "modelId": self.id,
            "author": self.id.partition("/")[0],
            "sha": commit.oid,
            "private": self.private,
            "gated": False if self.granted is None else "manual",
            "disabled": False,
            "lastModified": commit.date,
            "createdAt": first.date,
            "downloads": 0,
            "likes": 0,
            "tags": list(card.get("tags") or ()),
            "cardData": card,
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }


def front_matter(text: str) -> Any:
    """Return what the YAML block of a card says: None without one, an exception if not YAML."""
    import yaml

    found = _FRONT.match(text)
    if found is None:
        return None
    try:
        return yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return error


def card_faults(text: str) -> tuple[list[str], list[str]]:
    """Return errors and warnings about the metadata of a card."""
    data = front_matter(text)
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return [f"the metadata must be a YAML mapping: {data}"], []
    errors = [f'"{key}" must be text' for key in _TEXT if not _is_text(data.get(key, "-"))]
    errors += [
        f'"{key}" must be text or a list of texts'
        for key in _TEXTS
        if not all(_is_text(value) for value in _listed(data.get(key, "-")))
    ]
    if not isinstance(data.get("tags", []), list):
        errors.append('"tags" must be an array')
    if data.get("base_model_relation", "adapter") not in _RELATIONS:
        errors.append(f'"base_model_relation" must be one of {_RELATIONS}')
    if not _LICENSE.fullmatch(str(data.get("license", "other"))):
        errors.append(f'"license" {data["license"]!r} is not a licence id')
    for key in ("base_model", "datasets"):
        for name in _listed(data.get(key, "-")):
            if not _REPO_ID.fullmatch(str(name)):
                errors.append(f'"{key}" with value {name!r} is not valid: use an id of the Hub')
    return errors + list(_index_faults(data.get("model-index", []))), []


_TEXT = ("library_name", "pipeline_tag", "license", "license_name", "license_link")
_TEXTS = ("base_model", "datasets", "metrics", "language", "tags")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _index_faults(index: Any) -> Iterator[str]:
    if not isinstance(index, list):
        yield '"model-index" must be an array'
        return
    for i, model in enumerate(index):
        where = f"model-index[{i}]"
        if not isinstance(model, dict) or not _is_text(model.get("name")):
            yield f'"{where}.name" is required'
        elif not isinstance(model.get("results"), list):
            yield f'"{where}.results" must be an array'
        else:
            for j, result in enumerate(model["results"]):
                yield from _result_faults(f"{where}.results[{j}]", result)


def _result_faults(where: str, result: Any) -> Iterator[str]:
    if not isinstance(result, dict):
        yield f'"{where}" must be a mapping'
        return
    for key, names in (("task", ("type",)), ("dataset", ("type", "name"))):
        part = result.get(key)
        for name in names:
            if not isinstance(part, dict) or not _is_text(part.get(name)):
                yield f'"{where}.{key}.{name}" is required'
    metrics = result.get("metrics")
    if not isinstance(metrics, list) or not metrics:
        yield f'"{where}.metrics" must be a non-empty array'
        return
    for metric in metrics:
        if not isinstance(metric, dict) or not _is_text(metric.get("type")):
            yield f'"{where}.metrics.type" is required'
        elif metric.get("value") is None:
            yield f'"{where}.metrics.value" is required'


# --- its endpoints -----------------------------------------------------------------------------

_ID, _REV = r"(?P<repo_id>[^/]+(?:/[^/]+)?)", r"(?P<revision>[^/]+)"
_MODEL = f"/api/models/{_ID}"
_ROUTES = [
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("GET", f"{_MODEL}/revision/{_REV}", "info"),
    ("POST", f"{_MODEL}/branch/{_REV}", "branch"),
    ("POST", f"{_MODEL}/preupload/{_REV}", "preupload"),
    ("POST", f"{_MODEL}/commit/{_REV}", "commit"),
    ("GET", _MODEL, "info"),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/lfs-objects/(?P<sha256>[0-9a-f]{64})", "store"),
    ("POST", f"/lfs-verify/{_ID}", "verify"),
    ("GET", f"/{_ID}/resolve/{_REV}/(?P<path>.+)", "resolve"),
]
_LFS_TYPE = {"Content-Type": "application/vnd.git-lfs+json"}


class Api:
    """The endpoints, for one request."""

    def __init__(self, hub: Hub, headers: Any, query: dict[str, list[str]], body: bytes) -> None:
        self.hub, self.query, self.raw = hub, query, body
        scheme, _, token = headers.get("Authorization", "").partition(" ")
        self.token = token if scheme == "Bearer" else ""

    def call(self, method: str, path: str) -> tuple[int, Any, dict[str, str]]:
        for verb, pattern, name in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and (verb == method or (verb, method) == ("GET", "HEAD")):
                result = getattr(self, name)(
                    **{k: unquote(v) for k, v in found.groupdict().items()}
                )
                return result if isinstance(result, tuple) else (200, result, {})
        raise HubError(404, f"no such endpoint: {method} {path}")

    @property
    def body(self) -> Any:
        return json.loads(self.raw)

    def authorize(self, code: str = "") -> None:
        """Let only accepted tokens write."""
        if not self.token:
            raise HubError(401, "Invalid username or password.", code)
        if self.token not in self.hub.tokens:
            raise HubError(403, "You don't have the rights to write here")

    def repo(self, repo_id: str, write: bool = False) -> Repo:
        """Return a repository that the caller may see; others look missing."""
        found = self.hub.repos.get(repo_id)
        if found is None or (found.private and self.token not in self.hub.tokens):
            status = 404 if self.token else 401
            message = "Repository not found" if self.token else "Invalid username or password."
            raise HubError(status, message, "RepoNotFound")
        if write:
            # On https the client takes any 401 of a repository for a missing one; on http it
            # goes by the code.
            self.authorize("RepoNotFound")
        return found

    def create(self) -> Any:
        self.authorize()
        body = self.body
        repo_id = f"{body.get('organization') or self.hub.user}/{body['name']}"
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repos:
            return 409, {"error": "You already created this model repo", "url": url}, {}
        private = body.get("visibility") == "private" or bool(body.get("private"))
        self.hub.repos[repo_id] = Repo(repo_id, private)
        return {"url": url, "name": repo_id, "id": hashlib.sha1(url.encode()).hexdigest()[:24]}

    def validate(self) -> Any:
        errors, warnings = card_faults(self.body["content"])
        listed = {"errors": errors, "warnings": warnings}
        found = {name: [{"message": text} for text in texts] for name, texts in listed.items()}
        return (400, found | {"error": "\n".join(errors)}, {}) if errors else found

    def info(self, repo_id: str, revision: str = "main") -> Any:
        repo = self.repo(repo_id)
        return repo.info(repo.at(revision))

    def branch(self, repo_id: str, revision: str) -> Any:
        repo = self.repo(repo_id, write=True)
        if revision.startswith("refs/"):
            raise HubError(400, f"Invalid reference for a branch: {revision}")
        if revision in repo.heads:
            raise HubError(409, f"Reference already exists: refs/heads/{revision}")
        start = self.body.get("startingPoint") if self.raw else None
        repo.heads[revision] = repo.at(start or "main")
        return {}

    def preupload(self, repo_id: str, revision: str) -> Any:
        commit = self.repo(repo_id, write=True).at(revision)
        files = [self._mode(commit, asked) for asked in self.body["files"]]
        return {"files": files, "commitOid": commit.oid}

    def _mode(self, commit: Commit, asked: dict[str, Any]) -> dict[str, Any]:
        path = asked["path"]
        mode = "lfs" if self.hub.is_lfs(path, asked["size"]) else "regular"
        answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        return answer | ({"oid": commit.files[path].etag} if path in commit.files else {})

    def commit(self, repo_id: str, revision: str) -> Any:
        repo = self.repo(repo_id, write=True)
        lines = [json.loads(line) for line in self.raw.splitlines() if line.strip()]
        header = lines[0]["value"]
        if revision not in repo.heads:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        head = repo.heads[revision]
        if header.get("parentCommit") not in (None, head.oid):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines[1:]:
            self._apply(line["key"], line["value"], files)
        pull = {}
        if self.query.get("create_pr") == ["1"]:
            number = 1 + sum(name.startswith("refs/pr/") for name in repo.heads)
            revision = f"refs/pr/{number}"
            repo.heads[revision] = head
            url = f"{self.hub.url}/{repo_id}/discussions/{number}"
            pull = {"pullRequestUrl": url, "pullRequestNum": number}
        oid = repo.add(revision, header["summary"], files).oid
        answer = {"success": True, "commitOid": oid, "hookOutput": ""}
        return answer | {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}"} | pull

    def _apply(self, key: str, value: dict[str, Any], files: dict[str, File]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = File(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in self.hub.lfs:
                raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
            files[path] = File(self.hub.lfs[value["oid"]], lfs=True)
        else:
            raise HubError(400, f"unknown key of a commit: {key}")

    def batch(self, repo_id: str) -> Any:
        self.repo(repo_id, write=True)
        objects = []
        for wanted in self.body["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.lfs:
                upload = {"href": f"{self.hub.url}/lfs-objects/{wanted['oid']}", "header": {}}
                verify = {"href": f"{self.hub.url}/lfs-verify/{repo_id}", "header": {}}
                answer |= {"authenticated": True, "actions": {"upload": upload, "verify": verify}}
            objects.append(answer)
        return 200, {"transfer": "basic", "objects": objects}, _LFS_TYPE

    def store(self, sha256: str) -> Any:
        if hashlib.sha256(self.raw).hexdigest() != sha256:
            raise HubError(400, "the content's sha256 is another")
        self.hub.lfs[sha256] = self.raw
        return 200, b"", {}

    def verify(self, repo_id: str) -> Any:
        self.repo(repo_id, write=True)
        if len(self.hub.lfs.get(self.body["oid"], b"")) != self.body["size"]:
            raise HubError(404, "no such object")
        return {}

    def resolve(self, repo_id: str, revision: str, path: str) -> Any:
        repo = self.repo(repo_id)
        if repo.granted is not None and self.token not in repo.granted:
            status, who = (403, "you are not in the authorized list") if self.token else (401, "")
            raise HubError(status, f"Access to model {repo_id} is restricted. {who}", "GatedRepo")
        commit = repo.at(revision)
        file = commit.files.get(path)
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            headers["X-Linked-Etag"] = f'"{file.sha256}"'
            headers["X-Linked-Size"] = str(len(file.data))
        return 200, file.data, headers | {"Content-Type": "application/octet-stream"}


# --- the server --------------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    hub: Hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent about a client that went away, as after a cut."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # One packet per answer: header and body apart would wait for each other.
    wbufsize = -1
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *args: object) -> None:
        pass

    def answer(self) -> None:
        hub, (path, _, query) = self.server.hub, self.path.partition("?")
        if path == "/api/agent-harnesses":
            return self.reply(200, {"standardEnvVars": [], "harnesses": {}})
        with hub.lock:
            hub.requests.append((self.command, unquote(path)))
        cut = hub.due_cut(self.command, unquote(path))
        body = self.body(None if self.command == "GET" else cut)
        if body is None:
            self.close_connection = True
            return None
        try:
            with hub.lock:
                status, content, headers = Api(hub, self.headers, parse_qs(query), body).call(
                    self.command, path
                )
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)} | error.headers
            headers = {k.replace("_", "-"): v for k, v in headers.items() if v}
            status, content = error.status, {"error": str(error)}
        return self.reply(status, content, headers, cut if self.command == "GET" else None)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def body(self, cut: int | None) -> bytes | None:
        """Read the request's body, or up to `cut` bytes of it and return None."""
        length = int(self.headers.get("Content-Length", 0))
        if cut is not None:
            self.rfile.read(min(cut, length))
            return None
        body = self.rfile.read(length)
        return body if len(body) == length else None

    def reply(
        self,
        status: int,
        content: Any,
        headers: dict[str, str] | None = None,
        cut: int | None = None,
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content, default=str).encode()
        headers = {"Content-Type": _JSON} | (headers or {})
        ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, total = 0, len(data)
        if ranged and status == 200 and "ETag" in headers:
            start, stop = int(ranged[1]), min(int(ranged[2] or total), total - 1) + 1
            data, status = data[start:stop], 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{total}"
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if cut is not None and cut < start + len(data):
            data, self.close_connection = data[: max(cut - start, 0)], True
        if self.command != "HEAD":
            self.wfile.write(data)
