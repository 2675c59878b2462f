"""Loaders: a split and a transform as batches of pixels and labels; checks of their images."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..checks import integer
from ..errors import SpecError, VPTError, listing
from ..randomness import seeded
from .drawing import SEED, EpochSampler, Key
from .splits import Split, Task


class Samples(Dataset[tuple[Any, Any]]):
    """What a transform makes of the items of a split; a key's draw seeds it.

    Args:
        split: The split; its `sample` reads an item.
        transform: For `sample`.
    """

    def __init__(self, split: Any, transform: Any) -> None:
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: int | Key) -> tuple[Any, Any]:
        index, draw = key if isinstance(key, tuple) else (key, None)
        with seeded(draw):
            found: tuple[Any, Any] = self.split.sample(index, self.transform)
        return found


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
    if (transform is None) != split.decoded:
        raise SpecError(
            "loader",
            "None goes with a split of `decode()`, whose images are pixels, and a transform with "
            "every other split",
            given={"transform": ...},
        )

    def broken() -> dict[int, str]:
        found = broken_images(split) if check or skip_broken else {}
        return {index: split.where(index) for index in found}

    return batches(
        *("loader", split, transform, broken, "cannot be read"),
        batch_size=batch_size,
        shuffle=shuffle,
        seed=seed,
        workers=workers,
        drop_last=drop_last,
        skip_broken=skip_broken,
    )


def batches(
    call: str,
    split: Any,
    transform: Any,
    broken: Callable[[], Mapping[int, str]],
    what: str,
    *,
    batch_size: int,
    shuffle: bool,
    seed: int,
    workers: int,
    drop_last: bool,
    skip_broken: bool,
) -> DataLoader[Any]:
    """Return batches of a split of images, with labels or masks, without what is broken.

    Args:
        call: For messages.
        split: With `sample` and `subset`.
        transform: For `sample`.
        broken: Reads the split; what to say of each item that is broken, by index.
        what: Is wrong with images then.
        batch_size: As in `loader`; so are the others.
        shuffle: A new order each epoch.
        seed: Of order and augmentation.
        workers: Processes that read images.
        drop_last: Leave out a smaller last batch.
        skip_broken: Leave out what is broken.

    Raises:
        SpecError: A wrong option.
        VPTError: An empty split, or what is broken.
    """
    integer(1).check(call, "batch_size", batch_size)
    integer(0).check(call, "workers", workers)
    SEED.check(call, "seed", seed)
    if not len(split):
        raise VPTError(call, "the split is empty", "there is nothing to load")
    found = broken()
    if found and not skip_broken:
        raise VPTError(
            call,
            f"{len(found)} of {len(split)} images {what}: {listing(list(found.values()))}",
            "Replace them, or pass `skip_broken=True` to leave them out",
        )
    if len(found) == len(split):
        problem = f"all of {len(split)} images {what}"
        raise VPTError(call, problem, "there is nothing to load", given={"skip_broken": True})
    good = split.subset(i for i in range(len(split)) if i not in found) if found else split
    return DataLoader(
        Samples(good, transform),
        batch_size=batch_size,
        sampler=EpochSampler(len(good), seed) if shuffle else None,
        drop_last=drop_last,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
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
            "decode",
            "a random transform would be drawn once for all epochs",
            "use `loader(split, transform)` for it",
            given={"transform": ...},
        )
    if split.decoded:
        raise SpecError("decode", "its images are pixels already", given={"split": ...})

    def read(index: int) -> Tensor:
        return transform(split.image(index)).to(dtype)

    pixels = each(read, split, True, what="reading images")
    return Split((), split.labels, torch.stack(pixels))


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

    def read(index: int) -> str | None:
        try:
            split.image(index)
        except VPTError as error:
            return str(error.facts["reason"])
        return None

    def verdict(index: int) -> str | None:
        if split.images is not None:
            return read(index)
        return remembered([split.paths[index]], lambda: read(index))

    if split.decoded:
        return {}
    found = each(verdict, split, progress, what="checking images")
    return {index: reason for index, reason in enumerate(found) if reason is not None}


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
