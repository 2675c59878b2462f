"""Task adapters: round trips, other hosts, bytes, mismatches, damage."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import NAMES, build, image, logits, perturb

from peft_vpt import (
    disable_prompts,
    inject_prompts,
    is_prompted,
    load_task_adapter,
    remove_prompts,
    save_task_adapter,
    trainable_parameters,
)
from peft_vpt.adapter.file import canonical, checksum
from peft_vpt.errors import AdapterError, AdapterMismatchError, NotPromptedError

VARIANTS: list[dict[str, Any]] = [
    {},
    {"deep": False},
    {"deep": False, "layers": (0, 2)},
    {"sharing": "inter", "project": 6},
    {"sharing": "intra"},
    {"sharing": "all"},
    {"train_prompts": False},
]


def trained(name: str, classes: int | None = 4, **options: Any) -> nn.Module:
    """Return a prompted tiny model whose prompts and head are not what injection gave."""
    if "model" in name:
        classes = None
    model = inject_prompts(build(name), 3, num_classes=classes, **options)
    with torch.no_grad():
        for parameter in (*model.prompts.parameters(), *trainable_parameters(model).values()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def out(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(9)
    return logits(model(image()))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_round_trip_onto_bare_and_prompted_models(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = trained(name, **options)
    path = save_task_adapter(model, tmp_path / "task", task="pets")
    assert path == tmp_path / "task" / "adapter.safetensors"
    for host in (
        build(name),
        trained(name, 9, deep=False, sharing="intra"),
        trained(name, **options),
    ):
        assert load_task_adapter(host, tmp_path / "task") is host
        assert torch.equal(out(host), out(model))
        assert host.prompts.spec == model.prompts.spec
        assert host.prompts.info["task"] == "pets"
        names = list(trainable_parameters(host))
        assert names == list(trainable_parameters(model))
        bare = build(name)
        assert torch.equal(out(remove_prompts(host)), out(bare))


def test_the_file_is_what_the_format_says(tmp_path: Path) -> None:
    model = trained("timm/cls", project=6)
    path = save_task_adapter(
        model, tmp_path / "a.safetensors", labels=["a", "b", "ü", "d"], metrics={"accuracy": 0.5}
    )
    tensors = load_file(path)
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {
        "prompts.0": (3, 6),
        "prompts.1": (3, 6),
        "prompts.2": (3, 6),
        "prompts.project.32.weight": (32, 6),
        "prompts.project.32.bias": (32,),
        "head.weight": (4, 32),
        "head.bias": (4,),
    }
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert list(metadata) == ["peft_vpt"]
    values = json.loads(metadata["peft_vpt"])
    assert metadata["peft_vpt"] == canonical(values)
    assert values["checksum"] == checksum(tensors, values)
    assert values["format_version"] == 1
    assert values["head"] == {
        "classes": 4,
        "labels": ["a", "b", "ü", "d"],
        "in_features": 32,
        "reads": "cls",
    }
    assert values["backbone"]["dims"] == [32]
    assert values["backbone"]["depth"] == 3
    assert len(values["backbone"]["fingerprint"]["blocks"][0]) == 9


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    first = save_task_adapter(trained("timm/cls"), tmp_path / "a").read_bytes()
    copy_of = load_task_adapter(build("timm/cls"), tmp_path / "a")
    assert save_task_adapter(copy_of, tmp_path / "b").read_bytes() == first
    assert save_task_adapter(trained("timm/cls"), tmp_path / "a").read_bytes() == first
    assert os.listdir(tmp_path / "a") == ["adapter.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files_keep_their_dtype_and_load_across_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = inject_prompts(build("timm/cls", dtype), 3)
    path = save_task_adapter(model, tmp_path)
    assert {t.dtype for t in load_file(path).values()} == {dtype}
    host = build("timm/cls", torch.float32)
    load_task_adapter(host, tmp_path)
    assert host.prompts.stored(0).dtype == torch.float32
    assert torch.equal(host.prompts.stored(0).to(dtype), model.prompts.stored(0))


def timm_to_transformers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {
        "vit.embeddings.cls_token": state["cls_token"],
        "vit.embeddings.position_embeddings": state["pos_embed"],
    }
    names = {
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
        "head": "classifier",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.o_proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        layer = ""
        if module.startswith("blocks."):
            _, index, module = module.split(".", 2)
            layer = f"vit.layers.{index}."
        if module == "attn.qkv":
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{layer}attention.{part}_proj.{kind}"] = rows
        elif module in names:
            renamed[f"{layer}{names[module]}.{kind}"] = value
    return renamed


@pytest.mark.parametrize("options", [{}, {"deep": False}, {"pooling": "image"}])
def test_adapters_load_across_timm_and_transformers(
    options: dict[str, Any], tmp_path: Path
) -> None:
    ours = trained("timm/cls", **options)
    theirs = build(
        "transformers/vit", layer_norm_eps=1e-6, num_attention_heads=2, intermediate_size=128
    )
    theirs.load_state_dict(timm_to_transformers(build("timm/cls").state_dict()))
    save_task_adapter(ours, tmp_path / "timm", labels=["w", "x", "y", "z"])
    load_task_adapter(theirs, tmp_path / "timm")
    # Other kernels for the same sums in float64.
    torch.testing.assert_close(out(theirs), out(ours), rtol=1e-9, atol=1e-10)
    assert theirs.config.id2label == {0: "w", 1: "x", 2: "y", 3: "z"}
    save_task_adapter(theirs, tmp_path / "back")
    back = load_task_adapter(build("timm/cls"), tmp_path / "back")
    assert torch.equal(out(back), out(ours))
    assert back.prompts.info["labels"] == ["w", "x", "y", "z"]


def test_a_head_of_another_kind_is_saved_and_loaded_by_its_class(tmp_path: Path) -> None:
    def model() -> nn.Module:
        vit = build("timm/cls")
        vit.head = nn.Sequential(nn.Linear(32, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
        return perturb(vit).eval()

    source = inject_prompts(model(), 2)
    with torch.no_grad():
        source.head[0].weight.mul_(2)
        source.head[1].running_mean.add_(1)
    path = save_task_adapter(source, tmp_path)
    assert "head.module.0.weight" in load_file(path)
    assert torch.equal(out(load_task_adapter(model(), tmp_path)), out(source))
    with pytest.raises(AdapterMismatchError, match="head is a Sequential"):
        load_task_adapter(build("timm/cls"), tmp_path)


def test_strict_prompts_keeps_the_head(tmp_path: Path) -> None:
    save_task_adapter(trained("timm/cls", 4), tmp_path)
    bare = build("timm/cls")
    head = bare.head
    load_task_adapter(bare, tmp_path, strict="prompts")
    assert bare.head is head
    other = trained("timm/cls", 7, deep=False)
    weight = other.head.weight.detach().clone()
    load_task_adapter(other, tmp_path, strict="prompts")
    assert torch.equal(other.head.weight, weight)
    assert torch.equal(other.prompts.stored(1), bare.prompts.stored(1))
    gap = build("timm/gap-with-cls")
    with pytest.raises(AdapterMismatchError, match="reads 'cls', this model has a head that reads"):
        load_task_adapter(gap, tmp_path, strict=False)
    load_task_adapter(gap, tmp_path, strict="prompts")


def test_wrapped_models_are_looked_through(tmp_path: Path) -> None:
    model = trained("timm/cls")
    wrapped = nn.DataParallel(model)
    save_task_adapter(wrapped, tmp_path)
    host = torch.compile(build("timm/cls"), backend="eager")
    assert load_task_adapter(host, tmp_path) is host
    assert is_prompted(host)
    with disable_prompts(host):
        pass


def edited(path: Path, target: Path, **changes: Any) -> Path:
    """Write a copy of an adapter with changed tensors or metadata, and a checksum that fits."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["peft_vpt"])
    for name, value in changes.pop("tensors", {}).items():
        if value is None:
            tensors.pop(name)
        else:
            tensors[name] = value
    for dotted, value in changes.pop("metadata", {}).items():
        *parents, last = dotted.split(".")
        at = metadata
        for parent in parents:
            at = at[parent]
        at[last] = value
    metadata["checksum"] = checksum(tensors, metadata)
    target.parent.mkdir(exist_ok=True)
    save_file(tensors, target, metadata={"peft_vpt": canonical(metadata)})
    return target


