"""Vision encoders of transformers: those of a table by name, all others by their attention."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import UnsupportedArchitectureError
from .anatomy import Encoder, Head, ImageFacts, ancestors, as_pair, is_kind
from .discover import Found, find_blocks, first_layer
from .projection import join
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
_CLASSIFIES = ("ForImageClassification", "ForVideoClassification")
_DEFAULT_SIZE = (224, 224)
_VISION_INPUTS = ("pixel_values", "pixel_values_videos", "flattened_patches", "pixel_patches")


def matches(module: nn.Module) -> bool:
    """Tell whether a module is a transformers model of images that holds attention of its own."""
    if not is_kind(module, "PreTrainedModel", "transformers"):
        return False
    if type(module).__module__.startswith(PACKAGE + "timm_"):
        return False
    # Told by its forward: text towers and inner encoders inherit everything else.
    names = _called_with(module)
    images = bool(names) and (names[0] in _VISION_INPUTS or "grid_thw" in names)
    if not images and type(module).__name__ not in ALSO:
        return False
    return any(rule(path, part, module) is not None for path, part in module.named_modules())


def describe(host: nn.Module, path: str, model: Any) -> Encoder:
    """Describe a transformers vision encoder found at `path` of the host.

    Raises:
        UnsupportedArchitectureError: Prompts have no meaning in it.
    """
    name, row = _row(model) or (type(model).__name__, None)
    found = find_blocks(model, path, rule)
    _refuse(model, name, found)
    norm = None if row is None else row.norm
    pools = name == "BeitModel" and model.config.use_mean_pooling and model.pooler is not None
    after = NORM_BEHIND if pools else None
    registers = int(getattr(model.config, "num_register_tokens", 0))
    reads = "mean" if type(model).__name__ in _MEAN else "pooled"
    reads = "mean:norm-after" if after else reads if row is None else row.reads
    return Encoder(
        family=f"transformers {name}",
        library="transformers",
        path=path,
        input_size=_input_size(model, row),
        blocks=found.blocks,
        prefix_tokens=0 if row is None else row.prefix + registers,
        has_cls=row is not None and row.prefix > 0,
        final_norm=None if norm is None else join(path, norm),
        norm_after_pool=None if after is None else join(path, after),
        norm_weights=first_layer(model, path, after, norm, *NORMS) or _norm_outside(host, path),
        head=head(host, path, reads, found.blocks[-1].width),
        known=row is not None,
        skipped=found.skipped,
        inputs=_inputs(model, row),
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


def _row(module: nn.Module) -> tuple[str, Family] | None:
    for cls in type(module).__mro__:
        if cls.__name__ in FAMILIES and cls.__module__.startswith(PACKAGE):
            return cls.__name__, FAMILIES[cls.__name__]
    return None


def _norm_outside(host: nn.Module, path: str) -> str | None:
    """Return the path of the final norm of a host whose encoder has none (VideoMAE, CvT)."""
    around = (first_layer(m, at, *NORMS_OUTSIDE) for at, m in ancestors(host, path))
    return next(filter(None, around), None)


def head(host: nn.Module, path: str, reads: str = "pooled", width: int = 0) -> Head | None:
    """Return the classifier of an encoder, or of a model around it.

    Args:
        host: The model.
        path: Of the encoder in it.
        reads: What the classifier is fed.
        width: Of the tokens; 0 where it is not known, and only a linear layer tells.
    """
    for owner, module in ((path, host.get_submodule(path)), *ancestors(host, path)):
        if hasattr(module, "cls_classifier"):
            names = ("cls_classifier", "distillation_classifier")
            return Head(tuple(join(owner, n) for n in names), "cls|dist", width)
        if hasattr(module, "classifier") and type(module).__name__.endswith(_CLASSIFIES):
            name, layer = "classifier", module.classifier
            if type(layer) is nn.Sequential:
                # ConvNets flatten a pooled map first.
                linear = [n for n, part in layer.named_children() if isinstance(part, nn.Linear)]
                name = join(name, *linear[-1:])
                layer = module.get_submodule(name)
            width = getattr(layer, "in_features", width * (1 + ("+" in reads)))
            return Head((join(owner, name),), reads, int(width)) if width else None
    return None


def image_facts(model: Any) -> ImageFacts:
    """Return what a model says about its images."""
    channels = int(getattr(model.config, "num_channels", None) or 3)
    size = as_pair(getattr(model.config, "image_size", None)) or _DEFAULT_SIZE
    return ImageFacts(channels, (size,), None, (0.5,) * channels, (0.5,) * channels)


def _input_size(model: Any, row: Family | None) -> tuple[int, int, int]:
    facts = image_facts(model)
    height, width = facts.sizes[0]
    if row is not None and row.any_size:
        patch = as_pair(getattr(model.config, "patch_size", None)) or _DEFAULT_SIZE
        height, width = min(height, 4 * patch[0]), min(width, 4 * patch[1])
    return facts.channels, height, width


def _inputs(model: Any, row: Family | None) -> str:
    if row is not None:
        return "image" if row.image else "patches"
    frames = (getattr(model.config, name, 0) for name in ("num_frames", "frames_per_clip"))
    return "video" if any(frames) else "guess"


def takes_images(module: nn.Module) -> bool:
    """Tell whether a transformers model takes images as its first argument."""
    # Not `main_input_name`, which an inner part that takes tokens inherits.
    is_model = is_kind(module, "PreTrainedModel", "transformers")
    return is_model and _called_with(module)[:1] == ["pixel_values"]


def _called_with(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[1:]
