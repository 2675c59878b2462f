"""Segmentation tasks: images with masks, and their loaders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import SpecError, VPTError, listing
from ..preprocessing import to_rgb, upright_rgb
from ..randomness import seeded
from .drawing import EpochSampler, Key, check_counts
from .loading import each, remembered, worker_options
from .splits import check_text, refuse_overlaps
from .warps import IGNORE, SegmentationTransform, mask_tensor


@dataclass(frozen=True, repr=False)
class SegmentationSplit:
    """Images and masks: pairs of absolute paths.

    Args:
        pairs: (image, mask).
        classes: Number of classes.
        reduce_zero_label: Whether 0 in the files is no class (ADE20K): it is ignored.
    """

    pairs: tuple[tuple[str, str], ...]
    classes: int
    reduce_zero_label: bool = False

    def __len__(self) -> int:
        return len(self.pairs)

    def __repr__(self) -> str:
        return f"SegmentationSplit({len(self)} images, {self.classes} classes)"

    def subset(self, indices: Iterable[int]) -> SegmentationSplit:
        """Return the pairs at `indices`, in that order."""
        pairs = tuple(self.pairs[i] for i in indices)
        return SegmentationSplit(pairs, self.classes, self.reduce_zero_label)

    def read(self, index: int) -> tuple[Any, Tensor]:
        """Return an RGB image and its mask int64 `(h, w)`, where 255 is ignored.

        Raises:
            VPTError: One cannot be read, they differ in size, a label is out of range, or nothing
                says which way an image with an EXIF orientation lies under its mask.
        """
        image_path, mask_path = self.pairs[index]
        try:
            mask = read_mask(mask_path, self.reduce_zero_label)
            image = image_under(image_path, mask_path, (mask.shape[1], mask.shape[0]))
        except VPTError:
            raise
        # Decoders raise whatever a damaged file leads them to.
        except Exception as error:
            raise VPTError(
                f"{image_path} with {mask_path} cannot be read: {type(error).__name__}: {error}"
            ) from error
        if tuple(mask.shape) != (image.height, image.width):
            raise VPTError(
                f"{image_path} is {image.height}x{image.width}, but {mask_path} is "
                f"{mask.shape[0]}x{mask.shape[1]}; they must be of one size."
            )
        top = int(mask[mask != IGNORE].max()) if bool((mask != IGNORE).any()) else 0
        if top >= self.classes:
            raise VPTError(
                f"{mask_path} has the label {top}, but there are {self.classes} classes (0 to "
                f"{self.classes - 1}, 255 is ignored); correct it, or name every class."
            )
        return image, mask


@dataclass(frozen=True)
class SegmentationTask:
    """Named splits of images with masks, checked when it is made.

    Args:
        name: Of the task.
        classes: Class names in the order of the labels, 2 to 255.
        splits: "train", "val" and, where there is one, "test".
        notes: What a reader of results should know.

    Raises:
        VPTError: A name that is no text, too few or too many classes, or an image in two splits.
    """

    name: str
    classes: tuple[str, ...]
    splits: Mapping[str, SegmentationSplit]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_text("SegmentationTask", self.name, self.classes)
        if not 2 <= len(self.classes) <= IGNORE:
            raise VPTError(
                f"task {self.name!r}: has {len(self.classes)} classes; segmentation takes 2 to "
                f"{IGNORE}, as the label {IGNORE} is ignored. Correct classes.txt."
            )
        images = {name: [image for image, _ in s.pairs] for name, s in self.splits.items()}
        refuse_overlaps(self.name, images)

    def describe(self) -> str:
        """Return name, sizes and notes as lines of text."""
        sizes = ", ".join(f"{name} {len(split):,}" for name, split in self.splits.items())
        head = f"{self.name}: {len(self.classes)} classes, {sizes} (images with masks)"
        return "\n".join([head, *(f"  note: {note}" for note in self.notes)])


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Transformed images of a split with their masks."""

    def __init__(self, split: SegmentationSplit, transform: SegmentationTransform) -> None:
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: int | Key) -> tuple[Tensor, Tensor]:
        index, draw = key if isinstance(key, tuple) else (key, None)
        with seeded(draw):
            return self.transform(*self.split.read(index))


