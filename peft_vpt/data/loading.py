"""Loaders: a split and a transform as batches of pixels, with labels or masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..checks import integer
from ..errors import SpecError, VPTError, cut, listing
from ..randomness import seeded
from .drawing import SEED, EpochSampler, Key
from .reading import each
from .splits import Split, Task


class Samples(Dataset[tuple[Any, Any]]):
    """What a transform makes of the items of a split; a key's draw seeds it.

    Args:
        split: The split; its `sample` reads an item.
        transform: For `sample`.
    """

    def __init__(self, split: Any, transform: Any) -> None:
        self.split, self.transform = split, transform

    @property
    def labels(self) -> Sequence[int]:
        """Of all images, where they have labels; training looks here."""
        found: Sequence[int] = self.split.labels
        return found

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: int | Key) -> tuple[Any, Any]:
        index, draw = key if isinstance(key, tuple) else (key, None)
        with seeded(draw):
            found: tuple[Any, Any] = self.split.sample(index, self.transform)
        return found


def loader(
    split: Any,
    transform: Callable[..., Any] | None,
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
    integer(1).check("loader", "batch_size", batch_size)
    integer(0).check("loader", "workers", workers)
    SEED.check("loader", "seed", seed)
    if (transform is None) != getattr(split, "decoded", False):
        raise SpecError(
            "loader",
            "None goes with a split of `decode()`, whose images are pixels, and a transform with "
            "every other split",
            given={"transform": ...},
        )
    if not len(split):
        raise VPTError("loader", "the split is empty", "there is nothing to load")
    broken = split.broken() if check or skip_broken else {}
    if broken and not skip_broken:
        told = listing([f"{split.where(index)}: {cut(why, 100)}" for index, why in broken.items()])
        raise VPTError(
            "loader",
            f"{len(broken)} of {len(split)} images cannot be used: {told}",
            "Replace them, or pass `skip_broken=True` to leave them out",
        )
    if len(broken) == len(split):
        problem = f"none of {len(split)} images can be used"
        raise VPTError("loader", problem, given={"skip_broken": True})
    good = split.subset(i for i in range(len(split)) if i not in broken) if broken else split
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
        broken += [prefix + split.where(i) for i in split.broken(progress=progress)]
    return broken
