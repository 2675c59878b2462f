"""What a layout holds before it becomes a task: class names, labels, what is missing."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import VPTError
from ..wording import listing
from .splits import Split, real_paths

Label = int | str
# What splits are called, in any case, in folders and in Hugging Face datasets.
_SPELLINGS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


@dataclass
class Found:
    """The splits of a layout, before missing ones are cut from train.

    Args:
        layout: In words.
        classes: Class names.
        splits: Those that are there; "train" always is.
        cut_test: Whether a test split is cut from train as well.
        notes: For the task.
    """

    layout: str
    classes: tuple[str, ...]
    splits: dict[str, Split]
    cut_test: bool = False
    notes: list[str] = field(default_factory=list)


def split_of(name: str) -> str | None:
    """Return which split is called by a name; None for names of none."""
    return next((s for s, names in _SPELLINGS.items() if name.casefold() in names), None)


def split_names(names: Iterable[str], call: str) -> dict[str, str]:
    """Return the name of each split that is there, out of names.

    Raises:
        VPTError: A split is there twice.
    """
    found: dict[str, str] = {}
    for name in sorted(names):
        split = split_of(name)
        if split in found:
            raise VPTError(
                f"{call}: has {found[split]} and {name}, both of which may be {split!r}; keep one "
                "of them (save a copy without the other where it is not yours)."
            )
        if split is not None:
            found[split] = name
    return found


def read_classes(folder: Path, call: str = "open_task") -> tuple[str, ...] | None:
    """Return the names in `classes.txt`, or None without that file.

    Raises:
        VPTError: It is empty, names a class twice, or has an empty line between names.
    """
    file = folder / "classes.txt"
    if not file.is_file():
        return None
    names = tuple(line.strip() for line in read_text(file, call).rstrip().splitlines())
    if not all(names):
        # Left out, it would give every name behind it the number of the class before.
        raise VPTError(
            f"{call}: line {names.index('') + 1} of {file} is empty; it must have one class "
            "name per line, so that their numbers are certain."
        )
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if not names or twice:
        problem = f"names {listing(twice)} twice" if twice else "is empty"
        raise VPTError(f"{call}: {file} {problem}; it must have one class name per line.")
    return names


def read_text(file: Path, call: str = "open_task") -> str:
    """Return the text of a file, with or without a byte order mark.

    Raises:
        VPTError: It cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise VPTError(f"{call}: {file} cannot be read as UTF-8 text: {error}") from error


def number_labels(
    labels: Mapping[str, Sequence[Label]],
    classes: tuple[str, ...] | None,
    call: str,
    pool: Sequence[Label] = (),
) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]]]:
    """Return class names and labels as indices into them.

    Args:
        labels: By split; names, or numbers from 0 up that stand for themselves as names.
        classes: Names that were given; then a number is an index. None: those in train, sorted.
        call: Begins a message.
        pool: Labels that count as those of train too.

    Raises:
        VPTError: A label that is below 0, that train lacks, or that is not among `classes`.
    """
    for name, values in labels.items():
        below = [value for value in values if isinstance(value, int) and value < 0]
        if below:
            raise VPTError(
                f"{call}: {len(below)} of {len(values)} labels of {name!r} are below 0 "
                f"({below[0]}), which is no class; take those images out."
            )
    everything = {label for values in (*labels.values(), pool) for label in values}
    if len({type(label) for label in everything}) > 1:
        raise VPTError(f"{call}: labels are numbers and names mixed; use one of the two.")
    if classes is None:
        known: Sequence[Label] = sorted({*labels["train"], *pool})
        classes = tuple(str(label) for label in known)
    else:
        by_number = all(isinstance(label, int) for label in everything)
        known = range(len(classes)) if by_number else classes
    index = {label: i for i, label in enumerate(known)}
    for name, values in labels.items():
        strange = sorted({str(label) for label in values if label not in index})
        if strange:
            raise VPTError(
                f"{call}: {len(strange)} classes of {name!r} are unknown to train: "
                f"{listing(strange)}. Train has {len(classes)} classes. Remove those images, or "
                "name every class in classes.txt, one per line."
            )
    return classes, {name: tuple(index[v] for v in values) for name, values in labels.items()}


def refuse_missing(folder: Path, source: str, paths: Sequence[str]) -> None:
    """Raise if any of the image files is not there.

    Raises:
        VPTError: All are counted, ten named.
    """
    missing = [path for path in dict.fromkeys(paths) if not os.path.isfile(path)]
    if missing:
        shown = listing([os.path.relpath(path, folder) for path in missing])
        raise VPTError(
            f"open_task: {source} names {len(missing)} images that are not under {folder}: "
            f"{shown}. Put them there, or take their lines out."
        )


def duplicate_notes(splits: Mapping[str, Split]) -> list[str]:
    """Return a note per split that has an image more than once; the image counts as often."""
    return [
        f"{name} names {extra} images again; each counts as often as it is named"
        for name, split in splits.items()
        if (extra := len(split.paths) - len(set(real_paths(split.paths))))
    ]


def absence_note(classes: Sequence[str], train: Split) -> list[str]:
    """Return a note on classes that have no training image."""
    present = set(train.labels)
    absent = [name for index, name in enumerate(classes) if index not in present]
    if not absent:
        return []
    return [f"{len(absent)} of {len(classes)} classes have no training image: {listing(absent)}"]
