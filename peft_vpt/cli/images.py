"""The images of a task on the command line: opened, told of, read once before anything else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .output import complain

if TYPE_CHECKING:
    from ..data import Split, Task

Broken = dict[str, dict[int, str]]
Tell = Callable[[str], None]
_PARTS = {"trainval": ("train", "val"), "all": ("train", "val", "test")}


def parts_of(task: Task, *names: str) -> list[str]:
    """Return the splits of a task that stand behind names, "trainval" and "all" among them.

    Raises:
        VPTError: The task lacks one; "all" is what is there.
    """
    found: dict[str, None] = {}
    for name in names:
        for part in _PARTS.get(name, (name,)):
            if name != "all":
                task.split(part)
            found |= {part: None} if part in task.splits else {}
    return list(found)


def open_images(data: str, *names: str, tell: Tell = complain, **options: Any) -> Task:
    """Open a task that has the splits that are named, and tell of it.

    Args:
        data: As in `open_task`.
        names: Of splits.
        tell: Takes what there is to tell.
        options: Of `open_task`. Not the seed: all commands have to cut splits alike, or one would
            measure on images that another one trained on.

    Raises:
        VPTError: There is no task, it lacks a split, or it has one class to train on.
    """
    from ..data import open_task
    from ..errors import VPTError

    if not data:
        raise VPTError("--data: it is empty; give a folder of images.")
    task = open_task(data, **options)
    parts_of(task, *names)
    trained = next((name for name in ("trainval", "train") if name in names), None)
    labels = sorted(set(task.split(trained).labels)) if trained else []
    if len(labels) == 1:
        raise VPTError(
            f"{data}: {trained} has one class only, {task.classes[labels[0]]}; there is nothing to "
            "tell apart. Give a folder with a folder per class."
        )
    tell(task.describe())
    return task


def split_of(task: Task, name: str) -> Split:
    """Return a split, or several joined: "trainval", "all"."""
    first, *rest = (task.split(part) for part in parts_of(task, name))
    for other in rest:
        first = first.joined(other)
    return first


def find_broken(task: Task, names: Iterable[str]) -> Broken:
    """Read every image of splits, and return which ones cannot be read, and why."""
    from ..data.check import broken_images

    found = {name: broken_images(task.split(name)) for name in names}
    return {name: indices for name, indices in found.items() if indices}


def without_broken(
    call: str, task: Task, broken: Mapping[str, dict[int, str]], skip: bool, tell: Tell = complain
) -> Task:
    """Return a task without its broken images, which are listed on stderr.

    Raises:
        VPTError: There are some and `skip` is False, or a split or a class of train has no others.
    """
    from ..errors import VPTError
    from ..wording import cut, listing

    if not broken:
        return task
    number = sum(map(len, broken.values()))
    for name, reasons in broken.items():
        for index, reason in reasons.items():
            where = task.split(name).where(index)
            tell(f"cannot be read: {name}, {where}: {cut(reason, 200)}")
    if not skip:
        raise VPTError(
            f"{call}: {number} of the images cannot be read; replace them, or leave them out by "
            "--skip-broken."
        )
    rest = {name: _rest(split, broken.get(name, ())) for name, split in task.splits.items()}
    if "train" in broken:
        lost = sorted(set(task.split("train").labels) - set(rest["train"].labels))
        if lost:
            raise VPTError(
                f"{call}: no image of {listing([task.classes[i] for i in lost])} in train can be "
                "read; replace some, or take the class out of every split."
            )
    tell(f"left out: {number} of the images")
    return dataclasses.replace(task, splits=rest)


def tell_copies(task: Task, seen: Iterable[str], measured: Iterable[str], tell: Tell) -> None:
    """Say how many images that results are measured on are among those that are trained on.

    Args:
        task: Of images that can be read.
        seen: Splits that are trained on.
        measured: Splits that are measured on.
        tell: Takes what there is to tell.
    """
    from ..experiments.sums import image_marks

    known = {mark: name for name in seen for mark in image_marks(task.split(name))}
    for name in measured:
        marks = image_marks(task.split(name))
        copies = [known[mark] for mark in marks if mark in known]
        if copies:
            tell(
                f"note: {len(copies)} of the {len(marks)} images of {name} are in "
                f"{' and '.join(sorted(set(copies)))} too, byte for byte; what is measured on "
                "them says little of new images"
            )


def describe_images(
    task: Task, names: Iterable[str], sums: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return what a result depends on: checksums of classes, and of images and labels per split.

    Args:
        task: The task.
        names: Of splits.
        sums: Of `image_sums`, where they are known.

    Raises:
        VPTError: An image cannot be read.
    """
    from ..experiments.sums import image_sums, text_sum

    return {
        "task": task.name,
        "classes": text_sum(task.classes),
        "images": image_sums(task, names) if sums is None else dict(sums),
    }


def _rest(split: Split, broken: Iterable[int]) -> Split:
    left = set(broken)
    return split.subset(i for i in range(len(split)) if i not in left) if left else split
