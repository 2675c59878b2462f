"""Pushing and loading over HTTP, with the real client against a loopback Hub."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hub_server import Hub, client
from torch import nn
from zoo import image, logits, perturb

from peft_vpt import (
    inject_prompts,
    load_task_adapter,
    push_task_adapter,
    save_task_adapter,
    trainable_parameters,
)
from peft_vpt.adapter.file import read_adapter, write_adapter
from peft_vpt.errors import AdapterError, AdapterMismatchError, NotPromptedError
from peft_vpt.hub import build_backbone, load_backbone_with_adapter

TOKEN = "hf_right"
TIMM_BASE, HF_BASE = "timm/test_vit.r160_in1k", "lab/tiny-vit"
LABELS = ["cat", "dog", "owl"]
REPO = "user/pets"


@pytest.fixture(params=["regular", "lfs"])
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


def timm_vit(seed: int = 0) -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(seed)
    return perturb(timm.create_model("test_vit")).eval()


def hf_vit(seed: int = 0) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8,
    )  # fmt: skip
    return perturb(transformers.ViTForImageClassification(config)).eval()


def upload_backbone(model: nn.Module, repo: str, folder: Path) -> None:
    """Put a backbone on the loopback Hub in its library's own layout."""
    from huggingface_hub import HfApi

    if hasattr(model, "save_pretrained"):
        transformers = pytest.importorskip("transformers")
        model.save_pretrained(folder)
        processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
        processor.save_pretrained(folder)
        model.config._name_or_path = repo
    else:
        hub = pytest.importorskip("timm.models._hub")
        hub.save_for_hf(model, folder, safe_serialization=True)
    HfApi().create_repo(repo, exist_ok=True)
    HfApi().upload_folder(repo_id=repo, folder_path=folder)


def prompted(model: nn.Module, value: float = 0.0) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    inject_prompts(model, 4, num_classes=3, generator=generator)
    with torch.no_grad():
        model.prompts.get_parameter("0").add_(value)
    return model.eval()


def size_of(model: nn.Module) -> int:
    return 32 if hasattr(model, "config") else 160


def commits(hub: Hub, repo: str = REPO) -> int:
    return len(hub.commits(repo))


def test_push_and_load_from_another_cache(hub: Hub, tmp_path: Path) -> None:
    model = prompted(timm_vit())
    url = push_task_adapter(
        model, REPO, task="pets", labels=LABELS, metrics={"accuracy": 0.93}, commit_message="first"
    )
    assert url.startswith(f"{hub.url}/{REPO}/commit/")
    assert hub.commits(REPO)[-1].title == "first"
    assert set(hub.files(REPO)) >= {"adapter.safetensors", "config.json", "README.md"}
    rendered = json.loads(hub.files(REPO)["config.json"])
    assert rendered["head"]["labels"] == LABELS
    hub.requests.clear()
    other = load_task_adapter(timm_vit(), REPO, cache_dir=tmp_path / "other")
    pixels = image(2, torch.float32, 160)
    assert torch.equal(other.eval()(pixels), model(pixels))
    assert other.prompts.info["labels"] == LABELS
    asked = {path.rpartition("/")[2] for method, path in hub.requests if method == "GET"}
    assert asked == {"adapter.safetensors"}


def test_a_second_push_is_a_new_commit_and_the_old_one_stays(hub: Hub) -> None:
    model = prompted(timm_vit())
    first = push_task_adapter(model, REPO).rpartition("/")[2]
    before = model.prompts.get_parameter("0").detach().clone()
    with torch.no_grad():
        model.prompts.get_parameter("0").mul_(2.0)
    count = commits(hub)
    assert push_task_adapter(model, REPO).rpartition("/")[2] != first
    assert commits(hub) == count + 1
    assert torch.equal(load_task_adapter(timm_vit(), REPO).prompts.get_parameter("0"), 2 * before)
    old = load_task_adapter(timm_vit(), REPO, revision=first)
    assert torch.equal(old.prompts.get_parameter("0"), before)


def test_the_same_push_twice_makes_no_commit(hub: Hub) -> None:
    model = prompted(timm_vit())
    push_task_adapter(model, REPO)
    count = commits(hub)
    push_task_adapter(model, REPO)
    assert commits(hub) == count


