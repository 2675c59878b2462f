"""Small, randomly initialised relatives of every timm architecture, to walk them all on a CPU.

Every timm entry point hands its settings to `build_model_with_cfg`. `build` lets the entry point
choose its classes and flags, and only makes numbers smaller on that last step: blocks per stage,
heads, widths, image. Head width stays what it was, since rotary embeddings depend on it.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

from torch import nn

Settings = dict[str, Any]
Rule = Callable[[Settings], Settings]

CLASSES = 5
BLOCKS = 2
HEADS = 2
GRID = 4
IMAGE = 64
WIDEST = 512

# fmt: off
_DEPTHS = (
    "depth", "depths", "layers", "num_blocks", "num_modules", "serial_depths", "parallel_depth",
    "depth_list", "block_config", "block_per_stage", "k_sec", "stages", "num_blocks_list", "d",
)
# fmt: on
_LIMITS = dict.fromkeys(_DEPTHS, BLOCKS) | {"c": 2048, "growth_rates": 64, "width_factor": 1}
_WIDTHS = ("embed_dim", "embed_dims", "dims", "widths")
_STAGE_WIDTHS = (64, 128, 256, 512, 512)


def _two_kinds(settings: Settings, *, name: str, size: int, most: int) -> Settings:
    """Shorten stages that hold attention groups, of `size` modules each, after convolutions."""
    few = [min(count, most) for count in settings[name]]
    stages = zip(settings["depths"], settings[name], few, strict=True)
    depths = [min(total - size * old, BLOCKS) + size * new for total, old, new in stages]
    return {name: tuple(few), "depths": tuple(depths)}


def _stage_widths(settings: Settings) -> Settings:
    name = "embed_dims" if "embed_dims" in settings else "embed_dim"
    changed: Settings = {name: _STAGE_WIDTHS[: len(settings[name])]}
    if "stem_width" in settings:
        # Whether the stem's width is that of the first stage decides on its shortcut.
        stem = settings["stem_width"]
        last = stem if isinstance(stem, int) else stem[-1]
        width = _STAGE_WIDTHS[0] if last == settings[name][0] else _STAGE_WIDTHS[0] // 2
        changed["stem_width"] = width if isinstance(stem, int) else (width // 2, width)
    return changed


def _one_global_block(settings: Settings) -> Settings:
    # The first block of a stage pools, and pooling needs a window.
    stages = [min(count, BLOCKS) for count in settings["stages"]]
    return {"global_att_blocks": (sum(stages[:2]) + 1,), "window_spec": (8, 4, 4, 2)}


def _stem_width(settings: Settings) -> Settings:
    # A convolutional stem is built before the last step; unprojected, its width is a given.
    if settings["embed_layer"].keywords.get("proj", True):
        return {}
    return {name: settings[name] for name in ("embed_dim", "num_heads")}


def _single_blocks(settings: Settings) -> Settings:
    return {k: [*v[:3], 1, *v[4:]] for k, v in settings.items() if k.startswith("stage")}


def _slim_groups(settings: Settings) -> Settings:
    return {"base_width": min(settings["base_width"], 8)} if settings["cardinality"] > 1 else {}


# Per module of timm: settings that the general rules cannot know, applied after them.
_OVERRIDES: dict[str, Settings | Rule] = {
    "convit": {"embed_dim": 48, "local_up_to_layer": 1},
    "csatv2": partial(_two_kinds, name="transformer_depths", size=1, most=BLOCKS),
    # Its fixed number of heads divides the widths as they are, not their halves.
    "edgenext": lambda settings: {"dims": settings["dims"]},
    "efficientformer": {"num_vit": 1},
    "efficientformer_v2": {"num_vit": 1},
    "efficientvit_mit": {"head_widths": (256, 256)},
    "fastvit": _stage_widths,
    "focalnet": {"embed_dim": 64},
    "gemma4_vit": {"intermediate_size": 256},
    "hgnet": _single_blocks,
    "hieradet_sam2": _one_global_block,
    "iformer": partial(_two_kinds, name="attn_groups", size=3, most=1),
    "maxxvit": _stage_widths,
    "nasnet": {"num_features": 1056, "stem_size": 32},
    "nextvit": {"depths": (1, 2, 5, 2)},
    # Widths and stages follow from these numbers; they are those of the smallest RegNet.
    "regnet": {"depth": 13, "w0": 24, "wa": 36.44, "wm": 2.49, "group_size": 16},
    "resnet": _slim_groups,
    "swin_transformer": {"window_size": 4},
    "swin_transformer_v2": {"window_size": 4},
    "tiny_vit": {"window_sizes": (4, 4, 4, 2)},
    "vgg": {"mlp_ratio": 0.05},
    "vision_transformer_sam": {"global_attn_indexes": (1,), "window_size": 3},
    "vision_transformer_hybrid": _stem_width,
    "vitamin": _stem_width,
}

# Image sizes of modules or names that the general rule does not fit; 0: the size it is made for.
_IMAGES = {
    0: ("bat_resnext26ts", "byoanet", "efficientformer"),
    84: ("deepseek_vit",),
    96: ("gemma4_vit", "maxxvit"),
    120: ("crossvit",),
    128: ("efficientvit_msra", "hieradet_sam2", "nasnet", "pnasnet", "vision_transformer_hybrid"),
    160: ("inception_resnet_v2", "inception_v3", "inception_v4"),
}


def names() -> list[str]:
    """Return every architecture name that timm knows."""
    import timm

    return list(timm.list_models())


def build(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """Build a small relative of an architecture: same module classes and flags, fewer numbers.

    Args:
        name: An architecture name, as in `names()`.

    Returns:
        The model, random weights, float32, eval mode; and the `(C, H, W)` that it runs on.
    """
    import timm

    module = sys.modules[timm.models.model_entrypoint(name).__module__]
    family = module.__name__.rpartition(".")[2]
    config: Any = timm.get_pretrained_cfg(name)
    images: list[int] = []
    original = module.build_model_with_cfg

    def shrunk(model_cls: type[nn.Module], *args: Any, **given: Any) -> Any:
        known = _parameters(model_cls)
        images.append(_image_size(name, family, known | given) or config.input_size[-1])
        if "num_classes" in known and config.num_classes:
            given["num_classes"] = CLASSES
        if "img_size" in known:
            given["img_size"] = images[0]
        # A pruning table names the blocks of the full model.
        if not given.get("pruned"):
            given.update(_shrink_all(family, known | given))
        return original(model_cls, *args, **given)

    with mock.patch.object(module, "build_model_with_cfg", shrunk):
        model: nn.Module = timm.create_model(name, pretrained=False)
    return model.eval(), (config.input_size[0], images[0], images[0])


def _parameters(model_cls: type[nn.Module]) -> Settings:
    """Collect a class's settings and their defaults, through `**kwargs` to its bases."""
    found: Settings = {}
    for cls in model_cls.__mro__:
        parameters = inspect.signature(cls).parameters.values()
        for parameter in parameters:
            found.setdefault(parameter.name, parameter.default)
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
    return found


