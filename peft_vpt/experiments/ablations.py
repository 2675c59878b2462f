"""The paper's ablations and tables as values: which variants each of them trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import SpecError
from .backbones import Facts
from .embeddings import MOST_PROTOTYPES
from .variants import FROM_IMAGES, Variant, percent, with_fraction

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


class Row(NamedTuple):
    """A variant, and where it stands in the figure: on which line, at which place."""

    variant: Variant
    series: str = ""
    place: Any = None


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
    rows: Callable[[Facts], Iterable[Row]]
    kinds: tuple[str, ...] = ("tokens", "windows", "convolutions")
    axis: str = ""
    final: bool = True


def rows_of(name: str, facts: Facts) -> tuple[Row, ...]:
    """Return the rows of an ablation for a backbone, prompts without a length as a rule.

    Args:
        name: One of `ABLATIONS`.
        facts: Of the backbone.

    Raises:
        SpecError: An unknown name, or a backbone on which it has no meaning.
    """
    if name not in ABLATIONS:
        raise SpecError(f"ablation {name!r}: must be one of {', '.join(ABLATIONS)}.")
    ablation = ABLATIONS[name]
    if facts.kind not in ablation.kinds:
        means = {"tokens": "plain ViTs", "windows": "transformers of several widths or on maps",
                 "convolutions": "models without transformer blocks"}  # fmt: skip
        fit = " and ".join(means[kind] for kind in ablation.kinds)
        raise SpecError(f"ablation {name!r} ({ablation.paper}): has a meaning for {fit} only.")
    return tuple(ablation.rows(facts))


def variants_of(rows: Sequence[Row]) -> tuple[Variant, ...]:
    """Return the variants of rows, each once: one may stand on several lines."""
    return tuple({row.variant.label: row.variant for row in rows}.values())


def _prompts(detail: str = "", protocol: str = "vpt-deep", **options: Any) -> Variant:
    return Variant(f"{protocol} {detail}".strip(), protocol, options)


def _named(*protocols: str) -> list[Row]:
    return [Row(Variant(name, name)) for name in protocols]


def _methods(facts: Facts) -> list[Row]:
    return _named(*METHODS[facts.kind])


def _location(facts: Facts) -> Iterator[Row]:
    length = facts.tokens or 1
    for protocol in ("vpt-deep", "vpt-shallow"):
        yield Row(_prompts("prepend", protocol))
        yield Row(_prompts("add", protocol, location="add", length=length))
    if facts.kind == "tokens":
        yield Row(_prompts("prepend-pixel", "vpt-shallow", location="prepend-pixel"))
    yield Row(_prompts("concat-channel", "vpt-shallow", location="concat-channel"))


def _length(facts: Facts) -> Iterator[Row]:
    for protocol in ("vpt-deep", "vpt-shallow"):
        for p in LENGTHS[facts.kind]:
            yield Row(_prompts(f"p={p}", protocol, length=p), protocol, p)


def _pad(facts: Facts) -> Iterator[Row]:
    for p in LENGTHS["convolutions"]:
        variant = Variant(f"vpt pad p={p}", "vpt-shallow", {"location": "pad", "length": p})
        yield Row(variant, "vpt pad", p)


def _layers(facts: Facts) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Return series, number and indices of the blocks that get prompts."""
    counts = dict.fromkeys(max(1, round(n * facts.depth / _OF_DEPTHS)) for n in DEPTHS)
    blocks = tuple(range(facts.depth))
    for n in counts:
        yield "bottom-up", n, blocks[:n]
        yield "top-down", n, blocks[-n:]


def _span(layers: Sequence[int]) -> str:
    return f"blocks {layers[0] + 1}-{layers[-1] + 1}"


def _depth(facts: Facts) -> Iterator[Row]:
    for series, n, layers in _layers(facts):
        yield Row(_prompts(_span(layers), layers=list(layers)), series, n)


def _depth_length(facts: Facts) -> Iterator[Row]:
    for _, _, layers in _layers(facts):
        for p in LENGTHS[facts.kind]:
            label = f"{_span(layers)} p={p}"
            yield Row(_prompts(label, layers=list(layers), length=p), _span(layers), p)