BAD_EDITS: list[tuple[dict[str, Any], str]] = [
    ({"metadata": {"format_version": 2}}, "has format version 2; this release reads version 1"),
    ({"metadata": {"format_version": True}}, "has format version True"),
    ({"metadata": {"spec": {"length": 3, "strange": 1}}}, "its prompt options are wrong"),
    ({"metadata": {"spec.length": 0}}, "must be an integer from 1 to 65536"),
    ({"metadata": {"spec.layers": [0, 1, 5]}}, "is outside the model"),
    ({"metadata": {"backbone": []}}, "metadata field 'backbone' is missing or of the wrong type"),
    (
        {"metadata": {"backbone.fingerprint": {"blocks": "x"}}},
        "metadata field 'backbone.fingerprint.dtype'",
    ),
    ({"metadata": {"head.labels": ["one"]}}, "classes, features and labels do not fit"),
    ({"metadata": {"head.classes": 9}}, "tensor head.weight has shape (4, 32)"),
    ({"tensors": {"prompts.1": None}}, "tensors missing: prompts.1"),
    ({"tensors": {"head.bias": None}}, "tensors missing: head.bias"),
    ({"tensors": {"prompts.7": torch.ones(3, 32)}}, "not expected: prompts.7"),
    ({"tensors": {"extra": torch.ones(1)}}, "not expected: extra"),
    ({"tensors": {"prompts.0": torch.ones(3, 31)}}, "tensor prompts.0 has shape (3, 31)"),
    ({"tensors": {"prompts.0": torch.ones(3, 32, dtype=torch.int32)}}, "not floating point"),
    ({"tensors": {"prompts.0": torch.full((3, 32), float("nan"))}}, "not finite"),
    ({"tensors": {"head.bias": torch.full((4,), float("inf"))}}, "not finite"),
]


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize(("edit", "message"), BAD_EDITS, ids=[m for _, m in BAD_EDITS])
def test_wrong_files_leave_the_model_alone(
    edit: dict[str, Any], message: str, tmp_path: Path, *, prompted: bool
) -> None:
    path = save_task_adapter(trained("timm/cls"), tmp_path)
    if any(t is not None and not t.is_floating_point() for t in edit.get("tensors", {}).values()):
        tensors = load_file(path) | edit["tensors"]
        with safe_open(path, framework="pt") as file:
            save_file(tensors, tmp_path / "bad.safetensors", metadata=file.metadata())
        bad = tmp_path / "bad.safetensors"
    else:
        bad = edited(path, tmp_path / "bad.safetensors", **edit)
    model = trained("timm/cls", 6, deep=False) if prompted else build("timm/cls")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(AdapterError) as caught:
        load_task_adapter(model, bad)
    assert message in str(caught.value)
    assert str(bad) in str(caught.value)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_damaged_files(tmp_path: Path) -> None:
    path = save_task_adapter(trained("timm/cls"), tmp_path)
    data = path.read_bytes()
    bad = tmp_path / "bad.safetensors"
    model = build("timm/cls")
    for size in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        bad.write_bytes(data[:size])
        with pytest.raises(AdapterError, match="not a readable safetensors file"):
            load_task_adapter(model, bad)
    bad.write_bytes(b"this is not a safetensors file at all")
    with pytest.raises(AdapterError, match="not a readable safetensors file"):
        load_task_adapter(model, bad)
    save_file({"x": torch.ones(1)}, bad, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="not a peft_vpt task adapter"):
        load_task_adapter(model, bad)
    save_file({"x": torch.ones(1)}, bad, metadata={"peft_vpt": "{" * 100_000})
    with pytest.raises(AdapterError, match="not canonical JSON"):
        load_task_adapter(model, bad)
    generator = torch.Generator().manual_seed(0)
    for position in torch.randint(len(data), (200,), generator=generator).tolist():
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        bad.write_bytes(flipped)
        with pytest.raises(AdapterError):
            load_task_adapter(model, bad)
    assert not is_prompted(model)


