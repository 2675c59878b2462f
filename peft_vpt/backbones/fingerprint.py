"""The backbone's fingerprint: read from the weights, equal across libraries, dtypes and devices."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .anatomy import Encoder
from .projection import join
from .weights import UnreadableWeightsError, Weight, layer_weight, weights_below

Fingerprint = dict[str, Any]
_TOLERANCE = 1e-6
# Rounding a weight to fp16 and then to bf16 is not rounding it to bf16: 2.4e-3 on a real ViT-Ti.
_TOLERANCE_FP16 = 5e-3
_TOLERANCE_QUANTIZED = 5e-2
_VECTOR_NUMBERS = 3
# Parts of an encoder that another input size or task changes, by the names of both libraries.
_EMBEDDING = re.compile(r"(patch|pos|position)_?embed\w*|embeddings?|embeds|rope|rotary\w*")
_BEHIND = re.compile(r".*pool\w*|head\w*|fc_norm|classifier\w*|prompts|aux_head|lm_head")
# Less than half the distance of two fp16 numbers, so that only ties between bf16 numbers move.
_TIE = 2.0**-12


@dataclass(frozen=True)
class Comparison:
    """How far two fingerprints are apart.

    Args:
        difference: The relative difference of one number, of all the one that is the furthest
            beyond, or the nearest to, what is allowed.
        allowed: What is allowed for that number.
        place: Where it was read: "block 3" or "the final norm".
        loose: Whether they agree only by the tolerance for quantized weights.
    """

    difference: float
    allowed: float
    place: str
    loose: bool = False

    @property
    def same(self) -> bool:
        """Whether this is the same backbone, as far as fingerprints tell."""
        return self.difference <= self.allowed


def fingerprint(host: nn.Module, encoder: Encoder) -> Fingerprint | None:
    """Return sums over the weights that prompts depend on, or None where they cannot be read.

    That is where weights are on `meta`, or a layer does not show its weights.

    Per block, nine float64 numbers over parameters rounded to bf16: sums of |w|, w^2 and w^4 over
    vectors, the same over matrices, and sums of w^2 over the rows of queries, keys and values.
    Then three numbers for the final norm, and the first six over what stands between and around the
    blocks, where there is any: patch merging, convolutions of a hybrid, layers in front of the
    classifier. Statistics of batch norms count as vectors. The patch projection, positions (also
    relative ones inside the blocks), pooling and the classifier are left out. An encoder whose
    blocks are not known (a ConvNet) counts as one block of all its parameters but the head's.
    Quantized weights count dequantized; `quantized` says so, and is absent elsewhere.

    Args:
        host: The model, prompted or not.
        encoder: Its anatomy.
    """
    try:
        return _read(host, encoder)
    except UnreadableWeightsError:
        return None


def compare(
    saved: Fingerprint, host: nn.Module, encoder: Encoder, own: Fingerprint | None = None
) -> Comparison:
    """Compare a saved fingerprint with a model.

    Args:
        saved: From an adapter's metadata.
        host: The model, prompted or not.
        encoder: Its anatomy.
        own: The model's fingerprint, where its weights are no longer those it began with.

    Raises:
        UnreadableWeightsError: Its weights cannot be read; the message says why.
    """
    if own is not None:
        return _compare(saved, own, [own])
    own = _read(host, encoder)
    found = _compare(saved, own, [own])
    if found.same:
        return found
    return _compare(saved, own, [own, *_by_other_ties(saved, own, host, encoder)])


def _by_other_ties(
    saved: Fingerprint, own: Fingerprint, host: nn.Module, encoder: Encoder
) -> list[Fingerprint]:
    """Return what the numbers may have been on the other side of a rounding to fp16.

    Where one large weight outweighs all others, its rounding alone can exceed the tolerance.
    """
    here, there = (side["dtype"] == "float16" for side in (own, saved))
    if there and not here:
        return [_read(host, encoder, Tensor.half)]
    if here and not there:
        return [_read(host, encoder, partial(_scaled, by=s)) for s in (1 - _TIE, 1 + _TIE)]
    return []


def _scaled(tensor: Tensor, by: float) -> Tensor:
    return tensor.detach().float() * by


@torch.no_grad()
def _read(
    host: nn.Module, encoder: Encoder, view: Callable[[Tensor], Tensor] = Tensor.detach
) -> Fingerprint:
    _refuse_unreadable(host, encoder)
    rows, dtypes, quantized = [], [], False
    for weights, projected in _parts(host, encoder):
        rows.append(_by_shape(weights, view))
        rows[-1] += [
            sum((_sum(_rounded(w, view).square_()) for w in part), 0.0) for part in projected
        ]
        # Noted here: dequantized weights of all blocks would not fit where the packed ones do.
        dtypes += [str(w.values.dtype).removeprefix("torch.") for w in weights]
        quantized |= any(w.quantized for w in weights)
    final, beside = encoder.norm_weights, _beside(host, encoder)
    result = {
        # That of the first weight; float16 if any of them was.
        "dtype": "float16" if "float16" in dtypes else (dtypes or ["float32"])[0],
        "blocks": rows,
        "norm": _moments(weights_below(host.get_submodule(final)) if final else [], view),
    }
    if beside:
        result["rest"] = _by_shape(beside, view)
    for place, _, *numbers in _numbers(result):
        if not all(map(math.isfinite, numbers)):
            raise UnreadableWeightsError(f"{place} holds weights that are not finite")
    return result | {"quantized": True} if quantized else result


def _parts(
    host: nn.Module, encoder: Encoder
) -> Iterator[tuple[list[Weight], list[tuple[Tensor, ...]]]]:
    """Yield the weights of each block, and those that queries, keys and values come from.

    An encoder without known blocks is one block, without projections.
    """
    for block in encoder.blocks:
        module = host.get_submodule(block.path)
        rows = [a.projection.rows(module.get_submodule(a.path)) for a in block.attentions]
        yield weights_below(module), list(zip(*rows, strict=True))
    if not encoder.blocks:
        apart = ("prompts", *_inside(encoder, encoder.head_paths))
        yield weights_below(host.get_submodule(encoder.path), apart), [(), (), ()]


def _inside(encoder: Encoder, paths: Iterable[str]) -> list[str]:
    """Return those of the host's paths that lead into the encoder, from there on."""
    below = f"{encoder.path}." if encoder.path else ""
    return [path.removeprefix(below) for path in paths if path.startswith(below)]


