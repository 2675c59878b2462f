"""The real Hub client of this process, pointed at a loopback Hub."""

from __future__ import annotations

import errno
import importlib
import socket
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from support.hub_server import Hub

# The discard port: nothing listens there.
_DEAD = "http://127.0.0.1:9"
_LOCAL = ("127.0.0.1", "::1", "localhost", "")


def client(
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
    token: str | None = None,
    offline: bool = False,
) -> None:
    """Point huggingface_hub, timm and transformers at a loopback Hub until the test ends.

    Args:
        hub: The server.
        monkeypatch: Undoes everything.
        cache: Folder of the Hub cache. A sibling `<name>-home` takes what else the client writes.
        token: The token of who is logged in; None: nobody.
        offline: Whether HF_HUB_OFFLINE is on.
    """
    home = cache.with_name(f"{cache.name}-home")
    # First, as an import that sees the new environment would keep it after the test.
    _constants(monkeypatch, hub.url, cache, home, offline)
    _environment(monkeypatch, hub.url, cache, home, token, offline)
    _no_other_host(monkeypatch, hub)
    _no_waiting(monkeypatch)
    _forget_shared_api()
    hub.on_close(_forget_shared_api)
    from huggingface_hub.utils import _http

    # A new connection pool, so that no setting of an earlier one is kept.
    session = _http.default_client_factory()
    monkeypatch.setattr(_http, "_GLOBAL_CLIENT", session)
    # Through close_session where it is in use: a later call then opens a new one.
    hub.on_close(
        lambda: _http.close_session() if _http._GLOBAL_CLIENT is session else session.close()
    )


def _environment(
    monkeypatch: pytest.MonkeyPatch,
    url: str,
    cache: Path,
    home: Path,
    token: str | None,
    offline: bool,
) -> None:
    """Set what processes started by the test go by, and what is read at each call."""
    values = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "DISABLE_SAFETENSORS_CONVERSION": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        values |= {name: _DEAD, name.lower(): _DEAD}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    for name in ("HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)


def _constants(
    monkeypatch: pytest.MonkeyPatch, url: str, cache: Path, home: Path, offline: bool
) -> None:
    """Set what the client read from the environment when it was imported."""
    for name in ("_cache_assets", "_cache_manager", "_git_credential", "tqdm"):
        importlib.import_module(f"huggingface_hub.utils.{name}")
    from huggingface_hub import constants, hf_api

    values = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": offline,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(cache),
        "HUGGINGFACE_HUB_CACHE": str(cache),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_XET_CACHE": str(home / "xet"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(home / ".agent_harnesses.json"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value, raising=False)
    # Some modules hold copies, by `from .constants import NAME`.
    for module in [m for name, m in sys.modules.items() if name.startswith("huggingface_hub.")]:
        for name, value in values.items():
            if module is not constants and name in vars(module):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", url)
    detect = sys.modules.get("huggingface_hub.utils._detect_agent")
    if detect is not None:
        monkeypatch.setattr(detect, "_registry", {"standardEnvVars": [], "harnesses": {}})


def _forget_shared_api() -> None:
    """Let transformers build its shared HfApi again: it keeps the address of the first use."""
    shared = sys.modules.get("transformers.utils.hub")
    if shared is not None:
        shared._hf_api = None  # type: ignore[attr-defined]


def _no_other_host(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    """Let this process reach loopback addresses only; note any other try in `hub.strays`."""

    def refuse(host: object) -> None:
        hub.strays.append(str(host))
        raise OSError(errno.ENETUNREACH, f"a test must not reach {host}")

    def guarded(original: Any) -> Any:
        def connect(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in _LOCAL:
                refuse(address[0])
            return original(self, address)

        return connect

    lookup = getattr(socket.getaddrinfo, "unguarded", socket.getaddrinfo)

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name is not None and name not in _LOCAL:
            refuse(name)
        return lookup(host, *args, **kwargs)

    getaddrinfo.unguarded = lookup  # type: ignore[attr-defined]
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guarded(getattr(socket._socket.socket, name)))


def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drop the client's waits between retries."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    for module in (file_download, _http):
        clock = types.SimpleNamespace(**vars(module.time))
        clock.sleep = lambda seconds: None
        monkeypatch.setattr(module, "time", clock)
