"""Grids of settings: their points, and which of two results is better."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import SpecError

_FIRST_TIE = "base_lr"


def grid_points(grid: Any) -> list[dict[str, Any]]:
    """Return the settings at every point of a grid, the last setting changing first.

    Raises:
        SpecError: Values that a study cannot keep, or one twice.
    """
    if not isinstance(grid, Mapping) or not grid:
        raise SpecError(f"sweep(grid={grid!r}): must be a mapping of settings to values.")
    for key, values in grid.items():
        listed = isinstance(values, Sequence) and not isinstance(values, str) and values
        plain = listed and all(
            v is None or isinstance(v, str | bool | int) or _is_finite(v) for v in values
        )
        if not isinstance(key, str) or not plain or len(set(map(repr, values))) < len(values):
            raise SpecError(
                f"sweep(grid[{key!r}]={values!r}): must be a list of different numbers, texts, "
                "booleans or None."
            )
    return [dict(zip(grid, row, strict=True)) for row in itertools.product(*grid.values())]


def check_sweep(folder: Any, storage: Any, name: Any, patience: Any) -> None:
    """Check the plain options of `sweep`.

    Raises:
        SpecError: One is wrong, or the process is one of a distributed launch.
    """
    if (folder is None) == (storage is None):
        raise SpecError("sweep: give either folder, for a journal file there, or storage.")
    if not isinstance(name, str) or not name or set(name) & set("/\\\0") or name.startswith("."):
        raise SpecError(f"sweep(name={name!r}): must be text that can name a file.")
    if not _is_finite(patience) or patience <= 0:
        raise SpecError(f"sweep(patience={patience!r}): must be a number of seconds > 0.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SpecError(
            "sweep: the processes of one distributed launch train one model together and cannot "
            "each take trials. Start each worker by itself, with the same folder."
        )


def rank(
    value: float, params: Mapping[str, Any], grid: Mapping[str, Sequence[Any]]
) -> tuple[float, ...]:
    """Return a key that sorts the best trial first: high value, then small settings."""
    keys = sorted(grid, key=lambda key: key != _FIRST_TIE)
    return (-value, *(_size(params[key], grid[key]) for key in keys))


def finite(value: Any, settings: Mapping[str, Any]) -> float:
    """Return what an objective returned.

    Raises:
        SpecError: It is no finite number.
    """
    try:
        # Numbers of numpy and torch too.
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise SpecError(
            f"sweep: the objective returned {value!r} at {settings}; it must be a finite number."
        )
    return number


def _size(value: Any, values: Sequence[Any]) -> float:
    numbers = all(isinstance(v, int | float) for v in values)
    return float(value) if numbers else float(list(values).index(value))


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
