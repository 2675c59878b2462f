"""The loss: cross-entropy with class weights and label smoothing."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Subset, TensorDataset

from ..errors import SpecError, VPTError
from .batches import Drawn
from .metrics import check_labels
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
        if self._kind != "none" and labels is None:
            raise SpecError(
                f"fit(recipe.class_weights={self._kind!r}): give labels, those of all training "
                "images, for their counts."
            )
        if self._kind != "none" and labels is not None and len(labels) != images:
            raise SpecError(
                f"fit(labels=...): {len(labels)} labels, but train has {images} images; give the "
                "label of each, in any order."
            )
        self._labels = None if self._kind == "none" or labels is None else _integers(labels)
        self._weights: Tensor | None = None

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
        if labels.is_floating_point():
            self._check_shares(labels, logits)
        else:
            check_labels(labels, logits.shape[1], "fit")
        smoothing = self._smoothing
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        if self._labels is not None:
            if self._weights is None:
                self._weights = class_weights(self._labels, logits.shape[1], self._kind)
            assert self._weights is not None
            losses = losses * self._weights.to(losses)[labels]
        return losses[:count].sum()

    def _check_shares(self, labels: Tensor, logits: Tensor) -> None:
        if labels.shape != logits.shape or self._labels is not None:
            raise VPTError(
                f"fit: labels that are shares of classes, {tuple(labels.shape)}, for "
                f"{tuple(logits.shape)} logits and class_weights={self._kind!r}; they need the "
                "shape of the logits, and class_weights='none'."
            )


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
            f"fit(labels=...): has the label {int(numbers.max())}, but the model has {classes} "
            f"classes, 0 to {classes - 1}; correct it, or give num_classes."
        )
    counts = torch.bincount(numbers, minlength=classes).double()
    power = -1.0 if kind == "inv" else -0.5
    weights = torch.where(counts > 0, counts.clamp(min=1.0) ** power, 0.0)
    return weights * counts.sum() / (weights * counts).sum()


def _integers(labels: Sequence[int] | Tensor) -> Tensor:
    """Return labels as a tensor, whatever kind of integers they are."""
    try:
        numbers = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SpecError(f"fit(labels=...): must be class numbers: {error}.") from error
    whole = not numbers.is_floating_point() and numbers.dtype != torch.bool
    if numbers.dim() != 1 or not len(numbers) or not whole or int(numbers.min()) < 0:
        raise SpecError(
            "fit(labels=...): must be the class numbers, from 0, of all training images, one each."
        )
    return numbers.long().cpu()


_NAMES = ("labels", "targets")


def check_known_labels(loaders: Mapping[str, Any], classes: int) -> None:
    """Raise where a label that can be seen without loading an image is no class of the model.

    Args:
        loaders: Batches by what they are for; what is no DataLoader is passed over.
        classes: Number of outputs.

    Raises:
        VPTError: There is one.
    """
    for name, loader in loaders.items():
        dataset, sampler = (getattr(loader, part, None) for part in ("dataset", "sampler"))
        labels = _known(dataset)
        # A sampler that leaves images out may do so for their labels.
        if labels is None or sampler is None or len(sampler) != len(labels):
            continue
        wrong = ((labels < 0) | (labels >= classes)).nonzero().flatten().tolist()
        if wrong and not _is_class(dataset, wrong[0], classes):
            raise VPTError(
                f"fit({name}=...): {len(wrong)} of {len(labels)} labels are no classes of the "
                f"model, the first at index {wrong[0]}: {int(labels[wrong[0]])}. The model has "
                f"{classes} classes, 0 to {classes - 1}; give num_classes when prompts are "
                "injected, or correct the labels."
            )


def labels_checksum(dataset: Any) -> str | None:
    """Return what tells the labels of a dataset from others; None where it does not hold them."""
    labels = _known(dataset)
    return None if labels is None else checksum_of(labels)


def checksum_of(labels: Tensor) -> str:
    """Return 8 hexadecimal digits of integers."""
    return f"{zlib.crc32(labels.long().cpu().contiguous().numpy().data):08x}"


def _known(dataset: Any) -> Tensor | None:
    """Return the labels of a dataset; None where it does not hold a number for every image."""
    if isinstance(dataset, Drawn):
        return _known(dataset.dataset)
    if isinstance(dataset, Subset):
        whole = _known(dataset.dataset)
        indices = torch.as_tensor(list(dataset.indices), dtype=torch.long)
        return None if whole is None else whole[indices]
    if isinstance(dataset, TensorDataset):
        found: Any = dataset.tensors[1] if len(dataset.tensors) > 1 else None
    else:
        holders = (getattr(dataset, "split", None), dataset)
        values = (getattr(holder, name, None) for holder in holders for name in _NAMES)
        found = next((value for value in values if value is not None), None)
    try:
        labels = torch.as_tensor(found)
        fits = labels.dim() == 1 and len(labels) == len(dataset)
    except (TypeError, ValueError, RuntimeError):
        return None
    return labels.cpu() if fits and not labels.is_floating_point() else None


def _is_class(dataset: Any, index: int, classes: int) -> bool:
    """Tell whether an item has another label than the dataset says, and one of the classes."""
    try:
        item = dataset.dataset[index] if isinstance(dataset, Drawn) else dataset[index]
        return 0 <= int(item[1]) < classes
    except Exception:  # whatever reading an image raises; the label stands as it is
        return False
