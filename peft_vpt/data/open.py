"""Opening a task: which layout a folder has, and which splits are cut from its training images."""

from __future__ import annotations

import math
from pathlib import Path

from ..errors import VPTError, listing
from .drawing import check_counts, check_shares, stratified
from .folders import folder_names, is_split_folder, open_flat_folder, open_split_folder
from .huggingface import PREFIX, open_dataset
from .lists import is_fgvc, is_vtab, open_fgvc, open_vtab
from .splits import Found, Task, split_of

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
    check_shares("open_task", val_fraction=val_fraction, test_fraction=test_fraction)
    check_shares("open_task", whole=True, fraction=fraction)
    check_counts("open_task", seed=(seed, 0))
    text = str(source)
    percent = round(fraction * 100)
    whole = fraction < 1 and math.isclose(percent, fraction * 100)
    own_file = False
    if text.startswith(PREFIX):
        found = open_dataset(text)
        title = text.removeprefix(PREFIX).partition(":")[0].rstrip("/").rsplit("/", 1)[-1]
    else:
        folder = _folder(source)
        # Without val.json, val is cut from train.json, whatever share of the rest is kept.
        needed = ("train.json", "val.json", f"train_{percent}.json")
        there = all((folder / file).is_file() for file in needed)
        own_file = whole and there and not is_vtab(folder)
        found = _open(folder, percent if own_file else None)
        title = folder.resolve().name
    if found.cut_test:
        _cut(found, "test", test_fraction, seed)
    if "val" not in found.splits:
        _cut(found, "val", val_fraction, seed)
    if fraction < 1:
        _keep(found, fraction, seed, own_file=own_file)
    order = ("train", "val", "test")
    splits = {str(part): found.splits[part] for part in order if part in found.splits}
    return Task(name or title, found.classes, splits, tuple(found.notes), found.layout)


def _folder(source: str | Path) -> Path:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "is not there"
        raise VPTError(
            f"open_task({str(source)!r}): {what}; give a folder of images, or 'hf:owner/name' for "
            "a Hugging Face dataset."
        )
    return folder.absolute()


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
            f"open_task({str(folder)!r}): no classes or no training images found; it has "
            f"{listing(there) if there else 'nothing'}. A task is {_LAYOUTS}."
        )
    return open_flat_folder(folder)


def _cut(found: Found, name: str, share: float, seed: int) -> None:
    train = found.splits["train"]
    drawn, rest = stratified(train.labels, share, seed, keep=1)
    if not drawn:
        raise VPTError(
            f"open_task: there is no split {name!r}, and none can be cut from {len(train)} "
            f"training images of {len(found.classes)} classes; give more images or the split."
        )
    found.splits |= {"train": train.subset(rest), name: train.subset(drawn)}
    found.notes.append(f"{name} is {len(drawn)} images cut from train (stratified, seed {seed})")


def _keep(found: Found, fraction: float, seed: int, *, own_file: bool) -> None:
    train = found.splits["train"]
    if own_file:
        found.notes.append(f"train is {len(train)} images of train_{round(fraction * 100)}.json")
        return
    drawn, _ = stratified(train.labels, fraction, seed, least=1)
    found.splits["train"] = train.subset(drawn)
    found.notes.append(f"train is {len(drawn)} of {len(train)} images (stratified, seed {seed})")
