"""Segmentation tasks: images with masks, folders of them like ADE20K's, and their loaders."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import SpecError, VPTError, listing, renamed
from ..preprocessing import load_image
from .drawing import PART, SEED, stratified
from .layouts import files_under, folder_names, left_out, read_classes
from .loading import loader
from .reading import each, faults, remembered
from .splits import check_names, description, real_paths, refuse_leaks, split_names
from .transforms import IGNORE, SegmentationTransform

Pair = tuple[str, str]
_CALL = "open_segmentation"
_IMAGES, _MASKS = "images", "annotations"


@dataclass(frozen=True, repr=False)
class SegmentationSplit:
    """Images and masks: pairs of absolute paths.

    Args:
        pairs: (image, mask).
        classes: Number of classes.
        reduce_zero_label: Whether 0 in the files is no class (ADE20K): it is ignored.
    """

    pairs: tuple[Pair, ...]
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

    def where(self, index: int) -> str:
        """Return the paths of an image and its mask."""
        return " with ".join(self.pairs[index])

    def broken(self, *, progress: bool = True) -> dict[int, str]:
        """Read every image and mask in full; return what is wrong with some, by index."""

        def read(index: int) -> str | None:
            try:
                self.read(index)
            except VPTError as error:
                return error.problem
            return None

        def verdict(index: int) -> str | None:
            about = (self.classes, self.reduce_zero_label)
            return remembered(self.pairs[index], lambda: read(index), about)

        return faults(verdict, self, progress, what="checking masks")

    def sample(self, index: int, transform: SegmentationTransform) -> tuple[Tensor, Tensor]:
        """Return the pixels of an image and its mask, transformed."""
        return transform(*self.read(index))

    def read(self, index: int) -> tuple[Any, Tensor]:
        """Return an RGB image and its mask int64 `(h, w)`, where 255 is ignored.

        The image is turned as its EXIF tag says, as everywhere.

        Raises:
            VPTError: One cannot be read, they differ in size, or a label is out of range.
        """
        image_path, mask_path = self.pairs[index]
        fail = partial(VPTError, "SegmentationSplit.read", path=self.where(index))
        try:
            image = load_image(image_path)
            mask = read_mask(mask_path, self.reduce_zero_label)
        # Decoders raise whatever a damaged file leads them to.
        except Exception as error:
            raise fail(f"cannot be read: {type(error).__name__}: {error}") from error
        height, width = mask.shape
        if (image.height, image.width) != (height, width):
            raise fail(
                f"the image is {image.height}x{image.width} as it is shown, but its mask is "
                f"{height}x{width}",
                "make them of one size; save an image that an EXIF tag turns as its mask lies",
            )
        known = mask[mask != IGNORE]
        if known.numel() and int(known.max()) >= self.classes:
            raise fail(
                f"the mask has the label {int(known.max())}, but there are {self.classes} classes "
                f"(0 to {self.classes - 1}, {IGNORE} is ignored)",
                "correct it, or name every class",
            )
        return image, mask


def read_mask(path: str, reduce_zero_label: bool) -> Tensor:
    """Read a mask file of one channel as int64 `(h, w)`, where 255 is ignored.

    Of a palette image the indices count. With `reduce_zero_label` 0 becomes 255, and every other
    label falls by one (ADE20K).

    Raises:
        OSError: It cannot be read.
        ValueError: It has several channels, or labels above 255.
    """
    import numpy as np
    from PIL import Image

    with Image.open(path) as file:
        file.load()
        values = np.asarray(file).astype(np.int64)
    if values.ndim != 2:
        raise ValueError(f"a mask has one channel of labels, this one is {file.mode}")
    if values.size and (values.max() > IGNORE or values.min() < 0):
        raise ValueError(f"labels are 0 to 255, this mask has {values.min()} to {values.max()}")
    mask = torch.from_numpy(values)
    if reduce_zero_label:
        mask = torch.where((mask == 0) | (mask == IGNORE), IGNORE, mask - 1)
    return mask


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
        check_names("SegmentationTask", self.name, self.classes)
        if not 2 <= len(self.classes) <= IGNORE:
            raise VPTError(
                "SegmentationTask",
                f"has {len(self.classes)} classes; segmentation takes 2 to {IGNORE}, as the label "
                f"{IGNORE} is ignored",
                "Correct classes.txt",
                given={"name": self.name},
            )
        files = {n: real_paths(image for image, _ in s.pairs) for n, s in self.splits.items()}
        refuse_leaks("SegmentationTask", self.name, files)

    def describe(self) -> str:
        """Return name, sizes and notes as lines of text."""
        return description(self, "images with masks")


def open_segmentation(
    folder: str | Path,
    *,
    name: str | None = None,
    reduce_zero_label: bool = False,
    val_fraction: float = 0.1,
    seed: int = 0,
) -> SegmentationTask:
    """Open a folder like ADE20K's: `images/{training,validation,test}` and `annotations/...`.

    The folders of splits may be called as in `open_task` (`train`, `val`, `Testing` ...). A mask is
    an 8-bit PNG of one channel with the name of its image, over the image as it is shown, an EXIF
    orientation applied; 255 is ignored. Names of
    classes are in `classes.txt`, one per line; without it the highest label of the training masks
    says how many there are. The training masks are read for the labels that they have.

    Args:
        folder: The folder.
        name: Of the task. None: the folder's.
        reduce_zero_label: 0 is no class (ADE20K): it is ignored, and labels fall by one;
            `classes.txt` has the names of the others.
        val_fraction: Share of train that becomes val where there is no `validation`.
        seed: Of that cut.

    Raises:
        SpecError: A share or a seed that is none.
        VPTError: No such layout, an empty split, an image without its mask, one in two splits,
            fewer than two classes in the training masks, or labels most of which never occur.
    """
    PART.check(_CALL, "val_fraction", val_fraction)
    SEED.check(_CALL, "seed", seed)
    root = Path(folder).expanduser().absolute()
    places, notes = _places(root)
    pairs: dict[str, Sequence[Pair]] = {}
    for split, (images, masks) in places.items():
        pairs[split], others = _pairs(root, images, masks)
        notes += left_out(images, others)
    classes, absent = _classes(root, pairs["train"], reduce_zero_label)
    if "val" not in pairs:
        train = pairs["train"]
        drawn, rest = stratified([0] * len(train), val_fraction, seed, keep=1)
        if not drawn:
            problem = "no images/validation, and one training image is too few to cut it from"
            raise VPTError(_CALL, problem, path=root)
        pairs |= {"train": [train[i] for i in rest], "val": [train[i] for i in drawn]}
        notes.append(f"val is {len(drawn)} images cut from train (seed {seed})")
    splits: dict[str, SegmentationSplit] = {
        n: SegmentationSplit(tuple(pairs[n]), len(classes), reduce_zero_label)
        for n in ("train", "val", "test")
        if n in pairs
    }
    return SegmentationTask(name or root.resolve().name, classes, splits, (*notes, *absent))


def _places(root: Path) -> tuple[dict[str, tuple[Path, Path]], list[str]]:
    """Return the folders of images and masks of each split, and a note on those of none."""
    kinds = {kind: root / kind for kind in (_IMAGES, _MASKS)}
    names = {k: folder_names(f, _CALL) if f.is_dir() else [] for k, f in kinds.items()}
    there = {kind: split_names(_CALL, kinds[kind], found) for kind, found in names.items()}
    missing = [f"{kind}/training" for kind, found in there.items() if "train" not in found]
    if missing:
        raise VPTError(
            _CALL,
            f"{' and '.join(missing)} not found",
            "the layout is images/{training,validation,test}/* and "
            "annotations/{training,validation,test}/*.png",
            path=root,
        )
    images, masks = there.values()
    bare = [f"{_IMAGES}/{images[split]}" for split in images if split not in masks]
    if bare:
        raise VPTError(
            _CALL,
            f"{', '.join(bare)} has no folder of masks beside it in {_MASKS}/",
            "add it, or take the images away",
            path=root,
        )
    places = {
        split: (root / _IMAGES / images[split], root / _MASKS / masks[split]) for split in images
    }
    used = {folder for pair in places.values() for folder in pair}
    others = [f"{k}/{n}" for k, found in names.items() for n in found if kinds[k] / n not in used]
    return places, [f"folders that are not used: {listing(others)}"] if others else []


def _pairs(root: Path, images: Path, masks: Path) -> tuple[list[Pair], list[str]]:
    """Return images with the masks of the same name, and other files; folders below belong too."""
    found, below = (files_under(place, _CALL) for place in (images, masks))
    if not found.images:
        raise VPTError(_CALL, "is empty; it has no images", path=images)
    files = [path for path in below.images if path.lower().endswith(".png")]
    known = {_stem(path, masks): path for path in files}
    stems = [_stem(path, images) for path in found.images]
    missing = [f"{(masks / stem).relative_to(root)}.png" for stem in stems if stem not in known]
    if missing:
        raise VPTError(
            _CALL,
            f"{len(missing)} of {len(stems)} images have no mask: {listing(missing)} not found",
            "Add the masks, or remove the images",
            path=images,
        )
    for place, twice in ((images, len(stems) - len({*stems})), (masks, len(files) - len(known))):
        if twice:
            raise VPTError(
                _CALL,
                f"{twice} files differ in their suffix alone",
                "keep one of each name",
                path=place,
            )
    return [
        (path, known[stem]) for path, stem in zip(found.images, stems, strict=True)
    ], found.others


def _stem(path: str, folder: Path) -> str:
    """Return a path below a folder without its suffix."""
    return os.path.splitext(os.path.relpath(path, folder))[0]


def _classes(
    root: Path, pairs: Sequence[Pair], reduce_zero_label: bool
) -> tuple[tuple[str, ...], list[str]]:
    """Return class names, and a note on those that are in no training mask."""
    names = read_classes(root, _CALL)

    def read(index: int) -> set[int] | None:
        path = pairs[index][1]
        try:
            counts = torch.bincount(read_mask(path, reduce_zero_label).flatten())
        # Decoders raise whatever a damaged file leads them to.
        except Exception as error:
            if names:
                return None  # The loader lists it.
            reason = f"the mask cannot be read: {type(error).__name__}: {error}"
            raise VPTError(_CALL, reason, path=path) from error
        return set(counts.nonzero().flatten().tolist())

    found = each(read, pairs, True, what="reading masks")
    labels: set[int] = set().union(*(part for part in found if part is not None))
    there, whole = sorted(labels - {IGNORE}), None not in found
    if whole and len(there) < 2:
        beside = f" beside {IGNORE}, which is ignored" if IGNORE in labels else ""
        one = f"one class, {there[0]}" if there else "no class"
        raise VPTError(
            _CALL,
            f"the training masks have {one}{beside}; segmentation needs two at least",
            f"In masks of 0 and {IGNORE}, write 1 in the place of {IGNORE}",
            path=root,
        )
    known = names or tuple(str(index) for index in range(there[-1] + 1))
    absent = [name for index, name in enumerate(known) if index not in labels]
    if names is None and len(absent) > len(there):
        raise VPTError(
            _CALL,
            f"the training masks have the labels {listing([str(n) for n in there])}, so that "
            f"{len(absent)} of {len(known)} classes never occur",
            "Number the classes from 0 without gaps, or name every one in classes.txt",
            path=root,
        )
    note = f"{len(absent)} of {len(known)} classes are in no training mask: {listing(absent)}"
    return known, [note] if whole and absent else []


def segmentation_loader(
    split: SegmentationSplit,
    transform: SegmentationTransform,
    *,
    batch_size: int,
    **options: Any,
) -> DataLoader[Any]:
    """Return batches of pixels `(B, 3, H, W)` and masks `(B, H, W)` int64, 255 ignored.

    Args:
        split: A split of a segmentation task.
        transform: Of `segmentation_transform`.
        batch_size: Images per batch.
        options: As in `peft_vpt.data.loader`: `shuffle`, `seed`, `workers`, `drop_last`,
            `skip_broken`, `check`.

    Raises:
        SpecError: A wrong option, or batches of several images at their own sizes.
        VPTError: An empty split; pairs that cannot be read, differ in size, or have labels out of
            range: all counted, ten named.
    """
    call = "segmentation_loader"
    if transform.mode == "full" and batch_size != 1:
        raise SpecError(
            call,
            "images at their own size come one by one",
            "use `batch_size=1`",
            given={"batch_size": batch_size},
        )
    with renamed(call):
        return loader(split, transform, batch_size=batch_size, **options)


def check_masks(split: SegmentationSplit, *, progress: bool = True) -> dict[int, str]:
    """Read every image and mask in full; return what is wrong by index."""
    broken = split.broken(progress=progress)
    return {index: f"{split.where(index)}: {why}" for index, why in broken.items()}
