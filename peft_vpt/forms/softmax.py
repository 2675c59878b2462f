"""The one place where extra keys and values meet an attention's softmax.

`SoftmaxOverride` is active for one call of one attention module. Inside that call it sees
`F.scaled_dot_product_attention`, or the explicit sequence matmul, softmax, matmul of an unfused or
eager attention, and appends along the key axis. Every softmax it meets is written to a list, which
is the guard (exactly one), the recorder of the self-check, and what the tests look at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedArchitectureError

_MATMUL = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
_SOFTMAX = {torch.softmax, F.softmax, Tensor.softmax}
ADD = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__}
_SHAPE = {Tensor.view, Tensor.reshape, torch.reshape}
_WATCHED = {F.scaled_dot_product_attention, torch.einsum, *_MATMUL}
_SDPA_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
Pair = tuple[Tensor, Tensor]


@dataclass
class Met:
    """What one softmax received from the model.

    Keys and values are `(batch, heads, tokens, head_dim)`, with windows in the batch or behind the
    heads, or `(batch * heads, tokens, head_dim)`.
    """

    keys: Tensor
    values: Tensor | None = None
    query: Tensor | None = None
    normalised: bool = True

    @property
    def open(self) -> bool:
        """Whether scores were seen, but not yet what they are multiplied with."""
        return self.values is None


class SoftmaxOverride(TorchFunctionMode):
    """Append keys and values at the softmax of the calls made inside the `with` block.

    Args:
        pair: Gives keys and values `(1 or samples, heads, length, head_dim)`, once per softmax;
            None to record only.
        met: List that receives one `Met` per softmax.
        scores: What to do with explicit scores; see `Attention.scores`.
        heads_axis: See `Attention.heads_axis`.
    """

    def __init__(
        self,
        pair: Callable[[], Pair] | None,
        met: list[Met],
        *,
        scores: str = "lengthen",
        heads_axis: int = 1,
    ) -> None:
        super().__init__()
        self.pair = pair
        self.met = met
        self.late = scores == "late"
        self.unused = scores == "unused"
        self.axis = heads_axis
        # Of the explicit softmax that is under way.
        self.extra: Pair | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Pass every call on, those that lead to a softmax with longer keys and values."""
        kwargs = kwargs or {}
        if not self.met and func not in _WATCHED:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._fused(func, args, dict(kwargs))
        scores = self.met[-1] if self.met and self.met[-1].open else None
        if func in _MATMUL and _is_batched(args) and not self.unused:
            ready = scores is not None and scores.normalised
            return self._second(func, *args) if ready else self._first(func, *args)
        if func is torch.einsum:
            operands = args[1] if len(args) == 2 else args[1:]
            if len(operands) == 2:
                return self._einsum(scores, args[0], *operands)
        if scores is not None and self.extra is not None:
            args = self._lengthen(scores, func, args)
        if scores is not None and func in _SOFTMAX:
            scores.normalised = True
        return func(*args, **kwargs)

    def _fused(
        self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        kwargs |= dict(zip(_SDPA_NAMES, args, strict=False))
        query, keys, values = (kwargs.pop(name) for name in _SDPA_NAMES[:3])
        self.met.append(Met(keys, values))
        if self.pair is None:
            return func(query, keys, values, **kwargs)
        extra = self.pair()
        if kwargs.pop("is_causal", False):
            kwargs["attn_mask"] = causal_mask(query.shape[-2], keys.shape[-2], query.device)
        kwargs["attn_mask"] = pad_mask(
            kwargs.get("attn_mask"), extra[0].shape[-2], tokens=keys.shape[-2]
        )
        query = _own_storage(query, keys, values)
        keys, values = (
            append(own, x, self.axis) for own, x in zip((keys, values), extra, strict=True)
        )
        return func(query, keys, values, **kwargs)

    def _first(self, func: Callable[..., Tensor], query: Tensor, keys: Tensor) -> Tensor:
        keys = keys.transpose(-2, -1)
        self.met.append(Met(keys, query=query, normalised=False))
        self.extra = None if self.pair is None else self.pair()
        if self.extra is not None and not self.late:
            keys = append(keys, self.extra[0], self.axis)
        return func(query, keys.transpose(-2, -1))

    def _einsum(self, scores: Met | None, equation: str, left: Tensor, right: Tensor) -> Tensor:
        """Take part in products over batch and heads that are written as sums."""
        (a, b), c = equation.replace(" ", "").partition("->")[0].split(","), equation[-4:].strip()
        if left.dim() == right.dim() == 4 and a[:2] == b[:2] == c[:2]:
            if (a[3], c[2:]) == (b[3], a[2] + b[2]) and scores is None:
                return self._first(torch.matmul, left, right.transpose(-2, -1))
            if (a[3], c[2:]) == (b[2], a[2] + b[3]) and scores is not None and scores.normalised:
                return self._second(torch.matmul, left, right)
        return torch.einsum(equation, left, right)

    def _second(self, func: Callable[..., Tensor], left: Tensor, right: Tensor) -> Tensor:
        met, extra = self.met[-1], self.extra
        tokens = met.keys.shape[-2] + (0 if extra is None else extra[0].shape[-2])
        met.query = self.extra = None
        ordinary = left.shape[-1] == tokens and right.shape[-2] == met.keys.shape[-2]
        if extra is None:
            # Both readings fit the shapes then.
            ordinary = _are_weights(left, -1) or not _are_weights(right, -2)
        if ordinary:
            met.values = right
            return func(left, right if extra is None else append(right, extra[1], self.axis))
        # Values times transposed weights.
        met.values = left.transpose(-2, -1)
        if extra is not None:
            left = append(met.values, extra[1], self.axis).transpose(-2, -1)
        return func(left, right)

    def _lengthen(
        self, met: Met, func: Callable[..., Any], args: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        assert self.extra is not None
        own, length = met.keys.shape[-2], self.extra[0].shape[-2]
        if self.late and func in _SOFTMAX and not met.normalised:
            assert met.query is not None
            keys = fit(self.extra[0], met.keys, self.axis).transpose(-2, -1)
            scores = torch.matmul(met.query, keys.to(met.query.dtype))
            scores = scores.reshape(*args[0].shape[:-1], length).to(args[0].dtype)
            return (torch.cat([args[0], scores], dim=-1), *args[1:])
        if func in ADD:
            return _align(args, own, length)
        if func in _SHAPE and args[0].shape[-1:] == (own + length,):
            return _reshaped(args, own, length)
        return args


def append(own: Tensor, extra: Tensor, heads_axis: int = 1) -> Tensor:
    """Append `extra`, fitted by `fit`, behind `own` along the token axis."""
    return torch.cat([own, fit(extra, own, heads_axis).to(own.dtype)], dim=-2)


def fit(extra: Tensor, own: Tensor, heads_axis: int = 1) -> Tensor:
    """Bring `(1 or samples, heads, length, head_dim)` into the layout of a model's keys.

    That is `(batch, heads, tokens, head_dim)`, with the windows of a sample side by side in the
    batch, five axes with the windows on one of their own, or `(batch * heads, tokens, head_dim)`.
    Heads are repeated where the model has already repeated its own (grouped queries).
    """
    heads = extra.shape[1] if own.dim() == 3 else own.shape[heads_axis if own.dim() == 5 else 1]
    batch = own.shape[0] // heads if own.dim() == 3 else own.shape[0]
    if extra.shape[-1] != own.shape[-1] or heads % extra.shape[1]:
        raise UnsupportedArchitectureError(
            "",
            f"prompts have {extra.shape[1]} heads of width {extra.shape[-1]}, and the softmax of "
            f"this attention receives keys or values of shape {tuple(own.shape)}",
            "The block does something that this family does not know",
        )
    if extra.shape[1] != heads:
        extra = extra.repeat_interleave(heads // extra.shape[1], dim=1)
    if extra.shape[0] == 1:
        extra = extra.expand(batch, -1, -1, -1)
    elif extra.shape[0] != batch:
        extra = extra.repeat_interleave(batch // extra.shape[0], dim=0)
    if own.dim() == 3:
        return extra.reshape(batch * heads, *extra.shape[2:])
    if own.dim() == 5:
        windows = 3 - heads_axis
        return extra.unsqueeze(windows).expand(*own.shape[:3], *extra.shape[2:])
    return extra


def pad_mask(mask: Tensor | None, length: int, *, tokens: int, rows: bool = False) -> Tensor | None:
    """Let every query see `length` further keys: 0 in an additive mask, True in a boolean one.

    Args:
        mask: `(..., queries or 1, tokens or 1)` or None, which stays None.
        length: Number of keys appended.
        tokens: Number of keys in front of them.
        rows: Also add `length` queries that see everything.
    """
    if mask is None:
        return None
    if mask.shape[-1] == 1:
        mask = mask.expand(*mask.shape[:-1], tokens)
    bottom = length if rows and mask.shape[-2] > 1 else 0
    if mask.dtype != torch.bool:
        return F.pad(mask, (0, length, 0, bottom))
    return ~F.pad(~mask, (0, length, 0, bottom))


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """Return the boolean mask `(queries, keys)` that `is_causal=True` stands for."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()


def _are_weights(tensor: Tensor, axis: int) -> bool:
    """Tell whether entries add up to one, as a softmax leaves them."""
    total = tensor.sum(axis)
    return bool(torch.isclose(total, torch.ones_like(total), atol=1e-2).all())


def _is_batched(args: tuple[Any, ...]) -> bool:
    """Tell a product of scores from a projection written as one (some LoRA)."""
    return len(args) == 2 and args[0].dim() == args[1].dim() > 2


def _align(args: tuple[Any, ...], own: int, length: int) -> tuple[Any, ...]:
    """Pad the shorter of two addends, a mask or bias made for the model's own keys."""
    if len(args) != 2 or not all(isinstance(arg, Tensor) and arg.dim() for arg in args):
        return args
    wide = max(arg.shape[-1] for arg in args)
    return tuple(
        F.pad(arg, (0, length)) if arg.shape[-1] == own == wide - length else arg for arg in args
    )


def _reshaped(args: tuple[Any, ...], own: int, length: int) -> tuple[Any, ...]:
    """Write the longer key axis into a shape that names the model's own number of keys."""
    sizes = args[1] if len(args) == 2 and isinstance(args[1], tuple | list) else args[1:]
    if not sizes or sizes[-1] != own:
        return args
    return (args[0], (*sizes[:-1], own + length))


def _own_storage(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Copy a query that is a view of the fused qkv activation, so that backward need not keep it.

    The keys and values are copied by the concatenation anyway; without this the whole fused
    activation would stay alive beside them.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or query._base is None:
        return query
    shared = query._base is keys._base or query._base is values._base
    return query.clone() if shared else query
