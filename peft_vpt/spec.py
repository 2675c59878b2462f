"""What prompts are: `PromptSpec`, the options of `inject_prompts` as a frozen value."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any

from .errors import SpecError

CHOICES: dict[str, tuple[str, ...]] = {
    "location": ("prepend", "add", "prepend-pixel", "concat-channel", "pad"),
    "sharing": ("none", "inter", "intra", "all"),
    "init": ("xavier", "normal", "zeros", "tensor"),
    "pooling": ("default", "cls", "image", "prompt", "global"),
    "form": ("auto", "kv", "token"),
}
_PIXEL_LAYERS: dict[str, tuple[int, ...]] = {
    "prepend-pixel": (0,),
    "concat-channel": (),
    "pad": (),
}
NOWHERE = "none"
# More than any image has tokens; also what keeps a small file from asking for gigabytes.
_MOST_PROMPTS = 65_536
_WITHOUT_TOKENS = ("concat-channel", "pad")


@dataclass(frozen=True)
class PromptSpec:
    """The options of a set of prompts; equal specs on equal backbones give equal shapes.

    `None` stands for a default that depends on the model or on another field; `resolve` fills it
    in. `model.prompts.spec` and an adapter file always hold the resolved spec.

    Args:
        length: Prompts per entry, the paper's p; at most 65,536.
        deep: True: prompts act on their entry block only. False: they flow on to the next entry,
            or to the end of the encoder.
        layers: Strictly ascending block indices in front of which prompts enter. None: all blocks
            if `deep`, the first one if not.
        location: Where prompts meet the input: "prepend" (tokens of their own); "add" (to the
            tokens in front of each entry block; `length` is 1 or the number of tokens);
            "prepend-pixel" (patches of pixels through the frozen patch projection);
            "concat-channel" (further image channels with a convolution of their own); "pad" (a
            border of `length` pixels). Pixel locations are shallow: they resolve to deep=False
            and dropout 0.
        sharing: "none"; "inter" (one set for all layers of a stage); "intra" (one vector, repeated
            `length` times); "all" (one vector per stage).
        init: "xavier", "normal" or "zeros"; "tensor" where the values came from the caller.
        dropout: Rate of the per-sample dropout on prompts. None: 0.1 if `deep`, 0.0 if not.
        project: Width of the prompts in front of a learned shared projection, or None.
        pooling: What the head receives: "default" (what the model does), "cls", "image", "prompt"
            or "global" (all but prefix tokens).
        train_prompts: False keeps the prompts fixed (a control).
        form: "auto", "kv" or "token".

    Source: Jia et al., ECCV 2022, sections 3.2 (shallow, deep), 4.3 and A (ablations).
    """

    length: int = 50
    deep: bool = True
    layers: tuple[int, ...] | None = None
    location: str = "prepend"
    sharing: str = "none"
    init: str = "xavier"
    dropout: float | None = None
    project: int | None = None
    pooling: str = "default"
    train_prompts: bool = True
    form: str = "auto"

    def __post_init__(self) -> None:
        """Check every field for itself; pairs that need the model are checked by `resolve`."""
        _set(self, "length", _count("length", self.length))
        if self.length > _MOST_PROMPTS:
            raise _wrong("length", self.length, f"must be at most {_MOST_PROMPTS}")
        for name in ("deep", "train_prompts"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "must be True or False")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed and not self._is_none(name):
                raise _wrong(name, getattr(self, name), f"must be one of {', '.join(allowed)}")
        if self.layers is not None:
            may_be_empty = self.is_pixel or self.location == NOWHERE
            _set(self, "layers", _ascending(self.layers, may_be_empty))
        if self.dropout is not None:
            _set(self, "dropout", _rate(self.dropout))
        if self.project is not None:
            _set(self, "project", _count("project", self.project))

    def _is_none(self, name: str) -> bool:
        return name == "location" and self.location == NOWHERE and self.layers == ()

    @classmethod
    def none(cls) -> PromptSpec:
        """Return the spec of a model without prompts, for protocols that need none."""
        return cls(length=1, deep=False, layers=(), location=NOWHERE, dropout=0.0)

    def resolve(self, depth: int) -> PromptSpec:
        """Return the spec with every None that depends on the model filled in.

        Args:
            depth: Number of transformer blocks of the encoder.

        Raises:
            SpecError: A layer outside the model, or a pair of options that excludes itself.
        """
        if self.location == NOWHERE:
            return self
        self._check_location()
        if self.is_pixel:
            entries = _PIXEL_LAYERS[self.location]
            return dataclasses.replace(self, deep=False, layers=entries, dropout=0.0)
        layers = self.layers
        if layers is None:
            layers = tuple(range(depth)) if self.deep else (0,)
        if layers[-1] >= depth:
            raise _wrong(
                "layers", layers, f"reach outside the model, whose blocks are 0 to {depth - 1}"
            )
        dropout = (0.1 if self.deep else 0.0) if self.dropout is None else self.dropout
        spec = dataclasses.replace(self, layers=layers, dropout=dropout)
        spec._check_form(depth)
        return spec

    def spans(self, depth: int) -> list[tuple[int, int]]:
        """Return where prompts enter and leave: one `(enter, leave)` per entry, both inclusive.

        Prompts enter the token sequence in front of block `enter` and leave it behind block
        `leave`. This is the only place that reads `deep` and `layers`.
        """
        layers = self.resolve(depth).layers if self.layers is None else self.layers
        assert layers is not None
        if not layers:
            return []
        if self.location == "add" or (self.deep and not self.is_pixel):
            return [(layer, layer) for layer in layers]
        ends = [layer - 1 for layer in layers[1:]] + [depth - 1]
        return list(zip(layers, ends, strict=True))

    def token_reason(self, span: tuple[int, int], last: bool) -> str | None:
        """Return why a span needs real tokens, or None where extra keys and values are enough."""
        if self.location != "prepend":
            return f"location='{self.location}'"
        if self.form == "token":
            return "form='token'"
        if span[0] != span[1]:
            return "prompts are carried through several blocks"
        if last and self.pooling in ("prompt", "global"):
            return f"pooling='{self.pooling}' reads what the block computes for its prompts"
        return None

    @property
    def is_pixel(self) -> bool:
        """Whether prompts are pixels, which enter with the image and nowhere else."""
        return self.location in _PIXEL_LAYERS

    def _check_location(self) -> None:
        """Refuse options that mean nothing at the location."""
        where = f"with location='{self.location}'"
        if self.pooling in ("prompt", "global") and self.location in ("add", *_WITHOUT_TOKENS):
            raise _wrong(
                "pooling", self.pooling, f"needs prompt tokens, and {where} there are none"
            )
        if not self.is_pixel:
            return
        if self.sharing != "none":
            raise _wrong("sharing", self.sharing, f"can only be 'none' {where}: nothing to share")
        if self.project is not None:
            raise _wrong("project", self.project, f"can only be None {where}: prompts are pixels")
        if self.form == "kv":
            raise _wrong("form", self.form, f"can only be 'auto' or 'token' {where}")
        if self.dropout:
            raise _wrong("dropout", self.dropout, f"can only be 0 {where}: prompts are pixels")
        if self.layers not in (None, _PIXEL_LAYERS[self.location]):
            raise _wrong("layers", self.layers, f"can only be None {where}: prompts enter once")

    def _check_form(self, depth: int) -> None:
        if self.form != "kv":
            return
        spans = self.spans(depth)
        for span in spans:
            reason = self.token_reason(span, last=span is spans[-1])
            if reason:
                raise _wrong(
                    "form",
                    "kv",
                    f"cannot serve blocks {span[0]} to {span[1]}: {reason}; use 'auto'",
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as plain JSON values."""
        values = dataclasses.asdict(self)
        return values | {"layers": None if self.layers is None else list(self.layers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PromptSpec:
        """Build a spec from `to_dict` values.

        Raises:
            SpecError: An unknown or missing field, or a wrong value.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, Mapping) or set(values) != names:
            given = sorted(values) if isinstance(values, Mapping) else type(values).__name__
            raise SpecError(f"PromptSpec.from_dict: needs the fields {sorted(names)}, got {given}.")
        return cls(**values)


def _set(spec: PromptSpec, name: str, value: object) -> None:
    object.__setattr__(spec, name, value)


def _wrong(name: str, value: object, what: str) -> SpecError:
    return SpecError(f"inject_prompts({name}={value!r}): {name} {what}.")


def _count(name: str, value: object) -> int:
    problem = _wrong(name, value, f"must be an integer >= 1, got {value!r}")
    if isinstance(value, bool):
        raise problem
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise problem from None
    if number < 1:
        raise problem
    return number


def _rate(value: object) -> float:
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else -1.0
    if not 0 <= number < 1:
        raise _wrong("dropout", value, "must be a number from 0 up to, not including, 1")
    return number


def _ascending(layers: object, may_be_empty: bool) -> tuple[int, ...]:
    problem = _wrong("layers", layers, "must be block indices, each >= 0, in strictly rising order")
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise problem
    layers = tuple(layers)
    if any(isinstance(layer, bool) for layer in layers):
        raise problem
    try:
        indices = tuple(operator.index(layer) for layer in layers)
    except TypeError:
        raise problem from None
    rising = all(a < b for a, b in pairwise(indices))
    if indices == () and may_be_empty:
        return indices
    if not indices or indices[0] < 0 or not rising:
        raise problem
    return indices


def xavier_bound(patch: tuple[int, int], dim: int) -> float:
    """Return the bound of the uniform initialisation, sqrt(6 / (3 ph pw + dim)).

    Args:
        patch: Kernel `(height, width)` in pixels of the patch or stem convolution.
        dim: Width of the prompts.

    Source: Jia et al. 2022, section A.1 (the initialisation of the patch projection).
    """
    return math.sqrt(6.0 / (3 * patch[0] * patch[1] + dim))