def segmentation_loader(
    split: SegmentationSplit,
    transform: SegmentationTransform,
    *,
    batch_size: int,
    shuffle: bool = False,
    seed: int = 0,
    workers: int = 0,
    drop_last: bool = False,
    skip_broken: bool = False,
    check: bool = True,
) -> DataLoader[Any]:
    """Return batches of pixels `(B, 3, H, W)` and masks `(B, H, W)` int64, 255 ignored.

    Arguments are those of `peft_vpt.data.loader`; the transform is `segmentation_transform`'s.

    Raises:
        SpecError: A wrong option, or batches of several images at their own sizes.
        VPTError: An empty split; pairs that cannot be read, differ in size, or have labels out of
            range: all counted, ten named.
    """
    call = "segmentation_loader"
    check_counts(call, batch_size=(batch_size, 1), workers=(workers, 0), seed=(seed, 0))
    if transform.mode == "full" and batch_size != 1:
        raise SpecError(
            f"segmentation_loader(batch_size={batch_size!r}): images at their own size come one by "
            "one; use batch_size=1."
        )
    problems = check_masks(split) if check or skip_broken else {}
    if problems and not skip_broken:
        raise VPTError(
            f"segmentation_loader: {len(problems)} of {len(split)} images or masks are wrong: "
            f"{listing(list(problems.values()))} Correct them, or pass skip_broken=True."
        )
    good = split.subset(i for i in range(len(split)) if i not in problems) if problems else split
    if not len(good):
        raise VPTError("segmentation_loader: the split is empty; there is nothing to load.")
    return DataLoader(
        Pairs(good, transform),
        batch_size=batch_size,
        sampler=EpochSampler(len(good), seed) if shuffle else None,
        drop_last=drop_last,
        **worker_options(workers),
    )


def check_masks(split: SegmentationSplit, *, progress: bool = True) -> dict[int, str]:
    """Read every image and mask in full; return what is wrong by index."""

    def verdict(index: int) -> str | None:
        def read() -> str | None:
            try:
                split.read(index)
            except VPTError as error:
                return str(error)
            return None

        about = (split.classes, split.reduce_zero_label)
        return remembered(split.pairs[index], read, about)

    found = each(verdict, range(len(split)), progress, what="checking masks")
    return {index: problem for index, problem in enumerate(found) if problem is not None}


def read_mask(path: str, reduce_zero_label: bool) -> Tensor:
    """Read a mask file as int64 `(h, w)`, where 255 is ignored.

    Raises:
        OSError: It cannot be read.
        ValueError: It has several channels, or labels above 255.
    """
    from PIL import Image

    with Image.open(path) as file:
        file.load()
        return mask_tensor(file, reduce_zero_label)


_TAG = 0x0112


def image_under(image_path: str, mask_path: str, size: tuple[int, int]) -> Any:
    """Return an RGB image as its mask lies over it: as it is shown, or as it is stored.

    Annotation tools differ in whether they turn an image by its tag, so the size of the mask
    decides. It says nothing of a square image, one upside down or a mirrored one.

    Args:
        image_path: The image.
        mask_path: Its mask.
        size: Width and height of the mask.

    Raises:
        OSError: A file cannot be read as an image.
        VPTError: Nothing says which way it is.
    """
    from PIL import Image

    with Image.open(mask_path) as file:
        own = _orientation(file)
    with Image.open(image_path) as file:
        tag = _orientation(file)
        file.load()
        # The decoder of TIFF turns an image by itself.
        turned = tag != _orientation(file)
        if tag == own and not turned:
            return to_rgb(file)
        shown = file.size[::-1] if tag > 4 and not turned else file.size
        stored = shown[::-1] if tag > 4 else shown
        if own != 1 or size == stored == shown:
            raise _unknown(image_path, mask_path, image_path if own == 1 else mask_path)
        if size == stored and not turned:
            return to_rgb(file)
        return upright_rgb(file)


def _orientation(file: Any) -> int:
    """Return the EXIF orientation of an open image, 1 (as stored) where it says none."""
    found = file.getexif().get(_TAG, 1)
    return int(found) if found in range(2, 9) else 1


def _unknown(image_path: str, mask_path: str, which: str) -> VPTError:
    return VPTError(
        f"{image_path} with {mask_path}: an EXIF orientation turns {which} when it is shown, and "
        "nothing says whether the mask lies over the image as shown or as stored. Save the file "
        "turned and without the tag (PIL.ImageOps.exif_transpose), or remove the tag."
    )
