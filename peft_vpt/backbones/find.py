"""How the one encoder of a host is found: `encoder_for`.

A vision transformer is described by the family that knows it. Where there is none, an image model
of timm or transformers is described as a whole, without blocks: what a border of pixels needs to
know. What a model says about its images is here too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn

from ..errors import UnsupportedArchitectureError
from ..spec import location as place_of
from . import timm_table, timm_vit, transformers_table, transformers_vit
from .anatomy import Encoder, Head, ancestors, as_pair, is_below, is_kind
from .projection import join
from .timm_vit import classifier_paths, is_simple

Match = tuple[str, nn.Module, ModuleType]
FAMILIES: tuple[ModuleType, ...] = (timm_vit, transformers_vit)
_RULES = (timm_table.rule, transformers_table.rule)
_DEFAULT_SIZE = (224, 224)
_SIZES = (224, 256, 64, 32, 384)
# A stem that folds pixels into channels has more; the image itself has not.
_MOST = 15


def encoder_for(host: nn.Module, location: str) -> Encoder:
    """Describe the encoder of a host, or a whole image model where the location takes one.

    Raises:
        UnsupportedArchitectureError: Nothing in the host is known, or there are several encoders.
    """
    try:
        return _vision_transformer(host)
    except UnsupportedArchitectureError as error:
        encoder = _image_model(host)
        if encoder is None:
            raise
        if place_of(location).whole_models:
            return encoder
        advice = f"{error.advice}. " if error.advice else ""
        advice += "`location='pad'` works for every image model"
        raise type(error)(error.call, error.problem, advice, **error.facts) from error


def _vision_transformer(host: nn.Module) -> Encoder:
    """Find and describe the one vision transformer of a host.

    Raises:
        UnsupportedArchitectureError: None is known, or there are several encoders.
    """
    found = _matching(host)
    if not found:
        raise UnsupportedArchitectureError(
            "inject_prompts",
            f"found no attention over image tokens that prompts could join in {_name(host)}",
            "docs/supported-models.md lists what is known; `location='pad'` works for every image "
            "model of timm and transformers",
        )
    others = _other_encoders(host, [path for path, _, _ in found])
    if len(found) + len(others) > 1:
        paths = [path for path, _, _ in found]
        raise UnsupportedArchitectureError(
            "inject_prompts",
            f"{_name(host)} holds several encoders: "
            f"{', '.join(repr(p) for p in sorted(paths + others))}",
            "Pass the one to prompt, "
            + " or ".join(f"`inject_prompts(model.{path})`" for path in paths)
            + "; then only that submodule is frozen and counted",
            paths=paths,
        )
    path, module, family = found[0]
    encoder: Encoder = family.describe(host, path, module)
    if not encoder.blocks:
        raise UnsupportedArchitectureError(
            "inject_prompts", f"{_name(host)} has no transformer blocks, so prompts have no place"
        )
    return encoder


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _matching(host: nn.Module) -> list[Match]:
    found = [
        (path, module, family)
        for path, module in host.named_modules()
        for family in FAMILIES
        if family.matches(module)
    ]
    return [match for match in found if not _is_spoken_for(match, found)]


def _is_spoken_for(match: Match, found: list[Match]) -> bool:
    """Tell whether another model describes the same encoder better.

    A transformers model with a head is built around its encoder, which is then the one to take; a
    timm model that holds another one is itself the encoder.
    """
    path, _, family = match
    if family is timm_vit:
        return any(o is timm_vit and p != path and is_below(path, p) for p, _, o in found)
    return any(p != path and is_below(p, path) for p, _, _ in found)


def _other_encoders(host: nn.Module, known: list[str]) -> list[str]:
    """Return the paths of transformers models beside the known ones: text towers, decoders."""
    others: list[str] = []
    for path, module in host.named_modules():
        related = is_below(path, *known, *others) or any(is_below(k, path) for k in known)
        if not related and is_kind(module, "PreTrainedModel", "transformers"):
            others.append(path)
    return others


def _image_model(host: nn.Module) -> Encoder | None:
    """Describe the one image model of a host, or return None."""
    models = list(_outermost(host))
    if len(models) != 1:
        return None
    path, model = models[0]
    if _is_timm(model):
        return _whole(model, path, "timm", _timm_head(model, path))
    if not takes_images(model):
        return None
    base = getattr(model, "base_model", model)
    inner = join(path, next(name for name, part in model.named_modules() if part is base))
    if _is_timm(base):
        return _whole(base, inner, "timm", _timm_head(base, inner))
    return _whole(base, inner, "transformers", _transformers_head(model, path))


def _outermost(host: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    found: list[str] = []
    for path, module in host.named_modules():
        if is_below(path, *found):
            continue
        if _is_timm(module) or is_kind(module, "PreTrainedModel", "transformers"):
            found.append(path)
            yield path, module


def _is_timm(module: nn.Module) -> bool:
    ours = any(cls.__module__.startswith("timm.models.") for cls in type(module).__mro__)
    return ours and all(hasattr(module, n) for n in ("forward_features", "get_classifier"))


def _whole(model: Any, path: str, library: str, head: Head | None) -> Encoder:
    facts = image_facts(model, library)
    return Encoder(
        family=f"{library} {type(model).__name__}",
        library=library,
        path=path,
        blocks=(),
        prefix_tokens=0,
        has_cls=False,
        final_norm=None,
        norm_after_pool=None,
        norm_weights=None,
        head=head,
        gate=None,
        input_size=(facts.channels, *facts.sizes[0]),
    )


def _timm_head(model: Any, path: str) -> Head | None:
    names = classifier_paths(model)
    if not names:
        return None
    first: Any = model.get_submodule(names[0])
    width = getattr(first, "in_features", None) or getattr(first, "in_channels", None)
    width = width or getattr(model, "head_hidden_size", None) or model.num_features
    paths = tuple(join(path, name) for name in names)
    return Head(paths, "pooled", int(width), is_simple(model, names))


def _transformers_head(model: nn.Module, path: str) -> Head | None:
    classifier = getattr(model, "classifier", None)
    if not type(model).__name__.endswith("ForImageClassification"):
        return None
    name = "classifier"
    if isinstance(classifier, nn.Sequential):
        linear = [n for n, m in classifier.named_children() if isinstance(m, nn.Linear)]
        name = f"classifier.{linear[-1]}" if linear else name
        classifier = model.get_submodule(name)
    if not isinstance(classifier, nn.Linear):
        return None
    return Head((join(path, name),), "pooled", int(classifier.in_features))


def is_convnet(host: nn.Module, encoder: Encoder) -> bool:
    """Tell whether a model mixes its pixels by convolutions alone.

    That is, it has several whose windows overlap (patches that are cut out do not mix), and no
    attention of any kind beside them.
    """
    if encoder.blocks:
        return False
    for path, module in host.named_modules():
        parent = host.get_submodule(path.rpartition(".")[0])
        if any(rule(path, module, parent) is not None for rule in _RULES):
            return False
    model = host.get_submodule(encoder.path)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    return sum(c.kernel_size[0] > c.stride[0] for c in convs) > 1


def image_path(host: nn.Module, encoder: Encoder) -> str:
    """Return the path of the module that takes the image: the encoder, or the nearest around it.

    What holds the blocks may be called with tokens, as the `...Encoder` classes of transformers.
    """
    takes = _is_timm if encoder.library == "timm" else takes_images
    if takes(host.get_submodule(encoder.path)):
        return encoder.path
    around = (path for path, module in ancestors(host, encoder.path) if takes(module))
    return next(around, encoder.path)


def takes_images(module: nn.Module) -> bool:
    """Tell whether a transformers model takes images as its first argument."""
    if not is_kind(module, "PreTrainedModel", "transformers"):
        return False
    # Not `main_input_name`, which an inner part that takes tokens inherits.
    return list(inspect.signature(type(module).forward).parameters)[1:2] == ["pixel_values"]


@dataclass(frozen=True)
class ImageFacts:
    """What a model says about the images it takes.

    Args:
        channels: Of an image.
        sizes: `(height, width)`, the likeliest first; the default one where it takes several.
        fixed: Whether it takes no other size; None where only trying tells.
        mean: Of the normalisation, per channel; 0.5 where nothing is said.
        std: Likewise.
    """

    channels: int
    sizes: tuple[tuple[int, int], ...]
    fixed: bool | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


def image_facts(model: Any, library: str) -> ImageFacts:
    """Return what a model says about its images."""
    if library == "timm":
        return _timm_facts(model)
    config = model.config
    channels = int(getattr(config, "num_channels", None) or 3)
    size = as_pair(getattr(config, "image_size", None)) or _DEFAULT_SIZE
    return ImageFacts(channels, (size,), None, (0.5,) * channels, (0.5,) * channels)


def _timm_facts(model: Any) -> ImageFacts:
    config = getattr(model, "pretrained_cfg", None) or {}
    embeds = [m for m in model.modules() if is_kind(m, "PatchEmbed", "timm.layers")]
    embed: Any = next((e for e in embeds if getattr(e, "img_size", None)), None)
    dynamic = bool(getattr(model, "dynamic_img_size", False))
    if dynamic or embed is None:
        fixed = not dynamic and bool(config.get("fixed_input_size", False))
    else:
        fixed = bool(getattr(embed, "strict_img_size", True))
    known = tuple(config.get("input_size", None) or (3, *_DEFAULT_SIZE))
    own = (as_pair(getattr(m, "img_size", None)) for m in (model, embed, *model.children()))
    # Without repeats. Few models say which size they were built for, so later ones may be tried.
    sizes = tuple(dict.fromkeys([*(s for s in own if s), known[1:], *((n, n) for n in _SIZES)]))
    channels = _channels(model, known[0])
    mean, std = (tuple(float(x) for x in config.get(name) or ()) for name in ("mean", "std"))
    if len(mean) != channels or len(std) != channels:
        mean = std = (0.5,) * channels
    return ImageFacts(channels, sizes, fixed, mean, std)


def _channels(model: nn.Module, default: int) -> int:
    """Return the channels of the first convolution, but where a stem folds pixels into them."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return default if first is None or first.in_channels > _MOST else int(first.in_channels)


def says_its_size(model: Any, size: Sequence[int]) -> nn.Module:
    """Let a model that takes images of any size say which size these have: a border asks it."""
    config = getattr(model, "pretrained_cfg", None)
    if config and not encoder_for(model, "pad").blocks:
        model.pretrained_cfg = {**config, "input_size": (config["input_size"][0], *size)}
    found: nn.Module = model
    return found
