"""The loss: cross-entropy with class weights and label smoothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import SpecError
from .metrics import check_labels
from .recipes import Recipe


class Loss:
    """The sum over a batch of the cross-entropies, each times the weight of its class.

    Args:
        recipe: Says which weights and how much smoothing.
        labels: Of all training images, for their counts.

    Raises:
        SpecError: Class weights without labels.
    """

    def __init__(self, recipe: Recipe, labels: Sequence[int] | None) -> None:
        self._kind, self._smoothing = recipe.class_weights, recipe.label_smoothing
        if self._kind != "none" and labels is None:
            raise SpecError(
                f"fit(recipe.class_weights={self._kind!r}): give labels, those of all training "
                "images, for their counts."
            )
        self._labels = labels
        self._weights: Tensor | None = None

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the sum for logits `(batch, classes)` and labels `(batch,)`."""
        check_labels(labels, logits.shape[1], "fit")
        smoothing = self._smoothing
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        if self._kind != "none" and self._labels is not None:
            if self._weights is None:
                self._weights = class_weights(self._labels, logits.shape[1], self._kind)
            assert self._weights is not None
            losses = losses * self._weights.to(losses)[labels]
        return losses.sum()


def class_weights(labels: Sequence[int], classes: int, kind: str) -> Tensor | None:
    """Return a weight per class from the numbers of training images; None for kind "none".

    "inv": 1 / count; "inv_sqrt": 1 / sqrt(count); scaled so that the mean over the images is 1, and
    0 for a class without images.
    """
    if kind == "none":
        return None
    counts = torch.bincount(torch.as_tensor(labels), minlength=classes).double()
    power = -1.0 if kind == "inv" else -0.5
    weights = torch.where(counts > 0, counts.clamp(min=1.0) ** power, 0.0)
    return weights * counts.sum() / (weights * counts).sum()
