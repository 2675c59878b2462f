"""Gradient checkpointing: whether blocks are checkpointing, and of which kind."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from ..errors import VPTError
from .anatomy import Encoder, ancestors, is_kind


def keeps_training_flag(module: nn.Module) -> bool:
    """Tell whether a module checkpoints itself, as transformers' layers do in train mode."""
    return bool(getattr(module, "gradient_checkpointing", False))


def outermost_checkpoint(host: nn.Module, path: str) -> str:
    """Return the path of the outermost layer around a block that can checkpoint itself."""
    layers = [at for at, module in ancestors(host, path) if at and _is_layer(module)]
    return layers[-1] if layers else path


def is_checkpointing(host: nn.Module, encoder: Encoder, index: int) -> bool:
    """Tell whether a block would be recomputed in backward."""
    return _recomputing(host, encoder, index) is not None


def is_reentrant(host: nn.Module, encoder: Encoder, index: int) -> bool:
    """Tell whether a block runs under reentrant checkpointing."""
    layer = _recomputing(host, encoder, index)
    if layer is None:
        return False
    if encoder.library == "timm":
        # In sys.modules wherever a timm model exists.
        return bool(sys.modules["timm.layers"].use_reentrant_ckpt())
    function = getattr(layer, "_gradient_checkpointing_func", None)
    return bool(getattr(function, "keywords", {}).get("use_reentrant", True))


def refuse_cut_off(host: nn.Module, encoder: Encoder, index: int) -> None:
    """Raise where a reentrant checkpoint encloses every place for a hook in front of a block.

    timm checkpoints around its blocks, transformers before 5.23 in the `__call__` of its layers,
    some of its encoders around theirs.

    Raises:
        VPTError: It does.
    """
    if not is_reentrant(host, encoder, index):
        return
    enclosed = encoder.gate is None
    if encoder.library != "timm":
        layer: Any = _recomputing(host, encoder, index)
        kinds = type(layer).__mro__
        enclosed = not _is_layer(layer) or any(
            "__call__" in vars(kind) for kind in kinds[: kinds.index(nn.Module)]
        )
    if enclosed:
        raise VPTError(
            "",
            "reentrant gradient checkpointing would give prompts no gradient here, and no error: "
            "nothing in front of the checkpoints can be made to require one",
            "Use the other kind: `timm.layers.set_reentrant_ckpt(False)`, or in transformers "
            "`gradient_checkpointing_kwargs={'use_reentrant': False}`",
        )


def _recomputing(host: nn.Module, encoder: Encoder, index: int) -> nn.Module | None:
    """Return what recomputes a block: the outermost layer, or else its encoder."""
    if encoder.library == "timm":
        # Models of several stages keep the flag in each of them.
        stages = host.get_submodule(encoder.path).modules()
        return next((m for m in stages if getattr(m, "grad_checkpointing", False)), None)
    parts = encoder.blocks[index].path.split(".")
    around = [host.get_submodule(".".join(parts[:end])) for end in range(1, len(parts) + 1)]
    active = [m for m in around if m.training and keeps_training_flag(m)]
    return next((m for m in active if _is_layer(m)), active[0] if active else None)


def _is_layer(module: nn.Module) -> bool:
    return is_kind(module, "GradientCheckpointingLayer", "transformers")
