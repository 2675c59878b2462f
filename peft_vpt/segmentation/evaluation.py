"""Segmentation of images of any size by sliding windows, and mean intersection over union."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import integer, list_of, number
from ..data.transforms import IGNORE
from ..errors import VPTError

_EDGES = "the height and width in pixels that the model takes, two integers > 0"
_WINDOW = list_of(integer(1), _EDGES, 2, 2, tuples=True)
_SCALES = list_of(number(0, above=True), "a list of one or more numbers > 0", tuples=True)


class Scores(NamedTuple):
    """What a segmentation is worth: mean over classes, per class, and of pixels.

    The IoU of a class that is neither there nor predicted is NaN, as is a mean over no class.
    """

    miou: float
    iou: list[float]
    pixel_accuracy: float


class Confusion:
    """Counts of pixels by true and predicted class.

    Args:
        classes: Number of classes, 2 to 255.

    Raises:
        SpecError: Another number.
    """

    def __init__(self, classes: int) -> None:
        check_classes("Confusion", classes)
        self._table = torch.zeros(classes, classes, dtype=torch.int64)

    def add(self, found: Tensor, truth: Tensor) -> None:
        """Count predicted and true class indices of one shape; 255 in the truth is left out.

        Raises:
            VPTError: The shapes differ, or an index is none of a class.
        """
        if found.shape != truth.shape:
            raise VPTError(
                "Confusion.add",
                f"predictions {tuple(found.shape)} and truth {tuple(truth.shape)} must be of one "
                "shape",
                "resize the predictions to the masks",
            )
        classes, known = len(self._table), truth != IGNORE
        sides = {"prediction": found[known].long().cpu(), "true label": truth[known].long().cpu()}
        for name, labels in sides.items():
            wrong = labels[(labels < 0) | (labels >= classes)]
            if len(wrong):
                raise VPTError(
                    "Confusion.add",
                    f"the {name} {int(wrong[0])} is none of {classes} classes (0 to {classes - 1})",
                    "count every class that the model can predict",
                )
        index = sides["true label"] * classes + sides["prediction"]
        counts = torch.bincount(index, minlength=classes**2)
        self._table += counts.reshape(classes, classes)

    def scores(self) -> Scores:
        """Return what has been counted; a class that is in neither does not count."""
        hit = self._table.diagonal().double()
        union = self._table.sum(0) + self._table.sum(1) - self._table.diagonal()
        iou = hit / union
        share = hit.sum() / self._table.sum().clamp(min=1)
        return Scores(float(iou[union > 0].mean()), iou.tolist(), float(share))


def check_classes(call: str, classes: Any) -> None:
    """Check a number of classes, for which labels of one byte have room."""
    what = f"an integer from 2 to {IGNORE}; the label {IGNORE} is ignored"
    replace(integer(2, IGNORE), what=what).check(call, "classes", classes)


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

    The image is scaled, cut into overlapping windows of the model's size, and averaged. Where it is
    smaller than a window then, it is padded on the right and below with 0, the mean colour of
    normalised pixels, as a crop in training is; scores of the padding are dropped.

    Args:
        model: From pixels `(batch, 3, *window)` to scores of the same size; in eval mode.
        pixels: `(batch, 3, H, W)`.
        window: Height and width that the model takes.
        scales: Factors on both edges of the image; one is single-scale, several multi-scale.
        flip: Whether to average with the mirrored image.
        overlap: Share of a window that the next one covers too, from 0 to below 1.
        at_once: Windows in one forward of the model.

    Raises:
        SpecError: A wrong window, scale, overlap or number of windows.
    """
    _WINDOW.check("predict", "window", window)
    _SCALES.check("predict", "scales", scales)
    number(0, 1, below=True).check("predict", "overlap", overlap)
    integer(1).check("predict", "at_once", at_once)
    size = pixels.shape[-2:]
    total = torch.zeros(())
    for scale in scales:
        scaled = [max(round(edge * scale), 1) for edge in size]
        image = F.interpolate(pixels, scaled, mode="bilinear", align_corners=False)
        views = [image, image.flip(-1)] if flip else [image]
        for mirrored, view in enumerate(views):
            found = _slide(model, _cover(view, window), window, overlap, at_once)
            found = found[..., : scaled[0], : scaled[1]].softmax(1)
            found = found.flip(-1) if mirrored else found
            found = F.interpolate(found, size, mode="bilinear", align_corners=False)
            total = total.to(found) + found
    return total / (len(scales) * (2 if flip else 1))


def _cover(image: Tensor, window: tuple[int, int]) -> Tensor:
    """Pad an image that is smaller than a window up to it, on the right and below."""
    low, right = (max(w - s, 0) for w, s in zip(window, image.shape[-2:], strict=True))
    return F.pad(image, (0, right, 0, low))


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
        classes: Number of classes, 2 to 255; one that neither occurs nor is predicted does not
            count.

    Raises:
        SpecError: Another number of classes.
        VPTError: As in `Confusion.add`.
    """
    check_classes("score", classes)
    confusion = Confusion(classes)
    for found, truth in predictions:
        confusion.add(found, truth)
    return confusion.scores()
