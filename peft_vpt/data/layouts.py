"""Layouts of a task on disk: image folders, the lists of VTAB-1k, the json splits of FGVC."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ..errors import VPTError, listing
from .splits import Split, split_names, split_of

FLAT, SPLIT = "folder of classes", "image folders"
_CALL = "open_task"
_SUFFIXES = "avif bmp gif jfif jp2 jpe jpeg jpg pbm pgm png ppm tga tif tiff webp"
EXTENSIONS = frozenset(f".{suffix}" for suffix in _SUFFIXES.split(" "))
# What systems leave in every folder.
_SYSTEM = ("__macosx", "thumbs.db", "desktop.ini")
Label = int | str
Rows = list[tuple[str, Label]]


@dataclass
class Found:
    """What a layout holds, before missing splits are cut from train.

    Args:
        layout: In words.
        classes: Class names.
        splits: Those that are there; "train" always is.
        notes: For the task.
    """

    layout: str
    classes: tuple[str, ...]
    splits: dict[str, Split]
    notes: list[str] = field(default_factory=list)


def is_split_folder(folder: Path) -> bool:
    """Return whether a folder has a folder `train`, or one that is called like it."""
    names = folder_names(folder)
    alike = [name for name in names if split_of(name) == "train"]
    if "train" in alike or all(split_of(name) for name in names):
        return bool(alike)
    # "Train" may be a class too, of vehicles say.
    return any(folder_names(folder / name) for name in alike)


def open_split_folder(folder: Path) -> Found:
    """Read `train/<class>/*` and, if they are there, val and test.

    Their folders are called `train`, `training`; `val`, `valid`, `validation`, `dev`; `test`,
    `testing`, in any case. Classes are the names of train's folders, sorted. Folders in a class
    folder, links too, belong to it. Notes say which files are left out.

    Raises:
        VPTError: No class folders, a class without images, a class that train lacks, an empty
            split, or two folders for one.
    """
    names = folder_names(folder)
    there = split_names(_CALL, folder, names)
    found = _folders(folder, SPLIT, {split: folder / name for split, name in there.items()})
    others = [name for name in names if name not in there.values()]
    if others:
        beside = f"folders beside {there['train']} that are not used"
        found.notes.append(f"{beside}: {listing(others)}")
    return found


def open_flat_folder(folder: Path) -> Found:
    """Read `<class>/*` as train.

    Raises:
        VPTError: No class folders, or one without images.
    """
    return _folders(folder, FLAT, {"train": folder})


def _folders(folder: Path, layout: str, places: Mapping[str, Path]) -> Found:
    """Read a folder of classes per split."""
    images: dict[str, list[str]] = {}
    labels: dict[str, list[Label]] = {}
    notes: list[str] = []
    for split, place in places.items():
        files = {c: files_under(place / c) for c in folder_names(place)}
        empty = [c for c, found in files.items() if not found.images]
        if not files or (empty and split == "train"):
            what = f"{len(empty)} of {len(files)} class folders have no images: {listing(empty)}"
            raise VPTError(
                _CALL,
                what if files else "has no class folders",
                f"Put the images of each class in a folder of its own, {place / '<class>' / '*'}; "
                f"they end in {', '.join(sorted(EXTENSIONS))}",
                path=place,
            )
        images[split] = [path for found in files.values() for path in found.images]
        labels[split] = [c for c, found in files.items() for _ in found.images]
        notes += left_out(place, [path for found in files.values() for path in found.others])
        notes += _loose(place)
    classes, numbers = number_labels(labels, None, folder)
    splits = {name: Split(tuple(images[name]), numbers[name]) for name in places}
    return Found(layout, classes, splits, notes)


def _loose(folder: Path) -> list[str]:
    """Return a note on images beside the folders of classes."""
    names = [n for n in os.listdir(folder) if _is_image(n) and os.path.isfile(folder / n)]
    if not names:
        return []
    beside = f"{len(names)} images of {folder.name} left out, beside the folders of classes"
    return [f"{beside}: {listing(sorted(names), most=3)}"]


class Files(NamedTuple):
    """Absolute paths under a folder: images by their suffix, and all other files."""

    images: list[str]
    others: list[str]


def files_under(folder: Path, call: str = _CALL) -> Files:
    """Return all files under a folder, sorted, through links too; hidden ones are left out.

    Raises:
        VPTError: A folder cannot be read.
    """
    found = Files([], [])
    been: set[str] = set()
    refuse = partial(_refuse, call)
    for place, folders, names in os.walk(folder.absolute(), onerror=refuse, followlinks=True):
        # A link to a folder around it would never end.
        real = os.path.realpath(place)
        if real in been:
            folders.clear()
            continue
        been.add(real)
        folders[:] = [name for name in folders if not _hidden(name)]
        for name in names:
            if not _hidden(name):
                kind = found.images if _is_image(name) else found.others
                kind.append(os.path.join(place, name))
    return Files(sorted(found.images), sorted(found.others))


def folder_names(folder: Path, call: str = _CALL) -> list[str]:
    """Return the names of the folders in a folder, sorted; hidden ones are left out.

    Raises:
        VPTError: It cannot be read.
    """
    try:
        names = os.listdir(folder)
    except OSError as error:
        _refuse(call, error)
    return sorted(n for n in names if not _hidden(n) and os.path.isdir(folder / n))


def left_out(folder: Path, others: Sequence[str]) -> list[str]:
    """Return a note on files that are no images by their suffix."""
    if not others:
        return []
    kinds = Counter(Path(path).suffix.lower() or "no suffix" for path in others)
    counted = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
    shown = listing([os.path.relpath(path, folder) for path in others], most=3)
    left = f"{len(others)} files of {folder.name} left out, no images by their suffix"
    return [f"{left} ({counted}): {shown}"]


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in EXTENSIONS and not _hidden(name)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.casefold() in _SYSTEM


def _refuse(call: str, error: OSError) -> NoReturn:
    """Raise for a folder that cannot be read: its images would be missed without a word."""
    raise VPTError(
        call,
        f"cannot be read ({error.strerror})",
        "make it readable, or take it away",
        path=error.filename,
    ) from error


LISTS = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}
JOINED = "train800val200.txt"
# The last word is the label. Numbers of other scripts, and of thousands of digits, are none.
_LINE = re.compile(r"\s*(.*\S)\s+([0-9]{1,18})\s*")


def is_vtab(folder: Path) -> bool:
    """Return whether a folder has one of the lists of training images of VTAB-1k."""
    return any((folder / name).is_file() for name in (LISTS["train"], LISTS["val"], JOINED))


def open_vtab(folder: Path) -> Found:
    """Read `train800.txt`, `val200.txt` and `test.txt`: path and label per line.

    Labels are numbers from 0. Names are in `classes.txt`; without it the numbers are the names.
    Nothing tells a mistake then from a label that is above all of train's, or so high in train that
    there would be more classes than training images; both are errors.

    Raises:
        VPTError: A list is missing, a line is no path and label, an image is not there, a label is
            out of range, or `train800val200.txt` is another set than both lists.
    """
    rows = {name: _read_list(folder / file) for name, file in LISTS.items()}
    joined = folder / JOINED
    if joined.is_file() and Counter(_read_list(joined)) != Counter(rows["train"] + rows["val"]):
        raise VPTError(
            _CALL,
            f"holds other lines than {LISTS['train']} and {LISTS['val']} together",
            "correct it, or delete it (it is made from the two)",
            path=joined,
        )
    classes = read_classes(folder)
    if classes is None and rows["train"]:
        # Gaps below the highest label of train are classes without images there, not mistakes.
        top, count = max(int(label) for _, label in rows["train"]), len(rows["train"])
        if top >= count:
            raise VPTError(
                _CALL,
                f"has the label {top}, which makes {top + 1} classes of {count} images",
                "correct it, or name every class in classes.txt, one per line",
                path=folder / LISTS["train"],
            )
        classes = tuple(str(index) for index in range(top + 1))
    return _listed("VTAB-1k lists", folder, folder, LISTS, rows, classes)


def _read_list(file: Path) -> Rows:
    rows: Rows = []
    bad: list[str] = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if found := _LINE.fullmatch(line):
            rows.append((found[1], int(found[2])))
        elif line.strip():
            bad.append(f"line {number} {line.strip()!r}")
    if bad:
        raise VPTError(
            _CALL,
            f"{len(bad)} lines without a path and a whole number from 0 up: {listing(bad)}",
            "Write 'path label' on every line",
            path=file,
        )
    return rows


def is_fgvc(folder: Path) -> bool:
    """Return whether a folder has json splits."""
    return (folder / "train.json").is_file()


def open_fgvc(folder: Path, percent: int | None = None) -> Found:
    """Read `train.json`, `test.json` and, if it is there, `val.json`: {path: label or name}.

    Paths are relative to the folder or its `images/`. Without `classes.txt` the classes are the
    labels of train, sorted, so that numbers need not begin at 0.

    Args:
        folder: The folder.
        percent: Share of train whose own file, `train_<percent>.json`, replaces `train.json`.

    Raises:
        VPTError: A file is missing or no such mapping, an image is not there, or a class of
            another split is unknown to train.
    """
    train = "train.json" if percent is None else f"train_{percent}.json"
    files = {"train": train, "val": "val.json", "test": "test.json"}
    if not (folder / "val.json").is_file():
        del files["val"]
    rows = {name: _read_json(folder / file) for name, file in files.items()}
    names = [path for found in rows.values() for path, _ in found]
    roots = (folder, folder / "images")
    root = max(roots, key=lambda r: sum(os.path.isfile(r / path) for path in names[:1000]))
    whole = [] if percent is None else [label for _, label in _read_json(folder / "train.json")]
    return _listed("FGVC json splits", folder, root, files, rows, read_classes(folder), whole)


def _read_json(file: Path) -> Rows:
    text = read_text(file)
    try:
        # Tuples tell objects, with the paths that they name twice, from arrays.
        pairs: Any = json.loads(text, object_pairs_hook=tuple)
    except (ValueError, RecursionError) as error:
        raise VPTError(_CALL, f"is no JSON: {error}", path=file) from error
    if not isinstance(pairs, tuple):
        raise VPTError(_CALL, "must be a JSON object, image path: label or class name", path=file)
    bad = [f"{path}: {label!r}" for path, label in pairs if type(label) not in (int, str)]
    if bad:
        raise VPTError(
            _CALL,
            f"{len(bad)} labels that are neither whole numbers nor class names: {listing(bad)}",
            "Correct them",
            path=file,
        )
    return list(pairs)


def _listed(
    layout: str,
    folder: Path,
    root: Path,
    files: Mapping[str, str],
    rows: Mapping[str, Rows],
    classes: tuple[str, ...] | None,
    pool: Sequence[Label] = (),
) -> Found:
    """Make splits of rows of paths and labels.

    Args:
        layout: In words.
        folder: With the lists.
        root: What their paths are relative to.
        files: Name of the list of each split.
        rows: By split.
        classes: Names, if they were given.
        pool: Labels that count as those of train too.
    """
    for name, found in rows.items():
        if not found:
            raise VPTError(_CALL, "is empty; it has no images", path=folder / files[name])
    labels = {name: [label for _, label in found] for name, found in rows.items()}
    names, numbers = number_labels(labels, classes, folder, pool)
    splits = {}
    for name, found in rows.items():
        paths = tuple(os.path.normpath(root / path) for path, _ in found)
        missing = [path for path in dict.fromkeys(paths) if not os.path.isfile(path)]
        if missing:
            shown = listing([os.path.relpath(path, root) for path in missing])
            raise VPTError(
                _CALL,
                f"names {len(missing)} images that are not under {root}: {shown}",
                "Put them there, or take their lines out",
                path=folder / files[name],
            )
        splits[name] = Split(paths, numbers[name])
    return Found(layout, names, splits)


def number_labels(
    labels: Mapping[str, Sequence[Label | None]],
    classes: tuple[str, ...] | None,
    source: str | Path,
    pool: Iterable[Label] = (),
) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]]]:
    """Return class names and labels as indices into them.

    Args:
        labels: By split; names, or numbers from 0 up that stand for themselves as names.
        classes: Names that were given; then a number is an index. None: those in train, sorted.
        source: Begins a message.
        pool: Labels that count as those of train too.

    Raises:
        VPTError: A label that is none, that train lacks, or that is not among `classes`, or
            numbers and names mixed.
    """
    for name, values in labels.items():
        absent = [v for v in values if v is None or (isinstance(v, int) and v < 0)]
        if absent:
            raise VPTError(
                _CALL,
                f"{len(absent)} of {len(values)} images of {name!r} have no label ({absent[0]})",
                "take them out (of a dataset: filter, save_to_disk, open 'hf:<its folder>')",
                path=source,
            )
    everything: set[Any] = {label for values in (*labels.values(), pool) for label in values}
    by_number = {isinstance(label, int) for label in everything}
    if len(by_number) > 1:
        kinds = {
            name: "a number" if isinstance(values[0], int) else "a name"
            for name, values in labels.items()
            if values
        }
        begin = ", ".join(f"{kind} in {name}" for name, kind in kinds.items())
        raise VPTError(
            _CALL,
            f"labels must be all numbers or all names; they begin with {begin}",
            "use one of the two (of a dataset: cast_column, save_to_disk, open 'hf:<its folder>')",
            path=source,
        )
    if classes is None:
        known: Sequence[Any] = sorted({*labels["train"], *pool})
        classes = tuple(str(label) for label in known)
    else:
        known = range(len(classes)) if True in by_number else classes
    index = {label: i for i, label in enumerate(known)}
    for name, values in labels.items():
        strange = sorted({str(label) for label in values if label not in index})
        if strange:
            raise VPTError(
                _CALL,
                f"{len(strange)} classes of {name!r} are unknown to train: {listing(strange)}. "
                f"Train has {len(classes)} classes",
                "Remove them, or give train some; beside lists classes.txt may name more classes",
                path=source,
            )
    return classes, {name: tuple(index[v] for v in values) for name, values in labels.items()}


def read_classes(folder: Path, call: str = _CALL) -> tuple[str, ...] | None:
    """Return the names in `classes.txt`, or None without that file.

    Raises:
        VPTError: It is empty, names a class twice, or has an empty line between names.
    """
    file = folder / "classes.txt"
    if not file.is_file():
        return None
    names = tuple(line.strip() for line in read_text(file, call).rstrip().splitlines())
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    problem = f"names {listing(twice)} twice" if twice else "" if names else "is empty"
    if not all(names):
        # Left out, it would give every name behind it the number of the class before.
        problem = f"line {names.index('') + 1} is empty"
    if problem:
        raise VPTError(call, problem, "it must have one class name per line", path=file)
    return names


def read_text(file: Path, call: str = _CALL) -> str:
    """Return the text of a file, with or without a byte order mark.

    Raises:
        VPTError: It is missing, cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise VPTError(call, "is missing", "a task of this layout has one", path=file) from error
    except (OSError, UnicodeDecodeError) as error:
        raise VPTError(call, f"cannot be read as UTF-8 text: {error}", path=file) from error