def _by_shape(weights: Sequence[Weight], view: Callable[[Tensor], Tensor]) -> list[float]:
    """Return the sums over vectors, then those over matrices."""
    vectors = [w for w in weights if w.values.dim() < 2]
    return _moments(vectors, view) + _moments([w for w in weights if w.values.dim() >= 2], view)


def _beside(host: nn.Module, encoder: Encoder) -> list[Weight]:
    """Return weights between the blocks and around them: mergers, stems, norms in front."""
    if not encoder.blocks:
        return []
    root = host.get_submodule(encoder.path)
    blocks = [block.path for block in encoder.blocks]
    norm = encoder.norm_weights or "prompts"
    apart = _inside(encoder, [*blocks, norm, *encoder.head_paths])
    convs = [path for path, module in root.named_modules() if isinstance(module, nn.Conv2d)]
    first = convs[0] if convs else ""
    if _EMBEDDING.fullmatch(first.rpartition(".")[0].rpartition(".")[2]):
        apart.append(first.rpartition(".")[0])
    found: list[Weight] = []
    # Tokens and positions, the encoder's own parameters, are embeddings too.
    for name, module in root.named_children():
        inner = tuple(p.removeprefix(f"{name}.") for p in apart if p.startswith(f"{name}."))
        own = {path for path in convs if path.startswith(f"{name}.")}
        embeds = _EMBEDDING.fullmatch(name) is not None and own <= {first}
        behind = _BEHIND.fullmatch(name) and not inner
        if name not in apart and not embeds and not behind:
            # Of a part that embeds and does more, tokens and positions are its own parameters.
            inner = (*inner, *([""] if _EMBEDDING.fullmatch(name) else []))
            found += weights_below(module, inner)
    return found


