"""The loopback Hub behaves as a Hub to the real client, so that tests may trust it."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import httpx2
import pytest
import torch
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    hf_hub_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from support.hub_server import Hub, client

TOKEN, REPO = "hf_right", "user/pets"
WEIGHTS = bytes(range(256)) * 4096
FILES = {
    "adapter.safetensors": WEIGHTS,
    "config.json": b'{"a": 1}',
    "README.md": b"---\nlicense: mit\n---\n# Pets\n",
    "empty.safetensors": b"",
}


@pytest.fixture(params=["regular", "lfs"])
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


def commit(
    files: dict[str, bytes],
    revision: str | None = None,
    title: str = "t",
) -> str:
    """Commit to REPO; return the id."""
    added = [CommitOperationAdd(path, data) for path, data in files.items()]
    return HfApi().create_commit(REPO, added, commit_message=title, revision=revision).oid


def get(path: str, **kw: object) -> bytes:
    return Path(hf_hub_download(REPO, path, **kw)).read_bytes()  # type: ignore[arg-type]


def test_several_files_in_one_commit_come_back_byte_equal(hub: Hub) -> None:
    url = HfApi().create_repo(REPO)
    assert url == f"{hub.url}/{REPO}"
    oid = commit(FILES, title="all of it")
    assert [c.title for c in hub.commits(REPO)] == ["initial commit", "all of it"]
    assert hub.commits(REPO)[-1].oid == oid
    assert {path: get(path) for path in FILES} == FILES
    assert {path: data for path, data in hub.files(REPO).items() if path in FILES} == FILES
    stored = hub.repos[REPO].at("main").files
    assert [p for p in stored if stored[p].lfs] == ["adapter.safetensors"] * (hub.mode == "lfs")
    assert any(method == "PUT" for method, _ in hub.requests) == (hub.mode == "lfs")
    listed = {sibling.rfilename for sibling in HfApi().model_info(REPO).siblings or ()}
    assert listed == {*FILES, ".gitattributes"}


def test_revisions(hub: Hub) -> None:
    HfApi().create_repo(REPO)
    old = commit({"adapter.safetensors": b"old"})
    HfApi().create_branch(REPO, branch="side/one")
    commit({"adapter.safetensors": b"side"}, revision="side/one")
    commit({"adapter.safetensors": b"new"})
    found = {rev: get("adapter.safetensors", revision=rev) for rev in ("main", "side/one", old)}
    assert found == {"main": b"new", "side/one": b"side", old: b"old"}
    with pytest.raises(HfHubHTTPError, match="409"):
        HfApi().create_branch(REPO, branch="side/one")
    assert HfApi().model_info(REPO, revision=old).sha == old


def test_what_is_missing(hub: Hub) -> None:
    hub.create(REPO, {"a.txt": b"a"})
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("user/nothing", "a.txt")
    with pytest.raises(RevisionNotFoundError):
        get("a.txt", revision="nowhere")
    with pytest.raises(RemoteEntryNotFoundError):
        get("b.txt")
    with pytest.raises(RevisionNotFoundError):
        commit({"a.txt": b"b"}, revision="nowhere")
    assert HfApi().file_exists(REPO, "a.txt")
    assert not HfApi().file_exists(REPO, "b.txt")


def test_a_commit_behind_another_is_refused(hub: Hub) -> None:
    hub.create(REPO, {"a.txt": b"a"})
    first = hub.commits(REPO)[0].oid
    with pytest.raises(HfHubHTTPError, match="412"):
        HfApi().create_commit(
            REPO, [CommitOperationAdd("d", b"d")], commit_message="late", parent_commit=first
        )
    assert HfApi().repo_exists(REPO)


def test_tokens(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    HfApi().create_repo(REPO, private=True)
    commit({"a.txt": b"a"})
    hub.create("user/open", {"a.txt": b"a"})
    hub.create("user/gated", {"a.txt": b"a"})
    hub.gate("user/gated", granted={"hf_friend"})
    for token in (False, "hf_wrong"):
        with pytest.raises(RepositoryNotFoundError):
            get("a.txt", token=token)
        with pytest.raises(HfHubHTTPError, match=r"40[13]"):
            HfApi(token=token).create_repo("user/mine")
        with pytest.raises(HfHubHTTPError, match=r"40[13]"):
            HfApi(token=token).upload_file(
                repo_id="user/open", path_in_repo="b", path_or_fileobj=b"b"
            )
    for token in (False, TOKEN):
        with pytest.raises(GatedRepoError):
            hf_hub_download("user/gated", "a.txt", token=token)
    hf_hub_download("user/gated", "a.txt", token="hf_friend")
    assert get("a.txt") == b"a"
    client(hub, monkeypatch, tmp_path / "logged-out")
    with pytest.raises(RepositoryNotFoundError):
        get("a.txt")
    hf_hub_download("user/open", "a.txt")


# The client keeps whole chunks only: below one of them it starts again, above it resumes.
@pytest.mark.parametrize("chunk", [10_000, 10_000_000])
def test_a_cut_download_is_tried_again_and_leaves_nothing_valid(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", chunk)
    hub.create(REPO, {"adapter.safetensors": WEIGHTS})
    hub.cut("GET", "adapter.safetensors", 70_000, times=50)
    with pytest.raises(httpx2.RemoteProtocolError):
        get("adapter.safetensors")
    with pytest.raises(LocalEntryNotFoundError):
        get("adapter.safetensors", local_files_only=True)
    hub.mend()
    hub.requests.clear()
    hub.cut("GET", "adapter.safetensors", 90_000)
    assert get("adapter.safetensors") == WEIGHTS
    assert [method for method, _ in hub.requests] == ["HEAD", "GET", "GET"]


# Two routes carry file content: the commit itself, and in lfs mode a PUT before it.
@pytest.mark.parametrize("after", [0, 1000, 10**9])
def test_a_cut_upload_leaves_no_commit(hub: Hub, after: int) -> None:
    HfApi().create_repo(REPO)
    route = ("PUT", "/lfs-objects/") if hub.mode == "lfs" else ("POST", "/commit/")
    hub.cut(*route, after, times=50)
    # In lfs mode the client wraps it.
    with pytest.raises((httpx2.TransportError, RuntimeError)):
        commit(FILES)
    assert len(hub.commits(REPO)) == 1
    assert not hub.lfs
    hub.mend()
    commit(FILES)
    assert hub.files(REPO)["adapter.safetensors"] == WEIGHTS


@pytest.mark.parametrize(
    ("front", "says"),
    [
        ("license: [", "YAML"),
        ("- a\n- b", "mapping"),
        ("license: Apache License", "license"),
        ("tags: pets", "tags"),
        ("base_model: ''", "base_model"),
        ("base_model: a/b\nbase_model_relation: child", "base_model_relation"),
        ("model-index:\n- results: []", "name"),
        ("model-index:\n- name: a\n  results:\n  - task: {type: x}", "dataset"),
    ],
)
def test_cards_with_wrong_metadata_are_refused(hub: Hub, front: str, says: str) -> None:
    hub.create(REPO)
    text = f"---\n{front}\n---\n# Pets\n"
    with pytest.raises(ValueError, match=says):
        commit({"README.md": text.encode()})
    assert len(hub.commits(REPO)) == 1


def test_a_card_of_the_client_is_taken(hub: Hub) -> None:
    data = ModelCardData(
        base_model="lab/vit", base_model_relation="adapter", license="apache-2.0",
        library_name="peft-vpt", tags=["vpt"], pipeline_tag="image-classification",
    )  # fmt: skip
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n# Pets\n")
    card.validate()
    hub.create(REPO)
    card.push_to_hub(REPO)
    assert ModelCard.load(REPO).data.base_model_relation == "adapter"
    assert HfApi().model_info(REPO).library_name == "peft-vpt"
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        commit({"README.md": b"# No metadata\n"})


def test_timm_and_transformers(hub: Hub, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    transformers = pytest.importorskip("transformers")
    small = timm.create_model("test_vit")
    timm.models.push_to_hf_hub(small, "timm/tiny", private=True)
    again = timm.create_model("hf-hub:timm/tiny", pretrained=True)
    assert torch.equal(again.blocks[0].attn.qkv.weight, small.blocks[0].attn.qkv.weight)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=32, patch_size=16,
    )  # fmt: skip
    model = transformers.ViTModel(config)
    model.push_to_hub("lab/tiny")
    loaded = transformers.AutoModel.from_pretrained("lab/tiny")
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    hub.requests.clear()
    loaded = transformers.AutoModel.from_pretrained("lab/tiny", local_files_only=True)
    assert hub.requests == []


def test_a_process_started_by_the_test_reaches_the_same_hub(hub: Hub) -> None:
    hub.create(REPO, {"a.txt": b"from there"}, private=True)
    code = f"import huggingface_hub as h; print(open(h.hf_hub_download('{REPO}', 'a.txt')).read())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "from there"
    assert get("a.txt", local_files_only=True) == b"from there"


def test_no_other_host_can_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = Hub()
    client(server, monkeypatch, tmp_path / "cache")
    # An address that is nobody's by its standard, in case the guard fails.
    with pytest.raises(OSError, match="must not reach"):
        socket.create_connection(("192.0.2.1", 80), timeout=0.1)
    with socket.socket() as plain, pytest.raises(OSError, match="must not reach"):
        plain.connect(("192.0.2.1", 80))
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen("http://nobody.invalid", timeout=0.1)
    assert server.strays == ["192.0.2.1"] * 2
    with pytest.raises(AssertionError, match="other hosts"):
        server.__exit__(None)


def test_everything_is_undone_after_the_test(tmp_path: Path) -> None:
    before = (constants.ENDPOINT, constants.HF_HUB_OFFLINE, socket.getaddrinfo, HfApi().endpoint)
    with pytest.MonkeyPatch.context() as patch, Hub() as server:
        client(server, patch, tmp_path / "cache")
        assert HfApi().endpoint == constants.ENDPOINT == server.url
    after = (constants.ENDPOINT, constants.HF_HUB_OFFLINE, socket.getaddrinfo, HfApi().endpoint)
    assert after == before
    assert "connect" not in vars(socket.socket)


def test_the_client_writes_nothing_outside_its_folders(hub: Hub, tmp_path: Path) -> None:
    hub.create(REPO, FILES)
    get("adapter.safetensors")
    assert {p.name for p in tmp_path.iterdir()} <= {"cache", "cache-home"}
    shutil.rmtree(tmp_path / "cache")
    get("adapter.safetensors")
    fresh = hub.fresh_cache()
    get("adapter.safetensors", cache_dir=fresh)
    hub.close()
    assert not fresh.exists()