def test_a_private_repository(hub: Hub, tmp_path: Path) -> None:
    push_task_adapter(prompted(timm_vit()), REPO, private=True)
    with pytest.raises(AdapterError, match="token") as caught:
        load_task_adapter(timm_vit(), REPO, token=False, cache_dir=tmp_path / "other")
    assert type(caught.value.__cause__).__name__ == "RepositoryNotFoundError"
    load_task_adapter(timm_vit(), REPO, token=TOKEN, cache_dir=tmp_path / "other")


@pytest.mark.parametrize(
    ("source", "options", "cause"),
    [
        ("user/nothing", {}, "RepositoryNotFoundError"),
        (REPO, {"revision": "nowhere"}, "RevisionNotFoundError"),
        ("user/empty", {}, "RemoteEntryNotFoundError"),
        ("user/gated", {}, "GatedRepoError"),
        (REPO, {"local_files_only": True}, "LocalEntryNotFoundError"),
    ],
)
def test_what_cannot_be_had(hub: Hub, source: str, options: dict[str, Any], cause: str) -> None:
    from huggingface_hub import HfApi

    push_task_adapter(prompted(timm_vit()), REPO)
    for name in ("user/empty", "user/gated"):
        HfApi().create_repo(name)
    hub.gate("user/gated")
    model = timm_vit()
    keys = list(model.state_dict())
    cache = {"cache_dir": hub.fresh_cache()} if options.get("local_files_only") else {}
    with pytest.raises(AdapterError, match=re.escape(source)) as caught:
        load_task_adapter(model, source, **options, **cache)
    assert type(caught.value.__cause__).__name__ == cause
    assert list(model.state_dict()) == keys


def test_offline_from_the_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = prompted(timm_vit())
    push_task_adapter(model, REPO)
    load_task_adapter(timm_vit(), REPO)
    client(hub, monkeypatch, tmp_path / "cache", token=TOKEN, offline=True)
    hub.requests.clear()
    load_task_adapter(timm_vit(), REPO)
    load_task_adapter(timm_vit(), REPO, local_files_only=True)
    with pytest.raises(AdapterError, match="HF_HUB_OFFLINE"):
        push_task_adapter(model, REPO)
    assert not hub.requests


def test_a_cut_upload_leaves_the_hub_as_it_was(hub: Hub) -> None:
    model = prompted(timm_vit())
    push_task_adapter(model, REPO)
    files, count = dict(hub.files(REPO)), commits(hub)
    with torch.no_grad():
        model.prompts.get_parameter("0").add_(1.0)
    # The client tries some requests again by itself.
    hub.cut("POST", "/commit/", 100, times=20)
    hub.cut("PUT", "", 100, times=20)
    with pytest.raises(AdapterError, match=REPO) as caught:
        push_task_adapter(model, REPO)
    assert caught.value.__cause__ is not None
    assert commits(hub) == count
    assert hub.files(REPO) == files
    hub.mend()
    push_task_adapter(model, REPO)
    assert commits(hub) == count + 1


def test_a_cut_download_is_not_taken_for_the_file(hub: Hub, tmp_path: Path) -> None:
    model = prompted(timm_vit())
    push_task_adapter(model, REPO)
    hub.cut("GET", "adapter.safetensors", 3000, times=50)
    bare = timm_vit()
    keys = list(bare.state_dict())
    with pytest.raises(AdapterError):
        load_task_adapter(bare, REPO, cache_dir=tmp_path / "other")
    assert list(bare.state_dict()) == keys
    with pytest.raises(AdapterError):
        load_task_adapter(bare, REPO, cache_dir=tmp_path / "other", local_files_only=True)
    hub.mend()
    load_task_adapter(bare, REPO, cache_dir=tmp_path / "other")
    pixels = image(1, torch.float32, 160)
    assert torch.equal(bare.eval()(pixels), model(pixels))


