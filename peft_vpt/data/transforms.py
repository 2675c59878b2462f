"""Transforms of images for training and evaluation, from a backbone's preprocessing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..adapter.schema import INTERPOLATIONS
from ..errors import SpecError
from ..preprocessing import describe_preprocessing, timm_transform

KINDS = ("vtab", "fgvc", "timm")
# 224 of 256: floor(size / 0.875) is 256 for 224, 438 for 384 and 512 for 448 pixels.
_FGVC_CROP = 0.875
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
    if kind not in KINDS:
        raise SpecError(f"train_transform(kind={kind!r}): must be one of {', '.join(KINDS)}.")
    values = describe_preprocessing(preprocessing)
    missing = [name for name in _NEEDED if values.get(name) is None]
    if missing:
        raise SpecError(
            f"train_transform(preprocessing=...): lacks {', '.join(missing)}; it must have size, "
            "mean, std, interpolation and crop, as in an adapter file."
        )
    if values["interpolation"] not in INTERPOLATIONS:
        raise SpecError(
            f"train_transform(preprocessing=...): interpolation {values['interpolation']!r} must "
            f"be one of {', '.join(INTERPOLATIONS)}."
        )
    crop = {"vtab": None, "fgvc": _FGVC_CROP, "timm": values.get("crop")}[kind]
    edges = values["size"] if size is None else size
    return {name: values[name] for name in _NEEDED} | {"size": edges_of(edges), "crop": crop}


def edges_of(size: Any) -> list[int]:
    """Return [height, width] of an edge or a pair.

    Raises:
        SpecError: It is neither.
    """
    pair = [size, size] if isinstance(size, int) else list(size)
    if len(pair) != 2 or not all(type(edge) is int and edge > 0 for edge in pair):
        raise SpecError(f"size={size!r}: must be an edge or (height, width), positive integers.")
    return pair


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
