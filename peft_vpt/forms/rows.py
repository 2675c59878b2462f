"""Comparing projected keys and values with those of a softmax, wherever a block has moved them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .softmax import Met

# Both sides run the same kernels on the same numbers, but on another number of rows; what is left
# is the order of summation, a few rounding steps of the dtype they were computed in.
_ROUNDINGS = 64
# Half precision is summed up in float32 and rounded once.
_HALF_ROUNDINGS = 4
# Of the slots that a block has moved, as many are looked up; each is one of all tokens.
_SLOTS = 512


@dataclass
class Rows:
    """Keys and values of a softmax beside ours, slot by slot: `(samples, slots, heads, dim)` each.

    Blocks cut tokens into windows, roll and pad them. Which of our tokens a slot holds is found by
    its value; the keys of the two must then agree as well.
    """

    keys: Tensor
    values: Tensor
    our_keys: Tensor
    our_values: Tensor
    report: str = ""

    @classmethod
    def match(
        cls,
        met: list[Met],
        keys: Tensor,
        values: Tensor,
        blank: tuple[Tensor, Tensor],
        heads_axis: int = 1,
    ) -> Rows:
        """Find the token of every slot.

        Args:
            met: Softmaxes of one call.
            keys: Ours, `(samples, heads, tokens, dim)`.
            values: Ours.
            blank: Keys and values of a window's padding, `(1, heads, 1, dim)`.
            heads_axis: See `Attention.heads_axis`.
        """
        if len(met) > 1:
            keys, values = (x.transpose(0, 1).flatten(1, 2).unsqueeze(0) for x in (keys, values))
        samples, heads = keys.shape[:2]
        their_keys = torch.cat([_rows(m.keys, samples, heads, heads_axis) for m in met], dim=1)
        their_values = torch.cat([_rows(m.values, samples, heads, heads_axis) for m in met], dim=1)
        repeats = their_keys.shape[2] // heads
        ours = [_rows(x, samples, heads) for x in (keys, values)]
        pads = [_rows(x, 1, heads).expand(samples, -1, -1, -1) for x in blank]
        ours = [torch.cat(pair, dim=1) for pair in zip(ours, pads, strict=True)]
        ours = [x.repeat_interleave(repeats, dim=2).to(their_keys.dtype) for x in ours]
        rows = cls(their_keys, their_values, ours[0], ours[1])
        if ours[1].shape[2:] != their_values.shape[2:]:
            rows.report = (
                f"{tuple(ours[1].shape[2:])} heads by width, {tuple(their_values.shape[2:])}"
            )
            return rows
        rows._align()
        return rows

    def _align(self) -> None:
        flat, own = self.values.flatten(2), self.our_values.flatten(2)
        slots = flat.shape[1]
        if slots == own.shape[1] - 1 and _close(own[:, :slots], flat):
            where = torch.arange(slots).to(flat.device).expand(flat.shape[0], -1)
        else:
            step = -(-slots // _SLOTS)
            self.keys, self.values = self.keys[:, ::step], self.values[:, ::step]
            where = _nearest(flat[:, ::step], own)
        index = where[:, :, None, None]
        self.our_keys, self.our_values = (
            x.gather(1, index.expand(-1, -1, *x.shape[2:]))
            for x in (self.our_keys, self.our_values)
        )
        difference = float((self.our_values - self.values).abs().max())
        self.report = f"largest difference {difference:.3g} at a scale of {_scale(self.values):.3g}"

    def values_equal(self) -> bool:
        """Tell whether every slot holds the value of a token of the same sample, or padding."""
        return self.values.shape == self.our_values.shape and _close(self.our_values, self.values)


def same_keys(rows: Rows, rotates: str) -> str:
    """Return why keys differ, or "": equal, or a rotation of ours that only the slot decides.

    A rotation by position leaves inner products as they are: of the keys of a slot and head between
    samples, or, where samples have positions of their own, between the heads of a slot. Where a
    model's own code keeps no lengths ("skewed"), a slot whose position is zero must still be equal.
    """
    ours, theirs = rows.our_keys, rows.keys
    if ours.shape != theirs.shape:
        return f"shape {tuple(ours.shape)} against {tuple(theirs.shape)}"
    if _close(ours, theirs):
        return ""
    if rotates == "yes" and _turns_pairs(ours, theirs):
        for products in ("sthd,uthd->thsu", "sthd,stgd->sthg"):
            a, b = (torch.einsum(products, x.float(), x.float()) for x in (ours, theirs))
            if float((a - b).abs().max()) <= _tolerance_turned(b, ours.dtype):
                return ""
    if rotates == "skewed":
        slots = (ours - theirs).abs().flatten(2).amax(dim=(0, 2))
        if float(slots.min()) <= _tolerance(theirs.float()):
            return ""
    difference = float((ours - theirs).abs().max())
    return f"largest difference {difference:.3g} at a scale of {_scale(theirs):.3g}"


# How rotations pair channels: neighbours, halves, or halves of each half (one per axis).
_Pairing = tuple[tuple[int, ...], int]
_PAIRINGS: tuple[_Pairing, ...] = (
    ((-1, 2), -1),
    ((2, -1), -2),
    ((2, 2, -1), -2),
)


def _turns_pairs(ours: Tensor, theirs: Tensor) -> bool:
    """Tell whether channel pairs have equal lengths, as a rotation within pairs leaves them.

    Where only a part of a head is rotated, the channels that no slot turns are left out.
    """
    turned = (ours - theirs).abs().flatten(0, -2).amax(dim=0) > _tolerance(theirs)
    parts = ((ours, theirs), (ours[..., turned], theirs[..., turned]))
    return any(_equal_pairs(a, b, pairing) for a, b in parts for pairing in _PAIRINGS)


def _equal_pairs(ours: Tensor, theirs: Tensor, pairing: _Pairing) -> bool:
    shape, axis = pairing
    if ours.shape[-1] % (4 if len(shape) > 2 else 2):
        return False
    a, b = (x.float().reshape(*x.shape[:-1], *shape).square().sum(axis) for x in (ours, theirs))
    return float((a - b).abs().max()) <= _tolerance_turned(b, ours.dtype)


def as_tokens(hidden: Tensor, width: int | None) -> Tensor:
    """Bring tokens, packed tokens or a map of either layout to `(samples, tokens, dim)`."""
    if hidden.dim() == 2:
        return hidden.unsqueeze(0)
    if hidden.dim() > 3 and width is not None and hidden.shape[-1] != width == hidden.shape[1]:
        return hidden.flatten(2).transpose(1, 2)
    return hidden.reshape(hidden.shape[0], -1, hidden.shape[-1])


def equal_rows(hidden: Tensor, block: Tensor) -> bool:
    """Tell whether every token that a norm sees is one that its block was given."""
    if hidden.shape == block.shape and torch.equal(hidden, block):
        return True
    if hidden.shape[-1] != block.shape[-1]:
        return False
    rows, own = (x.reshape(-1, x.shape[-1]).float() for x in (hidden, block))
    rows = rows[:: -(-len(rows) // _SLOTS)]
    # A window's padding is zero.
    own = torch.cat([own, own.new_zeros(1, own.shape[-1])])
    found = own[_nearest(rows, own)]
    return _close(found, rows)


def _rows(tensor: Tensor | None, samples: int, heads: int, heads_axis: int = 1) -> Tensor:
    assert tensor is not None
    if tensor.dim() == 3:
        tensor = tensor.reshape(-1, heads, *tensor.shape[1:])
    if tensor.dim() == 5:
        tensor = (tensor.transpose(1, 2) if heads_axis == 1 else tensor).flatten(0, 1)
    # Windows of a sample stand side by side in the batch.
    tensor = tensor.transpose(1, 2)
    return tensor.reshape(samples, -1, *tensor.shape[2:]).detach()


def _nearest(rows: Tensor, own: Tensor) -> Tensor:
    """Return for each row the index of the row of `own` that is nearest."""
    if rows.device.type == "mps":
        return _nearest(rows.cpu(), own.cpu()).to(rows.device)
    # In single precision, products cancel where rows have a large part in common.
    fast = "use_mm_for_euclid_dist"
    return torch.cdist(rows.double(), own.double(), compute_mode=fast).argmin(dim=-1)


def _scale(tensor: Tensor) -> float:
    return max(float(tensor.abs().max()), 1e-30)


def _close(ours: Tensor, theirs: Tensor) -> bool:
    return float((ours - theirs).abs().max()) <= _tolerance(theirs)


def _tolerance_turned(products: Tensor, dtype: torch.dtype) -> float:
    """Return what products of rotated keys may differ by.

    A rotation rounds twice more, products double that; it is often computed in float32, whatever
    the model's dtype.
    """
    return 4 * _tolerance(products, torch.float32 if dtype == torch.float64 else dtype)


def _tolerance(tensor: Tensor, dtype: torch.dtype | None = None) -> float:
    eps = torch.finfo(dtype or tensor.dtype).eps
    return (_HALF_ROUNDINGS if eps > 1e-5 else _ROUNDINGS) * eps * _scale(tensor)
