"""Seeded draws: stratified parts of a split, orders of an epoch, one draw per image."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from ..errors import SpecError

Key = tuple[int, int]


def check_counts(call: str, **options: tuple[Any, int]) -> None:
    """Check options that are whole numbers; each is given with the least it may be.

    Raises:
        SpecError: One is none, or less.
    """
    for name, (value, least) in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SpecError(f"{call}({name}={value!r}): must be an integer from {least} up.")


def check_shares(call: str, *, whole: bool = False, **shares: Any) -> None:
    """Check options that are shares of the images; `whole` says whether all of them are one.

    Raises:
        SpecError: One is no number above 0 and below 1.
    """
    for name, value in shares.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value <= 1 or (value == 1 and not whole):
            end = "at most 1" if whole else "below 1"
            raise SpecError(f"{call}({name}={value!r}): must be above 0 and {end}.")


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
    """Keys `(index, draw)` of all images in random order; `draw` seeds the image's transform.

    Order and draws follow from the generator alone, so they are the same with any number of
    workers, and when an epoch is begun again in its middle. `set_epoch` fixes them by seed and
    epoch (accelerate calls it); without it every pass draws on.

    Args:
        count: Number of images.
        seed: Of all epochs.
    """

    def __init__(self, count: int, seed: int) -> None:
        check_counts("loader", seed=(seed, 0))
        self._count, self._seed = count, seed
        self.generator = torch.Generator()
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass that of an epoch."""
        self.generator.manual_seed(random.Random(f"{self._seed}/{epoch}").getrandbits(63))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Key]:
        order = torch.randperm(self._count, generator=self.generator).tolist()
        draws = torch.randint(2**31, (self._count,), generator=self.generator).tolist()
        return iter(list(zip(order, draws, strict=True)))
