"""Batches: images and their labels, as loaders give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import VPTError

_NAMES = ("pixel_values", "labels")


def pair_of(batch: Any, call: str, *, soft: bool = False) -> tuple[Tensor, Tensor]:
    """Return pixels and labels of a batch, class numbers as int64.

    Args:
        batch: `(pixels, labels)`, or a mapping of transformers with `pixel_values` and `labels`.
        call: For messages.
        soft: Whether labels may be shares of classes, `(images, classes)`.

    Raises:
        VPTError: It is neither, or its labels are no integers, one per image.
    """
    named = isinstance(batch, Mapping)
    pair = [batch.get(name) for name in _NAMES] if named else batch
    plain = isinstance(pair, list | tuple) and len(pair) == 2
    if not plain or not all(isinstance(part, Tensor) for part in pair):
        raise VPTError(
            f"{call}: a batch is {_described(batch)}; it must be (pixels, labels), two tensors, or "
            f"a mapping with {' and '.join(_NAMES)}, as a DataLoader over (image, label) gives."
        )
    pixels, labels = pair
    if soft and labels.is_floating_point() and labels.dim() == 2 and len(labels) == len(pixels):
        return pixels, labels
    return pixels, whole_labels(labels, len(pixels), call)


def whole_labels(labels: Tensor, images: int, call: str) -> Tensor:
    """Return labels as int64.

    Raises:
        VPTError: They are no integers, or not one per image.
    """
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if tuple(labels.shape) != (images,) or not (whole or not images):
        raise VPTError(
            f"{call}: labels of shape {tuple(labels.shape)} and {labels.dtype} for {images} "
            "images; they must be class numbers, integers of shape (images,)."
        )
    return labels.long()


def _described(batch: Any) -> str:
    if isinstance(batch, Mapping):
        held = (f"{name!r}: {type(value).__name__}" for name, value in batch.items())
        return f"a mapping with {', '.join(held) or 'nothing'}"
    if isinstance(batch, list | tuple):
        return f"a {type(batch).__name__} of {', '.join(type(part).__name__ for part in batch)}"
    return f"a {type(batch).__name__}"