def test_a_file_swapped_for_another_backbones_is_refused(hub: Hub, tmp_path: Path) -> None:
    push_task_adapter(prompted(timm_vit()), REPO)
    other = save_task_adapter(prompted(timm_vit(seed=1)), tmp_path / "other")
    hub.swap(REPO, "adapter.safetensors", other.read_bytes())
    with pytest.raises(AdapterMismatchError, match="weights"):
        load_task_adapter(timm_vit(), REPO, cache_dir=tmp_path / "cache2")


def test_branches_and_pull_requests(hub: Hub) -> None:
    model = prompted(timm_vit())
    push_task_adapter(model, REPO)
    head = hub.commits(REPO)[-1]
    with torch.no_grad():
        model.prompts.get_parameter("0").add_(1.0)
    push_task_adapter(model, REPO, revision="trial")
    url = push_task_adapter(model, REPO, create_pr=True)
    assert "discussions" in url
    assert hub.commits(REPO)[-1] == head
    changed = load_task_adapter(timm_vit(), REPO, revision="trial").prompts.get_parameter("0")
    assert torch.equal(changed, model.prompts.get_parameter("0"))


def test_what_is_pushed_may_be_a_file(hub: Hub, tmp_path: Path) -> None:
    model = prompted(timm_vit())
    path = save_task_adapter(model, tmp_path / "pets", labels=LABELS)
    push_task_adapter(path, REPO)
    assert hub.files(REPO)["adapter.safetensors"] == path.read_bytes()
    before = path.read_bytes()
    push_task_adapter(path.parent, REPO, task="pets", base_model="lab/vit", labels=["a", "b", "c"])
    assert path.read_bytes() == before
    target = tmp_path / "got.safetensors"
    target.write_bytes(hub.files(REPO)["adapter.safetensors"])
    found = read_adapter(target).metadata
    assert (found["task"], found["backbone"]["hub_id"]) == ("pets", "lab/vit")
    assert found["head"]["labels"] == ["a", "b", "c"]


def test_bad_pushes_touch_no_hub(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(NotPromptedError):
        push_task_adapter(timm_vit(), REPO)
    with pytest.raises(AdapterError, match="no such adapter"):
        push_task_adapter(tmp_path / "nothing", REPO)
    assert not hub.requests
    with pytest.raises(AdapterError, match="owner/name"):
        push_task_adapter(prompted(timm_vit()), "user/a b")


@pytest.mark.parametrize("make", [timm_vit, hf_vit])
def test_backbone_and_adapter_by_one_name(
    make: Any, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    name = HF_BASE if make is hf_vit else TIMM_BASE
    upload_backbone(model, name, tmp_path / "base")
    prompted(model)
    push_task_adapter(model, REPO, labels=LABELS)
    again, preprocess = load_backbone_with_adapter(REPO)
    assert type(again) is type(model)
    pixels = image(2, torch.float32, size_of(model))
    assert torch.equal(logits(again(pixels)), logits(model(pixels)))
    assert again.prompts.info["labels"] == LABELS
    if make is hf_vit:
        assert again.config.id2label == dict(enumerate(LABELS))
        assert preprocess.size["height"] == 32
    else:
        from PIL import Image

        assert preprocess(Image.new("RGB", (50, 70))).shape == (3, 160, 160)
    client(hub, monkeypatch, tmp_path / "cache", token=TOKEN, offline=True)
    hub.requests.clear()
    load_backbone_with_adapter(REPO, local_files_only=True)
    assert not hub.requests


def test_a_backbone_that_moved_on_is_loaded_at_its_revision(hub: Hub, tmp_path: Path) -> None:
    upload_backbone(timm_vit(), TIMM_BASE, tmp_path / "base")
    # From the Hub, as a user would, so that the cache knows the commit.
    model = prompted(build_backbone("timm", TIMM_BASE))
    path = save_task_adapter(model, tmp_path / "pets")
    assert read_adapter(path).metadata["backbone"]["revision"] == hub.commits(TIMM_BASE)[-1].oid
    push_task_adapter(model, REPO)
    upload_backbone(timm_vit(seed=1), TIMM_BASE, tmp_path / "base2")
    shutil.rmtree(tmp_path / "cache")
    again, _ = load_backbone_with_adapter(REPO)
    pixels = image(1, torch.float32, 160)
    assert torch.equal(again(pixels), model(pixels))
    with pytest.raises(AdapterMismatchError):
        load_backbone_with_adapter(REPO, backbone=f"{TIMM_BASE}@main")


def test_no_backbone_named(tmp_path: Path) -> None:
    model = prompted(hf_vit())
    path = save_task_adapter(model, tmp_path)
    with pytest.raises(AdapterError, match="backbone="):
        load_backbone_with_adapter(path)


def test_a_border_for_images_of_another_size_than_the_backbones(hub: Hub, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    name = "timm/test_resnet.r160_in1k"
    torch.manual_seed(0)
    model = perturb(timm.create_model("test_resnet")).eval()
    upload_backbone(model, name, tmp_path / "backbone")
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 64, 64)}
    inject_prompts(model, 2, location="pad", num_classes=3)
    with torch.no_grad():
        model.prompts.pixel.tb.add_(0.5)
    images = {
        "size": [64, 64],
        "mean": [0.5],
        "std": [0.5],
        "interpolation": "bicubic",
        "crop": None,
    }
    save_task_adapter(model, tmp_path, preprocessing=images)
    loaded, _ = load_backbone_with_adapter(tmp_path, backbone=name)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(pixels), model.eval()(pixels))


