"""What every family must do beyond exact numbers: adapters, removal, copies, checkpointing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from matrix.walk import Build, output
from torch import nn

from peft_vpt import (
    inject_prompts,
    is_prompted,
    load_task_adapter,
    remove_prompts,
    save_task_adapter,
)

# One member of every family whose attention takes prompts.
TIMM = [
    "test_vit",
    "vit_tiny_patch16_dinov3_qkvb",
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
    "vit_relpos_small_patch16_224",
    "naflexvit_base_patch16_gap",
    "qwen3_vit_88m",
    "deepseek_vit_412m",
    "gemma4_vit_167m",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "swinv2_cr_tiny_224",
    "davit_tiny",
    "maxvit_rmlp_pico_rw_256",
    "coatnet_0_rw_224",
    "hiera_tiny_224",
    "sam2_hiera_tiny",
    "samvit_base_patch16_224",
    "tiny_vit_5m_224",
    "nest_tiny",
    "volo_d1_224",
    "pit_ti_224",
    "crossvit_tiny_240",
    "cait_xxs24_224",
    "caformer_s18",
    "mvitv2_tiny",
    "gcvit_xxtiny",
    "tnt_s_patch16_224",
    "convit_tiny",
    "pvt_v2_b0",
    "twins_svt_small",
    "levit_128s",
    "nextvit_small",
    "mobilevit_xxs",
    "fastvit_mci0",
    "visformer_tiny",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "mobilenetv4_hybrid_medium_075",
    "lowformer_b0",
    "cpubone_nano",
    "iformer_t",
    "csatv2",
    "botnet26t_256",
]
TRANSFORMERS = [
    "ViTForImageClassification",
    "BeitForImageClassification",
    "Data2VecVisionForImageClassification",
    "DINOv3ViTModel",
    "Siglip2ForImageClassification",
    "PixtralVisionModel",
    "Qwen2VisionTransformerPretrainedModel",
    "Gemma4VisionModel",
    "Llama4VisionModel",
    "VJEPA2ForVideoClassification",
    "SwinForImageClassification",
    "Swinv2ForImageClassification",
    "HieraForImageClassification",
    "SamVisionModel",
    "Sam2VisionModel",
    "VitDetModel",
    "SegformerForImageClassification",
    "PvtForImageClassification",
    "PvtV2ForImageClassification",
    "CvtForImageClassification",
    "LevitForImageClassification",
    "MobileViTForImageClassification",
    "GroupViTVisionModel",
    "TimesformerForVideoClassification",
    "XCLIPVisionModel",
    "BlipVisionModel",
    "Florence2VisionBackbone",
    "Pix2StructVisionModel",
    "TimmWrapperForImageClassification",
]
NAMES = [f"timm/{n}" for n in TIMM] + [f"transformers/{n}" for n in TRANSFORMERS]
# Those whose code has no gradient checkpointing.
NO_CHECKPOINTS = {
    "timm/pit_ti_224",
    "timm/crossvit_tiny_240",
    "timm/convit_tiny",
    "timm/twins_svt_small",
    "transformers/Sam2VisionModel",
    "transformers/PvtForImageClassification",
    "transformers/CvtForImageClassification",
    "transformers/LevitForImageClassification",
    "transformers/Florence2VisionBackbone",
}
QUICK = ("test_vit", "dinov3_qkvb", "swin_tiny", "maxvit", "Swinv2For", "Siglip2", "Qwen2")


def build(name: str) -> tuple[nn.Module, Any]:
    library, _, kind = name.partition("/")
    pytest.importorskip(library)
    if "Timm" in kind:
        pytest.importorskip("timm")
    return Build(library)(kind)


def names(every: bool = False) -> list[Any]:
    """Return all names, those outside `QUICK` marked slow unless every one is wanted."""
    slow = pytest.mark.slow
    return [
        n if every or any(part in n for part in QUICK) else pytest.param(n, marks=slow)
        for n in NAMES
    ]


@pytest.mark.parametrize("name", NAMES)
def test_adapter_copy_and_removal(name: str, tmp_path: Any) -> None:
    model, inputs = build(name)
    with torch.no_grad():
        bare = output(model, inputs)
    keys = list(model.state_dict())
    inject_prompts(model, 2, init="normal")
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    head = model.prompts.encoder.head
    allowed = ("prompts.", *(() if head is None else head.paths))
    assert all(n.startswith(allowed) for n in trainable), trainable
    model.eval()
    with torch.no_grad():
        prompted = output(model, inputs)
        assert not torch.equal(prompted, bare)
        assert torch.equal(output(copy.deepcopy(model), inputs), prompted)
    save_task_adapter(model, tmp_path / "task")
    fresh = load_task_adapter(build(name)[0], tmp_path / "task")
    with torch.no_grad():
        assert torch.equal(output(fresh, inputs), prompted)
    remove_prompts(model)
    with torch.no_grad():
        assert torch.equal(output(model, inputs), bare)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("name", names())
def test_gradient_checkpointing(name: str) -> None:
    model, inputs = build(name)
    inject_prompts(model, 2, dropout=0.0)
    model.train()
    plain = gradients(model, inputs)
    assert checkpoint(model) == (name not in NO_CHECKPOINTS)
    model.train()
    again = gradients(model, inputs)
    for key, grad in plain.items():
        torch.testing.assert_close(again[key], grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", names())
def test_compile(name: str) -> None:
    model, inputs = build(name)
    with torch.no_grad():
        expected = output(inject_prompts(model, 2, dropout=0.0), inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(output(compiled, inputs), expected, rtol=1e-6, atol=1e-8)


def gradients(model: nn.Module, inputs: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    output(model, inputs).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def checkpoint(model: Any) -> bool:
    """Turn gradient checkpointing on, if the model has it."""
    try:
        if hasattr(model, "set_grad_checkpointing"):
            model.set_grad_checkpointing(True)
            return True
        if getattr(model, "supports_gradient_checkpointing", False):
            model.gradient_checkpointing_enable({"use_reentrant": False})
            return True
    except (AssertionError, ValueError):
        return False
    return False


def test_tokens_with_a_large_part_in_common_are_told_apart() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("tiny_vit_5m_224", num_classes=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "downsample.conv3.bn.bias" in name:
                parameter.add_(3.0)
    assert is_prompted(inject_prompts(model, length=2))
