"""Values: a split of labelled images, and a task of such splits."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from ..errors import VPTError, is_text, listing
from ..preprocessing import load_image, upright_rgb


class View(Sequence[Any]):
    """Chosen items of sequences, read when they are asked for."""

    def __init__(self, items: Iterable[tuple[Any, int]]) -> None:
        self.items = tuple(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        source, position = self.items[index]
        return source[position]


@dataclass(frozen=True, repr=False)
class Split:
    """One split of a task: images and their labels.

    Args:
        paths: Image files, absolute; empty where `images` serves.
        labels: Class index of each image.
        images: In place of paths: a sequence of PIL images, or a tensor `(n, 3, H, W)` of pixels
            that are transformed already.
    """

    paths: tuple[str, ...]
    labels: tuple[int, ...]
    images: Any = field(default=None, compare=False)

    def __post_init__(self) -> None:
        count = len(self.paths if self.images is None else self.images)
        if count != len(self.labels):
            raise VPTError(f"Split: {count} images but {len(self.labels)} labels; one label each.")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Split({len(self)} images of {len(set(self.labels))} classes)"

    def image(self, index: int) -> Any:
        """Read an image as 8-bit RGB (`peft_vpt.preprocessing.load_image` says how).

        Raises:
            VPTError: It cannot be read; the message names it.
        """
        try:
            if self.images is None:
                return load_image(self.paths[index])
            return upright_rgb(self.images[index])
        # Decoders raise whatever a damaged file leads them to, SyntaxError and struct.error too.
        except Exception as error:
            raise VPTError(
                f"image {self.where(index)} cannot be read: {type(error).__name__}: {error}. "
                "Replace it, or leave it out with loader(..., skip_broken=True)."
            ) from error

    def where(self, index: int) -> str:
        """Return the path of an image, or its number where it has none."""
        return self.paths[index] if self.images is None else f"number {index}"

    def subset(self, indices: Iterable[int]) -> Split:
        """Return the images at `indices`, in that order; nothing is read."""
        chosen = list(indices)
        labels = tuple(self.labels[i] for i in chosen)
        if self.images is None:
            return Split(tuple(self.paths[i] for i in chosen), labels)
        if isinstance(self.images, torch.Tensor):
            return Split((), labels, self.images[chosen])
        items = self.images.items if isinstance(self.images, View) else None
        return Split((), labels, View(items[i] if items else (self.images, i) for i in chosen))

    def joined(self, other: Split) -> Split:
        """Return the images of both, this split's first.

        Raises:
            VPTError: One holds paths and the other images.
        """
        labels = self.labels + other.labels
        if self.images is None and other.images is None:
            return Split(self.paths + other.paths, labels)
        if isinstance(self.images, torch.Tensor) and isinstance(other.images, torch.Tensor):
            return Split((), labels, torch.cat([self.images, other.images]))
        if self.images is None or other.images is None:
            raise VPTError(
                "Split.joined: one split holds paths, the other images; make them alike."
            )
        both = [(part.images, i) for part in (self, other) for i in range(len(part))]
        return Split((), labels, View(both))


@dataclass(frozen=True)
class Task:
    """Named splits with common classes, checked when it is made.

    Args:
        name: Of the task.
        classes: Class names in the order of the labels.
        splits: "train", "val" and, where there is one, "test".
        notes: What a reader of results should know: duplicate lines, classes without images.
        layout: Where the splits came from, in words.

    Raises:
        VPTError: A name that is no text, no classes, an empty split, a label out of range, or an
            image in two splits or under two labels.
    """

    name: str
    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    notes: tuple[str, ...] = ()
    layout: str = "given"

    def __post_init__(self) -> None:
        check_text("Task", self.name, self.classes)
        if not self.classes:
            raise VPTError(f"Task({self.name!r}): no classes; a task needs at least one.")
        for name, split in self.splits.items():
            self._check_split(name, split)
        if "train" not in self.splits:
            raise VPTError(f"Task({self.name!r}): no split 'train'; it has {list(self.splits)}.")
        refuse_overlaps(self.name, {name: split.paths for name, split in self.splits.items()})

    def split(self, name: str) -> Split:
        """Return a split: "train", "val", "test", or "trainval" (train and val joined).

        Raises:
            VPTError: The task has no such split.
        """
        if name == "trainval":
            return self.trainval()
        if name not in self.splits:
            raise VPTError(
                f"task {self.name!r} ({self.layout}) has no split {name!r}; it has "
                f"{', '.join(self.splits)}."
            )
        return self.splits[name]

    def trainval(self) -> Split:
        """Return train and val joined, for the final runs (paper section 4.1)."""
        if "val" not in self.splits:
            return self.splits["train"]
        return self.splits["train"].joined(self.splits["val"])

    def describe(self) -> str:
        """Return name, sizes, layout and notes as lines of text."""
        sizes = ", ".join(f"{name} {len(split):,}" for name, split in self.splits.items())
        head = f"{self.name}: {len(self.classes)} classes, {sizes} ({self.layout})"
        return "\n".join([head, *(f"  note: {note}" for note in self.notes)])

    def _check_split(self, name: str, split: Split) -> None:
        if not len(split):
            raise VPTError(
                f"task {self.name!r} ({self.layout}): split {name!r} is empty; give it images or "
                "take it away."
            )
        bad = [i for i, label in enumerate(split.labels) if not self._is_label(label)]
        if bad:
            shown = listing([f"{split.where(i)}: {split.labels[i]!r}" for i in bad])
            raise VPTError(
                f"task {self.name!r}: {len(bad)} labels of {name!r} are no integers from 0 to "
                f"{len(self.classes) - 1}: {shown}. Correct them, or name every class."
            )
        seen: dict[str, int] = {}
        for path, label in zip(real_paths(split.paths), split.labels, strict=False):
            if seen.setdefault(path, label) != label:
                raise VPTError(
                    f"task {self.name!r}: {path} occurs in {name!r} with the labels {seen[path]} "
                    f"and {label}; keep one of them."
                )

    def _is_label(self, label: object) -> bool:
        plain = isinstance(label, int) and not isinstance(label, bool)
        return plain and 0 <= label < len(self.classes)  # type: ignore[operator]


def check_text(call: str, task: str, classes: Iterable[str]) -> None:
    """Raise unless a task and its classes have names that an adapter can hold.

    Raises:
        VPTError: One is no text, or none that can be written as UTF-8.
    """
    for kind, names in (("name", [task]), ("class", classes)):
        bad = [repr(name) for name in names if not (isinstance(name, str) and is_text(name))]
        if bad:
            raise VPTError(
                f"{call}({task!r}): the {kind} {listing(bad)} cannot be written as UTF-8, and no "
                "adapter could hold it; rename the folder, or correct the list."
            )


def refuse_overlaps(task: str, paths: Mapping[str, Iterable[str]]) -> None:
    """Raise if an image file is in two splits, by whatever path or link.

    Raises:
        VPTError: All are counted, ten named.
    """
    files = {name: set(real_paths(found)) for name, found in paths.items()}
    for one, other in combinations(files, 2):
        shared = sorted(files[one] & files[other])
        if shared:
            raise VPTError(
                f"task {task!r}: {len(shared)} images are in {one!r} and in {other!r}: "
                f"{listing(shared)}. Take them out of one, or the results mean nothing."
            )


def real_paths(paths: Iterable[str]) -> list[str]:
    """Return where files really are, links followed; a folder is looked up once."""
    folder = cache(os.path.realpath)
    found = []
    for path in paths:
        head, tail = os.path.split(path)
        real = os.path.join(folder(head), tail)
        found.append(os.path.realpath(real) if os.path.islink(real) else real)
    return found


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
