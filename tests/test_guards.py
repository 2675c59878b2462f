"""Where prompts would silently go wrong: every hole that was found, kept shut."""

from __future__ import annotations

import copy
import sys
from functools import partial
from types import FrameType
from typing import Any

import pytest
import torch
from matrix.walk import output
from test_families import build
from torch import nn
from zoo import build as plain
from zoo import image

from peft_vpt import inject_prompts, remove_prompts
from peft_vpt.errors import SpecError, UnsupportedArchitectureError, VPTError
from peft_vpt.prompts import Prompts
from peft_vpt.undo import Snapshot


def attention(change: Any) -> type[nn.Module]:
    """Return timm's attention with something done to its keys and values."""
    pytest.importorskip("timm")
    from timm.layers import Attention

    class Changed(Attention):
        def forward(self, x: torch.Tensor, attn_mask: Any = None, is_causal: bool = False) -> Any:
            b, n, _ = x.shape
            qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
            k, v = change(k, v)
            x = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.proj(x.transpose(1, 2).reshape(b, n, -1))

    return Changed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_self_check_notices_in_every_precision(dtype: torch.dtype) -> None:
    model = plain("timm/cls").to(dtype)
    inject_prompts(copy.deepcopy(model), 2)
    model.blocks[1].attn.__class__ = attention(lambda k, v: (1.4 * k, 1.4 * v))
    with pytest.raises(UnsupportedArchitectureError, match="self-check of block 1"):
        inject_prompts(model, 2)


def test_half_precision_passes_with_rotations() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        for name in ("timm/vit_tiny_patch16_dinov3_qkvb", "transformers/DINOv3ViTModel"):
            model = inject_prompts(build(name)[0].to(dtype), 2)
            assert model.prompts.checked


def test_a_rotation_is_one_of_channel_pairs() -> None:
    model, _ = build("timm/eva02_tiny_patch14_224")
    attn = model.blocks[0].attn
    forward = type(attn).forward

    class Flipped(type(attn)):
        def forward(self, x: torch.Tensor, rope: Any = None, **rest: Any) -> Any:
            call = nn.functional.scaled_dot_product_attention

            def flipped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **more: Any) -> Any:
                return call(q.flip(-1).roll(1, -1), k.flip(-1).roll(1, -1), v, **more)

            nn.functional.scaled_dot_product_attention = flipped
            try:
                return forward(self, x, rope, **rest)
            finally:
                nn.functional.scaled_dot_product_attention = call

    attn.__class__ = Flipped
    with pytest.raises(UnsupportedArchitectureError):
        inject_prompts(model, 2)


def test_a_block_without_known_attention_is_not_passed_over() -> None:
    model = plain("timm/cls")
    model.blocks[2].attn = nn.MultiheadAttention(32, 2, batch_first=True).double()
    with pytest.raises(UnsupportedArchitectureError, match=r"block 'blocks\.2'"):
        inject_prompts(model, 2)


def test_reentrant_checkpoints_around_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = pytest.importorskip("timm.layers")
    model, inputs = build("timm/swin_tiny_patch4_window7_224")
    inject_prompts(model, 2)
    model.set_grad_checkpointing()
    model.train()
    layers.set_reentrant_ckpt(True)
    try:
        with pytest.raises(VPTError, match="set_reentrant_ckpt"):
            model(inputs)
    finally:
        layers.set_reentrant_ckpt(False)


@pytest.mark.parametrize("name", ["SwinForImageClassification", "HieraForImageClassification"])
def test_reentrant_checkpoints_around_transformers_stages(name: str) -> None:
    model, inputs = build(f"transformers/{name}")
    inject_prompts(model, 2)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()
    output(model, inputs).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.prompts.parameters())


def test_a_graph_break_under_the_override_is_an_error() -> None:
    model = plain("timm/cls")

    def broken(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        torch._dynamo.graph_break()
        return k, v

    for block in model.blocks:
        block.attn.__class__ = attention(broken)
    inject_prompts(model, 2)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="graph_break"):
        torch.compile(model, backend="eager")(image())


def test_carried_prompts_and_checkpointing_in_swin() -> None:
    for name in ("timm/swin_tiny_patch4_window7_224", "transformers/SwinForImageClassification"):
        grads = []
        for checkpoint in (False, True):
            model, inputs = build(name)
            inject_prompts(model, 2, deep=False, generator=torch.Generator().manual_seed(0))
            if checkpoint and name.startswith("timm"):
                model.set_grad_checkpointing()
            elif checkpoint:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
            output(model, inputs).square().sum().backward()
            grads.append(model.prompts.get_parameter("0").grad)
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_heads_of_several_layers_are_left_to_the_model() -> None:
    for name in ("crossvit_tiny_240", "volo_d1_224"):
        model, inputs = build(f"timm/{name}")
        with pytest.raises(SpecError, match="reset_classifier"):
            inject_prompts(model, 2, num_classes=7)
        model.reset_classifier(7)
        inject_prompts(model.double(), 2)
        assert output(model, inputs).shape[-1] == 7


def test_projections_stand_only_where_prompts_enter() -> None:
    model, _ = build("timm/swin_tiny_patch4_window7_224")
    inject_prompts(model, 2, project=3, layers=(0, 1))
    assert len(model.prompts.project) == 1


def test_a_dummy_forward_leaves_no_trace() -> None:
    model, _ = build("transformers/SwinForImageClassification")
    layers = [m for m in model.modules() if type(m).__name__ == "SwinLayer"]
    before = [(layer.window_size, layer.shift_size) for layer in layers]
    inject_prompts(model, 2)
    assert [(layer.window_size, layer.shift_size) for layer in layers] == before


def test_a_model_is_never_empty_while_it_is_put_back() -> None:
    model = plain("timm/cls")
    modules, handle = list(model.modules()), model.register_forward_hook(lambda *_: None)
    order, head = list(model._modules), model.head
    before = Snapshot(model)
    del model.head
    handle.remove()
    model.extra, model.blocks[0].added = nn.Linear(2, 2), 1
    model.head = nn.Identity()
    steps = 0

    def look(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal steps
        steps += 1
        assert all({"training", "_parameters", "_modules"} <= vars(m).keys() for m in modules)
        assert set(order) - {"head"} <= set(model._modules)
        return look

    sys.settrace(look)
    try:
        before.put_back()
    finally:
        sys.settrace(None)
    assert steps > len(modules)
    assert list(model._modules) == order
    assert model.head is head
    assert list(model._forward_hooks) == [handle.id]
    assert not hasattr(model.blocks[0], "added")


@pytest.mark.parametrize("verb", ["inject", "remove"])
def test_an_interruption_leaves_the_model_as_it_was(
    verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = plain("timm/cls")
    if verb == "remove":
        inject_prompts(model, 2, num_classes=3)
    expected = model(image())
    spaces = [(module, dict(vars(module))) for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    if verb == "inject":
        monkeypatch.setattr(Prompts, "train", interrupted)
    else:
        monkeypatch.setattr("peft_vpt.inject.restore", interrupted)
    call = partial(inject_prompts, length=2, num_classes=3) if verb == "inject" else remove_prompts
    with pytest.raises(KeyboardInterrupt):
        call(model)
    assert all(vars(module) == space for module, space in spaces)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(model(image()), expected)
