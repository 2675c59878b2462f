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

import json
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

from support.hub_api import Api
from support.hub_client import client
from support.hub_store import Commit, File, HubError, Repo

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
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while (size := int(self.rfile.readline().split(b";")[0], 16)) > 0:
                body += self.rfile.read(size)
                self.rfile.readline()
                if cut is not None and len(body) >= cut:
                    return None
            self.rfile.readline()
            return None if cut is not None else body
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
