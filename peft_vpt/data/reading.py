"""Reading many files at once: by threads, with a bar, and once for all that ask."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# Verdicts by path, size and time of files, so that many loaders on one task read them once.
_known: dict[Any, str | None] = {}


def remembered(paths: Sequence[str], read: Callable[[], str | None], about: Any = ()) -> str | None:
    """Return the verdict of `read` on files, from memory if they are unchanged since."""
    try:
        states = [os.stat(path) for path in paths]
    except OSError as error:
        return str(error)
    key = about, *paths, *((state.st_size, state.st_mtime_ns) for state in states)
    if key not in _known:
        _known[key] = read()
    return _known[key]


def each(work: Callable[[int], Any], split: Any, progress: bool, *, what: str = "") -> list[Any]:
    """Return `work` of the index of every item of a split, with a bar on a terminal.

    By threads, but for images in memory: readers of datasets need not be safe under threads.
    """
    from rich.console import Console
    from rich.progress import Progress

    count, console = len(split), Console(stderr=True)
    threads = min(os.cpu_count() or 1, 16) if getattr(split, "images", None) is None else 1
    bar = Progress(console=console, transient=True, disable=not (progress and console.is_terminal))
    with bar, ThreadPoolExecutor(threads) as pool:
        return list(bar.track(pool.map(work, range(count)), total=count, description=what))


def faults(
    verdict: Callable[[int], str | None], split: Any, progress: bool, *, what: str
) -> dict[int, str]:
    """Return what is wrong with the items of a split, by index; None says nothing."""
    found = each(verdict, split, progress, what=what)
    return {index: reason for index, reason in enumerate(found) if reason is not None}
