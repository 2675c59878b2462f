"""Plain Hugging Face ViTs: ViT, DeiT, BEiT, DINOv2, CLIP and SigLIP vision, ViT-MAE, ViT-MSN."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import UnsupportedArchitectureError
from .anatomy import Attention, Block, Encoder, Head, Separate, join, module_at

PACKAGE = "transformers.models."


@dataclass(frozen=True)
class Family:
    """What a table row says about one transformers class.

    Args:
        prefix: Number of prefix tokens, registers not counted.
        norm: The final norm below the encoder; None where it never sees the whole sequence.
        reads: What the class's `...ForImageClassification` feeds its classifier.
        any_size: Whether the embeddings take any image size without being asked.
    """

    prefix: int
    norm: str | None
    reads: str
    any_size: bool = False


FAMILIES = {
    "ViTModel": Family(1, "layernorm", "cls"),
    "DeiTModel": Family(2, "layernorm", "cls"),
    "BeitModel": Family(1, "layernorm", "cls"),
    "Dinov2Model": Family(1, "layernorm", "cls+mean", any_size=True),
    "Dinov2Backbone": Family(1, None, "", any_size=True),
    "Dinov2WithRegistersModel": Family(1, "layernorm", "cls+mean", any_size=True),
    "Dinov2WithRegistersBackbone": Family(1, None, "", any_size=True),
    "CLIPVisionModel": Family(1, None, "mean:no-norm"),
    "CLIPVisionTransformer": Family(1, None, "mean:no-norm"),
    "SiglipVisionModel": Family(0, "post_layernorm", "mean"),
    "SiglipVisionTransformer": Family(0, "post_layernorm", "mean"),
    "ViTMAEModel": Family(1, "layernorm", "cls"),
    "ViTMSNModel": Family(1, "layernorm", "cls"),
}
_BLOCK_LISTS = ("layers", "encoder.layers", "encoder.layer")
_NORMS = ("layernorm_before", "norm1", "layer_norm1")
_ATTENTIONS = ("attention", "self_attn", "attention.attention")
_PROJECTIONS = (
    Separate("q_proj", "k_proj", "v_proj"),
    Separate("query", "key", "value", head_dim="attention_head_size"),
)


def matches(module: nn.Module) -> bool:
    """Tell whether a module is an encoder of the table that owns its blocks itself."""
    return _row(module) is not None and _block_list(module) is not None


def describe(host: nn.Module, path: str, model: Any) -> Encoder:
    """Describe a transformers vision encoder found at `path` of the host."""
    name, row = _row(model) or ("", None)
    blocks = _block_list(model)
    assert row is not None
    assert blocks is not None
    if getattr(model.config, "use_relative_position_bias", False) or getattr(
        model.config, "use_shared_relative_position_bias", False
    ):
        raise UnsupportedArchitectureError(
            f"inject_prompts: {name} with a relative position bias is not supported yet; "
            "use a configuration with use_relative_position_bias=False and "
            "use_shared_relative_position_bias=False, or another backbone."
        )
    width = int(model.config.hidden_size)
    norm = row.norm
    after = None
    if name == "BeitModel" and model.config.use_mean_pooling:
        after = join(path, "pooler.layernorm") if model.pooler is not None else None
    return Encoder(
        family=f"transformers {name}",
        library="transformers",
        path=path,
        blocks=tuple(
            Block(join(path, blocks, str(i)), (_attention(block),), width)
            for i, block in enumerate(module_at(model, blocks).children())
        ),
        prefix_tokens=row.prefix + int(getattr(model.config, "num_register_tokens", 0)),
        has_cls=row.prefix > 0,
        final_norm=None if norm is None else join(path, norm),
        norm_after_pool=after,
        norm_weights=_find_path(
            model, path, (after and "pooler.layernorm", norm, "post_layernorm", "layernorm")
        ),
        head=_head(host, path, row, width, mean_pooled=after is not None),
        gate=None,
        input_size=_input_size(model, row),
    )


def _row(module: nn.Module) -> tuple[str, Family] | None:
    for cls in type(module).__mro__:
        if cls.__name__ in FAMILIES and cls.__module__.startswith(PACKAGE):
            return cls.__name__, FAMILIES[cls.__name__]
    return None


def _find(module: nn.Module, paths: tuple[str, ...]) -> str | None:
    for path in paths:
        try:
            module_at(module, path)
        except AttributeError:
            continue
        return path
    return None


def _find_path(model: nn.Module, path: str, names: tuple[str | None, ...]) -> str | None:
    found = _find(model, tuple(name for name in names if name))
    return None if found is None else join(path, found)


def _block_list(module: nn.Module) -> str | None:
    path = _find(module, _BLOCK_LISTS)
    return path if path and isinstance(module_at(module, path), nn.ModuleList) else None


def _attention(block: nn.Module) -> Attention:
    norm = _find(block, _NORMS)
    for path in _ATTENTIONS:
        if _find(block, (path,)) is None:
            continue
        for projection in _PROJECTIONS:
            if hasattr(module_at(block, path), projection.key):
                return Attention(path, norm, projection)
    raise UnsupportedArchitectureError(
        f"inject_prompts: no query, key and value layers found in {type(block).__name__}; "
        "this release of transformers names them in a way that is not known here."
    )


def _owners(host: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the encoder's ancestors in the host, from the nearest one out."""
    parts = path.split(".") if path else []
    for end in range(len(parts) - 1, -1, -1):
        owner = ".".join(parts[:end])
        yield owner, module_at(host, owner)


def _head(host: nn.Module, path: str, row: Family, width: int, *, mean_pooled: bool) -> Head | None:
    for owner, module in _owners(host, path):
        if hasattr(module, "cls_classifier"):
            names = ("cls_classifier", "distillation_classifier")
            return Head(tuple(join(owner, n) for n in names), "cls|dist", width)
        if hasattr(module, "classifier") and type(module).__name__.endswith(
            "ForImageClassification"
        ):
            reads = "mean:norm-after" if mean_pooled else row.reads
            return Head((join(owner, "classifier"),), reads, width * (1 + ("+" in reads)))
    return None


def _input_size(model: Any, row: Family) -> tuple[int, int, int]:
    config = model.config
    size, patch = (
        value if isinstance(value, list | tuple) else (value, value)
        for value in (config.image_size, config.patch_size)
    )
    if row.any_size:
        size = [min(int(s), 4 * int(p)) for s, p in zip(size, patch, strict=True)]
    return (int(config.num_channels), int(size[0]), int(size[1]))
