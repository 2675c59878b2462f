"""Protocols on further families and in the company of others: counts, libraries, loops."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from zoo import TinyFeatures, build, image, logits, perturb

from peft_vpt import (
    apply_protocol,
    count_parameters,
    load_task_adapter,
    save_task_adapter,
    trainable_parameters,
)
from peft_vpt.backbones.find import encoder_for
from peft_vpt.errors import AdapterMismatchError
from peft_vpt.protocols.delta import Delta
from peft_vpt.protocols.options import Protocol

SIZE: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2}
SIZE |= {"depth": 2, "num_classes": 5}
HF_SIZE: dict[str, Any] = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_labels": 5}
HF_SIZE |= {"num_attention_heads": 2, "num_hidden_layers": 2, "layer_norm_eps": 1e-6}


def timm_beit() -> nn.Module:
    beit = pytest.importorskip("timm.models.beit")
    torch.manual_seed(0)
    model = beit.Beit(**SIZE, init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True)
    return perturb(model).double().eval()


def timm_convnext() -> nn.Module:
    convnext = pytest.importorskip("timm.models.convnext")
    model = convnext.ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=5)
    return perturb(model).double().eval()


def hf_swin() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=64, embed_dim=16, depths=[1, 2], num_heads=[1, 2], window_size=4, num_labels=5
    )
    return perturb(transformers.SwinForImageClassification(config)).double().eval()


def hf_beit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BeitConfig(
        **HF_SIZE, intermediate_size=128, use_relative_position_bias=True, use_mask_token=True
    )
    return perturb(transformers.BeitForImageClassification(config)).double().eval()


def hf_dinov2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(**HF_SIZE)
    return perturb(transformers.Dinov2ForImageClassification(config)).double().eval()


MLP = {"mlp.fc1", "mlp.fc2"}
BEIT_LAYERS = {"norm1", "attn.proj", "norm2", *MLP}
CONVNEXT_STAGES = {0: (8, 1), 1: (16, 1), 2: (24, 2), 3: (32, 1)}
CONVNEXT_LAYERS = {"conv_dw", "norm", *MLP}
ATTENTION = {"attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"}


def with_leaves(layers: set[str], *leaves: str) -> set[str]:
    return {f"{layer}.{leaf}" for layer in layers for leaf in leaves or ("weight", "bias")}


BEIT_BLOCK = with_leaves(BEIT_LAYERS) | {
    "gamma_1", "gamma_2", "attn.q_bias", "attn.v_bias", "attn.qkv.weight",
    "attn.relative_position_bias_table",
}  # fmt: skip
BEIT_BIASES = with_leaves(BEIT_LAYERS, "bias") | {"attn.q_bias", "attn.v_bias"}
CONVNEXT_LAST = {f"stages.3.blocks.0.{n}" for n in with_leaves(CONVNEXT_LAYERS) | {"gamma"}}
CONVNEXT_LAST |= with_leaves({"stages.3.downsample.0", "stages.3.downsample.1", "head.norm"})
CONVNEXT_BIASES = {
    f"stages.{i}.blocks.{j}.{n}"
    for i, (_, depth) in CONVNEXT_STAGES.items()
    for j in range(depth)
    for n in with_leaves(CONVNEXT_LAYERS, "bias")
} | with_leaves(
    {"stem.0", "stem.1", "head.norm", *(f"stages.{i}.downsample.{j}" for i in (1, 2, 3)
     for j in (0, 1))}, "bias"
)  # fmt: skip
# By family and protocol: what trains beside the head, and how much that is.
EXPECTED: dict[tuple[str, str], tuple[set[str], int]] = {
    ("beit", "bias"): (
        {f"blocks.{i}.{n}" for i in (0, 1) for n in BEIT_BIASES}
        | {"patch_embed.proj.bias", "fc_norm.bias"},
        2 * 11 * 32 - 2 * 32 + 2 * 32,
    ),
    ("beit", "partial-1"): (
        {f"blocks.1.{n}" for n in BEIT_BLOCK} | with_leaves({"fc_norm"}),
        12 * 32**2 + 14 * 32 + (7 * 7 + 3) * 2 + 2 * 32,
    ),
    ("convnext", "bias"): (
        CONVNEXT_BIASES,
        sum(7 * w * n for w, n in CONVNEXT_STAGES.values())
        + 2 * 8 + (8 + 16) + (16 + 24) + (24 + 32) + 32,
    ),
    ("convnext", "partial-1"): (
        CONVNEXT_LAST,
        (2 * 24 + 4 * 24 * 32 + 32) + (8 * 32**2 + (49 + 1 + 2 + 4 + 1 + 1) * 32) + 2 * 32,
    ),
}  # fmt: skip
FAMILIES = {"beit": timm_beit, "convnext": timm_convnext}


@pytest.mark.parametrize(("name", "protocol"), EXPECTED)
def test_names_and_counts(name: str, protocol: str) -> None:
    names, count = EXPECTED[name, protocol]
    model = apply_protocol(FAMILIES[name](), protocol, num_classes=7)
    head = {n for n in trainable_parameters(model) if n.startswith(("head.weight", "head.bias"))}
    head |= {n for n in trainable_parameters(model) if n.startswith("head.fc.")}
    assert set(trainable_parameters(model)) - head == names
    assert count_parameters(model).trainable == count + 33 * 7


def test_names_and_counts_of_a_swin_of_transformers() -> None:
    model = apply_protocol(hf_swin(), "bias", num_classes=7)
    blocks = 11 * 16 + 2 * 11 * 32
    assert count_parameters(model).trainable == blocks + 16 + 16 + 4 * 16 + 32 + 33 * 7
    assert all(n.endswith("bias") or n == "classifier.weight" for n in trainable_parameters(model))
    model = apply_protocol(hf_swin(), "partial-1", num_classes=7)
    block = 12 * 32**2 + 13 * 32 + 7 * 7 * 2
    assert count_parameters(model).trainable == block + 2 * 32 + 33 * 7
    starts = ("swin.encoder.layers.1.blocks.1.", "swin.layernorm.", "classifier.")
    assert all(n.startswith(starts) for n in trainable_parameters(model))


def port(source: nn.Module, target: nn.Module) -> nn.Module:
    """Copy a whole backbone by the names of a file; equal outputs then say that they are right."""
    full = Protocol("full")
    models = (source, target)
    found = [Delta(full, m, encoder_for(m, "pad")).tensors(m) for m in models]
    assert {n: t.shape for n, t in found[0].items()} == {n: t.shape for n, t in found[1].items()}
    with torch.no_grad():
        for name, tensor in found[1].items():
            tensor.copy_(found[0][name])
    return target


def moved_a_little(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.1 * noise)
    return model


@pytest.mark.parametrize("protocol", ["full", "partial-1", "bias"])
def test_beit_crosses_from_timm_to_transformers_and_back(protocol: str, tmp_path: Path) -> None:
    theirs, x = port(timm_beit(), hf_beit()), image()
    ours = moved_a_little(apply_protocol(timm_beit(), protocol, num_classes=4))
    load_task_adapter(theirs, save_task_adapter(ours, tmp_path / "timm"))
    # Other kernels for the same sums in float64.
    torch.testing.assert_close(logits(theirs(x)), logits(ours(x)), rtol=1e-9, atol=1e-10)
    back = load_task_adapter(timm_beit(), save_task_adapter(theirs, tmp_path / "back"))
    assert torch.equal(logits(back(x)), logits(ours(x)))


def test_a_whole_dinov2_crosses_but_for_its_head(tmp_path: Path) -> None:
    """Its mask token is not trained and not in the file: timm's has none."""
    vit = pytest.importorskip("timm.models.vision_transformer")

    def make() -> nn.Module:
        torch.manual_seed(0)
        return perturb(vit.VisionTransformer(**SIZE, init_values=0.1)).double().eval()

    theirs, x = port(make(), hf_dinov2()), image()
    ours = moved_a_little(apply_protocol(make(), "full"))
    load_task_adapter(theirs, save_task_adapter(ours, tmp_path), strict="prompts")
    hidden = theirs.dinov2(x).last_hidden_state
    torch.testing.assert_close(hidden, ours.forward_features(x), rtol=1e-9, atol=1e-10)
    assert not theirs.dinov2.embeddings.mask_token.requires_grad


