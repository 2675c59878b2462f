"""Where protocols have a place: refusals that change nothing, layers as they run, what trains."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import build, image, logits, perturb

from peft_vpt import (
    apply_protocol,
    load_task_adapter,
    remove_prompts,
    save_task_adapter,
    trainable_parameters,
)
from peft_vpt.backbones.find import encoder_for, is_convnet
from peft_vpt.errors import SpecError, UnsupportedArchitectureError, VPTError
from peft_vpt.protocols.delta import Delta


def small_timm(name: str) -> tuple[nn.Module, Tensor]:
    """Build a small relative of a timm architecture and an image for it."""
    pytest.importorskip("timm")
    from matrix.small_timm import build as build_small

    torch.manual_seed(0)
    model, size = build_small(name)
    return perturb(model), torch.randn(2, *size)


def glpn() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GLPNConfig(
        hidden_sizes=[8, 16, 32, 32], depths=[1, 1, 1, 2], num_attention_heads=[1, 1, 1, 1],
        decoder_hidden_size=8,
    )  # fmt: skip
    found: nn.Module = transformers.GLPNModel(config)
    return found


def maskformer() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    stages: dict[str, Any] = {"depths": [1, 1, 1, 1]}
    config = transformers.MaskFormerConfig(
        backbone_config=transformers.SwinConfig(
            **stages, image_size=64, embed_dim=8, num_heads=[1, 1, 1, 1], window_size=2,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        decoder_config=transformers.DetrConfig(
            d_model=32, decoder_layers=1, encoder_layers=1, decoder_ffn_dim=32,
            decoder_attention_heads=1, encoder_attention_heads=1, use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone_config=transformers.ResNetConfig(
                **stages, hidden_sizes=[8, 8, 8, 8], embedding_size=8
            ),
        ),
        fpn_feature_size=32, mask_feature_size=32,
    )  # fmt: skip
    found: nn.Module = transformers.MaskFormerModel(config)
    return found


def everything(model: nn.Module) -> list[Any]:
    """Return what must be as before: modules, flags, hooks, modes, attributes, values."""
    found: list[Any] = [
        [(n, id(m), m.training, sorted(vars(m))) for n, m in model.named_modules()],
        [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        [v for m in model.modules() for v in vars(m).values() if isinstance(v, int | str)],
    ]
    return [*found, [t.clone() for t in model.state_dict().values()]]


def same(before: list[Any], after: list[Any]) -> bool:
    values = zip(before[-1], after[-1], strict=True)
    return before[:-1] == after[:-1] and all(torch.equal(a, b) for a, b in values)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("xcit_tiny_12_p8_224", "channel attention"),
        ("edgenext_xx_small", "channel attention"),
        ("coat_lite_tiny", "linear attention"),
        ("mixer_s32_224", "no softmax attention"),
        ("maskformer", "several encoders|encoder-decoder"),
    ],
)
@pytest.mark.parametrize("protocol", ["vpt-deep", "vpt-shallow", "vpt+bias"])
def test_only_a_convnet_gets_a_border_unasked(name: str, why: str, protocol: str) -> None:
    model = maskformer() if name == "maskformer" else small_timm(name)[0]
    before = everything(model)
    with pytest.raises(UnsupportedArchitectureError, match=why):
        apply_protocol(model, protocol, length=2)
    assert same(before, everything(model))


@pytest.mark.parametrize(
    ("name", "convnet"),
    [("convnext_atto", True), ("resnet10t", True), ("efficientvit_b0", False), ("vgg11", True)],
)
def test_what_a_convnet_is(name: str, convnet: bool) -> None:
    model = small_timm(name)[0]
    assert is_convnet(model, encoder_for(model, "pad")) == convnet


@pytest.mark.parametrize(
    "name", ["hiera_tiny_224", "hieradet_small", "mvitv2_tiny", "coatnet_0_224", "pvt_v2_b0"]
)
def test_adapters_stand_behind_layers_that_change_width_or_give_maps(name: str) -> None:
    model, x = small_timm(name)
    with torch.no_grad():
        bare = model(x)
    apply_protocol(model, "adapter", reduction=4)
    with torch.no_grad():
        assert torch.equal(model(x), bare)
    model.train()
    model(x).square().sum().backward()
    parts = model.prompts.delta.adapters
    assert len(parts) == model.prompts.encoder.depth
    assert all(part.up.weight.grad.abs().sum() > 0 for part in parts.values())


@pytest.mark.parametrize("name", ["caformer_s18", "davit_tiny", "efficientformer_l1"])
def test_adapters_behind_some_of_the_layers_are_refused(name: str) -> None:
    model = small_timm(name)[0]
    before = everything(model)
    with pytest.raises(UnsupportedArchitectureError, match="other blocks than those with attent"):
        apply_protocol(model, "adapter")
    assert same(before, everything(model))


class Apart(nn.Module):
    """A feed-forward layer whose parts the block uses itself."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.fc1, self.fc2 = mlp.fc1, mlp.fc2


