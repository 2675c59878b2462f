"""A value that one module leaves for another within the same forward."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch

_VALUES: ContextVar[dict[int, Any]] = ContextVar("peft_vpt_slots", default={})  # noqa: B039


class Slot:
    """Hold a value per thread and task, so that threads may share a model.

    While a forward is traced (compile, export) the value is an attribute: dynamo cannot write
    context variables.
    """

    def __init__(self) -> None:
        self.traced: Any = None

    def set(self, value: Any) -> None:
        """Store a value; None empties the slot."""
        if torch.compiler.is_compiling():
            self.traced = value
            return
        others = {key: kept for key, kept in _VALUES.get().items() if key != id(self)}
        _VALUES.set(others if value is None else others | {id(self): value})

    def get(self) -> Any:
        """Return the value, or None."""
        return self.traced if torch.compiler.is_compiling() else _VALUES.get().get(id(self))

    def __getstate__(self) -> dict[str, Any]:
        """Leave the value out of copies and pickles."""
        return {"traced": None}
