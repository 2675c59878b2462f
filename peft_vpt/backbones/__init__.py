"""Anatomy: which models are known, and what they call their parts.

To add a family, write a file with `matches(module)` and `describe(host, path, module)` and put it
into `FAMILIES`. The library behind it is never imported: a family is told by class names.
"""

from __future__ import annotations

from types import ModuleType

from torch import nn

from ..errors import UnsupportedArchitectureError
from . import timm_vit, transformers_vit
from .anatomy import Encoder, is_kind

Match = tuple[str, nn.Module, ModuleType]
FAMILIES: tuple[ModuleType, ...] = (timm_vit, transformers_vit)


def find_encoder(host: nn.Module) -> Encoder:
    """Find and describe the one vision transformer of a host.

    Raises:
        UnsupportedArchitectureError: None is known, or there are several encoders.
    """
    found = _matching(host)
    if not found:
        raise UnsupportedArchitectureError(
            f"inject_prompts: found no attention over image tokens that prompts could join in "
            f"{_name(host)}. docs/supported-models.md lists what is known; location='pad' works "
            "for every image model of timm and transformers."
        )
    others = _other_encoders(host, [path for path, _, _ in found])
    if len(found) + len(others) > 1:
        paths = [path for path, _, _ in found]
        raise UnsupportedArchitectureError(
            f"inject_prompts: {_name(host)} holds several encoders: "
            f"{', '.join(repr(p) for p in sorted(paths + others))}. Pass the one to prompt, "
            + " or ".join(f"inject_prompts(model.{path})" for path in paths)
            + "; then only that submodule is frozen and counted."
        )
    path, module, family = found[0]
    encoder: Encoder = family.describe(host, path, module)
    if not encoder.blocks:
        raise UnsupportedArchitectureError(
            f"inject_prompts: {_name(host)} has no transformer blocks, so prompts have no place."
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
        return any(o is timm_vit and p != path and _is_inside(path, p) for p, _, o in found)
    return any(p != path and _is_inside(p, path) for p, _, _ in found)


def _is_inside(path: str, outer: str) -> bool:
    return not outer or path.startswith(f"{outer}.")


def _other_encoders(host: nn.Module, known: list[str]) -> list[str]:
    """Return the paths of transformers models beside the known ones: text towers, decoders."""

    def related(path: str) -> bool:
        return any(
            path == k or k.startswith(f"{path}.") or path.startswith(f"{k}.") or not k or not path
            for k in known
        )

    others: list[str] = []
    for path, module in host.named_modules():
        is_model = is_kind(module, "PreTrainedModel", "transformers")
        nested = any(path.startswith(f"{other}.") for other in others)
        if is_model and not related(path) and not nested:
            others.append(path)
    return others