def _pooling(facts: Facts) -> Iterator[Row]:
    for pooling in ("cls", "image", "prompt", "global"):
        if pooling != "cls" or facts.has_cls:
            yield Row(_prompts(f"{pooling} pooling", pooling=pooling))


def _control(facts: Facts) -> Iterator[Row]:
    for protocol in ("vpt-deep", "vpt-shallow"):
        options = {"deep": protocol == "vpt-deep"}
        depth = protocol.removeprefix("vpt-")
        yield Row(Variant(f"{depth}, learned", protocol))
        yield Row(Variant(f"{depth}, fixed", "prompt-fixed", options))
        yield Row(Variant(f"{depth}, learned p=1", protocol, {"length": 1}))
    if facts.has_cls:
        yield Row(Variant("cls", "cls"))
    yield Row(Variant("linear", "linear"))


def _sharing(facts: Facts) -> Iterator[Row]:
    for sharing in ("none", "inter", "intra", "all"):
        yield Row(_prompts(f"sharing {sharing}", sharing=sharing))
    yield Row(_prompts("p=1", length=1))
    yield Row(Variant("linear", "linear"))


def _init(facts: Facts) -> Iterator[Row]:
    length = {"length": min(facts.classes, MOST_PROTOTYPES)}
    for name in ("random", *FROM_IMAGES):
        options = length if name == "random" else {**length, "init": name}
        yield Row(Variant(f"vpt-deep {name}", "vpt-deep", options))
        yield Row(Variant(f"prompt-fixed {name}", "prompt-fixed", options))


def _bias(facts: Facts) -> Iterator[Row]:
    yield from _named("bias")
    for protocol in ("vpt-shallow", "vpt-deep"):
        deep = {"deep": protocol == "vpt-deep"}
        yield Row(Variant(protocol, protocol))
        yield Row(Variant(f"{protocol} + bias", "vpt+bias", deep))


def _fraction(facts: Facts) -> Iterator[Row]:
    names = ["linear", "bias", "full", "vpt-shallow"]
    names += ["adapter", "vpt-deep"] if facts.depth else []
    for fraction in FRACTIONS:
        for variant in with_fraction([Variant(name, name) for name in names], fraction):
            yield Row(variant, variant.protocol, round(100 * fraction))


def _size(facts: Facts) -> Iterator[Row]:
    assert facts.tokens is not None
    patch = facts.size / (facts.tokens_at(facts.size) - facts.prefix) ** 0.5
    larger = round(round(facts.size * _LARGER / patch) * patch)
    extra = facts.tokens_at(larger) - facts.tokens
    for name in ("full", "linear", "vpt-shallow", "vpt-deep"):
        yield Row(Variant(f"{name} {facts.size} px", name))
        yield Row(Variant(f"{name} {larger} px", name, size=larger))
    # As many tokens as the larger images have.
    yield Row(_prompts(f"{facts.size} px p={extra}", length=extra))


def _rates(facts: Facts) -> Iterator[Row]:
    lengths = LENGTHS[facts.kind]
    prompts = "vpt-deep" if facts.depth else "vpt-shallow"
    kinds = [(Variant("linear", "linear"), "linear")]
    for p in (lengths[0], lengths[len(lengths) // 2]):
        kinds.append((_prompts(f"p={p}", prompts, length=p), f"{prompts} p={p}"))
    for variant, series in kinds:
        for decay in DECAYS:
            label = f"{variant.label} wd={decay:g}"
            changes = {"weight_decay": decay}
            yield Row(Variant(label, variant.protocol, variant.options, changes), series, decay)


def _numbered(kind: str, numbers: Sequence[int]) -> Callable[[Facts], Iterator[Row]]:
    def rows(facts: Facts) -> Iterator[Row]:
        for k in numbers:
            yield Row(Variant(f"{kind}-{k}", f"{kind}-{k}"), kind, k)

    return rows


def _adapter(facts: Facts) -> Iterator[Row]:
    for r in REDUCTIONS:
        yield Row(Variant(f"adapter r={r}", "adapter", {"reduction": r}), "adapter", r)


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
