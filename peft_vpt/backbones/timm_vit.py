"""timm's models: vision transformers of one width, and all others whose attention is known."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import UnsupportedArchitectureError
from .anatomy import Encoder, Head, as_pair, is_kind
from .discover import Found, find_blocks
from .heads import can_replace
from .projection import join, reach
from .timm_table import MODELS, rule

PACKAGE = "timm.models."
# Blocks on one sequence `(batch, tokens, dim)`, prefix tokens first, a norm behind the last.
PLAIN = ("VisionTransformer", "Eva", "Beit", "VisionTransformerRelPos", "NaFlexVit")


def matches(module: nn.Module) -> bool:
    """Tell whether a module is one of timm's models."""
    named = any(cls.__module__.startswith(PACKAGE) for cls in type(module).__mro__)
    # Some have had the one, some the other for longer.
    whole = hasattr(module, "forward_features") and hasattr(module, "forward_head")
    return named and (whole or hasattr(module, "forward_intermediates"))


def describe(host: nn.Module, path: str, model: Any) -> Encoder:
    """Describe a timm model found at `path` of the host.

    Raises:
        UnsupportedArchitectureError: Prompts have no meaning in it.
    """
    found = find_blocks(model, path, rule)
    _refuse(model, found)
    block = found.missing(model, path) if found.blocks else ""
    if block and any(is_kind(model, name, PACKAGE) for name in PLAIN):
        raise UnsupportedArchitectureError(
            "inject_prompts",
            f"no attention that is known was found in block {block!r} of {type(model).__name__}, "
            "so its prompts would have no effect",
            "Its attention must be a child attn with a fused qkv or separate q_proj, k_proj, "
            "v_proj layers and meet one softmax",
        )
    plain = next((name for name in PLAIN if is_kind(model, name, PACKAGE)), None)
    return Encoder(
        family=f"timm {plain or type(model).__name__}",
        library="timm",
        path=path,
        blocks=found.blocks,
        prefix_tokens=int(getattr(model, "num_prefix_tokens", 0)),
        has_cls=plain is not None and getattr(model, "cls_token", None) is not None,
        final_norm=join(path, "norm") if plain else None,
        norm_after_pool=join(path, "fc_norm") if plain and _has_norm(model, "fc_norm") else None,
        norm_weights=next(
            (join(path, n) for n in ("norm", "fc_norm", "head.norm") if _has_norm(model, n)), None
        ),
        head=_head(model, path, plain=plain is not None),
        gate=_gate(model, path) if plain else None,
        input_size=_input_size(model),
        plain=plain is not None or found.one_list(),
        known=plain is not None,
        inputs="image" if plain else "guess",
        skipped=tuple(f"{name}: {reason}" for name, reason in found.refused.items()),
    )


def _refuse(model: nn.Module, found: Found) -> None:
    name = type(model).__name__
    if name in MODELS or not found.blocks:
        raise found.unsupported(f"timm {name}", MODELS.get(name, ""))


def _has_norm(model: nn.Module, path: str) -> bool:
    return not isinstance(reach(model, path), nn.Identity | None)


def _gate(model: Any, path: str) -> str | None:
    names = [name for name in ("norm_pre", "pos_drop") if hasattr(model, name)]
    return join(path, names[0]) if names else None


def _head(model: Any, path: str, *, plain: bool) -> Head | None:
    if not hasattr(model, "get_classifier") or (plain and not model.global_pool):
        return None
    found = classifier_paths(model)
    if not found:
        return None
    first: Any = model.get_submodule(found[0])
    width = getattr(first, "in_features", None) or getattr(
        model, "head_hidden_size", model.num_features
    )
    return Head(
        paths=tuple(join(path, name) for name in found),
        reads=_reads(model) if plain else _pooled(model, len(found)),
        width=int(width),
        simple=is_simple(model, found),
    )


def classifier_paths(model: Any) -> list[str]:
    """Return the paths of what timm calls the classifier of a model, layer by layer if it can."""
    given = model.get_classifier()
    if isinstance(getattr(given, "fc", None), nn.Module):
        given = given.fc
    heads = list(given) if isinstance(given, tuple | list | nn.ModuleList) else [given]
    heads += [model.aux_head] if getattr(model, "aux_head", None) is not None else []
    paths = {id(module): name for name, module in model.named_modules()}
    found = [paths[id(head)] for head in heads if id(head) in paths]
    return found if len(found) == len(heads) else []


def is_simple(model: nn.Module, paths: list[str]) -> bool:
    """Tell whether linear layers of one width can stand in for all parts of a classifier."""
    heads = [model.get_submodule(path) for path in paths]
    widths = {getattr(head, "in_features", None) for head in heads} - {None}
    beside = getattr(model, "aux_head", None) is not None
    return len(widths) < 2 and not beside and all(can_replace(head) for head in heads)


def _pooled(model: Any, heads: int) -> str:
    """Return what a head of a model with several widths is fed."""
    if heads > 1:
        return "cls|dist"
    pool = getattr(model, "global_pool", "") or getattr(
        getattr(getattr(model, "head", None), "global_pool", None), "pool_type", ""
    )
    name = {"token": "cls", "avg": "mean"}.get(pool, pool) if isinstance(pool, str) else "mean"
    # A norm at the end of the encoder stands in front of the pooling, one in the head behind it.
    return name or "pooled" if not _has_norm(model, "head.norm") else f"{name}:norm-after"


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
    """Return the size that the model was built for, or a small one if it takes any."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    embed = getattr(model, "patch_embed", None)
    channels = int(getattr(model, "in_chans", 3))
    size = _fixed_size(model)
    if size is None:
        height, width = config.get("input_size", (3, 224, 224))[1:]
        return (channels, min(int(height), 256), min(int(width), 256))
    if getattr(model, "dynamic_img_size", False) and embed is not None:
        # Any multiple of the patch will do, and a few tokens check as well as a thousand.
        ratio = embed.feat_ratio(as_scalar=False)
        height, width = (min(s, 4 * int(r)) for s, r in zip(size, ratio, strict=True))
        return (channels, height, width)
    return (channels, *size)


def _fixed_size(model: nn.Module) -> tuple[int, int] | None:
    for module in (model, *model.children()):
        size = as_pair(getattr(module, "img_size", None))
        if size is not None:
            return size
    return None
