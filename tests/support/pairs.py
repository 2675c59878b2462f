"""A few cases of a product that still meet every pair of values."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import Any

import pytest


def pairwise(cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Mark cases slow, all but a few in which every two values that stand together still do.

    Args:
        cases: Of a product, impossible ones left out; as many values in each.

    Returns:
        All cases, for `pytest.mark.parametrize`.
    """
    pairs = {case: set(combinations(enumerate(map(str, case)), 2)) for case in cases}
    left, chosen = set().union(*pairs.values()), set()
    # Cases that bring most come first.
    for most in range(max(map(len, pairs.values())), 0, -1):
        for case, own in pairs.items():
            if len(own & left) >= most:
                chosen.add(case)
                left -= own
    return [pytest.param(*c, marks=() if c in chosen else pytest.mark.slow) for c in pairs]
