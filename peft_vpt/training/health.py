"""Whether training goes well: losses that rise, values that are not finite."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from ..errors import VPTError, VPTWarning

_SHORTEST, _LONGEST = 5, 50
_MARGIN = 1.05
# Of a few steps against the first one, which is before any update but of one batch only.
_LEAP, _NATS = 1.5, 0.5


class DivergedError(VPTError):
    """Training stopped at values that are not finite."""


class RisenLossWarning(VPTWarning):
    """The mean loss of a run has risen above its start."""


class LossWatch:
    """Warns once when the loss has risen above its start.

    Start and running mean are each over as many steps as an epoch has, 5 at least and 50 at most;
    5 % more than the start are noise. A leap within these first steps is told by the mean of five
    steps: more than one and a half times the first step's loss, and half a nat.

    Args:
        steps_per_epoch: Optimizer steps in an epoch.
        state: The `state` of an earlier one.
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
        # Plain values, from which another watch goes on.
        self.state: dict[str, Any] = dict(state or {"first": [], "last": [], "warned": False})

    def see(self, loss: float) -> RisenLossWarning | None:
        """Take the loss of a step, and return a warning the first time it has risen."""
        first, told = self.state["first"], None
        if len(first) < self._window:
            first.append(loss)
            told = self._leapt(first)
        else:
            last = self.state["last"] = [*self.state["last"], loss][-self._window :]
            told = self._risen(last) or self._leapt(last)
        if self.state["warned"] or told is None:
            return None
        self.state["warned"] = True
        return RisenLossWarning(
            VPTError(
                "fit",
                f"the mean loss of {told}: the learning rate is most likely too high",
                "Lower base_lr, or use `preset(protocol, kind='default')`",
                shell="Lower the rate, or use the default preset",
            )
        )

    def _risen(self, losses: list[float]) -> str | None:
        start, now, window = fmean(self.state["first"]), fmean(losses), self._window
        if len(losses) < window or now <= start * _MARGIN:
            return None
        return f"the last {window} steps is {now:.4g}, above the {start:.4g} of the first ones"

    def _leapt(self, losses: list[float]) -> str | None:
        start, now = self.state["first"][0], fmean(losses[-self._few :])
        if len(losses) < self._few or now <= start * _LEAP + _NATS:
            return None
        return f"the last {self._few} steps is {now:.4g}, above the {start:.4g} of the first one"