def _image_size(name: str, family: str, settings: Settings) -> int:
    for size, keys in _IMAGES.items():
        if name in keys or family in keys:
            return size
    patch = getattr(settings.get("cfg"), "patch_size", settings.get("patch_size"))
    return GRID * patch if isinstance(patch, int) and patch > GRID else IMAGE


def _shrink_all(family: str, settings: Settings) -> Settings:
    """Shrink plain settings, or the configuration object that some classes take instead."""
    for name in ("cfg", "model_cfg"):
        config = settings.get(name)
        if dataclasses.is_dataclass(config) or isinstance(config, dict):
            return {name: _shrunk_config(config, family)}
    return _shrunk(settings) | _overrides(family, settings)


def _shrunk_config(config: Any, family: str = "") -> Any:
    if isinstance(config, (list, tuple)):
        return type(config)(_shrunk_config(item) for item in config)
    if isinstance(config, dict):
        nested = {k: _shrunk_config(v) for k, v in config.items() if isinstance(v, dict)}
        return config | nested | _shrunk(config) | _overrides(family, config)
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    nested = {
        name: _shrunk_config(value)
        for name, value in values.items()
        if dataclasses.is_dataclass(value) or name == "blocks"
    }
    return dataclasses.replace(config, **nested | _shrunk(values) | _overrides(family, values))


