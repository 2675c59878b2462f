"""Shared fixtures and settings: offline, on the CPU, on few threads."""

from __future__ import annotations

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# The models are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def mode() -> str:
    """How the loopback Hub keeps large files; a module may run over "regular" and "lfs"."""
    return "regular"


@pytest.fixture
def hub(mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A loopback Hub, with somebody logged in."""
    from support.hub_server import Hub, client

    with Hub(mode, {"hf_right"}) as server:
        client(server, monkeypatch, tmp_path / "cache", token="hf_right")
        yield server
