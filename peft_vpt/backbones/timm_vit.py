"""timm's `VisionTransformer`: ViT, DeiT, CLIP, SigLIP, DINOv2, hybrids, parallel blocks."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import UnsupportedArchitectureError
from .anatomy import Attention, Block, Encoder, Fused, Head, is_kind, join

PACKAGE = "timm.models."
CLASS = "VisionTransformer"


def matches(module: nn.Module) -> bool:
    """Tell whether a module is one of timm's vision transformers (torchvision's is another)."""
    return is_kind(module, CLASS, PACKAGE)


def describe(host: nn.Module, path: str, model: Any) -> Encoder:
    """Describe a timm vision transformer found at `path` of the host."""
    blocks = tuple(
        Block(join(path, f"blocks.{i}"), _attentions(block), int(model.embed_dim))
        for i, block in enumerate(model.blocks)
    )
    return Encoder(
        family="timm ViT",
        library="timm",
        path=path,
        blocks=blocks,
        prefix_tokens=int(model.num_prefix_tokens),
        has_cls=model.cls_token is not None,
        final_norm=join(path, "norm"),
        norm_after_pool=join(path, "fc_norm") if _has_norm(model, "fc_norm") else None,
        norm_weights=next(
            (join(path, n) for n in ("norm", "fc_norm") if _has_norm(model, n)), None
        ),
        head=_head(model, path),
        gate=join(path, "norm_pre" if hasattr(model, "norm_pre") else "pos_drop"),
        input_size=_input_size(model),
    )


def _attentions(block: Any) -> tuple[Attention, ...]:
    kind = type(block).__name__
    if is_kind(block, "ParallelScalingBlock", PACKAGE):
        return (Attention("", "in_norm", Fused("in_proj")),)
    if is_kind(block, "ParallelThingsBlock", PACKAGE):
        return tuple(
            Attention(f"attns.{i}.attn", f"attns.{i}.norm", Fused())
            for i in range(len(block.attns))
        )
    if not hasattr(getattr(block, "attn", None), "qkv"):
        raise UnsupportedArchitectureError(
            f"inject_prompts: timm block {kind} holds no attention with a fused `qkv` projection, "
            "so the keys and values of prompts cannot be computed. "
            "Use a model whose blocks hold timm.layers.Attention."
        )
    post_norm = is_kind(block, "ResPostBlock", PACKAGE)
    return (Attention("attn", None if post_norm else "norm1", Fused()),)


def _has_norm(model: nn.Module, name: str) -> bool:
    return not isinstance(getattr(model, name, nn.Identity()), nn.Identity)


def _head(model: Any, path: str) -> Head | None:
    names = ["head"] + (["head_dist"] if hasattr(model, "head_dist") else [])
    if not isinstance(getattr(model, "head", None), nn.Module) or not model.global_pool:
        return None
    return Head(
        paths=tuple(join(path, name) for name in names),
        reads=_reads(model),
        width=int(model.embed_dim),
    )


def _reads(model: Any) -> str:
    if hasattr(model, "head_dist"):
        return "cls|dist"
    pool: str = {"token": "cls", "avg": "mean"}.get(model.global_pool, model.global_pool)
    if pool != "cls" and getattr(model, "pool_include_prefix", False) and model.num_prefix_tokens:
        pool = f"{pool}-all"
    if _has_norm(model, "norm") or (pool == "cls" and _has_norm(model, "fc_norm")):
        return pool
    return pool + (":norm-after" if _has_norm(model, "fc_norm") else ":no-norm")


def _input_size(model: Any) -> tuple[int, int, int]:
    embed, config = model.patch_embed, getattr(model, "default_cfg", None) or {}
    size = getattr(embed, "img_size", None) or config.get("input_size", (3, 224, 224))[1:]
    if getattr(model, "dynamic_img_size", False) and hasattr(embed, "feat_ratio"):
        # Any multiple of the patch will do, and a few tokens check as well as a thousand.
        ratio = embed.feat_ratio(as_scalar=False)
        size = tuple(min(int(s), 4 * int(r)) for s, r in zip(size, ratio, strict=True))
    return (int(getattr(model, "in_chans", 3)), int(size[0]), int(size[1]))
