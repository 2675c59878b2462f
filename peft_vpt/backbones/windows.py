"""Swin blocks and mergings, as far as prompts that flow through them need to know."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class WindowParts:
    """What a windowed block does to a token beside its attention.

    Args:
        out: Path from the block to the output projection.
        mlp: Paths of the modules that make up the MLP, in order.
        norms: Paths of the norms that belong to attention and MLP.
        post_norm: Whether a norm stands behind its branch (v2) or in front of it (v1).
    """

    out: str
    mlp: tuple[str, ...]
    norms: tuple[str, str]
    post_norm: bool = False


_PARTS: dict[str, WindowParts] = {
    "SwinTransformerBlock": WindowParts("attn.proj", ("mlp",), ("norm1", "norm2")),
    "SwinTransformerV2Block": WindowParts("attn.proj", ("mlp",), ("norm1", "norm2"), True),
    "SwinLayer": WindowParts("attention.o_proj", ("mlp",), ("layernorm_before", "layernorm_after")),
    "Swinv2Layer": WindowParts(
        "attention.output.dense",
        ("intermediate", "output"),
        ("layernorm_before", "layernorm_after"),
        True,
    ),
}


def window_parts(block: nn.Module) -> WindowParts | None:
    """Return what is known of a windowed block, or None."""
    return next(
        (_PARTS[cls.__name__] for cls in type(block).__mro__ if cls.__name__ in _PARTS), None
    )


def mergings(encoder: nn.Module) -> list[nn.Module]:
    """Return the modules that merge patches between stages, in forward order."""
    return [m for m in encoder.modules() if type(m).__name__.endswith("PatchMerging")]


def merge(module: Any, prompts: Tensor) -> Tensor:
    """Let prompts `(batch, length, dim)` follow a patch merging to `(batch, length, 2 dim)`.

    Each prompt stands for all four patches of a merging.

    Source: the Swin variant of Jia et al. 2022.
    """
    repeated = prompts.repeat(1, 1, 4)
    if module.norm.weight.numel() == repeated.shape[-1]:
        merged: Tensor = module.reduction(module.norm(repeated))
    else:
        merged = module.norm(module.reduction(repeated))
    return merged


def scores(attention: Any, query: Tensor, keys: Tensor) -> Tensor:
    """Return scaled products `(..., heads, queries, keys)`; cosine attention is told by its scale.

    Args:
        attention: The attention module.
        query: `(..., heads, tokens, head_dim)`, of length one under cosine attention.
        keys: The same.
    """
    products = query @ keys.transpose(-2, -1)
    scale = getattr(attention, "logit_scale", None)
    if scale is None:
        return products / math.sqrt(query.shape[-1])
    # The ceiling of the models' own code: a temperature of 0.01.
    clamped = torch.clamp(scale.view(-1, 1, 1), max=math.log(100.0))
    return products * clamped.exp()


def finish(block: nn.Module, parts: WindowParts, hidden: Tensor, attended: Tensor) -> Tensor:
    """Add attention output and MLP to tokens `(batch, tokens, dim)`, as the block does."""
    norm1, norm2 = (block.get_submodule(path) for path in parts.norms)
    branch: Tensor = block.get_submodule(parts.out)(attended)
    hidden = hidden + (norm1(branch) if parts.post_norm else branch)
    branch = hidden if parts.post_norm else norm2(hidden)
    for path in parts.mlp:
        branch = block.get_submodule(path)(branch)
    result: Tensor = hidden + (norm2(branch) if parts.post_norm else branch)
    return result
