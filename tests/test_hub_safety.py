"""What a repository or a file out of the world can not make a user's machine do, or a card say."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.hub_server import Hub
from test_hub import HF_BASE, LABELS, REPO, TIMM_BASE, hf_vit, prompted, timm_vit
from test_hub import upload_backbone as upload
from torch import nn
from zoo import image, logits

from peft_vpt import inject_prompts, load_task_adapter, push_task_adapter, save_task_adapter
from peft_vpt.adapter.file import read_adapter, write_adapter
from peft_vpt.errors import AdapterError
from peft_vpt.hub import load_backbone_with_adapter
from peft_vpt.preprocessing import describe_preprocessing, image_processor, timm_transform

IMAGES = {
    "size": [32, 32], "mean": [0.5], "std": [0.5], "interpolation": "bicubic", "crop": None,
}  # fmt: skip


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_pickle_in_a_timm_repository_is_not_opened(hub: Hub, tmp_path: Path) -> None:
    model = timm_vit()
    upload(model, TIMM_BASE, tmp_path / "base")
    push_task_adapter(prompted(model), REPO)
    config = hub.files(TIMM_BASE)["config.json"]
    payload = pickle.dumps(Bomb(tmp_path / "opened"))
    hub.create("evil/weights", {"config.json": config, "pytorch_model.bin": payload})
    with pytest.raises(AdapterError, match=r"model\.safetensors"):
        load_backbone_with_adapter(REPO, backbone="evil/weights")
    assert not (tmp_path / "opened").exists()
    assert not any("pytorch_model.bin" in str(request) for request in hub.requests)


@pytest.mark.parametrize("named", ["", "part", "attribute"])
def test_a_pickle_in_a_transformers_repository_is_not_opened(
    named: str, hub: Hub, tmp_path: Path
) -> None:
    model = hf_vit()
    upload(model, HF_BASE, tmp_path / "base")
    push_task_adapter(prompted(model), REPO)
    payload = pickle.dumps(Bomb(tmp_path / "opened"))
    files = {"config.json": hub.files(HF_BASE)["config.json"], "pytorch_model.bin": payload}
    if named == "part":
        # An index of safetensors that names a pickle.
        index = {"metadata": {}, "weight_map": {"classifier.bias": "pytorch_model.bin"}}
        files["model.safetensors.index.json"] = json.dumps(index).encode()
    elif named == "attribute":
        config = json.loads(files["config.json"]) | {"transformers_weights": "pytorch_model.bin"}
        files["config.json"] = json.dumps(config).encode()
        files["model.safetensors"] = hub.files(HF_BASE)["model.safetensors"]
    hub.create("evil/weights", files)
    with pytest.raises(AdapterError, match=r"never opened; build the model yourself") as caught:
        load_backbone_with_adapter(REPO, backbone="evil/weights")
    assert "pytorch_model.bin" in str(caught.value)
    assert not (tmp_path / "opened").exists()
    assert not any("pytorch_model.bin" in str(request) for request in hub.requests)


def test_a_folder_of_transformers_is_a_backbone_too(tmp_path: Path) -> None:
    model = hf_vit()
    model.save_pretrained(tmp_path / "base")
    path = save_task_adapter(prompted(model), tmp_path / "a", preprocessing=IMAGES)
    again, _ = load_backbone_with_adapter(path, backbone=str(tmp_path / "base"))
    pixels = image(2, torch.float32, 32)
    assert torch.equal(logits(again(pixels)), logits(model(pixels)))
    weights = tmp_path / "base" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(AdapterError, match="no weights as safetensors"):
        load_backbone_with_adapter(path, backbone=str(tmp_path / "base"))


@pytest.mark.parametrize("count", [2, 4])
def test_means_that_no_rgb_image_has(count: int, tmp_path: Path) -> None:
    images = IMAGES | {"mean": [0.5] * count, "std": [0.5] * count}
    path = save_task_adapter(prompted(timm_vit()), tmp_path, preprocessing=images)
    # Before anything is asked of any Hub: none is there.
    with pytest.raises(AdapterError, match=f"{count} means and {count} stds, and an image is read"):
        load_backbone_with_adapter(path)
    for make in (timm_transform, image_processor):
        with pytest.raises(AdapterError, match="one for each of 3 channels"):
            make(images)


def test_one_mean_is_that_of_every_channel() -> None:
    one = {"size": [8, 8], "mean": [0.25], "std": [0.5], "crop": None}
    three = one | {"mean": [0.25] * 3, "std": [0.5] * 3}
    assert torch.equal(timm_transform(one)(photo()), timm_transform(three)(photo()))
    assert list(image_processor(one).image_mean) == [0.25] * 3


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_code_in_a_transformers_repository_is_not_run(
    file: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hf_vit()
    upload(model, HF_BASE, tmp_path / "base")
    push_task_adapter(prompted(model), REPO)
    values = json.loads(hub.files(HF_BASE)[file])
    kind = "AutoConfig" if file == "config.json" else "AutoImageProcessor"
    values["auto_map"] = {kind: "evil.Evil"}
    if file == "preprocessor_config.json":
        values["image_processor_type"] = "Evil"
    else:
        values["model_type"] = "evil"
    hub.swap(HF_BASE, file, json.dumps(values).encode())
    hub.swap(HF_BASE, "evil.py", f"open({str(tmp_path / 'ran')!r}, 'w')".encode())

    def ask(*args: Any) -> str:
        raise AssertionError("a person was asked")

    monkeypatch.setattr("builtins.input", ask)
    with pytest.raises(AdapterError):
        load_backbone_with_adapter(REPO, backbone=f"{HF_BASE}")
    assert not (tmp_path / "ran").exists()


def test_a_class_that_is_not_the_repositorys_is_not_built(hub: Hub, tmp_path: Path) -> None:
    model = hf_vit()
    upload(model, HF_BASE, tmp_path / "base")
    path = save_task_adapter(prompted(model), tmp_path / "a")
    adapter = read_adapter(path)
    backbone = adapter.metadata["backbone"] | {"architecture": "BertForSequenceClassification"}
    rest = {k: v for k, v in adapter.metadata.items() if k not in ("checksum", "format_version")}
    write_adapter(path, adapter.tensors, rest | {"backbone": backbone})
    with pytest.raises(AdapterError, match="holds a ViTConfig"):
        load_backbone_with_adapter(path)


def test_a_local_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hf_vit().save_pretrained("runs/best")
    model = type(hf_vit()).from_pretrained("runs/best")
    assert model.config._name_or_path == "runs/best"
    for name in ("runs/best", "C:\\models/vit", "runs/..", "a b/c", "me/<img src=x>"):
        model.config._name_or_path = name
        path = save_task_adapter(prompted(model) if not hasattr(model, "prompts") else model, "a")
        assert read_adapter(path).metadata["backbone"]["hub_id"] is None


HOSTILE = "</td><img src=x onerror=alert(1)>\\<b> [a](http://evil.example) `x` # h\n## Install"


def test_a_card_says_nothing_that_a_file_put_into_it(hub: Hub, tmp_path: Path) -> None:
    model = prompted(timm_vit())
    path = save_task_adapter(
        model, tmp_path, task=HOSTILE, labels=[HOSTILE, "# x", "ok"], metrics={HOSTILE: 0.5}
    )
    push_task_adapter(path, REPO)
    card = hub.files(REPO)["README.md"].decode()
    text = card.split("---\n", 2)[2]
    for mark in ("<img", "</td>", "](http://evil", "\n## Install", "\n# x"):
        assert mark not in text.replace("\\<", "").replace("\\]", "")
    adapter = read_adapter(path)
    rest = {k: v for k, v in adapter.metadata.items() if k not in ("checksum", "format_version")}
    for field, value in (
        ("library_version", "1\n\n## Install"),
        ("backbone", adapter.metadata["backbone"] | {"hub_id": "a/b](http://evil.example)"}),
        ("backbone", adapter.metadata["backbone"] | {"architecture": "<img src=x>"}),
        ("backbone", adapter.metadata["backbone"] | {"revision": "main)<b>"}),
    ):
        with pytest.raises(AdapterError, match=field.split("_")[0]):
            write_adapter(tmp_path / "x.safetensors", adapter.tensors, rest | {field: value})


def test_results_that_a_user_wrote_stay(hub: Hub) -> None:
    from huggingface_hub import ModelCard

    model = prompted(timm_vit())
    push_task_adapter(model, REPO, task="pets", metrics={"accuracy": 0.5}, datasets="lab/pets")
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    mine = {
        "task": {"type": "image-classification"},
        "dataset": {"type": "lab/dogs", "name": "dogs"},
        "metrics": [{"type": "f1", "value": 0.25}],
    }
    data = card.data.to_dict()
    data["model-index"][0]["results"].append(mine)
    data["base_model"] = [data["base_model"], "lab/other"]
    import yaml

    text = f"---\n{yaml.safe_dump(data)}---\n{card.text}"
    hub.swap(REPO, "README.md", text.encode())
    push_task_adapter(model, REPO, task="pets", metrics={"accuracy": 0.75})
    after = yaml.safe_load(hub.files(REPO)["README.md"].decode().split("---\n")[1])
    results = after["model-index"][0]["results"]
    values = {r["metrics"][0]["type"]: (r["metrics"][0]["value"], r["dataset"]) for r in results}
    assert values["f1"] == (0.25, {"type": "lab/dogs", "name": "dogs"})
    assert values["accuracy"] == (0.75, {"type": "lab/pets", "name": "pets"})
    assert after["base_model"] == [TIMM_BASE, "lab/other"]


@pytest.mark.parametrize("metadata", ["tags: [{a: b}]", "metrics: [{name: f1}]"])
def test_metadata_that_the_hub_refuses_is_named(metadata: str, hub: Hub) -> None:
    before = f"---\n{metadata}\n---\nhello\n".encode()
    hub.create(REPO, {"README.md": before})
    with pytest.raises(AdapterError, match=f'"{metadata.split(":")[0]}" must be text'):
        push_task_adapter(prompted(timm_vit()), REPO, metrics={"accuracy": 0.5})
    assert hub.files(REPO)["README.md"] == before
    assert "adapter.safetensors" not in hub.files(REPO)


def test_a_card_with_a_byte_order_mark(hub: Hub) -> None:
    hub.create(REPO, {"README.md": "\ufeff---\nlicense: mit\n---\nhello\n".encode()})
    push_task_adapter(prompted(timm_vit()), REPO, metrics={"accuracy": 0.5})
    text = hub.files(REPO)["README.md"].decode()
    assert "license: mit" in text.split("---\n")[1]
    assert "hello" in text


def test_what_is_wrong_here_leaves_no_repository_behind(hub: Hub, tmp_path: Path) -> None:
    model = prompted(timm_vit())
    for repo, options in (
        ("pets", {}), ("user/a b", {}), (None, {}),
        (REPO, {"task": "\ud800"}), (REPO, {"labels": "cat"}), (REPO, {"labels": [1, 2, 3]}),
        (REPO, {"preprocessing": {"input_size": (3, 8, 8)}}),
    ):  # fmt: skip
        for source in (model, save_task_adapter(model, tmp_path)):
            with pytest.raises(AdapterError, match=r"(push|save)_task_adapter"):
                push_task_adapter(source, repo, **options)
    assert not hub.requests
    assert not hub.repos


def test_tied_heads_are_saved(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=1, num_classes=3)
    model.head_dist.weight = model.head.weight
    save_task_adapter(inject_prompts(model, 2), tmp_path)
    tensors = read_adapter(tmp_path / "adapter.safetensors").tensors
    assert torch.equal(tensors["head.weight"], tensors["head_dist.weight"])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_wholly_quantized_timm_model_takes_an_adapter(tmp_path: Path) -> None:
    model = prompted(timm_vit())
    save_task_adapter(model, tmp_path)
    small = torch.ao.quantization.quantize_dynamic(timm_vit(), {nn.Linear}, dtype=torch.qint8)
    load_task_adapter(small, tmp_path)
    pixels = image(2, torch.float32, 160)
    with torch.no_grad():
        one, other = logits(model(pixels)), logits(small.eval()(pixels))
    # 8 bits move an output of this size by less than a tenth of its own spread.
    assert (one - other).abs().max() < 0.1 * one.std()
    save_task_adapter(small, tmp_path / "again")


def photo() -> Any:
    noise = np.random.default_rng(1).integers(0, 256, (12, 40, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((600, 200), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    "name",
    [
        "eva02_base_patch14_448.mim_in22k_ft_in22k",
        "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        "vit_base_patch16_siglip_512.webli",
    ],
)
def test_timm_preprocessing_comes_back(name: str) -> None:
    timm = pytest.importorskip("timm")
    config = timm.get_pretrained_cfg(name).to_dict()
    theirs = timm.data.create_transform(**timm.data.resolve_data_config({}, pretrained_cfg=config))
    found = describe_preprocessing(timm.data.resolve_data_config({}, pretrained_cfg=config))
    assert torch.equal(timm_transform(found)(photo()), theirs(photo()))


def test_processors_come_back_or_are_refused() -> None:
    transformers = pytest.importorskip("transformers")
    kept = [
        transformers.ViTImageProcessor(), transformers.CLIPImageProcessor(),
        transformers.ViTImageProcessor(do_normalize=False),
        transformers.BitImageProcessor(), transformers.SiglipImageProcessor(),
    ]  # fmt: skip
    for processor in kept:
        ours = image_processor(describe_preprocessing(processor))
        one, other = (
            p(images=photo(), return_tensors="pt")["pixel_values"] for p in (processor, ours)
        )
        # Two ways of resampling differ by a few grey levels at most.
        assert (one - other).abs().max() < 0.1
    refused = [
        transformers.ViTImageProcessor(do_rescale=False),
        transformers.ViTImageProcessor(rescale_factor=1 / 127.5),
        transformers.ViTImageProcessor(do_resize=False),
        transformers.ViTImageProcessor(resample=None),
        transformers.MobileViTImageProcessor(), transformers.EfficientNetImageProcessor(),
        transformers.LevitImageProcessor(), transformers.PoolFormerImageProcessor(),
    ]  # fmt: skip
    for processor in refused:
        with pytest.raises(AdapterError, match="preprocessing"):
            describe_preprocessing(processor)


def test_a_border_of_pixels_on_transformers_gets_images_that_fit(hub: Hub, tmp_path: Path) -> None:
    model = hf_vit()
    upload(model, HF_BASE, tmp_path / "base")
    inject_prompts(model, 4, location="pad", num_classes=3)
    push_task_adapter(model, REPO, labels=LABELS)
    again, processor = load_backbone_with_adapter(REPO)
    pixels = processor(images=photo(), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 24, 24)
    assert logits(again(pixels)).shape == (1, 3)
