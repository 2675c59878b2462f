"""Vision encoders of transformers: those of a table by name, all others by their attention."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import UnsupportedArchitectureError
from .anatomy import Encoder, Head, ancestors, as_pair, is_kind
from .discover import Found, find_blocks
from .projection import join, reach
from .transformers_table import ALSO, MODELS, rule

PACKAGE = "transformers.models."


@dataclass(frozen=True)
class Family:
    """What a table row says about one transformers class.

    Args:
        prefix: Number of prefix tokens, registers not counted.
        norm: The final norm below the encoder; None where it never sees the whole sequence.
        reads: What the class's `...ForImageClassification` feeds its classifier.
        any_size: Whether the embeddings take any image size without being asked.
        image: Whether the model takes an image as a map of pixels.
    """

    prefix: int
    norm: str | None
    reads: str
    any_size: bool = False
    image: bool = True


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
    "Siglip2VisionModel": Family(0, "post_layernorm", "mean:valid", image=False),
    "Data2VecVisionModel": Family(1, None, "mean:norm-after"),
    "IJepaModel": Family(0, "layernorm", "mean"),
    "MetaClip2VisionModel": Family(1, None, "mean:no-norm"),
    "DINOv3ViTModel": Family(1, "norm", "cls", any_size=True),
    "ViTMAEModel": Family(1, "layernorm", "cls"),
    "ViTMSNModel": Family(1, "layernorm", "cls"),
}
# Names of the final norm in models without a row, and in what holds an encoder that has none.
NORM_BEHIND = "pooler.layernorm"
NORMS = ("post_layernorm", "layernorm", "norm", "rms_norm", NORM_BEHIND, "head_norm")
NORMS_OUTSIDE = ("fc_norm", "layernorm", "head_layernorm")
# The mean of all tokens behind the final norm.
_MEAN = ("SwinModel", "Swinv2Model", "DonutSwinModel")
_VISION_INPUTS = ("pixel_values", "pixel_values_videos", "flattened_patches", "pixel_patches")


def matches(module: nn.Module) -> bool:
    """Tell whether a module is a transformers model of images that holds attention of its own."""
    if not is_kind(module, "PreTrainedModel", "transformers"):
        return False
    if type(module).__module__.startswith(PACKAGE + "timm_"):
        return False
    return _takes_images(module) and any(
        rule(path, part, module) is not None for path, part in module.named_modules()
    )


def _takes_images(module: nn.Module) -> bool:
    """Tell by its forward: text towers and inner encoders inherit everything else."""
    if type(module).__name__ in ALSO:
        return True
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return bool(names) and (names[0] in _VISION_INPUTS or "grid_thw" in names)


def describe(host: nn.Module, path: str, model: Any) -> Encoder:
    """Describe a transformers vision encoder found at `path` of the host.

    Raises:
        UnsupportedArchitectureError: Prompts have no meaning in it.
    """
    name, row = _row(model) or (type(model).__name__, None)
    found = find_blocks(model, path, rule)
    _refuse(model, name, found)
    width = found.blocks[-1].width
    norm, after = (None, None) if row is None else (row.norm, _norm_after(model, path, name))
    return Encoder(
        family=f"transformers {name}",
        library="transformers",
        path=path,
        blocks=found.blocks,
        prefix_tokens=(
            0 if row is None else row.prefix + int(getattr(model.config, "num_register_tokens", 0))
        ),
        has_cls=row is not None and row.prefix > 0,
        final_norm=None if norm is None else join(path, norm),
        norm_after_pool=after,
        norm_weights=_find_path(model, path, (after and NORM_BEHIND, norm, *NORMS))
        or _norm_outside(host, path),
        head=_head(host, path, row, width, mean_pooled=after is not None),
        gate=None,
        input_size=_input_size(model, row),
        plain=row is not None or found.one_list(),
        known=row is not None,
        inputs=_inputs(model, row),
        skipped=tuple(f"{part}: {reason}" for part, reason in found.refused.items()),
    )


def _refuse(model: nn.Module, name: str, found: Found) -> None:
    reason = MODELS.get(type(model).__name__)
    if hasattr(model, "decoder"):
        reason = "it is an encoder-decoder"
    if reason is not None:
        raise UnsupportedArchitectureError(
            "inject_prompts",
            f"transformers {name}: {reason}; prompts belong to a backbone",
            "Pass its vision transformer, if it has one",
        )
    if not found.blocks:
        raise found.unsupported(f"transformers {name}")


def _norm_after(model: Any, path: str, name: str) -> str | None:
    if name != "BeitModel" or not model.config.use_mean_pooling or model.pooler is None:
        return None
    return join(path, NORM_BEHIND)


def _row(module: nn.Module) -> tuple[str, Family] | None:
    for cls in type(module).__mro__:
        if cls.__name__ in FAMILIES and cls.__module__.startswith(PACKAGE):
            return cls.__name__, FAMILIES[cls.__name__]
    return None


def _find_path(model: nn.Module, path: str, names: tuple[str | None, ...]) -> str | None:
    for name in filter(None, names):
        module = reach(model, name)
        # Where the norm stands behind the pooling, some models have an identity in front of it.
        if module is not None and any(True for _ in module.parameters()):
            return join(path, name)
    return None


def _norm_outside(host: nn.Module, path: str) -> str | None:
    """Return the path of the final norm of a host whose encoder has none (VideoMAE, CvT)."""
    owners = ancestors(host, path)
    return next(filter(None, (_find_path(m, at, NORMS_OUTSIDE) for at, m in owners)), None)


def _head(
    host: nn.Module, path: str, row: Family | None, width: int, *, mean_pooled: bool
) -> Head | None:
    for owner, module in ancestors(host, path):
        if hasattr(module, "cls_classifier"):
            names = ("cls_classifier", "distillation_classifier")
            return Head(tuple(join(owner, n) for n in names), "cls|dist", width)
        if hasattr(module, "classifier") and type(module).__name__.endswith(
            ("ForImageClassification", "ForVideoClassification")
        ):
            reads = "mean:norm-after" if mean_pooled else row.reads if row else _reads(host, path)
            width = getattr(module.classifier, "in_features", width * (1 + ("+" in reads)))
            return Head((join(owner, "classifier"),), reads, width)
    return None


def _reads(host: nn.Module, path: str) -> str:
    """Return what is known of the heads of models with several widths."""
    return "mean" if type(host.get_submodule(path)).__name__ in _MEAN else "pooled"


def _input_size(model: Any, row: Family | None) -> tuple[int, int, int]:
    config = model.config
    names = ("image_size", "patch_size")
    size, patch = (as_pair(getattr(config, name, None)) or (224, 224) for name in names)
    if row is not None and row.any_size:
        size = (min(size[0], 4 * patch[0]), min(size[1], 4 * patch[1]))
    return (int(getattr(config, "num_channels", 3)), *size)


def _inputs(model: Any, row: Family | None) -> str:
    if row is not None:
        return "image" if row.image else "patches"
    return "video" if _frames(model) else "guess"


def _frames(model: Any) -> int:
    return int(
        getattr(model.config, "num_frames", 0) or getattr(model.config, "frames_per_clip", 0) or 0
    )