def _refuse_unreadable(host: nn.Module, encoder: Encoder) -> None:
    """Refuse weights on `meta`, and projections in wrappers that do not show them."""
    if any(p.is_meta for p in host.get_submodule(encoder.path).parameters()):
        raise UnreadableWeightsError("its weights are on the meta device")
    for block in encoder.blocks:
        for attention in block.attentions:
            path = join(block.path, attention.path)
            layer = attention.projection.modules(host.get_submodule(path))[0]
            # Layers of the libraries hold one weight, if only further down (ConvNorm); a wrapper of
            # somebody else may hold any.
            own = type(layer).__module__.startswith(("timm.", "transformers.", "torch."))
            if not own and layer_weight(layer) is None:
                raise UnreadableWeightsError(
                    f"{path} ({type(layer).__name__}) does not show its weight"
                )


def _moments(weights: Sequence[Weight], view: Callable[[Tensor], Tensor]) -> list[float]:
    """Return the sums of |w|, w^2 and w^4."""
    totals = [0.0, 0.0, 0.0]
    for weight in weights:
        values = _rounded(weight.values, view)
        for index, step in enumerate((values.abs_, values.square_, values.square_)):
            totals[index] += _sum(step())
    return totals


def _rounded(tensor: Tensor, view: Callable[[Tensor], Tensor]) -> Tensor:
    # In float32 a bf16 number and its square are exact, its fourth power good to 1e-7.
    return view(tensor).detach().to(torch.bfloat16).to(torch.float32)


def _sum(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))


def _compare(saved: Fingerprint, own: Fingerprint, candidates: Sequence[Fingerprint]) -> Comparison:
    """Return the worst number; each counts by the candidate that is nearest to it."""
    if _shape(saved) != _shape(candidates[0]):
        one_sided = ("rest" in saved) != ("rest" in candidates[0])
        place = "layers around the blocks, which one side lacks" if one_sided else "their lengths"
        return Comparison(float("inf"), _TOLERANCE, place)
    half = "float16" in (saved["dtype"], own["dtype"])
    tight = _TOLERANCE_FP16 if half else _TOLERANCE
    quantized = bool(saved.get("quantized") or own.get("quantized"))
    worst, loose = Comparison(0.0, tight, "block 0"), False
    for place, index, number, *others in _numbers(saved, *candidates):
        difference = min(abs(number - n) / max(abs(number), abs(n), 1e-30) for n in others)
        # Norms and biases stay as they are in a quantized model.
        allowed = _TOLERANCE_QUANTIZED if quantized and index >= _VECTOR_NUMBERS else tight
        loose |= difference > tight
        if difference / allowed > worst.difference / worst.allowed:
            worst = Comparison(difference, allowed, place)
    return replace(worst, loose=loose and worst.same)


def _shape(values: Fingerprint) -> list[int]:
    return [len(row) for row in _table(values)]


def _table(values: Fingerprint) -> list[list[float]]:
    return [*values["blocks"], values["norm"], *([values["rest"]] if "rest" in values else [])]


def _numbers(*fingerprints: Fingerprint) -> Iterator[tuple[Any, ...]]:
    """Yield place, index in its row, and one number of each fingerprint."""
    depth = len(fingerprints[0]["blocks"])
    names = [*(f"block {i}" for i in range(depth)), "the final norm", "the rest of the encoder"]
    for place, *lines in zip(names, *map(_table, fingerprints), strict=False):
        for index, numbers in enumerate(zip(*lines, strict=True)):
            yield (place, index, *numbers)
