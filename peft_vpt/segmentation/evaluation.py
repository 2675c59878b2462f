"""Segmentation of images of any size by sliding windows, and mean intersection over union."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORE = 255


class Scores(NamedTuple):
    """What a segmentation is worth: mean over classes, per class (NaN where absent), of pixels."""

    miou: float
    iou: list[float]
    pixel_accuracy: float


class Confusion:
    """Counts of pixels by true and predicted class.

    Args:
        classes: Number of classes.
    """

    def __init__(self, classes: int) -> None:
        self._table = torch.zeros(classes, classes, dtype=torch.int64)

    def add(self, found: Tensor, truth: Tensor) -> None:
        """Count predicted and true class indices of one shape; 255 is left out."""
        classes, known = len(self._table), truth != IGNORE
        index = truth[known].long() * classes + found[known].long()
        counts = torch.bincount(index.cpu(), minlength=classes**2)
        self._table += counts.reshape(classes, classes)

    def scores(self) -> Scores:
        """Return what has been counted; a class that is in neither does not count."""
        hit = self._table.diagonal().double()
        union = self._table.sum(0) + self._table.sum(1) - self._table.diagonal()
        iou = hit / union
        share = hit.sum() / self._table.sum().clamp(min=1)
        return Scores(float(iou[union > 0].mean()), iou.tolist(), float(share))


@torch.no_grad()
def predict(
    model: nn.Module,
    pixels: Tensor,
    *,
    window: tuple[int, int],
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    overlap: float = 1 / 3,
    at_once: int = 8,
) -> Tensor:
    """Return class probabilities `(batch, classes, H, W)` of images of any size.

    The image is scaled, cut into overlapping windows of the model's size, and averaged.

    Args:
        model: From pixels `(batch, 3, *window)` to scores of the same size; in eval mode.
        pixels: `(batch, 3, H, W)`.
        window: Height and width that the model takes.
        scales: Factors on the image's size; one is single-scale, several multi-scale.
        flip: Whether to average with the mirrored image.
        overlap: Share of a window that the next one covers too.
        at_once: Windows in one forward of the model.
    """
    size = pixels.shape[-2:]
    total = torch.zeros(())
    for scale in scales:
        scaled = [max(round(s * scale), w) for s, w in zip(size, window, strict=True)]
        image = F.interpolate(pixels, scaled, mode="bilinear", align_corners=False)
        views = [image, image.flip(-1)] if flip else [image]
        for number, view in enumerate(views):
            found = _slide(model, view, window, overlap, at_once).softmax(1)
            found = found.flip(-1) if number else found
            found = F.interpolate(found, size, mode="bilinear", align_corners=False)
            total = total.to(found) + found
    return total / (len(scales) * (2 if flip else 1))


def _slide(
    model: nn.Module, image: Tensor, window: tuple[int, int], overlap: float, at_once: int
) -> Tensor:
    scores, counts = torch.zeros(()), torch.zeros(())
    rows, columns = (
        _starts(size, part, overlap) for size, part in zip(image.shape[-2:], window, strict=True)
    )
    places = [
        (..., slice(y, y + window[0]), slice(x, x + window[1])) for y in rows for x in columns
    ]
    for first in range(0, len(places), at_once):
        several = places[first : first + at_once]
        found = model(torch.cat([image[place] for place in several]))
        found = found if isinstance(found, Tensor) else found.logits
        found = F.interpolate(found, window, mode="bilinear", align_corners=False)
        if not counts.dim():
            scores = found.new_zeros(len(image), found.shape[1], *image.shape[-2:])
            counts = found.new_zeros(image.shape[-2:])
        for place, part in zip(several, torch.split(found, len(image)), strict=True):
            scores[place] += part
            counts[place] += 1
    return scores / counts


def _starts(size: int, window: int, overlap: float) -> list[int]:
    step = max(1, int(window * (1 - overlap)))
    return sorted({min(start, size - window) for start in range(0, size, step)})


def score(predictions: Iterable[tuple[Tensor, Tensor]], classes: int) -> Scores:
    """Return mean intersection over union, over all pixels of all images together.

    Args:
        predictions: Pairs of predicted and true class indices, of one shape; 255 is left out.
        classes: Number of classes; one that neither occurs nor is predicted does not count.
    """
    confusion = Confusion(classes)
    for found, truth in predictions:
        confusion.add(found, truth)
    return confusion.scores()
