"""Opening a task: which layout a folder has, and which splits are cut from its training images."""

from __future__ import annotations

import math
from pathlib import Path

from ..errors import VPTError, listing
from .drawing import PART, SEED, SHARE, stratified
from .huggingface import PREFIX, open_dataset
from .layouts import (
    Found,
    folder_names,
    is_fgvc,
    is_split_folder,
    is_vtab,
    open_fgvc,
    open_flat_folder,
    open_split_folder,
    open_vtab,
)
from .splits import Split, Task, real_paths, split_of

_CALL = "open_task"
_LAYOUTS = (
    "lists (train800.txt, val200.txt, test.txt), json splits (train.json, test.json), folders "
    "(train/<class>/*, val, test) or one folder per class (<class>/*)"
)


def open_task(
    source: str | Path,
    *,
    name: str | None = None,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    fraction: float = 1.0,
    seed: int = 0,
) -> Task:
    """Open labelled images as a task; the layout of a folder is found by its files.

    In this order: the lists of VTAB-1k (`train800.txt`, ...), the json splits of FGVC
    (`train.json`, ...), `train/<class>/*` with or without `val` and `test` (`valid`, `Testing` and
    the like too), `<class>/*`. Names
    "hf:owner/name" and "hf:owner/name:config" are Hugging Face datasets, "hf:/folder" one that was
    saved, or a local image folder. A missing val split is cut from train, stratified; where there
    is train alone, a test split is cut first. No image is read here: `check_images` does that.

    Args:
        source: A folder or a dataset name.
        name: Of the task. None: the folder's.
        val_fraction: Share of train that becomes val where there is none (paper: 90/10).
        test_fraction: Share that becomes test where there is train alone.
        fraction: Share of the training images to keep, stratified, at least one per class
            (paper figures 3 and 20); for a whole percent, `train_<percent>.json` is taken where it
            is there beside `val.json`. Val and test stay whole.
        seed: Of the cuts.

    Raises:
        SpecError: A fraction out of range, or a seed that is none.
        VPTError: No such folder or layout, or what is in it is wrong: no classes, an empty split,
            a class that train lacks, labels out of range, missing images, an image in two splits.
    """
    PART.check(_CALL, "val_fraction", val_fraction)
    PART.check(_CALL, "test_fraction", test_fraction)
    SHARE.check(_CALL, "fraction", fraction)
    SEED.check(_CALL, "seed", seed)
    text, percent = str(source), None
    if text.startswith(PREFIX):
        found = open_dataset(text)
        title = text.removeprefix(PREFIX).partition(":")[0].rstrip("/").rsplit("/", 1)[-1]
    else:
        folder = _folder(source)
        percent = _own_file(folder, fraction)
        found = _open(folder, percent)
        title = folder.resolve().name
    notes = [*found.notes, *_notes(found)]
    splits = dict(found.splits)
    if set(splits) == {"train"}:
        notes.append(_cut(splits, "test", test_fraction, seed))
    if "val" not in splits:
        notes.append(_cut(splits, "val", val_fraction, seed))
    if percent is not None:
        notes.append(f"train is {len(splits['train'])} images of train_{percent}.json")
    elif fraction < 1:
        train = splits["train"]
        splits["train"] = share_of(train, fraction, seed)
        kept = f"{len(splits['train'])} of {len(train)}"
        notes.append(f"train is {kept} images (stratified, seed {seed})")
    ordered: dict[str, Split] = {
        part: splits[part] for part in ("train", "val", "test") if part in splits
    }
    return Task(name or title, found.classes, ordered, tuple(notes), found.layout)


def share_of(train: Split, fraction: float, seed: int) -> Split:
    """Return a stratified share of training images, at least one per class."""
    return train.subset(stratified(train.labels, fraction, seed, least=1)[0])


def _folder(source: str | Path) -> Path:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise VPTError(
            _CALL,
            "is a file" if folder.exists() else "is not there",
            "give a folder of images, or 'hf:owner/name' for a Hugging Face dataset",
            path=source,
        )
    return folder.absolute()


def _own_file(folder: Path, fraction: float) -> int | None:
    """Return the percent of train that a json file of its own holds, if this is the share."""
    percent = round(fraction * 100)
    whole = fraction < 1 and math.isclose(percent, fraction * 100)
    # Without val.json, val is cut from train.json, whatever share of the rest is kept.
    needed = ("train.json", "val.json", f"train_{percent}.json")
    there = whole and all((folder / file).is_file() for file in needed)
    return percent if there and not is_vtab(folder) else None


def _open(folder: Path, percent: int | None) -> Found:
    if is_vtab(folder):
        return open_vtab(folder)
    if is_fgvc(folder):
        return open_fgvc(folder, percent)
    if is_split_folder(folder):
        return open_split_folder(folder)
    names = folder_names(folder)
    # Of a task without its train; a class may be called "valid", beside "invalid" say.
    stray = [name for name in names if name.casefold() in ("val", "validation", "test")]
    if stray or all(split_of(name) for name in names):
        there = sorted(entry.name for entry in folder.iterdir())
        raise VPTError(
            _CALL,
            "no classes or no training images found; it has "
            f"{listing(there) if there else 'nothing'}. A task is {_LAYOUTS}",
            path=folder,
        )
    return open_flat_folder(folder)


def _notes(found: Found) -> list[str]:
    """Return notes on images that are named twice, classes without any, and a missing test."""
    notes = [
        f"{name} names {extra} images again; each counts as often as it is named"
        for name, split in found.splits.items()
        if (extra := len(split.paths) - len(set(real_paths(split.paths))))
    ]
    count, present = len(found.classes), set(found.splits["train"].labels)
    absent = [name for index, name in enumerate(found.classes) if index not in present]
    if absent:
        missing = f"{len(absent)} of {count} classes have no training image"
        notes.append(f"{missing}: {listing(absent)}")
    if set(found.splits) == {"train", "val"}:
        notes.append("no test split: only val can be measured")
    return notes


def _cut(splits: dict[str, Split], name: str, share: float, seed: int) -> str:
    """Cut a split from train; return a note on it."""
    train = splits["train"]
    drawn, rest = stratified(train.labels, share, seed, keep=1)
    if not drawn:
        raise VPTError(
            _CALL,
            f"there is no split {name!r}, and none can be cut from {len(train)} training images "
            f"of {len(set(train.labels))} classes",
            "give more images or the split",
        )
    splits |= {"train": train.subset(rest), name: train.subset(drawn)}
    return f"{name} is {len(drawn)} images cut from train (stratified, seed {seed})"