def test_a_feed_forward_layer_that_is_never_called_takes_no_adapter() -> None:
    model = build("timm/cls")
    block = model.blocks[1]
    block.mlp = Apart(block.mlp)
    block.forward = lambda h: h + block.attn(block.norm1(h)) + block.mlp.fc2(block.mlp.fc1(h))
    before = everything(model)
    with pytest.raises(UnsupportedArchitectureError, match=r"blocks\.1\.mlp .* is not called"):
        apply_protocol(model, "adapter")
    assert same(before, everything(model))


@pytest.mark.parametrize("name", ["dla34", "resnetv2_50"])
def test_a_head_of_several_layers_stands_in_for_a_convolution(name: str, tmp_path: Path) -> None:
    model, x = small_timm(name)
    assert isinstance(model.get_classifier(), nn.Conv2d)
    bare = model(x)
    apply_protocol(model, "mlp-2", num_classes=3)
    model.train()
    loss = model(x).square().sum()
    loss.backward()
    assert model.eval()(x).shape == (2, 3)
    path = save_task_adapter(model, tmp_path)
    again = load_task_adapter(small_timm(name)[0], path)
    assert torch.equal(again(x), model(x))
    assert torch.equal(remove_prompts(model)(x), bare)


@pytest.mark.parametrize("protocol", ["mlp-2", "sidetune"])
def test_a_classifier_of_tokens_gets_no_head_of_several_layers(protocol: str) -> None:
    model = build("timm/cls")
    model.forward_head = lambda tokens, pre_logits=False: model.head(tokens)
    before = everything(model)
    with pytest.raises(UnsupportedArchitectureError, match=r"called with \(2, 17, 32\)"):
        apply_protocol(model, protocol)
    assert same(before, everything(model))


PACKED = r"blocks\.2\.mlp\.fc1\.weight of VisionTransformer is quantized"


@pytest.mark.parametrize(
    ("protocol", "options", "error", "message"),
    [
        ("sidetune", {"features": 3}, SpecError, "must be a torch.nn.Module"),
        ("linear", {"generator": 3}, SpecError, "must be a torch.Generator"),
        ("mlp-2", {"generator": 3, "num_classes": 4}, SpecError, "must be a torch.Generator"),
        ("vpt-deep", {"generator": 3}, SpecError, "must be a torch.Generator"),
        ("partial-1", {}, UnsupportedArchitectureError, PACKED),
        ("full", {"num_classes": 4}, UnsupportedArchitectureError, PACKED),
        ("prompt-fixed", {"train_prompts": True}, SpecError, "the name says train_prompts=False"),
        ("linear", {"num_classes": 0}, SpecError, "nothing would train.*give num_classes"),
        ("prompt-fixed", {"num_classes": 0}, SpecError, "nothing would train"),
        ("vpt-deep", {"length": 0}, SpecError, "length"),
    ],
)
def test_a_refusal_changes_nothing(
    protocol: str, options: dict[str, Any], error: type[VPTError], message: str
) -> None:
    model = build("timm/cls")
    if message == PACKED:
        weight = model.blocks[2].mlp.fc1.weight.to(torch.int8)
        model.blocks[2].mlp.fc1.weight = nn.Parameter(weight, requires_grad=False)
    before = everything(model)
    with pytest.raises(error, match=message):
        apply_protocol(model, protocol, **options)
    assert same(before, everything(model))


