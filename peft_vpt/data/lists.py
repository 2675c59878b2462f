"""Layouts whose splits are files: the lists of VTAB-1k and the json files of FGVC."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import VPTError, listing
from .splits import (
    Found,
    Label,
    Split,
    absence_note,
    duplicate_notes,
    number_labels,
    read_classes,
    read_text,
    refuse_missing,
)

LISTS = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}
JOINED = "train800val200.txt"
Rows = list[tuple[str, Label]]


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
    absent = [name for name in LISTS.values() if not (folder / name).is_file()]
    if absent:
        raise VPTError(
            f"open_task({str(folder)!r}): the VTAB-1k layout needs {', '.join(LISTS.values())}; "
            f"{', '.join(absent)} is missing."
        )
    rows = {name: _read_list(folder / file) for name, file in LISTS.items()}
    _check_joined(folder, rows)
    classes = read_classes(folder)
    numbers = [label for _, label in rows["train"] if isinstance(label, int)]
    if classes is None and numbers:
        # Gaps below the highest label of train are classes without images there, not mistakes.
        if max(numbers) >= len(numbers):
            raise VPTError(
                f"open_task: {folder / LISTS['train']} has the label {max(numbers)}, which makes "
                f"{max(numbers) + 1} classes of {len(numbers)} images; correct it, or name every "
                "class in classes.txt, one per line."
            )
        classes = tuple(str(index) for index in range(max(numbers) + 1))
    return _found(folder, "VTAB-1k lists", rows, classes, folder, LISTS)


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
    files = {"train": "train.json", "val": "val.json", "test": "test.json"}
    if percent is not None:
        files["train"] = f"train_{percent}.json"
    if not (folder / "val.json").is_file():
        del files["val"]
    if not (folder / "test.json").is_file():
        raise VPTError(f"open_task({str(folder)!r}): train.json is there, test.json is missing.")
    rows = {name: _read_json(folder / file) for name, file in files.items()}
    names = [path for found in rows.values() for path, _ in found]
    roots = (folder, folder / "images")
    root = max(roots, key=lambda r: sum(os.path.isfile(r / path) for path in names[:1000]))
    classes = read_classes(folder)
    whole = [] if percent is None else [label for _, label in _read_json(folder / "train.json")]
    return _found(folder, "FGVC json splits", rows, classes, root, files, whole)


def _found(
    folder: Path,
    layout: str,
    rows: dict[str, Rows],
    classes: tuple[str, ...] | None,
    root: Path,
    files: dict[str, str],
    pool: list[Label] | None = None,
) -> Found:
    for name, found in rows.items():
        if not found:
            raise VPTError(f"open_task({str(folder)!r}): {files[name]} is empty; it has no images.")
    call = f"open_task({str(folder)!r})"
    labels = {name: [label for _, label in found] for name, found in rows.items()}
    names, numbers = number_labels(labels, classes, call, pool or [])
    paths = {n: tuple(os.path.normpath(root / p) for p, _ in found) for n, found in rows.items()}
    for name, found_paths in paths.items():
        refuse_missing(folder, files[name], found_paths)
    splits = {name: Split(paths[name], numbers[name]) for name in rows}
    notes = duplicate_notes(splits) + absence_note(names, splits["train"])
    return Found(layout, names, splits, notes=notes)


def _read_list(file: Path) -> Rows:
    rows: Rows = []
    bad: list[str] = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        parts = line.rsplit(maxsplit=1)
        if not parts:
            continue
        # int() would take "1_0" and other scripts' digits too.
        # And it refuses to read numbers of thousands of digits.
        digits = parts[-1] if len(parts) == 2 else ""
        if digits.isascii() and digits.isdigit() and len(digits) < 19:
            rows.append((parts[0].strip(), int(digits)))
        else:
            bad.append(f"line {number} {line.strip()!r}")
    if bad:
        raise VPTError(
            f"open_task: {file} has {len(bad)} lines without a path and a whole number from 0 up: "
            f"{listing(bad)}. Write 'path label' on every line."
        )
    return rows


def _check_joined(folder: Path, rows: dict[str, Rows]) -> None:
    file = folder / JOINED
    if not file.is_file():
        return
    if Counter(_read_list(file)) != Counter(rows["train"] + rows["val"]):
        raise VPTError(
            f"open_task: {file} holds other lines than {LISTS['train']} and {LISTS['val']} "
            "together; correct it, or delete it (it is made from the two)."
        )


def _read_json(file: Path) -> Rows:
    if not file.is_file():
        raise VPTError(f"open_task: {file} is missing.")
    try:
        pairs: Any = json.loads(read_text(file), object_pairs_hook=_pairs)
    except (ValueError, RecursionError) as error:
        raise VPTError(f"open_task: {file} is no JSON: {error}") from error
    if not isinstance(pairs, _Pairs):
        raise VPTError(f"open_task: {file} must be a JSON object, image path: label or class name.")
    bad = [f"{path}: {label!r}" for path, label in pairs if type(label) not in (int, str)]
    if bad:
        raise VPTError(
            f"open_task: {file} has {len(bad)} labels that are neither whole numbers nor class "
            f"names: {listing(bad)}. Correct them."
        )
    return list(pairs)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with the paths that occur twice."""


def _pairs(pairs: list[tuple[str, Any]]) -> _Pairs:
    return _Pairs(pairs)
