"""The layout of image folders: a folder per class, with or without folders per split."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import VPTError
from .found import Found, split_names, split_of
from .splits import Split, listing

_SUFFIXES = "avif bmp gif jfif jp2 jpeg jpg pbm pgm png ppm tga tif tiff webp"
EXTENSIONS = frozenset(f".{suffix}" for suffix in _SUFFIXES.split(" "))


def is_split_folder(folder: Path) -> bool:
    """Return whether a folder has a folder `train`, or one that is called like it."""
    names = folder_names(folder)
    alike = [name for name in names if split_of(name) == "train"]
    if "train" in alike or all(split_of(name) for name in names):
        return bool(alike)
    # "Train" may be a class too, of vehicles say.
    return any(folder_names(folder / name) for name in alike)


def folder_names(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted; hidden ones are left out."""
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not _hidden(e.name))


def open_split_folder(folder: Path) -> Found:
    """Read `train/<class>/*` and, if they are there, val and test.

    Their folders are called `train`, `training`; `val`, `valid`, `validation`, `dev`; `test`,
    `testing`, in any case. Classes are the names of train's folders, sorted. Folders in a class
    folder belong to it. Without val it is cut from train, and test too if neither is there.

    Raises:
        VPTError: No class folders, a class without images, a class that train lacks, an empty
            split, or two folders for one.
    """
    names = folder_names(folder)
    there = split_names(names, f"open_task({str(folder)!r})")
    # Train first, whose classes the others must have.
    order = [name for name in ("train", "val", "test") if name in there]
    places = {str(split): folder / there[split] for split in order}
    files = {name: class_files(place) for name, place in places.items()}
    _refuse_empty_classes(places["train"], files["train"])
    classes = tuple(files["train"])
    for name in files:
        _refuse_strange(folder, name, files[name], classes)
    splits = {name: _split(found, classes) for name, found in files.items()}
    notes = ["no test split: only val can be measured"] if "val" in splits else []
    notes = [] if "test" in splits else notes
    others = [name for name in names if name not in there.values()]
    if others:
        notes.append(f"folders beside {there['train']} that are not used: {listing(others)}")
    return Found("image folders", classes, splits, cut_test=len(splits) == 1, notes=notes)


def open_flat_folder(folder: Path) -> Found:
    """Read `<class>/*`; val and test are cut from it.

    Raises:
        VPTError: No class folders, or one without images.
    """
    files = class_files(folder)
    _refuse_empty_classes(folder, files)
    classes = tuple(files)
    layout = "folder of classes"
    return Found(layout, classes, {"train": _split(files, classes)}, cut_test=True)


def class_files(folder: Path) -> dict[str, list[str]]:
    """Return the image files of every class folder, both sorted; hidden ones are left out.

    Raises:
        VPTError: There is no class folder.
    """
    names = folder_names(folder)
    if not names:
        raise VPTError(
            f"open_task: {folder} has no class folders; put the images of each class in a folder "
            f"of its own, {folder / '<class>' / '<image>'}."
        )
    return {name: image_files(folder / name) for name in names}


def image_files(folder: Path) -> list[str]:
    """Return all image files under a folder by their extension, sorted."""
    found: list[str] = []
    for place, folders, names in os.walk(folder.absolute()):
        folders[:] = [name for name in folders if not _hidden(name)]
        images = (n for n in names if not _hidden(n) and Path(n).suffix.lower() in EXTENSIONS)
        found += [os.path.join(place, name) for name in images]
    return sorted(found)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _refuse_empty_classes(folder: Path, files: dict[str, list[str]]) -> None:
    empty = [name for name, paths in files.items() if not paths]
    if empty:
        raise VPTError(
            f"open_task: {len(empty)} of {len(files)} class folders of {folder} have no images: "
            f"{listing(empty)}. Images end in {', '.join(sorted(EXTENSIONS))}. Add some, or "
            "remove the folders."
        )


def _refuse_strange(
    folder: Path, name: str, files: dict[str, list[str]], classes: tuple[str, ...]
) -> None:
    strange = [c for c in files if c not in classes]
    if strange:
        raise VPTError(
            f"open_task({str(folder)!r}): {len(strange)} class folders of {name!r} are not in "
            f"train: {listing(strange)}. Train has {listing(classes)}. Give train images of "
            "them, or remove them."
        )


def _split(files: dict[str, list[str]], classes: tuple[str, ...]) -> Split:
    pairs = [(path, classes.index(name)) for name, paths in files.items() for path in paths]
    return Split(tuple(path for path, _ in pairs), tuple(label for _, label in pairs))