def _overrides(family: str, settings: Settings) -> Settings:
    rule = _OVERRIDES.get(family, {})
    return rule(settings) if callable(rule) else dict(rule)


def _shrunk(settings: Settings) -> Settings:
    changed = {
        name: _mapped(partial(min, limit), settings[name])
        for name, limit in _LIMITS.items()
        if name in settings and _is_count(settings[name])
    }
    changed.update(_narrowed(settings))
    blocks = settings.get("block_args")
    if isinstance(blocks, list):
        changed["block_args"] = [_few_of_each(stage) for stage in blocks]
        changed["round_chs_fn"] = _unscaled(settings["round_chs_fn"])
    return changed


def _is_count(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_count(item) for item in value)
    return isinstance(value, (int, float))


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(change, item) for item in value)
    return change(value)


def _divided(value: Any, factor: int) -> Any:
    return _mapped(lambda number: number // factor, value)


def _narrowed(settings: Settings) -> Settings:
    """Take heads away and keep their width; halve widths that are not made of heads."""
    heads = settings.get("num_heads")
    changed: Settings = {}
    for name in _WIDTHS:
        width = settings.get(name)
        if isinstance(heads, int) and isinstance(width, int):
            changed |= _fewer_heads(settings, name)
        elif isinstance(heads, (list, tuple)) and _is_count(width):
            factor = _head_factor(heads, width)
            changed |= {name: _divided(width, factor), "num_heads": _divided(heads, factor)}
        elif heads is None and isinstance(width, (list, tuple)):
            halvings = max(0, math.ceil(math.log2(max(width) / WIDEST)))
            changed[name] = _divided(width, 2**halvings)
    return changed


def _fewer_heads(settings: Settings, name: str) -> Settings:
    heads = settings["num_heads"]
    few = min(heads, HEADS)
    changed = {"num_heads": few, name: settings[name] // heads * few}
    shared = settings.get("num_kv_heads")
    if isinstance(shared, tuple):
        # Grouped-query blocks lie in the middle, full ones at both ends.
        shared = (shared[0], shared[len(shared) // 2])[:BLOCKS]
        changed["num_kv_heads"] = tuple(max(1, count * few // heads) for count in shared)
    elif isinstance(shared, int):
        changed["num_kv_heads"] = max(1, shared * few // heads)
    return changed


def _head_factor(heads: Any, width: Any) -> int:
    widths = list(width) if isinstance(width, (list, tuple)) else [width]
    common = math.gcd(*heads)
    largest = widths[-1] if len(widths) > 1 else widths[0] * 2 ** (len(heads) - 1)
    factor = common // 2 if common % 2 == 0 else common if largest > 2 * WIDEST else 1
    return factor if all(w % factor == 0 for w in widths) else 1


def _few_of_each(blocks: list[Settings]) -> list[Settings]:
    """Keep the first block of every kind, and the last one, whose output is the stage's."""
    kinds = [_kind(block) for block in blocks]
    last = len(blocks) - 1
    return [block for i, block in enumerate(blocks) if kinds.index(kinds[i]) == i or i == last]


def _kind(block: Settings) -> tuple[Any, ...]:
    # A size of zero leaves a convolution out.
    absent = [name for name, value in block.items() if _is_count(value) and not value]
    return block["block_type"], *sorted(absent)


def _unscaled(rounding: Any) -> Any:
    scale = getattr(rounding, "keywords", {}).get("multiplier", 1.0)
    return partial(rounding, multiplier=min(2.0, scale))
