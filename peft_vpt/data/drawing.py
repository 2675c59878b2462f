"""Seeded draws: stratified parts of a split, orders of an epoch, one draw per image."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import RandomSampler, Sampler

from ..checks import integer, number
from ..randomness import derive, seeded

Key = tuple[int, int]


SEED = integer(0)
# A share of images that are kept, and one that is cut off.
SHARE = number(0, 1, above=True)
PART = number(0, 1, above=True, below=True)


def stratified(
    labels: Sequence[int], share: float, seed: int, *, least: int = 0, keep: int = 0
) -> tuple[list[int], list[int]]:
    """Draw a share of the images of every class.

    The total is `share` of all images rounded, shared out by largest remainders, so that rare
    classes are drawn in their turn.

    Args:
        labels: Of all images.
        share: Of the images, above 0 and at most 1.
        seed: Of the draw.
        least: Images drawn of every class at least, where it has them.
        keep: Images of every class that are never drawn.

    Returns:
        Indices drawn, and the others; both ascending.
    """
    groups: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        groups.setdefault(label, []).append(index)
    generator = random.Random(seed)
    for label in sorted(groups):
        generator.shuffle(groups[label])
    counts = _counts({c: len(g) for c, g in groups.items()}, share, least, keep, generator)
    drawn = {index for label, group in groups.items() for index in group[: counts[label]]}
    return sorted(drawn), [i for i in range(len(labels)) if i not in drawn]


def _counts(
    sizes: dict[int, int], share: float, least: int, keep: int, generator: random.Random
) -> dict[int, int]:
    most = {c: max(size - keep, 0) for c, size in sizes.items()}
    counts = {c: min(max(int(size * share), least), most[c]) for c, size in sizes.items()}
    # Classes of one size have one remainder: without a draw the first ones would always gain.
    order = sorted(sizes, key=lambda c: (-(sizes[c] * share % 1), generator.random()))
    missing = max(round(sum(sizes.values()) * share), 1) - sum(counts.values())
    while missing > 0 and any(counts[c] < most[c] for c in order):
        for label in order:
            if missing > 0 and counts[label] < most[label]:
                counts[label] += 1
                missing -= 1
    return counts


class EpochSampler(Sampler[Key]):
    """Keys `(index, draw)` in the order of an epoch; `draw` seeds the image's transform.

    Both follow from seed, epoch and index alone, so they are the same with any number of workers
    and processes, and when an epoch is begun again in its middle. `set_epoch` says which epoch the
    next pass is (accelerate calls it); without it, each pass is that of the next epoch.

    Args:
        inner: The order of indices: another sampler, a random one drawn anew for each epoch, or a
            number of images, all of which come in random order.
        seed: Of all epochs.
    """

    def __init__(self, inner: Sampler[int] | int, seed: int) -> None:
        if isinstance(inner, int):
            inner = RandomSampler(range(inner), generator=torch.Generator())
        self.inner, self._seed, self._epoch = inner, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass that of an epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.inner)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Key]:
        epoch, self._epoch = self._epoch, self._epoch + 1
        drawn = derive(self._seed, "order", epoch)
        own = getattr(self.inner, "generator", None)
        with seeded(drawn):
            if isinstance(own, torch.Generator):
                own.manual_seed(drawn)
            order = list(self.inner)
        return ((index, derive(self._seed, "image", epoch, index)) for index in order)
