"""Transforms of an image and its mask together."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from ..errors import SpecError
from .transforms import preprocessing_for

IGNORE = 255
MODES = ("train", "eval", "full")


@dataclass(frozen=True)
class SegmentationTransform:
    """PIL image and mask `(h, w)` to pixels `(3, H, W)` and a mask int64 `(H, W)`.

    Args:
        preprocessing: `size`, `mean`, `std`, `interpolation`.
        mode: "train", "eval" or "full".
        scale: Range of the random resize in training, in units of the size.
    """

    preprocessing: Mapping[str, Any]
    mode: str
    scale: tuple[float, float]

    def __call__(self, image: Any, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pixels of an image and its mask, moved alike."""
        from torchvision.transforms import functional as F

        labels = mask[None]
        if self.mode == "train":
            image, labels = self._draw(image, labels)
        elif self.mode == "eval":
            image, labels = self._resize(image, labels, self.preprocessing["size"])
        values = self.preprocessing
        pixels: Tensor = F.normalize(F.to_tensor(image), list(values["mean"]), list(values["std"]))
        if self.mode == "train":
            pixels, labels = self._crop(pixels, labels)
        return pixels, labels[0].long()

    def describe(self) -> str:
        """Return the steps in one line, for a log."""
        height, width = self.preprocessing["size"]
        low, high = self.scale
        return {
            "train": f"resize short side to {low:g}-{high:g} of {height}x{width}, random crop "
            f"{height}x{width}, random horizontal flip",
            "eval": f"resize to {height}x{width}, masks by nearest neighbour",
            "full": "image and mask at their own size",
        }[self.mode]

    def _draw(self, image: Any, labels: Tensor) -> tuple[Any, Tensor]:
        from torchvision.transforms import functional as F

        height, width = self.preprocessing["size"]
        # The image just covers the size at scale 1, whatever its shape.
        fit = max(height / image.height, width / image.width) * random.uniform(*self.scale)
        edges = [max(round(image.height * fit), 1), max(round(image.width * fit), 1)]
        image, labels = self._resize(image, labels, edges)
        if random.random() < 0.5:
            image, labels = F.hflip(image), F.hflip(labels)
        return image, labels

    def _resize(self, image: Any, labels: Tensor, edges: list[int]) -> tuple[Any, Tensor]:
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as F

        mode = InterpolationMode(self.preprocessing["interpolation"])
        resized = F.resize(image, edges, mode)
        return resized, F.resize(labels, edges, InterpolationMode.NEAREST_EXACT)

    def _crop(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        from torch.nn.functional import pad

        height, width = self.preprocessing["size"]
        low, right = (max(a - b, 0) for a, b in zip((height, width), pixels.shape[1:], strict=True))
        # Zeros behind the normalisation are the mean colour.
        pixels = pad(pixels, (0, right, 0, low))
        labels = pad(labels, (0, right, 0, low), value=IGNORE)
        top = random.randint(0, pixels.shape[1] - height)
        left = random.randint(0, pixels.shape[2] - width)
        area = (..., slice(top, top + height), slice(left, left + width))
        return pixels[area].contiguous(), labels[area].contiguous()


def segmentation_transform(
    preprocessing: Any,
    mode: str,
    size: int | tuple[int, int] | None = None,
    *,
    scale: tuple[float, float] = (0.5, 2.0),
) -> SegmentationTransform:
    """Return the transform of images with masks.

    Args:
        preprocessing: As in `train_transform`.
        mode: "train": random resize, horizontal flip and crop, padded with the mean colour and 255
            in the mask. "eval": resize both to the size. "full": image and mask at their own size,
            for mIoU on the annotation's pixels; batches are of one image then.
        size: Another size than the backbone's: an edge, or (height, width).
        scale: Of the random resize.

    Raises:
        SpecError: A wrong mode, size or scale.
    """
    if mode not in MODES:
        raise SpecError(f"segmentation_transform({mode!r}): must be one of {', '.join(MODES)}.")
    pair = tuple(scale) if isinstance(scale, Sequence) else ()
    numbers = all(isinstance(edge, int | float) and isfinite(edge) for edge in pair)
    if len(pair) != 2 or not numbers or not 0 < pair[0] <= pair[1]:
        raise SpecError(
            f"segmentation_transform(scale={scale!r}): must be two rising numbers > 0, finite."
        )
    return SegmentationTransform(preprocessing_for(preprocessing, "vtab", size), mode, pair)


def mask_tensor(image: Any, reduce_zero_label: bool) -> Tensor:
    """Return a mask image as int64 `(height, width)`; 255 is ignored.

    Args:
        image: Of one channel; of a palette image the indices count.
        reduce_zero_label: 0 becomes 255, and every other label falls by one (ADE20K).

    Raises:
        ValueError: The image has several channels, or values above 255.
    """
    import numpy as np

    values = np.asarray(image).astype(np.int64)
    if values.ndim != 2:
        raise ValueError(f"a mask has one channel of labels, this one is {image.mode}")
    if values.size and (values.max() > IGNORE or values.min() < 0):
        raise ValueError(f"labels are 0 to 255, this mask has {values.min()} to {values.max()}")
    mask = torch.from_numpy(values)
    if reduce_zero_label:
        mask = torch.where((mask == 0) | (mask == IGNORE), IGNORE, mask - 1)
    return mask
