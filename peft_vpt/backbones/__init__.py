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

FAMILIES: tuple[ModuleType, ...] = (timm_vit, transformers_vit)
_KNOWN = (
    "timm VisionTransformer (ViT, DeiT, CLIP, SigLIP, DINOv2 ...) and transformers ViT, DeiT, "
    "BEiT without relative bias, DINOv2, CLIP vision, SigLIP vision, ViT-MAE, ViT-MSN"
)


def find_encoder(host: nn.Module) -> Encoder:
    """Find and describe the one vision transformer of a host.

    Raises:
        UnsupportedArchitectureError: None is known, or there are several encoders.
    """
    found = _matching(host)
    if not found:
        raise UnsupportedArchitectureError(
            f"inject_prompts: found no vision transformer that is known in {_name(host)}. "
            f"Known are {_KNOWN}. docs/how-it-works.md says how to add a family."
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


def _matching(host: nn.Module) -> list[tuple[str, nn.Module, ModuleType]]:
    return [
        (path, module, family)
        for path, module in host.named_modules()
        for family in FAMILIES
        if family.matches(module)
    ]


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