def test_a_token_that_only_a_path_names_stays_in_its_library(tmp_path: Path) -> None:
    path = save_task_adapter(apply_protocol(build("timm/distilled"), "full"), tmp_path)
    model = build("transformers/deit-distilled", intermediate_size=128)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    message = r"not expected: delta\.path\.dist_token\..* loads into timm models alone"
    with pytest.raises(AdapterMismatchError, match=message):
        load_task_adapter(model, path, strict=False)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def applied(protocol: str, name: str = "timm/cls", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    if protocol == "sidetune":
        options["features"] = TinyFeatures()
    generator = torch.Generator().manual_seed(0)
    model = build(name, torch.float32)
    return apply_protocol(model, protocol, num_classes=4, generator=generator, **options)


@pytest.mark.parametrize("protocol", ["adapter", "sidetune"])
def test_protocols_compile(protocol: str) -> None:
    model, x = moved_a_little(applied(protocol)), image(dtype=torch.float32)
    torch._dynamo.reset()
    # The side network keeps the pixels per thread, which breaks the graph.
    compiled = torch.compile(model, backend="eager", fullgraph=protocol == "adapter")
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("protocol", ["adapter", "sidetune", "mlp-2", "bias", "partial-1"])
def test_protocols_train_under_autocast(protocol: str) -> None:
    model = moved_a_little(applied(protocol)).train()
    x = image(4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    for name, parameter in trainable_parameters(model).items():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    group = torch.distributed
    group.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    group.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("protocol", "name"),
    [
        ("adapter", "timm/cls"),
        ("sidetune", "timm/cls"),
        ("bias", "transformers/vit"),
        ("partial-1", "timm/cls"),
        ("full", "transformers/dinov2"),
    ],
)
def test_every_trained_weight_gets_a_gradient_under_ddp(protocol: str, name: str) -> None:
    grads = []
    for wrap in (lambda m: m, nn.parallel.DistributedDataParallel):
        model = moved_a_little(applied(protocol, name)).train()
        run = wrap(model)
        for seed in (0, 1):
            # The second forward raises where a weight of the first one got no gradient.
            logits(run(image(4, torch.float32, seed=seed))).square().sum().backward()
        grads.append({n: p.grad for n, p in trainable_parameters(model).items()})
    assert all(grad is not None for grad in grads[0].values())
    assert all(torch.equal(grads[1][n], grad) for n, grad in grads[0].items())
