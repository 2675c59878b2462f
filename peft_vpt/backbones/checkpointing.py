"""Gradient checkpointing: whether blocks are checkpointing, and of which kind."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from .anatomy import Encoder, is_kind, module_at


def keeps_training_flag(module: nn.Module) -> bool:
    """Tell whether a module checkpoints itself, as transformers' layers do in train mode."""
    return bool(getattr(module, "gradient_checkpointing", False))


def outermost_checkpoint(host: nn.Module, path: str) -> str:
    """Return the path of the outermost layer around a block that can checkpoint itself."""
    parts = path.split(".")
    for end in range(1, len(parts)):
        outer = ".".join(parts[:end])
        if is_kind(module_at(host, outer), "GradientCheckpointingLayer", "transformers"):
            return outer
    return path


def is_checkpointing(host: nn.Module, encoder: Encoder, index: int) -> bool:
    """Tell whether a block would be recomputed in backward."""
    if encoder.library == "timm":
        # Models of several stages keep the flag in each of them.
        parts = module_at(host, encoder.path).modules()
        return any(bool(getattr(part, "grad_checkpointing", False)) for part in parts)
    return _recomputing(host, encoder, index) is not None


def is_reentrant(host: nn.Module, encoder: Encoder, index: int) -> bool:
    """Tell whether a block runs under reentrant checkpointing."""
    if not is_checkpointing(host, encoder, index):
        return False
    if encoder.library == "timm":
        # In sys.modules wherever a timm model exists.
        use = getattr(sys.modules.get("timm.layers"), "use_reentrant_ckpt", None)
        return bool(use is not None and use())
    layer: Any = _recomputing(host, encoder, index)
    function = getattr(layer, "_gradient_checkpointing_func", None)
    return bool(getattr(function, "keywords", {}).get("use_reentrant", True))


def is_cut_off(host: nn.Module, encoder: Encoder, index: int) -> bool:
    """Tell whether a reentrant checkpoint encloses every place for a hook in front of a block.

    timm checkpoints around its blocks, transformers before 5.23 in the `__call__` of its layers.
    """
    if not is_reentrant(host, encoder, index):
        return False
    if encoder.library == "timm":
        return encoder.gate is None
    layer = _recomputing(host, encoder, index)
    return layer is not None and any(
        "__call__" in vars(cls) for cls in type(layer).__mro__ if cls is not nn.Module
    )


def _recomputing(host: nn.Module, encoder: Encoder, index: int) -> nn.Module | None:
    """Return the outermost transformers layer around a block that is checkpointing."""
    parts = encoder.blocks[index].path.split(".")
    for end in range(1, len(parts) + 1):
        layer = module_at(host, ".".join(parts[:end]))
        if layer.training and keeps_training_flag(layer) and _is_layer(layer):
            return layer
    return None


def _is_layer(module: nn.Module) -> bool:
    return is_kind(module, "GradientCheckpointingLayer", "transformers")