def test_missing_sources(tmp_path: Path) -> None:
    for source in (tmp_path / "none", "./none", "none.safetensors", tmp_path, "a/b/c", "justaname"):
        with pytest.raises(AdapterError, match="no such adapter"):
            load_task_adapter(build("timm/cls"), source)
    with pytest.raises(AdapterError, match="must be True, False or 'prompts'"):
        load_task_adapter(build("timm/cls"), tmp_path, strict="yes")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 64}, "dims [32], this model is"),
        ({"depth": 4}, "with depth 3, this model is"),
    ],
)
def test_another_shape_of_backbone(changes: dict[str, int], message: str, tmp_path: Path) -> None:
    save_task_adapter(trained("timm/cls"), tmp_path)
    for strict in (True, False, "prompts"):
        with pytest.raises(AdapterMismatchError) as caught:
            load_task_adapter(build("timm/cls", **changes), tmp_path, strict=strict)
        assert message in str(caught.value)


def test_another_backbone_of_the_same_shape(tmp_path: Path) -> None:
    source = trained("timm/cls")
    save_task_adapter(source, tmp_path)
    other = build("timm/cls", seed=1)
    with pytest.raises(AdapterMismatchError, match="this timm VisionTransformer has others"):
        load_task_adapter(other, tmp_path)
    assert not is_prompted(other)
    with pytest.warns(UserWarning, match="this timm VisionTransformer has others"):
        load_task_adapter(other, tmp_path, strict=False)
    assert torch.equal(other.prompts.stored(0), source.prompts.stored(0))


