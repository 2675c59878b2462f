"""`Protocol`: what trains of a model, as a plain value, and the table of all there are.

Everybody who wants to know something of a protocol asks it. A new one is a row of `KINDS`; what it
adds to a model is a class of `protocols.modules`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..checks import FLAG, integer
from ..errors import SpecError, UnsupportedArchitectureError, shown

_DEFAULT_REDUCTION = 8


@dataclass(frozen=True)
class Moves:
    """Which weights of the backbone itself train.

    Args:
        chosen: Tells it by name and parameter. None: all of them, and the modules that hold them
            follow the model into train mode.
        last: Whether only the last k blocks, or stages, are meant, and what stands behind them.
        missing: What a model has in which nothing is found, in words.
    """

    chosen: Callable[[str, Any], bool] | None = None
    last: bool = False
    missing: str = "no weights"


@dataclass(frozen=True)
class Kind:
    """What protocols of one name have in common, whatever their k.

    Args:
        numbered: Whether the name ends in a number, its k.
        prompts: Options of `inject_prompts` that the name fixes; None: it has no prompts.
        moves: What of the backbone itself trains.
        adds: Name of the class of `protocols.modules` that it adds to the model.
        layered: Whether its head is k layers.
        inside: Whether what trains stands inside the blocks, with nothing in front that does.
        classifier: What it does to the classifier, in words; a decoder would not read it.
        options: Names of options of its own.
    """

    numbered: bool = False
    prompts: Mapping[str, Any] | None = None
    moves: Moves | None = None
    adds: str = ""
    layered: bool = False
    inside: bool = False
    classifier: str = ""
    options: tuple[str, ...] = ()


def _called(pattern: str) -> Callable[[str, Any], bool]:
    return lambda name, _: re.fullmatch(pattern, name) is not None


# A table of relative positions carries "bias" in its name and is none.
_is_bias = _called(r"(.*\.)?(bias|[a-z_]*_bias)")
_BIASES = Moves(lambda name, p: p.dim() == 1 and _is_bias(name, p), missing="no bias terms")
_CLS = Moves(_called(r"(.*\.)?(cls_token|class_token|class_embedding)"), missing="no CLS token")
KINDS: dict[str, Kind] = {
    "full": Kind(moves=Moves(), options=("keep_original",)),
    "linear": Kind(),
    "partial": Kind(numbered=True, moves=Moves(last=True), inside=True),
    "mlp": Kind(numbered=True, layered=True, classifier="its layers are the classifier"),
    "sidetune": Kind(
        adds="SideNetwork",
        options=("features",),
        classifier="its network is added in front of the classifier",
    ),
    "bias": Kind(moves=_BIASES, inside=True),
    "adapter": Kind(adds="Bottlenecks", options=("reduction",), inside=True),
    "cls": Kind(moves=_CLS),
    "vpt-shallow": Kind(prompts={"deep": False}),
    "vpt-deep": Kind(prompts={"deep": True}),
    "vpt+bias": Kind(prompts={}, moves=_BIASES),
    "prompt-fixed": Kind(prompts={"train_prompts": False}),
}
NAMES = tuple(f"{name}-k" if kind.numbered else name for name, kind in KINDS.items())
PROMPTED = tuple(name for name, kind in KINDS.items() if kind.prompts is not None)
OPTIONS = {"reduction": integer(1), "keep_original": FLAG}


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
                "apply_protocol", f"must be one of {', '.join(NAMES)}", given={"name": self.name}
            )
        for option, rule in OPTIONS.items():
            value = getattr(self, option)
            if value is getattr(Protocol, option):
                continue
            rule.check("apply_protocol", option, value)
            if option not in self.row.options:
                raise SpecError(
                    "apply_protocol",
                    f"only {_having(option)} has this option",
                    given={"name": self.name, option: value},
                )
        if "reduction" in self.row.options:
            given = _DEFAULT_REDUCTION if self.reduction is None else operator.index(self.reduction)
            object.__setattr__(self, "reduction", given)

    @property
    def kind(self) -> str:
        """The name without its number, a key of `KINDS`; "" for a name that is none."""
        stem, _, digits = self.name.rpartition("-")
        if stem in KINDS and KINDS[stem].numbered:
            return stem if re.fullmatch(r"[1-9][0-9]{0,3}", digits) else ""
        return "" if self.name in KINDS and KINDS[self.name].numbered else self.name

    @property
    def row(self) -> Kind:
        """What it has in common with others of its name."""
        return KINDS[self.kind]

    @property
    def number(self) -> int:
        """The k of partial-k and mlp-k, 0 for others."""
        return int(self.name.rpartition("-")[2]) if self.row.numbered else 0

    @property
    def head_layers(self) -> int:
        """Number of layers of a head of its own; 0 where the head is the model's or a new one."""
        return self.number if self.row.layered else 0

    @property
    def prompted(self) -> bool:
        """Whether there are prompts."""
        return self.row.prompts is not None

    @property
    def trains_prompts(self) -> bool:
        """Whether there are prompts that train."""
        return self.row.prompts is not None and self.row.prompts.get("train_prompts", True)

    @property
    def moves(self) -> bool:
        """Whether weights of the backbone itself train."""
        return self.row.moves is not None

    @property
    def restores(self) -> bool:
        """Whether the backbone's own weights can be put back."""
        return self.keep_original or "keep_original" not in self.row.options

    def misfit(self, problem: str, advice: str = "") -> UnsupportedArchitectureError:
        """Return the error of a model in which it has no place."""
        given = {"name": self.name}
        return UnsupportedArchitectureError("apply_protocol", problem, advice, given=given)

    def same(self, other: Protocol | None) -> bool:
        """Tell whether an adapter of the one fits a model under the other."""
        return other is not None and self.to_dict() == other.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """Return the protocol as plain JSON values, without what says nothing.

        `keep_original` is about one process, not about an adapter.
        """
        values = {"name": self.name, "reduction": self.reduction}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, values: Any) -> Protocol:
        """Build a protocol from `to_dict` values.

        Raises:
            SpecError: An unknown or missing field, or a wrong value.
        """
        if not isinstance(values, Mapping) or "name" not in values:
            raise SpecError("Protocol.from_dict", f"needs a name, got {shown(values)}")
        unknown = sorted(map(str, set(values) - {"name", "reduction"}))
        if unknown:
            raise SpecError(
                "Protocol.from_dict",
                f"does not know {', '.join(unknown)}",
                "If a newer release wrote these options, update peft_vpt",
            )
        return cls(**values)


def _having(option: str) -> str:
    return " or ".join(repr(name) for name, kind in KINDS.items() if option in kind.options)
