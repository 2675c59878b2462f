"""Tiny random models of every family, built offline, with every parameter perturbed.

Zero-initialised weights would make equality empty, so all parameters get noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

SIZE = 32
CLASSES = 5
BASE: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "num_classes": CLASSES,
}
TIMM: dict[str, dict[str, Any]] = {
    "cls": {},
    "no-qkv-bias": {"qkv_bias": False},
    "registers": {"reg_tokens": 4, "init_values": 0.1},
    "registers-no-embed": {"reg_tokens": 2, "no_embed_class": True},
    "gap": {"class_token": False, "global_pool": "avg", "fc_norm": True},
    "gap-norm-before": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "gap-with-cls": {"global_pool": "avg"},
    "map": {"class_token": False, "global_pool": "map"},
    "clip": {"pre_norm": True},
    "dynamic": {"dynamic_img_size": True},
    "qk-norm": {"qk_norm": True, "scale_attn_norm": True},
    "no-final-norm": {"final_norm": False},
}
TIMM_BLOCKS = {
    "res-post": "ResPostBlock",
    "parallel-scaling": "ParallelScalingBlock",
    "parallel-things": "ParallelThingsBlock",
}
VIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": SIZE,
    "patch_size": 8,
    "num_labels": CLASSES,
}
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTConfig", "ViTForImageClassification", {}),
    "deit": ("DeiTConfig", "DeiTForImageClassification", {}),
    "deit-distilled": ("DeiTConfig", "DeiTForImageClassificationWithTeacher", {}),
    "beit": (
        "BeitConfig",
        "BeitForImageClassification",
        {"use_mean_pooling": False, "use_absolute_position_embeddings": True},
    ),
    "beit-mean": ("BeitConfig", "BeitForImageClassification", {}),
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification", {"mlp_ratio": 2}),
    "dinov2-registers": (
        "Dinov2WithRegistersConfig",
        "Dinov2WithRegistersForImageClassification",
        {"num_register_tokens": 3},
    ),
    "clip": ("CLIPVisionConfig", "CLIPForImageClassification", {}),
    "siglip": ("SiglipVisionConfig", "SiglipForImageClassification", {}),
    "msn": ("ViTMSNConfig", "ViTMSNForImageClassification", {}),
    "vit-model": ("ViTConfig", "ViTModel", {}),
    "mae-model": ("ViTMAEConfig", "ViTMAEModel", {"mask_ratio": 0.0}),
}
NAMES = (
    [f"timm/{name}" for name in (*TIMM, *TIMM_BLOCKS, "distilled")]
    + [f"transformers/{name}" for name in TRANSFORMERS]
)  # fmt: skip


def build(
    name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any
) -> nn.Module:
    """Build a tiny model by its name here, in eval mode."""
    torch.manual_seed(seed)
    library, _, kind = name.partition("/")
    pytest.importorskip(library)
    model = (_timm if library == "timm" else _transformers)(kind, changes)
    return perturb(model, seed).to(dtype).eval()


def perturb(model: nn.Module, seed: int = 0) -> nn.Module:
    """Add noise to every parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise.to(parameter))
    return model


def image(
    batch: int = 2, dtype: torch.dtype = torch.float64, size: int = SIZE, seed: int = 0
) -> torch.Tensor:
    """Return random images `(batch, 3, size, size)`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, size, size, generator=generator).to(dtype)


def logits(output: Any) -> torch.Tensor:
    """Return the tensor that matters in any model's output."""
    if isinstance(output, torch.Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        if output.get(name) is not None:
            return output[name]
    raise TypeError(type(output))


def bigger(model: nn.Module) -> dict[str, Callable[[], nn.Module]]:
    """Return models that hold `model` under `backbone`."""
    outer = nn.Module()
    outer.backbone = model
    return {"outer": lambda: outer}


def _timm(kind: str, changes: dict[str, Any]) -> nn.Module:
    from timm.models import deit, vision_transformer

    options = BASE | TIMM.get(kind, {}) | changes
    if kind == "distilled":
        return deit.VisionTransformerDistilled(**options)
    if kind in TIMM_BLOCKS:
        options["block_fn"] = getattr(vision_transformer, TIMM_BLOCKS[kind])
    return vision_transformer.VisionTransformer(**options)


def _transformers(kind: str, changes: dict[str, Any]) -> nn.Module:
    import transformers

    config_name, class_name, options = TRANSFORMERS[kind]
    values = VIT | options | changes
    config = getattr(transformers, config_name)(**values)
    if kind in ("clip", "siglip"):
        whole = {"clip": "CLIPConfig", "siglip": "SiglipConfig"}[kind]
        config = getattr(transformers, whole)(vision_config=config.to_dict())
        config.num_labels = values["num_labels"]
    return getattr(transformers, class_name)(config)


class TinyFeatures(nn.Module):
    """A side network's features that are quick: `(batch, 256, h, w)`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 256, 8, stride=8)

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.relu(self.conv(pixels))