def test_a_meta_backbone_is_refused_or_gets_the_values_unverified(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    from timm.models.vision_transformer import VisionTransformer
    from zoo import BASE

    source = trained("timm/cls")
    save_task_adapter(source, tmp_path)
    model = VisionTransformer(**BASE, device="meta")
    with pytest.raises(AdapterMismatchError, match="meta device"):
        load_task_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match="meta device"):
        load_task_adapter(model, tmp_path, strict=False)
    backbone = {n: t for n, t in build("timm/cls").state_dict().items() if "head" not in n}
    model.load_state_dict(backbone, strict=False, assign=True)
    assert set(trainable_parameters(model)) == set(trainable_parameters(source))
    torch.testing.assert_close(out(model.double().eval()), out(source), rtol=1e-5, atol=1e-5)


def test_bad_saves(tmp_path: Path) -> None:
    with pytest.raises(
        NotPromptedError, match="save_task_adapter: VisionTransformer carries no prompts"
    ):
        save_task_adapter(build("timm/cls"), tmp_path)
    model = trained("timm/cls")
    with pytest.raises(AdapterError, match="3 names for a head of 4 classes"):
        save_task_adapter(model, tmp_path, labels=["a", "b", "c"])
    for metrics in ({"a": float("nan")}, {"a": {1, 2}}, {"a": torch.ones(1)}):
        with pytest.raises(AdapterError, match="plain, finite JSON"):
            save_task_adapter(model, tmp_path, metrics=metrics)
    (tmp_path / "file").write_text("x")
    with pytest.raises(AdapterError, match="cannot be written"):
        save_task_adapter(model, tmp_path / "file" / "below")
    with pytest.raises(AdapterError, match="cannot be written"):
        save_task_adapter(model, "/proc/nowhere")
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(AdapterError, match=r"tensor head\.bias holds values that are not finite"):
        save_task_adapter(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["file"]


def test_a_failing_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_task_adapter(trained("timm/cls"), tmp_path)
    old = path.read_bytes()
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *a: (_ for _ in ()).throw(OSError(28, "No space left")))
            with pytest.raises(AdapterError, match="No space left"):
                save_task_adapter(trained("timm/cls", 7), tmp_path)
        assert path.read_bytes() == old
        assert os.listdir(tmp_path) == ["adapter.safetensors"]


def test_a_load_that_does_not_fit_leaves_the_prompts_that_were_there(tmp_path: Path) -> None:
    save_task_adapter(trained("timm/cls", pooling="image"), tmp_path)
    for name in ("transformers/vit-model", "timm/distilled"):
        model = build(name)
        with pytest.raises(AdapterError):
            load_task_adapter(model, tmp_path)
        assert not is_prompted(model)
    host = trained("timm/gap-with-cls", 4, deep=False)
    before = out(host)
    with pytest.raises(AdapterMismatchError):
        load_task_adapter(host, tmp_path)
    assert torch.equal(out(host), before)
    load_task_adapter(host, tmp_path, strict="prompts")
    assert host.prompts.spec.pooling == "default"


def test_what_a_pooled_head_reads_tells_the_norm(tmp_path: Path) -> None:
    save_task_adapter(trained("timm/no-final-norm", pooling="cls"), tmp_path)
    with pytest.raises(AdapterMismatchError, match="its head reads 'cls:no-norm'"):
        load_task_adapter(build("timm/cls"), tmp_path)


