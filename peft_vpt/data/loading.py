"""Loaders: a split and a transform as batches of pixels and labels."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import SpecError, VPTError, listing
from ..randomness import seeded
from .drawing import EpochSampler, Key, check_counts
from .splits import Split, Task


class Images(Dataset[tuple[Tensor, int]]):
    """Transformed images of a split with their labels.

    Args:
        split: The split.
        transform: PIL image to tensor; None where the split holds pixels already.
    """

    def __init__(self, split: Split, transform: Callable[[Any], Tensor] | None) -> None:
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: int | Key) -> tuple[Tensor, int]:
        index, draw = key if isinstance(key, tuple) else (key, None)
        label = self.split.labels[index]
        if self.transform is None:
            return self.split.images[index], label
        with seeded(draw):
            return self.transform(self.split.image(index)), label


def loader(
    split: Split,
    transform: Callable[[Any], Tensor] | None,
    *,
    batch_size: int,
    shuffle: bool = False,
    seed: int = 0,
    workers: int = 0,
    drop_last: bool = False,
    skip_broken: bool = False,
    check: bool = True,
) -> DataLoader[Any]:
    """Return batches of pixels `(B, 3, H, W)` float32 and labels `(B,)` int64.

    Every image is read once beforehand; what was read is remembered, so further loaders on the
    same files start at once. With `shuffle`, order and augmentation follow from seed and epoch
    alone, with any number of workers: `loader.sampler.set_epoch(epoch)` fixes them, as accelerate
    does by itself, and `accelerate.skip_first_batches` goes on in the middle of an epoch.

    Args:
        split: A split of a task.
        transform: Of `train_transform` or `eval_transform`, or any from PIL image to tensor.
            None for a split of `decode`.
        batch_size: Images per batch.
        shuffle: A new order each epoch.
        seed: Of order and augmentation.
        workers: Processes that read images; 0: this one.
        drop_last: Leave out the last batch if it is smaller.
        skip_broken: Leave out images that cannot be read, beforehand.
        check: False: do not read the images beforehand.

    Raises:
        SpecError: A wrong option.
        VPTError: An empty split, or images that cannot be read: all counted, ten named.
    """
    _check_options(split, transform, batch_size, workers)
    if skip_broken or check:
        split = without_broken(split, skip_broken)
    return DataLoader(
        Images(split, transform),
        batch_size=batch_size,
        sampler=EpochSampler(len(split), seed) if shuffle else None,
        drop_last=drop_last,
        **worker_options(workers),
    )


def decode(
    split: Split, transform: Callable[[Any], Tensor], *, dtype: torch.dtype = torch.float32
) -> Split:
    """Return a split whose images are transformed already and held in memory.

    For small tasks and many epochs: reading VTAB-1k images costs more than a step on a GPU.
    1,000 images of 224 pixels take 0.6 GB. Use it as `loader(decoded, None, ...)`.

    Args:
        split: A split of a task.
        transform: Without randomness.
        dtype: Of the pixels; float16 halves the memory, and the loader gives what is stored.

    Raises:
        SpecError: The transform is random, or the split is decoded already.
        VPTError: An image cannot be read.
    """
    if getattr(transform, "random", False):
        raise SpecError(
            "decode(transform=...): a random transform would be drawn once for all epochs; use "
            "loader(split, transform) for it."
        )
    if isinstance(split.images, torch.Tensor):
        raise SpecError("decode(split=...): its images are pixels already.")

    def read(index: int) -> Tensor:
        return transform(split.image(index)).to(dtype)

    threads = split.images is None
    pixels = each(read, range(len(split)), True, threads=threads, what="reading images")
    return Split((), split.labels, torch.stack(pixels))


def without_broken(split: Split, skip: bool) -> Split:
    """Return the split without its broken images; raise if there are any and `skip` is False."""
    broken = broken_images(split)
    if not broken:
        return split
    if not skip:
        shown = listing([split.where(index) for index in broken])
        raise VPTError(
            f"loader: {len(broken)} of {len(split)} images cannot be read: {shown}. Replace them, "
            "or pass skip_broken=True to leave them out; check_images(task) lists all."
        )
    if len(broken) == len(split):
        raise VPTError(f"loader(skip_broken=True): none of {len(split)} images can be read.")
    left = set(broken)
    return split.subset(index for index in range(len(split)) if index not in left)


def worker_options(workers: int) -> dict[str, Any]:
    """Return the options of a DataLoader that follow from the number of workers."""
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": torch.cuda.is_available(),
    }


def _check_options(split: Split, transform: Any, batch_size: int, workers: int) -> None:
    check_counts("loader", batch_size=(batch_size, 1), workers=(workers, 0))
    if not len(split):
        raise VPTError("loader: the split is empty; there is nothing to load.")
    if (transform is None) != isinstance(split.images, torch.Tensor):
        raise SpecError(
            "loader(transform=...): None goes with a split of decode(), whose images are pixels, "
            "and a transform with every other split."
        )


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
