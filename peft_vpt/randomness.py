"""Seeds that follow from what they are for, and global generators seeded for a while."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def derive(*parts: Any) -> int:
    """Return a seed below 2**32 that follows from the parts."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed the CPU's global generators inside the `with`, and put them back; None: do nothing."""
    if seed is None:
        yield
        return
    import numpy as np

    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    # Not torch.manual_seed, which would reach out to the GPU from a worker.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])
