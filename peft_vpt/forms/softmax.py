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

_MATMUL = {torch.matmul, Tensor.matmul, Tensor.__matmul__}
_SOFTMAX = {torch.softmax, F.softmax, Tensor.softmax}
_ADD = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__}
_SDPA_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")


@dataclass
class Met:
    """What one softmax received from the model: `(batch, heads, tokens, head_dim)` each."""

    keys: Tensor
    values: Tensor | None = None
    normalised: bool = True

    @property
    def open(self) -> bool:
        """Whether scores were seen, but not yet what they are multiplied with."""
        return self.values is None


class SoftmaxOverride(TorchFunctionMode):
    """Append keys and values at the softmax of the calls made inside the `with` block.

    Args:
        keys, values: `(1 or batch, heads, length, head_dim)`, or None to record only.
        met: List that receives one `Met` per softmax.
    """

    def __init__(self, keys: Tensor | None, values: Tensor | None, met: list[Met]) -> None:
        super().__init__()
        self.extra = None if keys is None or values is None else (keys, values)
        self.met = met

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Pass every call on, those that lead to a softmax with longer keys and values."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._fused(func, args, dict(kwargs))
        scores = self.met[-1] if self.met and self.met[-1].open else None
        # Four dimensions: a projection written as a matmul (some LoRA) has three.
        if func in _MATMUL and args[0].dim() > 3:
            ready = scores is not None and scores.normalised
            return self._second(func, *args) if ready else self._first(func, *args)
        if scores is not None and func in _SOFTMAX:
            scores.normalised = True
        if scores is not None and func in _ADD and self.extra is not None:
            args = _align(args, self.extra[0].shape[-2])
        return func(*args, **kwargs)

    def _fused(
        self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        kwargs |= dict(zip(_SDPA_NAMES, args, strict=False))
        query, keys, values = (kwargs.pop(name) for name in _SDPA_NAMES[:3])
        self.met.append(Met(keys, values))
        if self.extra is None:
            return func(query, keys, values, **kwargs)
        if kwargs.pop("is_causal", False):
            kwargs["attn_mask"] = causal_mask(query.shape[-2], keys.shape[-2], query.device)
        kwargs["attn_mask"] = pad_mask(
            kwargs.get("attn_mask"), self.extra[0].shape[-2], tokens=keys.shape[-2]
        )
        query = _own_storage(query, keys, values)
        return func(query, append(keys, self.extra[0]), append(values, self.extra[1]), **kwargs)

    def _first(self, func: Callable[..., Tensor], query: Tensor, keys: Tensor) -> Tensor:
        keys = keys.transpose(-2, -1)
        self.met.append(Met(keys, normalised=False))
        if self.extra is not None:
            keys = append(keys, self.extra[0])
        return func(query, keys.transpose(-2, -1))

    def _second(self, func: Callable[..., Tensor], weights: Tensor, values: Tensor) -> Tensor:
        self.met[-1].values = values
        if self.extra is not None:
            values = append(values, self.extra[1])
        return func(weights, values)


def append(own: Tensor, extra: Tensor) -> Tensor:
    """Append `(1 or batch, heads, length, head_dim)` behind `(batch, heads, tokens, head_dim)`.

    Extra heads are repeated where the model has already repeated its own (grouped queries).
    """
    if extra.shape[1] != own.shape[1]:
        extra = extra.repeat_interleave(own.shape[1] // extra.shape[1], dim=1)
    if extra.shape[0] != own.shape[0]:
        extra = extra.expand(own.shape[0], -1, -1, -1)
    return torch.cat([own, extra.to(own.dtype)], dim=-2)


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


def _align(args: tuple[Any, ...], length: int) -> tuple[Any, ...]:
    """Pad the shorter of two addends, a mask or bias made for the model's own keys."""
    if len(args) != 2 or not all(isinstance(arg, Tensor) and arg.dim() for arg in args):
        return args
    wide = max(arg.shape[-1] for arg in args)
    return tuple(
        F.pad(arg, (0, length)) if 1 < arg.shape[-1] == wide - length else arg for arg in args
    )


def _own_storage(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Copy a query that is a view of the fused qkv activation, so that backward need not keep it.

    The keys and values are copied by the concatenation anyway; without this the whole fused
    activation would stay alive beside them.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or query._base is None:
        return query
    shared = query._base is keys._base or query._base is values._base
    return query.clone() if shared else query
