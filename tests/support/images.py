"""Folders of images, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SHADES = {"dark": 60, "light": 190}


def draw_task(
    folder: Path,
    counts: Sequence[int] = (12, 6, 6),
    levels: Mapping[str, int] = SHADES,
    size: tuple[int, int] = (40, 36),
    noise: int = 60,
) -> Path:
    """Draw train, val and test of a task: classes of a brightness each, in noise.

    Args:
        folder: Where to; returned.
        counts: Images of a class in each split.
        levels: Brightness of each class.
        size: Height and width.
        noise: How far it reaches above the level.
    """
    rng = np.random.default_rng(0)
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        for name, level in levels.items():
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, noise, (*size, 3)) + level
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")
    return folder
