"""Values: a split of labelled images, and a task of such splits."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ..checks import integer
from ..errors import VPTError, is_text, listing
from ..preprocessing import load_image, upright_rgb
from .reading import faults, remembered


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
            raise VPTError(
                "Split", f"{count} images but {len(self.labels)} labels", "one label each"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Split({len(self)} images of {len(set(self.labels))} classes)"

    @property
    def decoded(self) -> bool:
        """Whether its images are pixels that are transformed already."""
        return isinstance(self.images, Tensor)

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
            reason = f"{type(error).__name__}: {error}"
            raise VPTError(
                "Split.image",
                f"cannot be read: {reason}",
                "Replace it, or leave it out with `loader(..., skip_broken=True)`",
                path=self.where(index),
                reason=reason,
            ) from error

    def broken(self, *, progress: bool = True) -> dict[int, str]:
        """Read every image in full; return why some cannot be read, by index."""

        def read(index: int) -> str | None:
            try:
                self.image(index)
            except VPTError as error:
                return str(error.facts["reason"])
            return None

        def verdict(index: int) -> str | None:
            held = self.images is not None
            return read(index) if held else remembered([self.paths[index]], lambda: read(index))

        return {} if self.decoded else faults(verdict, self, progress, what="checking images")

    def sample(self, index: int, transform: Any) -> tuple[Tensor, int]:
        """Return the pixels of an image and its label; None: they are transformed already."""
        held = self.images[index] if transform is None else transform(self.image(index))
        return held, self.labels[index]

    def where(self, index: int) -> str:
        """Return the path of an image, or its number where it has none."""
        return self.paths[index] if self.images is None else f"number {index}"

    def subset(self, indices: Iterable[int]) -> Split:
        """Return the images at `indices`, in that order; nothing is read."""
        chosen = list(indices)
        labels = tuple(self.labels[i] for i in chosen)
        if self.images is None:
            return Split(tuple(self.paths[i] for i in chosen), labels)
        pixels = self.images[chosen] if self.decoded else View((self.images, i) for i in chosen)
        return Split((), labels, pixels)

    def joined(self, other: Split) -> Split:
        """Return the images of both, this split's first.

        Raises:
            VPTError: One holds paths and the other images.
        """
        labels = self.labels + other.labels
        if self.images is None and other.images is None:
            return Split(self.paths + other.paths, labels)
        if self.images is None or other.images is None:
            raise VPTError(
                "Split.joined", "one split holds paths, the other images", "make them alike"
            )
        if self.decoded and other.decoded:
            return Split((), labels, torch.cat([self.images, other.images]))
        return Split((), labels, View((s.images, i) for s in (self, other) for i in range(len(s))))


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
        check_names("Task", self.name, self.classes)
        if not self.classes:
            raise self._error("it has no classes", "a task needs at least one")
        if "train" not in self.splits:
            raise self._error(f"no split 'train'; it has {', '.join(self.splits) or 'none'}")
        files = {name: real_paths(split.paths) for name, split in self.splits.items()}
        for name, split in self.splits.items():
            self._check_split(name, split, files[name])
        refuse_leaks("Task", self.name, files)

    def split(self, name: str) -> Split:
        """Return a split: "train", "val", "test", or "trainval" (train and val joined).

        Raises:
            VPTError: The task has no such split.
        """
        if name == "trainval":
            return self.trainval()
        if name not in self.splits:
            there = ", ".join(self.splits)
            raise self._error(f"has no split {name!r}; it has {there} ({self.layout})")
        return self.splits[name]

    def trainval(self) -> Split:
        """Return train and val joined, for the final runs (paper section 4.1)."""
        if "val" not in self.splits:
            return self.splits["train"]
        return self.splits["train"].joined(self.splits["val"])

    def describe(self) -> str:
        """Return name, sizes, layout and notes as lines of text."""
        return description(self, self.layout)

    def _check_split(self, name: str, split: Split, files: Sequence[str]) -> None:
        if not len(split):
            raise self._error(f"split {name!r} is empty", "give it images or take it away")
        is_label = integer(0, len(self.classes) - 1).fits
        bad = [i for i, label in enumerate(split.labels) if not is_label(label)]
        if bad:
            shown = listing([f"{split.where(i)}: {split.labels[i]!r}" for i in bad])
            raise self._error(
                f"{len(bad)} labels of {name!r} are no integers from 0 to "
                f"{len(self.classes) - 1}: {shown}",
                "Correct them, or name every class",
            )
        seen: dict[str, int] = {}
        for path, label in zip(files, split.labels, strict=False):
            if seen.setdefault(path, label) != label:
                raise self._error(
                    f"{path} occurs in {name!r} with the labels {seen[path]} and {label}",
                    "keep one of them",
                )

    def _error(self, problem: str, advice: str = "") -> VPTError:
        return VPTError("Task", problem, advice, given={"name": self.name})


def description(task: Any, layout: str) -> str:
    """Return name, sizes, layout and notes of a task as lines of text."""
    sizes = ", ".join(f"{name} {len(split):,}" for name, split in task.splits.items())
    head = f"{task.name}: {len(task.classes)} classes, {sizes} ({layout})"
    return "\n".join([head, *(f"  note: {note}" for note in task.notes)])


def check_names(call: str, task: str, classes: Iterable[str]) -> None:
    """Raise unless a task and its classes have names that an adapter can hold.

    Raises:
        VPTError: One is no text, or none that can be written as UTF-8.
    """
    for kind, names in (("name", [task]), ("class", classes)):
        bad = [repr(name) for name in names if not (isinstance(name, str) and is_text(name))]
        if bad:
            raise VPTError(
                call,
                f"the {kind} {listing(bad)} cannot be written as UTF-8, as an adapter holds it",
                "rename the folder, or correct the list",
                given={"name": task},
            )


def refuse_leaks(call: str, task: str, files: Mapping[str, Iterable[str]]) -> None:
    """Raise if an image file is in two splits.

    Args:
        call: For the message.
        task: Its name, for the message.
        files: By split, as `real_paths` gives them.

    Raises:
        VPTError: All are counted, ten named.
    """
    for one, other in combinations(files, 2):
        shared = sorted({*files[one]} & {*files[other]})
        if shared:
            raise VPTError(
                call,
                f"{len(shared)} images are in {one!r} and in {other!r}: {listing(shared)}",
                "Take them out of one, or the results mean nothing",
                given={"name": task},
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


# What splits are called, in any case, in folders and in Hugging Face datasets.
_SPELLINGS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


def split_of(name: str) -> str | None:
    """Return which split is called by a name; None for names of none."""
    return next((s for s, names in _SPELLINGS.items() if name.casefold() in names), None)


def split_names(call: str, place: Any, names: Iterable[str]) -> dict[str, str]:
    """Return the name of each split that is there, out of names: train first, then val and test.

    Raises:
        VPTError: A split is there twice.
    """
    found: dict[str, str] = {}
    for name in sorted(names):
        split = split_of(name)
        if split in found:
            raise VPTError(
                call,
                f"has {found[split]} and {name}, both of which may be {split!r}",
                "keep one of them (save a copy without the other where it is not yours)",
                path=place,
            )
        if split is not None:
            found[split] = name
    return {split: found[split] for split in _SPELLINGS if split in found}
