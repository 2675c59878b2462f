"""The 24 tasks of the paper: groups, classes, sizes, where they come from, prompt lengths."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from ..errors import SpecError


@dataclass(frozen=True)
class PaperTask:
    """A task of the paper (section 4.1, tables 7, 13 and 14; ViT-B/16 for the lengths).

    Args:
        name: Short name, as on the command line.
        title: As in the paper.
        group: "FGVC", "Natural", "Specialized" or "Structured".
        classes: Number of classes.
        train: Training images.
        val: Validation images.
        test: Test images.
        home: Where to get it: the data set's own page, or its authors and title.
        deep: Best prompt length of VPT-deep. The paper's per-task lengths are known from later
            copies only: with them the totals of table 1 come out, but single values are
            unverified.
        shallow: Best prompt length of VPT-shallow, as unverified.
        own_val: Whether val is the data set's own; otherwise it is cut from train.
        metric: What is reported.
    """

    name: str
    title: str
    group: str
    classes: int
    train: int
    val: int
    test: int
    home: str
    deep: int
    shallow: int
    own_val: bool = False
    metric: str = "top1"
    lengths_verified: bool = False


def _read() -> tuple[PaperTask, ...]:
    with Path(__file__).with_name("tasks.csv").open(encoding="utf-8", newline="") as file:
        rows = [
            {name: int(text) if text.isdigit() else text for name, text in row.items()}
            for row in csv.DictReader(file)
        ]
    return tuple(PaperTask(**row | {"own_val": bool(row["own_val"])}) for row in rows)  # type: ignore[arg-type]


TASKS = _read()


def paper_task(name: str) -> PaperTask:
    """Return a task of the paper by its short name or its title, in any case.

    Raises:
        SpecError: There is no such task.
    """
    wanted = name.casefold()
    for task in TASKS:
        if wanted in (task.name, task.title.casefold()):
            return task
    known = ", ".join(task.name for task in TASKS)
    raise SpecError(
        "paper_task", f"there is no such task; the paper's are {known}", given={"name": name}
    )