@pytest.mark.parametrize("protocol", ["adapter", "sidetune", "bias", "mlp-2"])
def test_a_call_that_fails_late_changes_nothing(
    protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("transformers/vit")
    before = everything(model)

    def fail(self: Delta, *args: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Delta, "unfreeze", fail)
    with pytest.raises(MemoryError):
        apply_protocol(model, protocol, num_classes=7)
    assert same(before, everything(model))
    assert model.config.num_labels == 5


def test_a_model_without_classifier_has_nothing_that_linear_could_train() -> None:
    model = build("transformers/vit-model")
    before = everything(model)
    with pytest.raises(SpecError, match=r"nothing would train.* image classification class"):
        apply_protocol(model, "linear")
    assert same(before, everything(model))


def names_of(model: nn.Module, depth: int) -> set[str]:
    return {".".join(name.split(".")[:depth]) for name in trainable_parameters(model)}


def test_the_last_blocks_are_those_that_run_last() -> None:
    # Twins registers the embeddings of all stages in front of all blocks, position maps behind.
    head = {"norm", "head"}
    model = apply_protocol(small_timm("twins_pcpvt_small")[0], "partial-1")
    assert names_of(model, 3) == {f"{n}.{leaf}" for n in head for leaf in ("weight", "bias")} | {
        "blocks.3.1"
    }
    model = apply_protocol(small_timm("twins_pcpvt_small")[0], "partial-3")
    assert names_of(model, 2) - {f"{n}.{leaf}" for n in head for leaf in ("weight", "bias")} == {
        "blocks.2", "blocks.3", "patch_embeds.3", "pos_block.3",
    }  # fmt: skip
    model = apply_protocol(glpn(), "partial-1")
    assert names_of(model, 4) == {
        "encoder.block.3.1", "encoder.layer_norm.3.weight", "encoder.layer_norm.3.bias",
    }  # fmt: skip


def test_what_is_registered_behind_the_blocks_and_never_runs_does_not_train() -> None:
    model = build("transformers/vit")
    model.vit.predictor = nn.Linear(32, 32).double()
    model.vit.scales = nn.ParameterList([torch.ones(32).double()])
    names = trainable_parameters(apply_protocol(model, "partial-1"))
    assert "vit.layernorm.weight" in names
    assert not any("predictor" in name for name in names)
    # Never called, but who knows whether it is used.
    assert "vit.scales.0" in names


def test_a_stage_of_which_only_the_last_part_is_shown_trains_whole() -> None:
    model = apply_protocol(small_timm("densenet121")[0], "partial-1")
    assert {".".join(n.split(".")[:2]) for n in trainable_parameters(model)} == {
        "features.transition3", "features.denseblock4", "features.norm5",
        "classifier.weight", "classifier.bias",
    }  # fmt: skip
    model.train()
    modes = {n: m.training for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    on = {n.split(".")[1] for n, mode in modes.items() if mode}
    assert on == {"transition3", "denseblock4", "norm5"}


@pytest.mark.parametrize("name", ["vgg11", "hrnet_w18"])
def test_a_model_without_stages_says_so(name: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match="shows no blocks or stages"):
        apply_protocol(small_timm(name)[0], "partial-1")


def test_sidetune_says_what_alexnet_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = apply_protocol(build("timm/cls", img_size=64), "sidetune")
    assert logits(model(image(size=64))).shape == (2, 5)
    small = apply_protocol(build("timm/cls"), "sidetune")
    with pytest.raises(VPTError, match=r"63 pixels or more, got \(2, 3, 32, 32\)"):
        small(image())
    grey = build("timm/cls", in_chans=1)
    before = everything(grey)
    with pytest.raises(UnsupportedArchitectureError, match="images of other channels"):
        apply_protocol(grey, "sidetune")
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(VPTError, match="install torchvision"):
        apply_protocol(build("timm/cls"), "sidetune")
    assert same(before, everything(grey))
