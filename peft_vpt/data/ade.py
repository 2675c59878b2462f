"""Opening folders of images and masks in the layout of ADE20K."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import VPTError, listing
from .drawing import check_counts, check_shares, stratified
from .folders import files_under, folder_names, left_out_notes
from .loading import each
from .masks import SegmentationSplit, SegmentationTask, read_mask
from .splits import read_classes, split_names
from .warps import IGNORE

Pair = tuple[str, str]
_IMAGES, _MASKS = "images", "annotations"


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
    an 8-bit PNG of one channel with the name of its image; 255 is ignored. An image with
    an EXIF orientation is turned where its mask has the size that it is shown at, left as it is
    stored where the mask has that size, and refused where both are one. Names of
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
    call = f"open_segmentation({str(folder)!r})"
    check_shares("open_segmentation", val_fraction=val_fraction)
    check_counts("open_segmentation", seed=(seed, 0))
    root = Path(folder).expanduser().absolute()
    places, notes = _places(root, call)
    pairs: dict[str, tuple[Pair, ...]] = {}
    for split, (images, masks) in places.items():
        pairs[split], left_out = _pairs(root, images, masks)
        notes += left_out
    classes, absent = _classes(root, pairs["train"], reduce_zero_label, call)
    splits = {n: SegmentationSplit(p, len(classes), reduce_zero_label) for n, p in pairs.items()}
    if "val" not in splits:
        train = splits["train"]
        drawn, rest = stratified([0] * len(train), val_fraction, seed, keep=1)
        if not drawn:
            raise VPTError(
                f"{call}: no images/validation, and one training image is too few to cut it from."
            )
        splits = {"train": train.subset(rest), "val": train.subset(drawn)} | {
            n: s for n, s in splits.items() if n == "test"
        }
        notes.append(f"val is {len(drawn)} images cut from train (seed {seed})")
    title = name or root.resolve().name
    return SegmentationTask(title, classes, splits, (*notes, *absent))


def _places(root: Path, call: str) -> tuple[dict[str, tuple[Path, Path]], list[str]]:
    """Return the folders of images and masks of each split, and a note on those of none."""
    names = {
        kind: folder_names(root / kind, call)
        for kind in (_IMAGES, _MASKS)
        if (root / kind).is_dir()
    }
    there = {kind: split_names(found, f"{call}: {kind}") for kind, found in names.items()}
    missing = [kind for kind in (_IMAGES, _MASKS) if "train" not in there.get(kind, {})]
    if missing:
        raise VPTError(
            f"{call}: {' and '.join(f'{kind}/training' for kind in missing)} not found; the layout "
            "is images/{training,validation,test}/* and annotations/{training,validation,test}/*"
            ".png."
        )
    images, masks = there[_IMAGES], there[_MASKS]
    bare = [f"{_IMAGES}/{images[split]}" for split in images if split not in masks]
    if bare:
        raise VPTError(
            f"{call}: {', '.join(bare)} has no folder of masks beside it in {_MASKS}/; add it, or "
            "take the images away."
        )
    splits = [split for split in ("train", "val", "test") if split in images]
    used = {kind: {found[split] for split in splits} for kind, found in there.items()}
    others = [f"{k}/{name}" for k, found in names.items() for name in found if name not in used[k]]
    notes = [f"folders that are not used: {listing(others)}"] if others else []
    return {s: (root / _IMAGES / images[s], root / _MASKS / masks[s]) for s in splits}, notes


def _pairs(root: Path, images: Path, masks: Path) -> tuple[tuple[Pair, ...], list[str]]:
    """Return images with the masks of the same name, and notes; folders below belong to them."""
    found, below = (files_under(place, "open_segmentation") for place in (images, masks))
    if not found.images:
        raise VPTError(f"open_segmentation: {images} is empty; it has no images.")
    files = [path for path in below.images if path.lower().endswith(".png")]
    known = {_stem(path, masks): path for path in files}
    pairs = [(path, known.get(_stem(path, images))) for path in found.images]
    missing = [_stem(path, images) for path, mask in pairs if mask is None]
    if missing:
        shown = listing([str((masks / stem).relative_to(root)) + ".png" for stem in missing])
        raise VPTError(
            f"open_segmentation: {len(missing)} of {len(pairs)} images of {images.name} have no "
            f"mask: {shown} not found. Add the masks, or remove the images."
        )
    for place, paths in ((images, found.images), (masks, files)):
        twice = len(paths) - len({_stem(path, place) for path in paths})
        if twice:
            raise VPTError(
                f"open_segmentation: {twice} files of {place.relative_to(root)} differ in their "
                "suffix alone; keep one of each name."
            )
    whole = tuple((path, mask) for path, mask in pairs if mask is not None)
    return whole, left_out_notes(images, found.others)


def _stem(path: str, folder: Path) -> str:
    """Return a path below a folder without its suffix."""
    return os.path.splitext(os.path.relpath(path, folder))[0]


def _classes(
    root: Path, pairs: Sequence[Pair], reduce_zero_label: bool, call: str
) -> tuple[tuple[str, ...], list[str]]:
    """Return class names, and a note on those that are in no training mask."""
    names = read_classes(root, "open_segmentation")
    labels, whole = _labels(pairs, reduce_zero_label, names is None)
    there = labels - {IGNORE}
    if whole and len(there) < 2:
        beside = f" beside {IGNORE}, which is ignored" if IGNORE in labels else ""
        one = f"one class, {min(there)}" if there else "no class"
        raise VPTError(
            f"{call}: the training masks have {one}{beside}; segmentation needs two at least. In "
            f"masks of 0 and {IGNORE}, write 1 in the place of {IGNORE}."
        )
    known = names or tuple(str(index) for index in range(max(there) + 1))
    absent = [name for index, name in enumerate(known) if index not in there]
    if names is None and len(absent) > len(there):
        shown = listing([str(label) for label in sorted(there)])
        raise VPTError(
            f"{call}: the training masks have the labels {shown}, so that {len(absent)} of "
            f"{len(known)} classes never occur. Number the classes from 0 without gaps, or name "
            "every one in classes.txt, one per line."
        )
    note = f"{len(absent)} of {len(known)} classes are in no training mask: {listing(absent)}"
    return known, [note] if whole and absent else []


def _labels(pairs: Sequence[Pair], reduce_zero_label: bool, needed: bool) -> tuple[set[int], bool]:
    """Return the labels of all masks, and whether all could be read.

    Raises:
        VPTError: One cannot be read, and `needed` says that all have to be.
    """

    def read(index: int) -> set[int] | None:
        path = pairs[index][1]
        try:
            counts = torch.bincount(read_mask(path, reduce_zero_label).flatten())
        # Decoders raise whatever a damaged file leads them to.
        except Exception as error:
            if not needed:
                return None  # the loader lists it
            raise VPTError(
                f"open_segmentation: mask {path} cannot be read: {type(error).__name__}: {error}"
            ) from error
        return set(counts.nonzero().flatten().tolist())

    found = each(read, range(len(pairs)), True, what="reading masks")
    sets = [labels for labels in found if labels is not None]
    return set().union(*sets), len(sets) == len(found)
