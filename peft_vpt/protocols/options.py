"""`Protocol`: what trains of a model, as a plain value."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import SpecError

PROMPTED: dict[str, dict[str, Any]] = {
    "vpt-shallow": {"deep": False},
    "vpt-deep": {"deep": True},
    "vpt+bias": {"deep": True},
    "prompt-fixed": {"deep": True, "train_prompts": False},
}
_NUMBERED = ("partial", "mlp")
KINDS = ("full", "linear", *_NUMBERED, "sidetune", "bias", "adapter", "cls", *PROMPTED)
NAMES = tuple(f"{kind}-k" if kind in _NUMBERED else kind for kind in KINDS)
_MOVING = ("full", "partial", "bias", "cls", "vpt+bias")
_DEFAULT_REDUCTION = 8


@dataclass(frozen=True)
class Protocol:
    """A transfer protocol.

    Args:
        name: One of `NAMES`, with a number in place of k.
        reduction: Of "adapter": the width of a bottleneck is the block's width divided by this.
        keep_original: Of "full": whether a copy of the backbone is kept on the CPU, without which
            it cannot be put back.

    Source: Jia et al. 2022, sections 4.1 and A.1; the reduction of section 4.1 is 8, 64 or 256.
    """

    name: str
    reduction: int | None = None
    keep_original: bool = False

    def __post_init__(self) -> None:
        """Check name and options.

        Raises:
            SpecError: An unknown name, a number that is missing, or an option of another protocol.
        """
        if not isinstance(self.name, str) or self.kind not in KINDS:
            raise SpecError(
                f"apply_protocol(name={self.name!r}): must be one of {', '.join(NAMES)}."
            )
        if self.kind == "adapter":
            given = _DEFAULT_REDUCTION if self.reduction is None else self.reduction
            object.__setattr__(self, "reduction", _count(given))
        elif self.reduction is not None:
            raise SpecError(
                f"apply_protocol({self.name!r}, reduction=...): only 'adapter' has a reduction."
            )
        if not isinstance(self.keep_original, bool):
            raise SpecError(
                f"apply_protocol(keep_original={self.keep_original!r}): must be True or False."
            )
        if self.keep_original and self.kind != "full":
            raise SpecError(
                f"apply_protocol({self.name!r}, keep_original=True): only 'full' has the choice; "
                "the other protocols always keep what they change."
            )

    @property
    def kind(self) -> str:
        """The name without its number; "" for a name that is none."""
        match = re.fullmatch(rf"({'|'.join(_NUMBERED)})-([1-9]\d{{0,3}})", self.name)
        if match:
            return match.group(1)
        return "" if self.name in _NUMBERED else self.name

    @property
    def number(self) -> int:
        """The k of partial-k and mlp-k, 0 for others."""
        digits = self.name.rpartition("-")[2]
        return int(digits) if self.kind in _NUMBERED else 0

    @property
    def trains_prompts(self) -> bool:
        """Whether there are prompts that train."""
        return bool(PROMPTED.get(self.kind, {"train_prompts": False}).get("train_prompts", True))

    @property
    def moves(self) -> bool:
        """Whether weights of the backbone itself train."""
        return self.kind in _MOVING

    @property
    def restores(self) -> bool:
        """Whether the backbone's own weights can be put back."""
        return self.kind != "full" or self.keep_original

    def same(self, other: Protocol | None) -> bool:
        """Tell whether an adapter of the one fits a model under the other."""
        return other is not None and self.to_dict() == other.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """Return the protocol as plain JSON values, without what says nothing.

        `keep_original` is about one process, not about an adapter.
        """
        found: dict[str, Any] = {"name": self.name}
        return found | ({} if self.reduction is None else {"reduction": self.reduction})

    @classmethod
    def from_dict(cls, values: Any) -> Protocol:
        """Build a protocol from `to_dict` values.

        Raises:
            SpecError: An unknown or missing field, or a wrong value.
        """
        names = {field.name for field in dataclasses.fields(cls)} - {"keep_original"}
        if not isinstance(values, Mapping) or not {"name"} <= set(values) <= names:
            raise SpecError(f"Protocol.from_dict: needs the fields {sorted(names)}, got {values}.")
        return cls(**values)


def _count(value: Any) -> int:
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise SpecError(f"apply_protocol(reduction={value!r}): must be an integer >= 1.")
    return number
