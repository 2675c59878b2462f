"""timm's models: vision transformers of one width, and all others whose attention is known."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import UnsupportedArchitectureError
from .anatomy import Encoder, Head, ImageFacts, as_pair, is_below, is_kind
from .discover import Found, find_blocks, first_layer
from .heads import can_replace
from .projection import join
from .timm_table import MODELS, rule

# Blocks on one sequence `(batch, tokens, dim)`, prefix tokens first, a norm behind the last.
PLAIN = ("VisionTransformer", "Eva", "Beit", "VisionTransformerRelPos", "NaFlexVit")
_DEFAULT_SIZE = (224, 224)
_SIZES = (224, 256, 64, 32, 384)
# A small image checks as well as a large one.
_LARGEST = 256
# A stem that folds pixels into channels has more; the image itself has not.
_MOST = 15


def takes_images(module: nn.Module) -> bool:
    """Tell whether a module is one of timm's models: all of them take images."""
    ours = any(cls.__module__.startswith("timm.models.") for cls in type(module).__mro__)
    return ours and hasattr(module, "forward_features")


# Whether it has attention of its own, `describe` finds.
matches = takes_images


def describe(host: nn.Module, path: str, model: Any) -> Encoder:
    """Describe a timm model found at `path` of the host.

    Raises:
        UnsupportedArchitectureError: Prompts have no meaning in it.
    """
    name = type(model).__name__
    plain = _plain(model)
    found = find_blocks(model, path, rule)
    if name in MODELS or not found.blocks:
        raise found.unsupported(f"timm {name}", MODELS.get(name, ""))
    if plain:
        _refuse_gaps(model, path, found)
    gates = [join(path, n) for n in ("norm_pre", "pos_drop") if plain and hasattr(model, n)]
    return Encoder(
        family=f"timm {plain or name}",
        library="timm",
        path=path,
        input_size=_input_size(model),
        blocks=found.blocks,
        prefix_tokens=int(getattr(model, "num_prefix_tokens", 0)),
        has_cls=plain is not None and getattr(model, "cls_token", None) is not None,
        final_norm=join(path, "norm") if plain else None,
        norm_after_pool=first_layer(model, path, "fc_norm") if plain else None,
        norm_weights=first_layer(model, path, "norm", "fc_norm", "head.norm"),
        head=None if plain and not model.global_pool else head(host, path, _reads(model)),
        gate=gates[0] if gates else None,
        known=plain is not None,
        skipped=found.skipped,
        inputs="image" if plain else "guess",
    )


def _plain(model: nn.Module) -> str | None:
    return next((kind for kind in PLAIN if is_kind(model, kind, "timm.models.")), None)


def _refuse_gaps(model: Any, path: str, found: Found) -> None:
    """Raise where a block shows no attention."""
    for number, _ in model.blocks.named_children():
        block = join(path, "blocks", number)
        if not any(is_below(attends.path, block) for attends in found.blocks):
            raise UnsupportedArchitectureError(
                "inject_prompts",
                f"no attention that is known was found in block {block!r} of "
                f"{type(model).__name__}, so its prompts would have no effect",
                "Its attention must be a child attn with a fused qkv or separate q_proj, k_proj, "
                "v_proj layers and meet one softmax",
            )


def head(host: nn.Module, path: str, reads: str = "pooled") -> Head | None:
    """Return what timm calls the classifier of a model, layer by layer if it can.

    Args:
        host: What holds the model.
        path: Of the model in it.
        reads: What the classifier is fed.
    """
    model: Any = host.get_submodule(path)
    parts, known = _classifiers(model), {id(m): join(path, n) for n, m in model.named_modules()}
    if not parts or any(id(part) not in known for part in parts):
        return None
    sizes = (getattr(parts[0], name, None) for name in ("in_features", "in_channels"))
    width = next(filter(None, sizes), None) or getattr(model, "head_hidden_size", None)
    widths = {getattr(part, "in_features", None) for part in parts} - {None}
    # Whether it is one linear layer each, of one width.
    simple = len(widths) < 2 and getattr(model, "aux_head", None) is None
    return Head(
        paths=tuple(known[id(part)] for part in parts),
        reads=reads,
        width=int(width or model.num_features),
        simple=simple and all(map(can_replace, parts)),
    )


