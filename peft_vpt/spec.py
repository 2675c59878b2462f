"""What prompts are: `PromptSpec`, the options of `inject_prompts`, and what locations there are."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from .checks import FLAG, Rule, integer, number, one_of, or_none
from .errors import SpecError


@dataclass(frozen=True)
class Location:
    """What follows from where prompts meet the input, whatever the model.

    Args:
        words: What prompts are there.
        home: Its `Place` in `forms`, "module.Class": what it asks of a model, shapes, first values
            and forms. Imported where it is used.
        entries: Of prompts that are pixels: the blocks that they enter as tokens. None: prompts
            are vectors, and enter the blocks of `layers`.
        tokens: Whether prompts are tokens of their own among those of the model.
        tensors: The stored ones by name, where there is not one per entry block; of each, the axis
            that `length` decides and how many times it.
        whole_models: Whether it takes image models too in which no transformer block is known.
        moves_image: Whether pixels lie elsewhere for the model than on the image that it is given.
        tries: Lengths of which a model that takes the location takes one.
    """

    words: str
    home: str
    entries: tuple[int, ...] | None = None
    tokens: bool = True
    tensors: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    whole_models: bool = False
    moves_image: bool = False
    tries: tuple[int, ...] = (2,)


LOCATIONS = {
    "prepend": Location("tokens of their own", "prepend.Prepend"),
    "add": Location(
        "vectors added to the tokens in front of each entry block",
        "add.Add",
        tokens=False,
        tries=(1,),
    ),
    "prepend-pixel": Location(
        "patches of pixels that go through the frozen patch projection",
        "pixel.Patches",
        entries=(0,),
        tensors={"pixel.patches": (0, 1)},
    ),
    "concat-channel": Location(
        "further image channels with a convolution of their own",
        "pixel.Channels",
        entries=(),
        tokens=False,
        tensors={"pixel.channels": (0, 1), "pixel.weight": (1, 1)},
    ),
    "pad": Location(
        "a border of pixels around the image",
        "pixel.Border",
        entries=(),
        tokens=False,
        tensors={"pixel.tb": (1, 2), "pixel.lr": (2, 2)},
        whole_models=True,
        moves_image=True,
        tries=(2, 4, 7, 8),
    ),
}
NOWHERE = "none"
_ABSENT = Location("no prompts", "prepend.Prepend", tokens=False, whole_models=True)


def location(name: str) -> Location:
    """Return a location by its name; the one of a model without prompts is called "none"."""
    return _ABSENT if name == NOWHERE else LOCATIONS[name]


_INDEX = integer(0)
_RULES = {
    # More than any image has tokens; also what keeps a small file from asking for gigabytes.
    "length": integer(1, 65_536),
    "deep": FLAG,
    "layers": or_none(
        Rule(
            "block indices, each >= 0, in strictly rising order",
            lambda value: (
                isinstance(value, tuple)
                and all(map(_INDEX.fits, value))
                and all(a < b for a, b in pairwise(value))
            ),
        )
    ),
    "location": one_of(*LOCATIONS),
    "sharing": one_of("none", "inter", "intra", "all"),
    "init": one_of("xavier", "normal", "zeros", "tensor"),
    "dropout": or_none(number(0, 1, below=True)),
    "project": or_none(integer(1)),
    "pooling": one_of("default", "cls", "image", "prompt", "global"),
    "train_prompts": FLAG,
    "form": one_of("auto", "kv", "token"),
}


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
        location: Where prompts meet the input: "prepend" (tokens of their own, kept behind the
            model's); "add" (to the tokens in front of each entry block; `length` is 1 or the
            number of tokens);
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
        if isinstance(self.layers, Iterable) and not isinstance(self.layers, str):
            object.__setattr__(self, "layers", tuple(self.layers))
        absent = self.location == NOWHERE and self.layers == ()
        for name, rule in _RULES.items():
            if not (absent and name == "location"):
                rule.check("inject_prompts", name, getattr(self, name))
        if self.layers == () and not (absent or self.is_pixel):
            raise _wrong("layers", (), "must name a block")
        plain: dict[str, Any] = {"length": operator.index(self.length)}
        if self.layers is not None:
            plain["layers"] = tuple(map(operator.index, self.layers))
        if self.dropout is not None:
            plain["dropout"] = float(self.dropout)
        if self.project is not None:
            plain["project"] = operator.index(self.project)
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    @property
    def where(self) -> Location:
        """What follows from the location."""
        return location(self.location)

    @property
    def is_pixel(self) -> bool:
        """Whether prompts are pixels, which enter with the image and nowhere else."""
        return self.where.entries is not None

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
            return dataclasses.replace(self, deep=False, layers=self.where.entries, dropout=0.0)
        layers = self.layers
        if layers is None:
            layers = tuple(range(depth)) if self.deep else (0,)
        if not layers or layers[-1] >= depth:
            named = f"block {layers[-1]}" if layers else "every block"
            problem = f"{named} is outside the model, whose blocks are 0 to {depth - 1}"
            raise _wrong("layers", layers, problem)
        dropout = (0.1 if self.deep else 0.0) if self.dropout is None else self.dropout
        spec = dataclasses.replace(self, layers=layers, dropout=dropout)
        spec._check_form(depth)
        return spec

    def spans(self, depth: int) -> list[tuple[int, int]]:
        """Return where prompts enter and leave: one `(enter, leave)` per entry, both inclusive.

        Prompts enter the token sequence in front of block `enter` and leave it behind block
        `leave`. Whoever asks where prompts are reads this, not `deep` and `layers`.
        """
        layers = self.resolve(depth).layers if self.layers is None else self.layers
        assert layers is not None
        if not layers:
            return []
        if not self.is_pixel and (self.deep or not self.where.tokens):
            return [(layer, layer) for layer in layers]
        ends = [layer - 1 for layer in layers[1:]] + [depth - 1]
        return list(zip(layers, ends, strict=True))

    def token_reason(self, span: tuple[int, int], last: bool) -> str | None:
        """Return why a span needs real tokens, or None where extra keys and values are enough."""
        if self.is_pixel or not self.where.tokens:
            return f"location='{self.location}'"
        if self.form == "token":
            return "form='token'"
        if span[0] != span[1]:
            return "prompts are carried through several blocks"
        if last and self.pooling in ("prompt", "global"):
            return f"pooling='{self.pooling}' reads what the block computes for its prompts"
        return None

    def _check_location(self) -> None:
        """Refuse options that mean nothing at the location."""
        where = f"with `location={self.location!r}`"
        if self.pooling in ("prompt", "global") and not self.where.tokens:
            problem = f"needs prompt tokens, and {where} there are none"
            raise _wrong("pooling", self.pooling, problem)
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
        if self.layers not in (None, self.where.entries):
            raise _wrong("layers", self.layers, f"can only be None {where}: prompts enter once")

    def _check_form(self, depth: int) -> None:
        spans = self.spans(depth) if self.form == "kv" else []
        for span in spans:
            reason = self.token_reason(span, last=span is spans[-1])
            if reason:
                problem = f"cannot serve blocks {span[0]} to {span[1]}: {reason}"
                raise _wrong("form", "kv", problem, "use 'auto'")

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as plain JSON values."""
        values = dataclasses.asdict(self)
        return values | {"layers": None if self.layers is None else list(self.layers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PromptSpec:
        """Build a spec from `to_dict` values.

        A field that is missing, in a file older than the field, takes its default.

        Raises:
            SpecError: A field that is not known, or a wrong value.
        """
        if not isinstance(values, Mapping):
            raise SpecError("PromptSpec.from_dict", f"needs fields, got {type(values).__name__}")
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise SpecError(
                "PromptSpec.from_dict",
                f"does not know {', '.join(map(str, unknown))}",
                "If a newer release wrote these options, update peft_vpt",
            )
        # What has no prompts has no options of prompts either.
        _RULES["location"].check("inject_prompts", "location", values.get("location", "prepend"))
        return cls(**values)


def _wrong(name: str, value: object, problem: str, advice: str = "") -> SpecError:
    return SpecError("inject_prompts", problem, advice, given={name: value})


def xavier_bound(patch: tuple[int, int], dim: int) -> float:
    """Return the bound of the uniform initialisation, sqrt(6 / (3 ph pw + dim)).

    Args:
        patch: Kernel `(height, width)` in pixels of the patch or stem convolution.
        dim: Width of the prompts.

    Source: Jia et al. 2022, section A.1 (the initialisation of the patch projection).
    """
    return math.sqrt(6.0 / (3 * patch[0] * patch[1] + dim))
