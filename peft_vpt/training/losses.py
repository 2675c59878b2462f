"""The loss: cross-entropy with class weights and label smoothing."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import SpecError, VPTError
from .batches import check_classes
from .recipes import Recipe


class Loss:
    """The sum over a batch of the cross-entropies, each times the weight of its class.

    Args:
        recipe: Says which weights and how much smoothing.
        labels: Of all training images, for their counts.
        images: Number of training images.

    Raises:
        SpecError: Class weights without labels, with another number of them, or with what are no
            classes.
    """

    def __init__(self, recipe: Recipe, labels: Sequence[int] | None, images: int) -> None:
        self._kind, self._smoothing = recipe.class_weights, recipe.label_smoothing
        self._labels: Tensor | None = None
        self._weights: Tensor | None = None
        if self._kind == "none":
            return
        if labels is None:
            given = {"recipe.class_weights": self._kind}
            problem = "give labels, those of all training images, for their counts"
            raise SpecError("fit", problem, given=given)
        if len(labels) != images:
            problem = f"{len(labels)} labels, but train has {images} images"
            raise SpecError("fit", problem, "give the label of each, in any order", given=_LABELS)
        self._labels = _integers(labels)

    @property
    def checksum(self) -> str | None:
        """What tells the labels that classes are weighted by from others; None without weights."""
        return None if self._labels is None else checksum_of(self._labels)

    def __call__(self, logits: Tensor, labels: Tensor, count: int | None = None) -> Tensor:
        """Return the sum for logits `(batch, classes)` and labels `(batch,)`.

        Args:
            logits: Of the batch.
            labels: Of the batch, or shares of classes, `(batch, classes)`.
            count: Images that count, the first ones; None: all.
        """
        if not labels.is_floating_point():
            check_classes(labels, logits.shape[1], "fit")
        elif labels.shape != logits.shape or self._labels is not None:
            raise VPTError(
                "fit",
                f"labels that are shares of classes, {tuple(labels.shape)}, for "
                f"{tuple(logits.shape)} logits and `class_weights={self._kind!r}`",
                "they need the shape of the logits, and `class_weights='none'`",
            )
        smoothing = self._smoothing
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        if self._labels is not None:
            if self._weights is None:
                self._weights = class_weights(self._labels, logits.shape[1], self._kind)
            assert self._weights is not None
            losses = losses * self._weights.to(losses)[labels]
        return losses[:count].sum()


def class_weights(labels: Sequence[int] | Tensor, classes: int, kind: str) -> Tensor | None:
    """Return a weight per class from the numbers of training images; None for kind "none".

    "inv": 1 / count; "inv_sqrt": 1 / sqrt(count); scaled so that the mean over the images is 1, and
    0 for a class without images.

    Raises:
        SpecError: No labels, or one that is none of the classes.
    """
    if kind == "none":
        return None
    numbers = _integers(labels)
    if int(numbers.max()) >= classes:
        raise SpecError(
            "fit",
            f"has the label {int(numbers.max())}, but the model has {classes} classes, 0 to "
            f"{classes - 1}",
            "correct it, or give num_classes",
            given=_LABELS,
        )
    counts = torch.bincount(numbers, minlength=classes).double()
    power = -1.0 if kind == "inv" else -0.5
    weights = torch.where(counts > 0, counts.clamp(min=1.0) ** power, 0.0)
    return weights * counts.sum() / (weights * counts).sum()


_LABELS = {"labels": ...}


def _integers(labels: Sequence[int] | Tensor) -> Tensor:
    """Return labels as a tensor, whatever kind of integers they are."""
    try:
        numbers = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        problem = f"must be class numbers: {error}"
        raise SpecError("fit", problem, given=_LABELS) from error
    whole = not numbers.is_floating_point() and numbers.dtype != torch.bool
    if numbers.dim() != 1 or not len(numbers) or not whole or int(numbers.min()) < 0:
        problem = "must be the class numbers, from 0, of all training images, one each"
        raise SpecError("fit", problem, given=_LABELS)
    return numbers.long().cpu()


def checksum_of(labels: Tensor) -> str:
    """Return 8 hexadecimal digits of integers."""
    return f"{zlib.crc32(labels.long().cpu().contiguous().numpy().data):08x}"