def _classifiers(model: Any) -> list[nn.Module]:
    given: Any = model.get_classifier() if hasattr(model, "get_classifier") else ()
    given = given.fc if isinstance(getattr(given, "fc", None), nn.Module) else given
    parts = list(given) if isinstance(given, tuple | list | nn.ModuleList) else [given]
    beside = getattr(model, "aux_head", None)
    return parts if beside is None else [*parts, beside]


def _reads(model: Any) -> str:
    """Return what the classifier is fed."""
    if len(_classifiers(model)) > 1:
        return "cls|dist"
    inner = getattr(getattr(model, "head", None), "global_pool", None)
    pool = getattr(model, "global_pool", "") or getattr(inner, "pool_type", "")
    name = {"token": "cls", "avg": "mean"}.get(pool, pool) if isinstance(pool, str) else "mean"
    norm, after, in_head = (first_layer(model, "", n) for n in ("norm", "fc_norm", "head.norm"))
    if _plain(model) is None:
        # A norm at the end of the encoder stands in front of the pooling, one in the head behind.
        return f"{name}:norm-after" if in_head else name or "pooled"
    if name != "cls" and getattr(model, "pool_include_prefix", False) and model.num_prefix_tokens:
        name = f"{name}-all"
    if norm or (name == "cls" and after):
        return name
    return name + (":norm-after" if after else ":no-norm")


def _input_size(model: Any) -> tuple[int, int, int]:
    """Return the size that the model was built for, or a small one if it takes any."""
    facts = image_facts(model)
    height, width = facts.sizes[0]
    if not _own_sizes(model):
        height, width = min(height, _LARGEST), min(width, _LARGEST)
    elif getattr(model, "dynamic_img_size", False) and hasattr(model, "patch_embed"):
        # Any multiple of the patch will do, and a few tokens check as well as a thousand.
        ratio = model.patch_embed.feat_ratio(as_scalar=False)
        height, width = (min(s, 4 * int(r)) for s, r in zip((height, width), ratio, strict=True))
    return facts.channels, height, width


def _own_sizes(model: nn.Module) -> list[tuple[int, int]]:
    """Return what the model and its parts say of the size that they were built for."""
    parts = (model, *_embeds(model)[:1], *model.children())
    sizes = (as_pair(getattr(part, "img_size", None)) for part in parts)
    return [size for size in sizes if size is not None]


def _embeds(model: nn.Module) -> list[Any]:
    found = [m for m in model.modules() if is_kind(m, "PatchEmbed", "timm.layers")]
    return [embed for embed in found if getattr(embed, "img_size", None)]


def image_facts(model: Any) -> ImageFacts:
    """Return what a model says about its images."""
    config = getattr(model, "pretrained_cfg", None) or {}
    embeds = _embeds(model)
    dynamic = bool(getattr(model, "dynamic_img_size", False))
    if dynamic or not embeds:
        fixed = not dynamic and bool(config.get("fixed_input_size", False))
    else:
        fixed = bool(getattr(embeds[0], "strict_img_size", True))
    known = tuple(config.get("input_size", None) or (3, *_DEFAULT_SIZE))
    # Few models say which size they were built for, so later ones may be tried.
    sizes = [*_own_sizes(model), known[1:], *((edge, edge) for edge in _SIZES)]
    channels = _channels(model, known[0])
    mean, std = (tuple(float(x) for x in config.get(name) or ()) for name in ("mean", "std"))
    if len(mean) != channels or len(std) != channels:
        mean = std = (0.5,) * channels
    return ImageFacts(channels, tuple(dict.fromkeys(sizes)), fixed, mean, std)


def _channels(model: nn.Module, default: int) -> int:
    """Return the channels of the first convolution, but where a stem folds pixels into them."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return default if first is None or first.in_channels > _MOST else int(first.in_channels)