def averaged(model: nn.Module) -> nn.Module:
    """Let a timm ViT's head read the mean of the image tokens, as no checkpoint of it does."""
    reset: Any = model.reset_classifier
    reset(3, global_pool="avg")
    return model


def levit() -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = {"embed_dim": (16, 32, 48), "key_dim": 8, "num_heads": (2, 2, 2), "depth": (1, 1, 1)}
    return perturb(timm.create_model("levit_128s", **sizes)).eval()


@pytest.mark.parametrize("kind", ["avg", "levit"])
def test_a_head_that_the_named_model_has_not_got(kind: str, hub: Hub, tmp_path: Path) -> None:
    model, name, size = timm_vit(), TIMM_BASE, 160
    if kind == "levit":
        model, name, size = levit(), "timm/levit_128s.tiny", 224
        model.pretrained_cfg = {**model.pretrained_cfg, "hf_hub_id": name}
    upload_backbone(model, name, tmp_path / "base")
    if kind == "levit":
        reset: Any = model.reset_classifier
        reset(3)
    inject_prompts(averaged(model) if kind == "avg" else model, 4)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.1)
    push_task_adapter(model.eval(), REPO, base_model=name)
    again, _ = load_backbone_with_adapter(REPO)
    pixels = image(2, torch.float32, size)
    assert torch.equal(again(pixels), model(pixels))
    # Prompts alone go with the head that the model is published with.
    bare, _ = load_backbone_with_adapter(REPO, strict="prompts")
    assert bare(pixels).shape[1] != 3


def test_a_head_of_no_model_by_that_name_is_told_on_a_push(hub: Hub, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    # A norm behind the pooling, in front of which the published weights have theirs.
    model = perturb(timm.create_model("test_vit", global_pool="avg", num_classes=3)).eval()
    assert isinstance(model.norm, nn.Identity)
    with pytest.warns(UserWarning, match="load_backbone_with_adapter, and the card's code, will"):
        push_task_adapter(inject_prompts(model, 2), REPO)


def test_a_file_that_tells_of_a_giant_head_takes_no_memory(hub: Hub, tmp_path: Path) -> None:
    model = levit()
    upload_backbone(model, "timm/levit_128s.tiny", tmp_path / "base")
    reset: Any = model.reset_classifier
    reset(3)
    adapter = read_adapter(save_task_adapter(inject_prompts(model, 2), tmp_path / "a"))
    rest = {k: v for k, v in adapter.metadata.items() if k not in ("checksum", "format_version")}
    head = adapter.metadata["head"] | {"classes": 2**31}
    path = write_adapter(tmp_path / "b.safetensors", adapter.tensors, rest | {"head": head})
    with pytest.raises(AdapterMismatchError, match="has 2147483648 classes"):
        load_backbone_with_adapter(path, backbone="timm/levit_128s.tiny")
