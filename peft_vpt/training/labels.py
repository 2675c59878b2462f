"""Labels that a dataset holds beside its images, checked before a step is made."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from ..errors import VPTError
from .batches import Drawn

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
