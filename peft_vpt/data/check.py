"""Reading every image once before a run, to list those that are broken."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from ..errors import VPTError
from .splits import Split, Task

# Verdicts by path, size and time of files, so that many loaders on one task read them once.
_known: dict[Any, str | None] = {}


def check_images(task: Task | Split, *, progress: bool = True) -> list[str]:
    """Read every image of a task, or of one split, in full.

    Args:
        task: A task or a split.
        progress: Show a bar on a terminal.

    Returns:
        Paths of the images that cannot be read ("test number 12" where images have no path).
    """
    splits = task.splits if isinstance(task, Task) else {"": task}
    broken: list[str] = []
    for name, split in splits.items():
        prefix = f"{name} " if split.images is not None and name else ""
        broken += [prefix + split.where(i) for i in broken_images(split, progress=progress)]
    return broken


def broken_images(split: Split, *, progress: bool = True) -> dict[int, str]:
    """Return why images of a split cannot be read, by index."""
    if isinstance(split.images, torch.Tensor):
        return {}

    def verdict(index: int) -> str | None:
        def read() -> str | None:
            try:
                split.image(index)
            except VPTError as error:
                cause = error.__cause__
                return f"{type(cause).__name__}: {cause}" if cause else str(error)
            return None

        return read() if split.images is not None else remembered([split.paths[index]], read)

    # Readers of datasets need not be safe under threads; files are.
    verdicts = each(verdict, range(len(split)), progress, threads=split.images is None)
    return {index: problem for index, problem in enumerate(verdicts) if problem is not None}


def remembered(paths: Sequence[str], read: Callable[[], str | None], about: Any = ()) -> str | None:
    """Return the verdict of `read` on files, from memory if they are unchanged since."""
    try:
        states = [os.stat(path) for path in paths]
    except OSError as error:
        return str(error)
    if not all(stat.S_ISREG(state.st_mode) for state in states):
        # To open a pipe would wait for ever.
        return "it is a folder or a pipe, no file"
    key = about, *paths, *((state.st_size, state.st_mtime_ns) for state in states)
    if key not in _known:
        _known[key] = read()
    return _known[key]


def each(
    work: Callable[[int], Any],
    items: Iterable[int],
    progress: bool,
    *,
    threads: bool = True,
    what: str = "checking images",
) -> list[Any]:
    """Return `work` of every item in order, by threads, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    chosen, console = list(items), Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=not (progress and console.is_terminal))
    with bar, ThreadPoolExecutor(min(os.cpu_count() or 1, 16) if threads else 1) as pool:
        return list(bar.track(pool.map(work, chosen), total=len(chosen), description=what))
