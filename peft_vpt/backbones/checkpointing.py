"""Gradient checkpointing: whether blocks are checkpointing, and of which kind."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from .anatomy import Encoder, module_at


def keeps_training_flag(module: nn.Module) -> bool:
    """Tell whether a module checkpoints itself, as transformers' layers do in train mode."""
    return bool(getattr(module, "gradient_checkpointing", False))


def is_checkpointing(host: nn.Module, encoder: Encoder, index: int) -> bool:
    """Tell whether a block would be recomputed in backward."""
    if encoder.library == "timm":
        return bool(getattr(module_at(host, encoder.path), "grad_checkpointing", False))
    block = module_at(host, encoder.blocks[index].path)
    return block.training and keeps_training_flag(block)


def is_reentrant(host: nn.Module, encoder: Encoder, index: int) -> bool:
    """Tell whether a block runs under reentrant checkpointing."""
    if not is_checkpointing(host, encoder, index):
        return False
    if encoder.library == "timm":
        # In sys.modules wherever a timm model exists.
        use = getattr(sys.modules.get("timm.layers"), "use_reentrant_ckpt", None)
        return bool(use is not None and use())
    block: Any = module_at(host, encoder.blocks[index].path)
    function = getattr(block, "_gradient_checkpointing_func", None)
    return bool(getattr(function, "keywords", {}).get("use_reentrant", True))
