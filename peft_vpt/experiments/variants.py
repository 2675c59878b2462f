"""What a comparison trains: variants of protocols, and the paper's ablations as tables of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..checks import number, one_of
from ..errors import SpecError
from ..protocols.options import Protocol

Options = Mapping[str, Any]
FINAL = ("trainval", "train")
# First values of prompts that take images to make.
FROM_IMAGES = ("prototypes", "tokens")
# Class prototypes as prompts: one per class, no more than these.
MOST_PROTOTYPES = 200


@dataclass(frozen=True)
class Variant:
    """One row of a comparison or an ablation: a protocol with its settings.

    Args:
        label: Its name, the `protocol` of its records.
        protocol: As in `apply_protocol`.
        options: Of the protocol, plain values. `init` of prompts may be "prototypes": the mean
            features of each class (paper, Figure 13), or "tokens": `prompts_from_tokens`.
        changes: Fields of the recipe to set.
        choices: Further options, one mapping each, among which val chooses.
        fraction: Share of the training images.
        size: Edge of the images; None: the comparison's.
        final: What the final runs train on: "trainval", or "train", as the paper does on FGVC.
        series: On which line of a figure it stands; "": its label.
        place: Where on that line, along the axis of the ablation.

    Raises:
        SpecError: An unknown protocol, or a value out of range.
    """

    label: str
    protocol: str
    options: Options = field(default_factory=dict)
    changes: Options = field(default_factory=dict)
    choices: Sequence[Options] = ({},)
    fraction: float = 1.0
    size: int | None = None
    final: str = "trainval"
    series: str = ""
    place: Any = None

    def __post_init__(self) -> None:
        Protocol(self.protocol)
        if not self.label or not self.choices:
            given = {"label": self.label, "choices": self.choices}
            raise SpecError("Variant", "needs a label, and a choice at least", given=given)
        number(0, 1, above=True).check("Variant", "fraction", self.fraction)
        one_of(*FINAL).check("Variant", "final", self.final)

    @property
    def prompted(self) -> bool:
        """Whether the protocol has prompts."""
        return Protocol(self.protocol).prompted


def named(protocols: Iterable[str], options: Mapping[str, Options] | None = None) -> list[Variant]:
    """Return protocols as they are, each under its own name."""
    return [Variant(name, name, (options or {}).get(name, {})) for name in protocols]


def is_name(label: str) -> bool:
    """Tell whether a label is the name of a protocol, as `named` gives it."""
    try:
        return bool(Protocol(label))
    except SpecError:
        return False


def distinct(variants: Iterable[Variant]) -> tuple[Variant, ...]:
    """Return variants, each label once: one may stand on several lines of a figure."""
    return tuple({variant.label: variant for variant in variants}.values())


def with_tokens(variant: Variant) -> Variant:
    """Let prompts that train, and have no first values of their own, begin as tokens."""
    if not Protocol(variant.protocol).trains_prompts or "init" in variant.options:
        return variant
    return replace(variant, options={**variant.options, "init": "tokens"})


def with_lengths(variants: Iterable[Variant], lengths: Sequence[int]) -> tuple[Variant, ...]:
    """Give prompts that have no length one; of several, val chooses.

    Raises:
        SpecError: No lengths.
    """
    if not lengths:
        raise SpecError("with_lengths", "there are no lengths", "give one at least")

    def lengthened(variant: Variant) -> Variant:
        if not variant.prompted or "length" in variant.options:
            return variant
        if len(lengths) == 1:
            return replace(variant, options={**variant.options, "length": lengths[0]})
        choices = tuple({**c, "length": n} for c in variant.choices for n in lengths)
        return replace(variant, choices=choices)

    return tuple(map(lengthened, variants))


def with_fraction(variants: Iterable[Variant], fraction: float) -> tuple[Variant, ...]:
    """Let variants train on a share of the training images, and their labels say so.

    Final runs train on the share of `train` alone: `val` would outweigh it, and the paper does so.
    """
    if fraction == 1:
        return tuple(variants)
    return tuple(
        replace(v, label=f"{v.label} {percent(fraction)}", fraction=fraction, final="train")
        for v in variants
    )


def percent(fraction: float) -> str:
    """Return a share in words, "10 %"."""
    return f"{100 * fraction:g} %"


@dataclass(frozen=True)
class Facts:
    """What the variants of an ablation follow from; `backbones.facts_of` finds it.

    Args:
        kind: "tokens" (blocks on one sequence of one width), "windows" (other transformers) or
            "convolutions" (no blocks).
        depth: Number of blocks.
        tokens: In front of the first block, prefix tokens included; None where they are a map.
        prefix: Number of prefix tokens.
        has_cls: Whether there is a CLS token.
        size: Edge of the images.
        classes: Of the task.
    """

    kind: str
    depth: int
    tokens: int | None
    prefix: int
    has_cls: bool
    size: int
    classes: int

    def tokens_at(self, size: int) -> int:
        """Return the number of tokens of images of another size.

        Raises:
            SpecError: Tokens are no square grid of the images.
        """
        patches = 0 if self.tokens is None else self.tokens - self.prefix
        grid = math.isqrt(patches)
        if not patches or grid**2 != patches or size * grid % self.size:
            raise SpecError(
                "tokens_at",
                f"an image of {size} x {size} is no whole number of the patches into which this "
                f"backbone cuts {self.size} x {self.size}",
                "choose another size",
                given={"size": size},
            )
        return self.prefix + (size * grid // self.size) ** 2


@dataclass(frozen=True)
class Ablation:
    """A table or figure of the paper.

    Args:
        paper: Its number there.
        what: What differs between rows.
        rows: Returns them for a backbone.
        kinds: Of backbones on which it has a meaning.
        axis: What `place` is, for a line per series; "": bars.
        final: False: accuracy on val over learning rates is what it shows.
    """

    paper: str
    what: str
    rows: Callable[[Facts], Iterable[Variant]]
    kinds: tuple[str, ...] = ("tokens", "windows", "convolutions")
    axis: str = ""
    final: bool = True


def rows_of(name: str, facts: Facts) -> tuple[Variant, ...]:
    """Return the rows of an ablation for a backbone, prompts without a length as a rule.

    Args:
        name: One of `ABLATIONS`.
        facts: Of the backbone.

    Raises:
        SpecError: An unknown name, or a backbone on which it has no meaning.
    """
    one_of(*ABLATIONS).check("rows_of", "name", name)
    ablation = ABLATIONS[name]
    if facts.kind not in ablation.kinds:
        means = {"tokens": "plain ViTs", "windows": "transformers of several widths or on maps",
                 "convolutions": "models without transformer blocks"}  # fmt: skip
        fit = " and ".join(means[kind] for kind in ablation.kinds)
        told = f"{ablation.paper} has a meaning for {fit} only"
        raise SpecError("rows_of", told, given={"name": name})
    return tuple(ablation.rows(facts))


# Jia et al. 2022, Table 6: prompt lengths by kind of backbone.
LENGTHS = {
    "tokens": (1, 5, 10, 50, 100, 200),
    "windows": (1, 5, 10, 50),
    "convolutions": (1, 3, 5, 7, 9, 11),
}
# Rows of Table 1, and of those about other backbones (Tables 2 and 5).
METHODS = {
    "tokens": ("full", "linear", "partial-1", "mlp-3", "sidetune", "bias", "adapter",
               "vpt-shallow", "vpt-deep"),
    "windows": ("full", "linear", "mlp-3", "partial-1", "bias", "vpt-shallow", "vpt-deep"),
    "convolutions": ("full", "linear", "partial-1", "mlp-3", "bias", "vpt-shallow"),
}  # fmt: skip
MLP_LAYERS = (2, 3, 5, 9)
REDUCTIONS = (8, 64, 256)
LAST_BLOCKS = (1, 2, 4)
DECAYS = (0.01, 0.001, 0.0001, 0.0)
# Figure 7 gives prompts to 1, 3, 6, 9 and 12 of 12 blocks; other backbones get these shares.
DEPTHS = (1, 3, 6, 9, 12)
_OF_DEPTHS = 12
# The figure spans 10 to 80 %; its points are not known.
FRACTIONS = (0.1, 0.2, 0.4, 0.8)
# Table 11 goes from 224 to 384 pixels.
_LARGER = 384 / 224
_BLOCKS = ("tokens", "windows")


def _prompts(detail: str, protocol: str = "vpt-deep", **options: Any) -> Variant:
    return Variant(f"{protocol} {detail}", protocol, options)


def _at(variant: Variant, series: str, place: Any) -> Variant:
    return replace(variant, series=series, place=place)


def _methods(facts: Facts) -> list[Variant]:
    return named(METHODS[facts.kind])


def _location(facts: Facts) -> Iterator[Variant]:
    length = facts.tokens or 1
    for protocol in ("vpt-deep", "vpt-shallow"):
        yield _prompts("prepend", protocol)
        yield _prompts("add", protocol, location="add", length=length)
    if facts.kind == "tokens":
        yield _prompts("prepend-pixel", "vpt-shallow", location="prepend-pixel")
    yield _prompts("concat-channel", "vpt-shallow", location="concat-channel")


def _length(facts: Facts) -> Iterator[Variant]:
    for protocol in ("vpt-deep", "vpt-shallow"):
        for p in LENGTHS[facts.kind]:
            yield _at(_prompts(f"p={p}", protocol, length=p), protocol, p)


def _pad(facts: Facts) -> Iterator[Variant]:
    for p in LENGTHS["convolutions"]:
        variant = Variant(f"vpt pad p={p}", "vpt-shallow", {"location": "pad", "length": p})
        yield _at(variant, "vpt pad", p)


def _layers(facts: Facts) -> Iterator[tuple[str, int, str, list[int]]]:
    """Return series, number, name and indices of the blocks that get prompts."""
    counts = dict.fromkeys(max(1, round(n * facts.depth / _OF_DEPTHS)) for n in DEPTHS)
    blocks = list(range(facts.depth))
    for n in counts:
        for series, layers in (("bottom-up", blocks[:n]), ("top-down", blocks[-n:])):
            yield series, n, f"blocks {layers[0] + 1}-{layers[-1] + 1}", layers


def _depth(facts: Facts) -> Iterator[Variant]:
    for series, n, name, layers in _layers(facts):
        yield _at(_prompts(name, layers=layers), series, n)


def _depth_length(facts: Facts) -> Iterator[Variant]:
    for _, _, name, layers in _layers(facts):
        for p in LENGTHS[facts.kind]:
            yield _at(_prompts(f"{name} p={p}", layers=layers, length=p), name, p)


def _pooling(facts: Facts) -> Iterator[Variant]:
    for pooling in ("cls", "image", "prompt", "global"):
        if pooling != "cls" or facts.has_cls:
            yield _prompts(f"{pooling} pooling", pooling=pooling)


def _control(facts: Facts) -> Iterator[Variant]:
    for depth in ("deep", "shallow"):
        protocol = f"vpt-{depth}"
        yield Variant(f"{depth}, learned", protocol)
        yield Variant(f"{depth}, fixed", "prompt-fixed", {"deep": depth == "deep"})
        yield Variant(f"{depth}, learned p=1", protocol, {"length": 1})
    yield from named(["cls", "linear"] if facts.has_cls else ["linear"])


def _sharing(facts: Facts) -> Iterator[Variant]:
    for sharing in ("none", "inter", "intra", "all"):
        yield _prompts(f"sharing {sharing}", sharing=sharing)
    yield _prompts("p=1", length=1)
    yield from named(["linear"])


def _init(facts: Facts) -> Iterator[Variant]:
    length = {"length": min(facts.classes, MOST_PROTOTYPES)}
    for name in ("random", *FROM_IMAGES):
        options = length if name == "random" else {**length, "init": name}
        yield Variant(f"vpt-deep {name}", "vpt-deep", options)
        yield Variant(f"prompt-fixed {name}", "prompt-fixed", options)


def _bias(facts: Facts) -> Iterator[Variant]:
    yield from named(["bias"])
    for protocol in ("vpt-shallow", "vpt-deep"):
        yield from named([protocol])
        yield Variant(f"{protocol} + bias", "vpt+bias", {"deep": protocol == "vpt-deep"})


def _fraction(facts: Facts) -> Iterator[Variant]:
    names = ["linear", "bias", "full", "vpt-shallow"]
    names += ["adapter", "vpt-deep"] if facts.depth else []
    for fraction in FRACTIONS:
        for variant in with_fraction(named(names), fraction):
            yield _at(variant, variant.protocol, round(100 * fraction))


def _size(facts: Facts) -> Iterator[Variant]:
    assert facts.tokens is not None
    patch = facts.size / (facts.tokens - facts.prefix) ** 0.5
    larger = round(round(facts.size * _LARGER / patch) * patch)
    extra = facts.tokens_at(larger) - facts.tokens
    for name in ("full", "linear", "vpt-shallow", "vpt-deep"):
        yield Variant(f"{name} {facts.size} px", name)
        yield Variant(f"{name} {larger} px", name, size=larger)
    # As many tokens as the larger images have.
    yield _prompts(f"{facts.size} px p={extra}", length=extra)


def _rates(facts: Facts) -> Iterator[Variant]:
    lengths = LENGTHS[facts.kind]
    prompts = "vpt-deep" if facts.depth else "vpt-shallow"
    for variant in (
        *named(["linear"]),
        *(_prompts(f"p={p}", prompts, length=p) for p in (lengths[0], lengths[len(lengths) // 2])),
    ):
        for decay in DECAYS:
            label, changes = f"{variant.label} wd={decay:g}", {"weight_decay": decay}
            yield _at(replace(variant, label=label, changes=changes), variant.label, decay)


def _numbered(kind: str, numbers: Sequence[int]) -> Callable[[Facts], Iterator[Variant]]:
    return lambda facts: (_at(Variant(f"{kind}-{k}", f"{kind}-{k}"), kind, k) for k in numbers)


def _adapter(facts: Facts) -> Iterator[Variant]:
    for r in REDUCTIONS:
        yield _at(Variant(f"adapter r={r}", "adapter", {"reduction": r}), "adapter", r)


ABLATIONS = {
    "methods": Ablation("Tables 1, 2, 4, 5, 13, 14", "transfer protocols", _methods),
    "location": Ablation("Figure 5", "where prompts meet the input", _location, _BLOCKS),
    "length": Ablation("Figure 6", "prompt length", _length, _BLOCKS, "prompt length p"),
    "mlp": Ablation("Figure 6, Table 13", "layers of an MLP head", _numbered("mlp", MLP_LAYERS),
                    axis="layers of the head"),
    "adapter": Ablation("Figure 6, Table 13", "reduction of the Adapter's bottleneck", _adapter,
                        _BLOCKS, "reduction r"),
    "partial": Ablation("Section 4.1", "last blocks or stages that train",
                        _numbered("partial", LAST_BLOCKS), axis="blocks or stages that train"),
    "depth": Ablation("Figures 7 and 14", "blocks that get prompts, bottom-up and top-down", _depth,
                      _BLOCKS, "blocks with prompts"),
    "depth-length": Ablation("Figure 14", "blocks that get prompts, by prompt length",
                             _depth_length, _BLOCKS, "prompt length p"),
    "pooling": Ablation("Figure 8", "what the head receives", _pooling, ("tokens",)),
    "control": Ablation("Figure 11", "fixed prompts, the CLS token learned, one prompt", _control,
                        _BLOCKS),
    "sharing": Ablation("Figure 12", "prompts shared in and across blocks", _sharing, _BLOCKS),
    "init": Ablation("Figure 13", "first values: random, class prototypes, tokens of images", _init,
                     ("tokens",)),
    "bias": Ablation("Table 9", "prompts and biases together", _bias, _BLOCKS),
    "fraction": Ablation("Figures 3 and 20", f"training images, {percent(FRACTIONS[0])} to "
                         f"{percent(FRACTIONS[-1])}", _fraction, axis="training images (%)"),
    "size": Ablation("Table 11", "larger images, and as many prompts as these add tokens", _size,
                     ("tokens",)),
    "pad": Ablation("Table 5", "border of learned pixels", _pad, ("convolutions",),
                    "width of the border p"),
    "rates": Ablation("Figure 17", "learning rate by weight decay, on val", _rates, final=False),
}  # fmt: skip
