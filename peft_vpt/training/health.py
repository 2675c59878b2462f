"""Whether training goes well: losses that rise, values that are not finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import VPTError

_SHORTEST, _LONGEST = 5, 50
_MARGIN = 1.05
# Of a few steps against the first one, which is before any update but of one batch only.
_LEAP, _NATS = 1.5, 0.5


class DivergedError(VPTError):
    """Training stopped at values that are not finite."""


class LossWatch:
    """Warns once when the loss has risen above its start.

    Start and running mean are each over as many steps as an epoch has, 5 at least and 50 at most;
    5 % more than the start are noise. A leap within these first steps is told by the mean of five
    steps: more than one and a half times the first step's loss, and half a nat.

    Args:
        steps_per_epoch: Optimizer steps in an epoch.
        state: What `state` returned earlier.
        total: Optimizer steps of the run; a run of fewer than five is told by all of them.
    """

    def __init__(
        self,
        steps_per_epoch: int,
        state: Mapping[str, Any] | None = None,
        *,
        total: int = _SHORTEST,
    ) -> None:
        self._few = min(_SHORTEST, total)
        self._window = min(max(steps_per_epoch, _SHORTEST), _LONGEST)
        self._first: list[float] = list(state["first"]) if state else []
        self._last: list[float] = list(state["last"]) if state else []
        self._warned = bool(state["warned"]) if state else False

    @property
    def state(self) -> dict[str, Any]:
        """Plain values from which a watch goes on."""
        return {"first": self._first, "last": self._last, "warned": self._warned}

    def see(self, loss: float) -> str | None:
        """Take the loss of a step, and return a warning the first time it has risen."""
        if len(self._first) < self._window:
            self._first.append(loss)
            told = self._leapt(self._first)
        else:
            self._last = [*self._last, loss][-self._window :]
            told = self._risen() or self._leapt(self._last)
        if self._warned or told is None:
            return None
        self._warned = True
        return (
            f"fit: the mean loss of {told}: the learning rate is most likely too high. Lower "
            "base_lr, or use preset(protocol, kind='default')."
        )

    def _risen(self) -> str | None:
        start, now, window = _mean(self._first), _mean(self._last), self._window
        if len(self._last) < window or now <= start * _MARGIN:
            return None
        return f"the last {window} steps is {now:.4g}, above the {start:.4g} of the first ones"

    def _leapt(self, losses: list[float]) -> str | None:
        start, now = self._first[0], _mean(losses[-self._few :])
        if len(losses) < self._few or now <= start * _LEAP + _NATS:
            return None
        return f"the last {self._few} steps is {now:.4g}, above the {start:.4g} of the first one"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
