"""The layout of image folders: a folder per class, with or without folders per split."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

from ..errors import VPTError, listing
from .splits import Found, Split, duplicate_notes, split_names, split_of

FLAT, SPLIT = "folder of classes", "image folders"
_SUFFIXES = "avif bmp gif jfif jp2 jpe jpeg jpg pbm pgm png ppm tga tif tiff webp"
EXTENSIONS = frozenset(f".{suffix}" for suffix in _SUFFIXES.split(" "))
# What systems leave in every folder.
_SYSTEM = ("__macosx", "thumbs.db", "desktop.ini")


class Files(NamedTuple):
    """Absolute paths under a folder: images by their suffix, and all other files."""

    images: list[str]
    others: list[str]


def is_split_folder(folder: Path) -> bool:
    """Return whether a folder has a folder `train`, or one that is called like it."""
    names = folder_names(folder)
    alike = [name for name in names if split_of(name) == "train"]
    if "train" in alike or all(split_of(name) for name in names):
        return bool(alike)
    # "Train" may be a class too, of vehicles say.
    return any(folder_names(folder / name) for name in alike)


def folder_names(folder: Path, call: str = "open_task") -> list[str]:
    """Return the names of the folders in a folder, sorted; hidden ones are left out.

    Raises:
        VPTError: It cannot be read.
    """
    try:
        names = os.listdir(folder)
    except OSError as error:
        _refuse(error, call)
    return sorted(n for n in names if not _hidden(n) and os.path.isdir(folder / n))


def open_split_folder(folder: Path) -> Found:
    """Read `train/<class>/*` and, if they are there, val and test.

    Their folders are called `train`, `training`; `val`, `valid`, `validation`, `dev`; `test`,
    `testing`, in any case. Classes are the names of train's folders, sorted. Folders in a class
    folder, links too, belong to it. Without val it is cut from train, and test too if neither is
    there. Notes say which files are left out.

    Raises:
        VPTError: No class folders, a class without images, a class that train lacks, an empty
            split, or two folders for one.
    """
    names = folder_names(folder)
    there = split_names(names, f"open_task({str(folder)!r})")
    # Train first, whose classes the others must have.
    order = [name for name in ("train", "val", "test") if name in there]
    places = {str(split): folder / there[split] for split in order}
    found = {name: class_files(place) for name, place in places.items()}
    files = {name: {c: f.images for c, f in by_class.items()} for name, by_class in found.items()}
    _refuse_empty_classes(places["train"], files["train"])
    classes = tuple(files["train"])
    for name in files:
        _refuse_strange(folder, name, files[name], classes)
    splits = {name: _split(by_class, classes) for name, by_class in files.items()}
    notes = ["no test split: only val can be measured"] if "val" in splits else []
    notes = [] if "test" in splits else notes
    others = [name for name in names if name not in there.values()]
    if others:
        notes.append(f"folders beside {there['train']} that are not used: {listing(others)}")
    notes += duplicate_notes(splits)
    for name, place in places.items():
        notes += _class_notes(place, found[name])
    return Found(SPLIT, classes, splits, cut_test=len(splits) == 1, notes=notes)


def open_flat_folder(folder: Path) -> Found:
    """Read `<class>/*`; val and test are cut from it.

    Raises:
        VPTError: No class folders, or one without images.
    """
    found = class_files(folder)
    files = {name: part.images for name, part in found.items()}
    _refuse_empty_classes(folder, files)
    classes = tuple(files)
    splits = {"train": _split(files, classes)}
    notes = duplicate_notes(splits) + _class_notes(folder, found)
    return Found(FLAT, classes, splits, cut_test=True, notes=notes)


def class_files(folder: Path) -> dict[str, Files]:
    """Return the files of every class folder, both sorted; hidden ones are left out.

    Raises:
        VPTError: There is no class folder.
    """
    names = folder_names(folder)
    if not names:
        raise VPTError(
            f"open_task: {folder} has no class folders; put the images of each class in a folder "
            f"of its own, {folder / '<class>' / '<image>'}."
        )
    return {name: files_under(folder / name) for name in names}


def files_under(folder: Path, call: str = "open_task") -> Files:
    """Return all files under a folder, sorted, through links too; hidden ones are left out.

    An empty folder that is called like an image is one of them, to be listed as broken.

    Raises:
        VPTError: A folder cannot be read.
    """
    images: list[str] = []
    others: list[str] = []
    been: set[str] = set()
    refuse = partial(_refuse, call=call)
    for place, folders, names in os.walk(folder.absolute(), onerror=refuse, followlinks=True):
        # A link to a folder around it would never end.
        real = os.path.realpath(place)
        folders[:] = sorted(n for n in folders if not _hidden(n) and real not in been)
        hollow = [n for n in folders if _is_image(n) and _is_empty(os.path.join(place, n))]
        for name in [*names, *hollow] if real not in been else ():
            if not _hidden(name):
                kind = images if _is_image(name) else others
                kind.append(os.path.join(place, name))
        been.add(real)
    return Files(sorted(images), sorted(others))


def left_out_notes(folder: Path, others: Sequence[str]) -> list[str]:
    """Return a note on files that are no images by their suffix."""
    if not others:
        return []
    kinds = Counter(Path(path).suffix.lower() or "no suffix" for path in others)
    counted = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
    shown = listing([os.path.relpath(path, folder) for path in others], most=3)
    left = f"{len(others)} files of {folder.name} left out, no images by their suffix"
    return [f"{left} ({counted}): {shown}"]


def _class_notes(folder: Path, files: Mapping[str, Files]) -> list[str]:
    """Return notes on the files of a folder of classes that are not used."""
    entries = [name for name in os.listdir(folder) if os.path.isfile(folder / name)]
    loose = sorted(name for name in entries if not _hidden(name) and _is_image(name))
    notes = left_out_notes(folder, [path for part in files.values() for path in part.others])
    if loose:
        beside = f"{len(loose)} images of {folder.name} left out, beside the folders of classes"
        notes.append(f"{beside}: {listing(loose, most=3)}")
    return notes


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in EXTENSIONS


def _is_empty(folder: str) -> bool:
    try:
        return not os.listdir(folder)
    except OSError:
        return False


def _refuse(error: OSError, call: str) -> NoReturn:
    """Raise for a folder that cannot be read: its images would be missed without a word."""
    raise VPTError(
        f"{call}: {error.filename}: cannot be read ({error.strerror}); make it readable, or take "
        "it away."
    ) from error


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.casefold() in _SYSTEM


def _refuse_empty_classes(folder: Path, files: Mapping[str, Sequence[str]]) -> None:
    empty = [name for name, paths in files.items() if not paths]
    if empty:
        raise VPTError(
            f"open_task: {len(empty)} of {len(files)} class folders of {folder} have no images: "
            f"{listing(empty)}. Images end in {', '.join(sorted(EXTENSIONS))}. Add some, or "
            "remove the folders."
        )


def _refuse_strange(
    folder: Path, name: str, files: Mapping[str, Sequence[str]], classes: tuple[str, ...]
) -> None:
    strange = [c for c in files if c not in classes]
    if strange:
        raise VPTError(
            f"open_task({str(folder)!r}): {len(strange)} class folders of {name!r} are not in "
            f"train: {listing(strange)}. Train has {listing(classes)}. Give train images of "
            "them, or remove them."
        )


def _split(files: Mapping[str, Sequence[str]], classes: tuple[str, ...]) -> Split:
    pairs = [(path, classes.index(name)) for name, paths in files.items() for path in paths]
    return Split(tuple(path for path, _ in pairs), tuple(label for _, label in pairs))