def test_loading_sets_what_trains_and_the_labels_again(tmp_path: Path) -> None:
    first, second = (trained("transformers/vit", 2) for _ in range(2))
    save_task_adapter(first, tmp_path / "a", labels=["cat", "dog"])
    save_task_adapter(second, tmp_path / "b")
    model = build("transformers/vit")
    load_task_adapter(model, tmp_path / "a")
    names = list(trainable_parameters(model))
    assert model.config.id2label == {0: "cat", 1: "dog"}
    model.requires_grad_(True)
    load_task_adapter(model, tmp_path / "b")
    assert list(trainable_parameters(model)) == names
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    load_task_adapter(model, tmp_path / "a")
    save_task_adapter(trained("transformers/vit", 3, deep=False), tmp_path / "c")
    load_task_adapter(model, tmp_path / "c", strict="prompts")
    assert model.config.id2label == {0: "cat", 1: "dog"}
    state = torch.random.get_rng_state()
    load_task_adapter(build("transformers/vit"), tmp_path / "c")
    build("transformers/vit")
    load_task_adapter(model, tmp_path / "c")
    after = torch.random.get_rng_state()
    build("transformers/vit")
    assert torch.equal(after, torch.random.get_rng_state())
    assert state.shape == after.shape


def test_a_head_without_bias(tmp_path: Path) -> None:
    def model() -> nn.Module:
        vit = build("timm/cls")
        vit.head = nn.Linear(32, 3, bias=False).double()
        return vit

    source = inject_prompts(model(), 2)
    save_task_adapter(source, tmp_path)
    host = load_task_adapter(build("timm/cls"), tmp_path)
    assert host.head.bias is None
    assert torch.equal(out(host), out(source))
    assert torch.equal(out(remove_prompts(host)), out(build("timm/cls")))


def test_metadata_that_is_not_canonical(tmp_path: Path) -> None:
    path = save_task_adapter(trained("timm/cls"), tmp_path, metrics={"accuracy": 0.5})
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        text = file.metadata()["peft_vpt"]
    edits = (" " + text, text.replace("0.5", "NaN"), text.replace("0.5", "1e999"), "[]", '"x"')
    edits += (text.replace('"task":null', '"task":null,"task":null'), text.replace("0.5", "0.50"))
    edits += (re.sub(r'"norm":\[[^,]*', f'"norm":[{10**400}', text),)
    bad = tmp_path / "bad.safetensors"
    for edit in edits:
        assert edit != text
        save_file(tensors, bad, metadata={"peft_vpt": edit})
        with pytest.raises(AdapterError, match=re.escape(str(bad))):
            load_task_adapter(build("timm/cls"), bad)


def test_sources_and_targets_that_are_no_paths(tmp_path: Path) -> None:
    for source in (None, 3, b"x", "~no-such-user-here/x", "x" * 300, "a\0b"):
        with pytest.raises(AdapterError):
            load_task_adapter(build("timm/cls"), source)
    for target in ("~no-such-user-here/x", "a\0b"):
        with pytest.raises(AdapterError):
            save_task_adapter(trained("timm/cls"), target)
    with pytest.raises(AdapterError, match="must be True, False or 'prompts'"):
        load_task_adapter(build("timm/cls"), tmp_path, strict=0)
    with pytest.raises(AdapterError, match="give a list of names"):
        save_task_adapter(trained("timm/cls"), tmp_path, labels="abcd")


def test_a_head_trained_in_place_stays_when_only_prompts_are_loaded(tmp_path: Path) -> None:
    save_task_adapter(trained("timm/cls", 4), tmp_path)
    model = trained("timm/cls", None, deep=False)
    weight = model.head.weight.detach().clone()
    load_task_adapter(model, tmp_path, strict="prompts")
    assert torch.equal(model.head.weight, weight)
    assert torch.equal(out(remove_prompts(model)), out(build("timm/cls")))


def test_fixed_prompts_fix_their_projection() -> None:
    model = inject_prompts(build("timm/cls"), 2, project=4, train_prompts=False)
    assert list(trainable_parameters(model)) == ["head.weight", "head.bias"]


def test_classifier_of_several_layers_keeps_its_structure(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("crossvit_tiny_240", num_classes=3)
    save_task_adapter(inject_prompts(model, 2), tmp_path)
    other = timm.create_model("crossvit_tiny_240", num_classes=4).eval()
    keys = list(other.state_dict())
    with pytest.raises(AdapterMismatchError, match=r"reset_classifier\(3\)"):
        load_task_adapter(other, tmp_path, strict=False)
    assert list(other.state_dict()) == keys
    other.reset_classifier(3)
    with pytest.warns(UserWarning, match="fingerprint"):
        load_task_adapter(other, tmp_path, strict=False)
    assert torch.equal(other.head[1].weight, model.head[1].weight)
