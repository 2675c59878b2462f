"""How the one encoder of a host is found: `encoder_for`.

A vision transformer is described by the family that knows it. Where there is none, an image model
of timm or transformers is described as a whole, without blocks: what a border of pixels needs to
know. What a model says about its images is here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ..errors import UnsupportedArchitectureError
from ..spec import location as place_of
from . import timm_vit, transformers_vit
from .anatomy import Encoder, ImageFacts, ancestors, is_below, is_kind
from .projection import join

Match = tuple[str, nn.Module, Any]
# Each says of its models what only it knows: `takes_images`, `matches`, `describe`, `rule`, `head`,
# `image_facts`.
LIBRARIES: dict[str, Any] = {"timm": timm_vit, "transformers": transformers_vit}


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
    path, module, library = found[0]
    encoder: Encoder = library.describe(host, path, module)
    return encoder


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _matching(host: nn.Module) -> list[Match]:
    found = [
        (path, module, library)
        for path, module in host.named_modules()
        for library in LIBRARIES.values()
        if library.matches(module)
    ]
    return [match for match in found if not _is_spoken_for(match, found)]


def _is_spoken_for(match: Match, found: list[Match]) -> bool:
    """Tell whether another model describes the same encoder better.

    A transformers model with a head is built around its encoder, which is then the one to take; a
    timm model that holds another one is itself the encoder.
    """
    path, _, library = match
    if library is timm_vit:
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
    if not any(library.takes_images(model) for library in LIBRARIES.values()):
        return None
    base = getattr(model, "base_model", model)
    inner = join(path, next(name for name, part in model.named_modules() if part is base))
    name = "timm" if timm_vit.takes_images(base) else "transformers"
    facts = image_facts(base, name)
    return Encoder(
        family=f"{name} {type(base).__name__}",
        library=name,
        path=inner,
        input_size=(facts.channels, *facts.sizes[0]),
        head=LIBRARIES[name].head(host, inner),
    )


def _outermost(host: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    found: list[str] = []
    for path, module in host.named_modules():
        if is_below(path, *found):
            continue
        if timm_vit.takes_images(module) or is_kind(module, "PreTrainedModel", "transformers"):
            found.append(path)
            yield path, module


def is_convnet(host: nn.Module, encoder: Encoder) -> bool:
    """Tell whether a model mixes its pixels by convolutions alone.

    That is, it has several whose windows overlap (patches that are cut out do not mix), and no
    attention of any kind beside them.
    """
    if encoder.blocks:
        return False
    for path, module in host.named_modules():
        parent = host.get_submodule(path.rpartition(".")[0])
        if any(library.rule(path, module, parent) for library in LIBRARIES.values()):
            return False
    model = host.get_submodule(encoder.path)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    return sum(c.kernel_size[0] > c.stride[0] for c in convs) > 1


def image_path(host: nn.Module, encoder: Encoder) -> str:
    """Return the path of the module that takes the image: the encoder, or the nearest around it.

    What holds the blocks may be called with tokens, as the `...Encoder` classes of transformers.
    """
    takes = LIBRARIES[encoder.library].takes_images
    if takes(host.get_submodule(encoder.path)):
        return encoder.path
    around = (path for path, module in ancestors(host, encoder.path) if takes(module))
    return next(around, encoder.path)


def image_facts(model: nn.Module, library: str) -> ImageFacts:
    """Return what a model says about its images."""
    facts: ImageFacts = LIBRARIES[library].image_facts(model)
    return facts


def says_its_size(model: Any, size: Sequence[int]) -> nn.Module:
    """Let a model that takes images of any size say which size these have: a border asks it."""
    config = getattr(model, "pretrained_cfg", None)
    if config and not encoder_for(model, "pad").blocks:
        model.pretrained_cfg = {**config, "input_size": (config["input_size"][0], *size)}
    found: nn.Module = model
    return found
