"""The backbone's fingerprint: read from the weights, equal across libraries, dtypes and devices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .backbones.anatomy import Encoder, join, module_at

Fingerprint = dict[str, Any]
_TOLERANCE = 1e-6
# Rounding a weight to fp16 and then to bf16 is not rounding it to bf16: 2.4e-3 on a real ViT-Ti.
_TOLERANCE_FP16 = 5e-3


@torch.no_grad()
def fingerprint(host: nn.Module, encoder: Encoder) -> Fingerprint | None:
    """Return sums over the weights that prompts depend on, or None where they cannot be read.

    That is where weights are on `meta`, or a wrapped projection does not show its `weight`.

    Per block, nine float64 numbers over parameters rounded to bf16: sums of |w|, w^2 and w^4 over
    vectors, the same over matrices, and sums of w^2 over the rows of queries, keys and values.
    Then three numbers for the final norm. Embeddings and head are left out. An encoder whose
    blocks are not known (a ConvNet) counts as one block of all its parameters but the head's.

    Args:
        host: The model, prompted or not.
        encoder: Its anatomy.
    """
    if any(p.is_meta for p in module_at(host, encoder.path).parameters()):
        return None
    for block in encoder.blocks:
        for attention in block.attentions:
            layers = attention.projection.modules(module_at(host, join(block.path, attention.path)))
            # Layers of the libraries hold one weight, if only further down (ConvNorm); a wrapper of
            # somebody else may hold any.
            own = type(layers[0]).__module__.startswith(("timm.", "transformers.", "torch."))
            if not own and not hasattr(layers[0], "weight"):
                return None
    first = next(module_at(host, encoder.start).parameters())
    norm = (
        () if encoder.norm_weights is None else module_at(host, encoder.norm_weights).parameters()
    )
    return {
        "dtype": str(first.dtype).removeprefix("torch."),
        "blocks": [_block(host, encoder, index) for index in range(encoder.depth)]
        or [_whole(host, encoder)],
        "norm": _moments(list(norm)),
    }


def _block(host: nn.Module, encoder: Encoder, index: int) -> list[float]:
    block = module_at(host, encoder.blocks[index].path)
    parameters = list(block.parameters())
    numbers = _moments([p for p in parameters if p.dim() < 2])
    numbers += _moments([p for p in parameters if p.dim() >= 2])
    rows = [0.0, 0.0, 0.0]
    for attention in encoder.blocks[index].attentions:
        weights = attention.projection.rows(module_at(block, attention.path))
        rows = [total + _sum(_rounded(w).square_()) for total, w in zip(rows, weights, strict=True)]
    return numbers + rows


def _whole(host: nn.Module, encoder: Encoder) -> list[float]:
    head = encoder.head.paths if encoder.head else ()
    apart = tuple(f"{path}." for path in ("prompts", *head))
    module = module_at(host, encoder.path)
    named = [(join(encoder.path, name), p) for name, p in module.named_parameters()]
    parameters = [p for name, p in named if not name.startswith(apart)]
    numbers = _moments([p for p in parameters if p.dim() < 2])
    return numbers + _moments([p for p in parameters if p.dim() >= 2]) + [0.0, 0.0, 0.0]


def _moments(tensors: list[Tensor]) -> list[float]:
    """Return the sums of |w|, w^2 and w^4."""
    totals = [0.0, 0.0, 0.0]
    for tensor in tensors:
        values = _rounded(tensor)
        totals[0] += _sum(values.abs_())
        totals[1] += _sum(values.square_())
        totals[2] += _sum(values.square_())
    return totals


def _rounded(tensor: Tensor) -> Tensor:
    # In float32 a bf16 number and its square are exact, its fourth power good to 1e-7.
    return tensor.detach().to(torch.bfloat16).to(torch.float32)


def _sum(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))


def largest_difference(saved: Fingerprint, own: Fingerprint) -> tuple[float, float]:
    """Return the largest relative difference of two fingerprints, and what is allowed.

    Fingerprints of another shape differ infinitely.
    """
    half = "float16" in (saved["dtype"], own["dtype"])
    allowed = _TOLERANCE_FP16 if half else _TOLERANCE
    pairs = [*zip(saved["blocks"], own["blocks"], strict=False), (saved["norm"], own["norm"])]
    if len(saved["blocks"]) != len(own["blocks"]) or any(len(a) != len(b) for a, b in pairs):
        return float("inf"), allowed
    numbers = [(x, y) for a, b in pairs for x, y in zip(a, b, strict=True)]
    return max(abs(x - y) / max(abs(x), abs(y), 1e-30) for x, y in numbers), allowed
