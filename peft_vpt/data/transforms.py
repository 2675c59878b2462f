"""Transforms for training and evaluation, of images alone and of images with their masks."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from ..checks import integer, list_of, number, one_of
from ..errors import SpecError
from ..preprocessing import INTERPOLATIONS, describe_preprocessing, timm_transform

IGNORE = 255
KINDS, MODES = ("vtab", "fgvc", "timm"), ("train", "eval", "full")
# 224 of 256: floor(size / 0.875) is 256 for 224, 438 for 384 and 512 for 448 pixels.
_FGVC_CROP = 0.875
_PAIR = list_of(integer(1), "an edge or (height, width), positive integers", 2, 2, tuples=True)
_RANGE = list_of(number(0, above=True), "two rising numbers > 0, finite", 2, 2, tuples=True)
_NEEDED = ("size", "mean", "std", "interpolation")


@dataclass(frozen=True)
class Transform:
    """PIL image to pixels `(3, height, width)`.

    Args:
        preprocessing: What evaluation does, in the words of the adapter file; give it to
            `save_task_adapter`, which then stores what the head was trained for.
        kind: "vtab", "fgvc" or "timm".
        train: Whether images are drawn at random where the kind augments.
    """

    preprocessing: Mapping[str, Any]
    kind: str
    train: bool
    _steps: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        steps = timm_transform(self.preprocessing)
        object.__setattr__(self, "_steps", _augmented(steps) if self.random else steps)

    @property
    def random(self) -> bool:
        """Whether two calls may differ."""
        return self.train and self.kind == "fgvc"

    def __call__(self, image: Any) -> Tensor:
        """Return the pixels of an image."""
        pixels: Tensor = self._steps(image)
        return pixels

    def describe(self) -> str:
        """Return the steps in one line, for a log."""
        height, width = self.preprocessing["size"]
        share = self.preprocessing["crop"]
        if share is None:
            steps = f"resize to {height}x{width}"
        else:
            cut = "random crop" if self.random else "centre crop"
            steps = (
                f"resize short side to {int(min(height, width) / share)}, {cut} {height}x{width}"
            )
        flip = ", random horizontal flip" if self.random else ""
        mean, std = (_short(self.preprocessing[key]) for key in ("mean", "std"))
        return f"{steps} ({self.preprocessing['interpolation']}){flip}, mean {mean}, std {std}"


def train_transform(
    preprocessing: Any, kind: str = "vtab", size: int | tuple[int, int] | None = None
) -> Transform:
    """Return the transform of training images.

    Args:
        preprocessing: `size`, `mean`, `std`, `interpolation`, `crop`; a timm data config or a
            transformers image processor.
        kind: "vtab": resize to the square, no augmentation (paper table 6). "fgvc": resize to
            256/224 of the size, random crop, random horizontal flip.
            "timm": the backbone's own evaluation transform.
        size: Another size than the backbone's: an edge, or (height, width).

    Raises:
        SpecError: An unknown kind, a size that is none, an incomplete preprocessing, or an unknown
            interpolation.
    """
    return Transform(preprocessing_for(preprocessing, kind, size), kind, train=True)


def eval_transform(
    preprocessing: Any, size: int | tuple[int, int] | None = None, *, kind: str = "vtab"
) -> Transform:
    """Return the transform of images to evaluate; arguments as in `train_transform`.

    "fgvc" resizes to 256/224 of the size and crops the centre; the others do as in training.
    """
    return Transform(preprocessing_for(preprocessing, kind, size), kind, train=False)


def preprocessing_for(
    preprocessing: Any, kind: str = "vtab", size: int | tuple[int, int] | None = None
) -> dict[str, Any]:
    """Return what evaluation under a kind does, in the words of the adapter file.

    Raises:
        SpecError: As in `train_transform`.
    """
    one_of(*KINDS).check("train_transform", "kind", kind)
    values = describe_preprocessing(preprocessing)
    missing = [name for name in _NEEDED if values.get(name) is None]
    if missing:
        raise SpecError(
            "train_transform",
            f"lacks {', '.join(missing)}",
            "it must have size, mean, std, interpolation and crop, as in an adapter file",
            given={"preprocessing": ...},
        )
    one_of(*INTERPOLATIONS).check("train_transform", "interpolation", values["interpolation"])
    crop = {"vtab": None, "fgvc": _FGVC_CROP, "timm": values.get("crop")}[kind]
    edges = values["size"] if size is None else size
    return {name: values[name] for name in _NEEDED} | {"size": edges_of(edges), "crop": crop}


def edges_of(size: Any) -> list[int]:
    """Return [height, width] of an edge or a pair.

    Raises:
        SpecError: It is neither.
    """
    pair = size if isinstance(size, list | tuple) else [size, size]
    if not _PAIR.fits(pair):
        raise SpecError("train_transform", f"must be {_PAIR.what}", given={"size": size})
    return list(pair)


def _augmented(steps: Any) -> Any:
    """Return timm's steps with a random crop and flip in the place of the centre crop."""
    from torchvision import transforms

    found: list[Any] = []
    for step in steps.transforms:
        if isinstance(step, transforms.CenterCrop):
            # Padding, as the centre crop has it, for sizes that rounding leaves a pixel short.
            found += [transforms.RandomCrop(step.size, pad_if_needed=True)]
            found += [transforms.RandomHorizontalFlip()]
        else:
            found.append(step)
    return transforms.Compose(found)


def _short(values: Any) -> str:
    numbers = [f"{float(value):.4g}" for value in values]
    return numbers[0] if len(set(numbers)) == 1 else f"({', '.join(numbers)})"


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
    one_of(*MODES).check("segmentation_transform", "mode", mode)
    _RANGE.check("segmentation_transform", "scale", scale)
    if scale[0] > scale[1]:
        raise SpecError("segmentation_transform", f"must be {_RANGE.what}", given={"scale": scale})
    low, high = scale
    return SegmentationTransform(preprocessing_for(preprocessing, "vtab", size), mode, (low, high))
