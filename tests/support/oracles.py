"""Independent oracles: they put prompts into a bare model without the library's projection code.

Slow and obvious on purpose. An oracle changes a bare model in place, given one tensor of prompts
`(length, dim)` per block, in the order in which the model registers its blocks. Three kinds:

- `around`: real tokens in front of the block, cut off behind it;
- `at_attention`: real tokens in front of the attention module, behind the block's norm, cut off
  behind it. What a block does for prompts behind its attention is thrown away, so this is equal;
- `written`, `rewritten`: the attention, or all of the block, written out here, with keys and values
  from the module's own layers.

Tokens of prompts stand behind the model's own, get identity rotations, zero bias and no mask.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Oracle = Callable[[nn.Module, list[Tensor]], None]
Rule = tuple[Callable[[nn.Module], bool], Callable[[Any, Tensor], None]]


def combine(*rules: Rule) -> Oracle:
    """Give every module that a rule picks its prompts, in the order of the model's modules."""

    def install(model: nn.Module, prompts: list[Tensor]) -> None:
        found = [(m, put) for m in model.modules() for wanted, put in rules if wanted(m)]
        assert len(found) == len(prompts), f"{len(found)} blocks, {len(prompts)} prompts"
        for (module, put), prompt in zip(found, prompts, strict=True):
            put(module, prompt)

    return install


def named(names: str, path: str = "", kind: str = "") -> Callable[[nn.Module], bool]:
    """Pick modules by class name, where something (of a class called `kind`) is at `path`."""

    def wanted(module: nn.Module) -> bool:
        inside = {n: type(m).__name__ for n, m in module.named_modules()}
        return type(module).__name__ in names.split() and kind in ("", inside.get(path))

    return wanted


# --- how tokens lie in a module's input ----------------------------------------------------------


class Layout(NamedTuple):
    """How a module takes tokens.

    Args:
        tokens: From the module's input to `(batch, tokens, dim)`.
        enter: From more tokens to what the module takes.
        leave: From what the module returns to `(batch, tokens, dim)`.
        back: From tokens, and the module's input, to the output's own shape.
    """

    tokens: Callable[[Tensor], Tensor]
    enter: Callable[[Tensor], Tensor]
    leave: Callable[[Tensor], Tensor]
    back: Callable[[Tensor, Tensor], Tensor]


def same(hidden: Tensor) -> Tensor:
    """Leave it as it is."""
    return hidden


def as_map(tokens: Tensor) -> Tensor:
    """Lay tokens out as a map `(batch, dim, 1, tokens)`."""
    return tokens.transpose(1, 2).unsqueeze(2)


def as_tokens(pixels: Tensor) -> Tensor:
    """Lay a map `(batch, dim, height, width)` out as tokens."""
    return pixels.flatten(2).transpose(1, 2)


def unmap(tokens: Tensor, like: Tensor) -> Tensor:
    """Undo `as_tokens`."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:])


def rows(first: int, last: int, enter: Callable[[Tensor], Tensor]) -> Layout:
    """Join axes on the way in and out."""
    flat = partial(torch.flatten, start_dim=first, end_dim=last)
    return Layout(flat, enter, flat, lambda x, h: x.reshape(h.shape))


ROWS = rows(1, -2, same)
MAPS = Layout(as_tokens, as_map, as_tokens, unmap)
# `(batch, height, width, dim)`, as one row of pixels.
GRID = rows(1, 2, lambda x: x.unsqueeze(1))
# `(batch, windows, tokens, dim)`: a window is a sample.
WINDOWS = rows(0, 1, lambda x: x.unsqueeze(1))
# Tokens of which a class token, given apart, is the query: nothing to cut.
CLASS = Layout(same, same, same, lambda x, h: x)


# --- real tokens ---------------------------------------------------------------------------------


def insert(
    module: Any,
    tokens: Tensor,
    layout: Layout = ROWS,
    pads: tuple[str, ...] = (),
    *,
    front: bool = False,
) -> None:
    """Add tokens `(1, length, dim)` to a module's first argument, and cut its output back.

    Args:
        module: A block or an attention.
        tokens: Prompts.
        layout: How the module takes tokens.
        pads: Methods of the module's parts that return a bias.
        front: In front of the model's own tokens: where those see only what stands before them.
    """
    original, length = module.forward, tokens.shape[1]
    pad_methods(module, pads, length)

    def forward(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original).bind(*args, **kwargs)
        values = bound.arguments
        name, hidden = next(iter(values.items()))
        own = layout.tokens(hidden)
        more = tokens.expand(own.shape[0], -1, -1)
        values[name] = layout.enter(torch.cat([more, own] if front else [own, more], dim=1))
        for part in (values, values.get("kwargs", {})):
            for known in part.keys() & PADS:
                part[known] = PADS[known](part[known], length)
        out = original(*bound.args, **bound.kwargs)
        whole = layout.leave(out[0] if isinstance(out, tuple) else out)
        kept = whole[:, length:] if front else whole[:, : own.shape[1]]
        kept = layout.back(kept, hidden)
        return (kept, *out[1:]) if isinstance(out, tuple) else kept

    module.forward = forward


def isotropic(module: nn.Module) -> bool:
    """Tell transformers' blocks by their names and parts."""
    return type(module).__name__.endswith(("Layer", "Block", "Merger")) and any(
        name in ("attention", "attn", "self_attn") for name, _ in module.named_children()
    )


def packed(module: Any, tokens: Tensor) -> None:
    """Append tokens to every segment of a packed sequence, and take them out again."""
    original, length = module.forward, tokens.shape[1]

    def forward(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original).bind(*args, **kwargs)
        values, more = bound.arguments, bound.arguments.get("kwargs", {})
        place = values if "cu_seqlens" in values else more
        ends = place["cu_seqlens"]
        sizes = ends.diff().tolist()
        place["cu_seqlens"] = ends + length * torch.arange(len(ends)).to(ends)
        name, hidden = next(iter(values.items()))
        values[name] = each_segment(hidden, sizes, tokens if hidden.dim() == 3 else tokens[0])
        place = values if "position_embeddings" in values else more
        if "position_embeddings" in place:
            cos, sin = place["position_embeddings"]
            none = cos[..., :1, :].expand(*cos.shape[:-2], length, -1) * 0
            place["position_embeddings"] = (
                each_segment(cos, sizes, none + 1),
                each_segment(sin, sizes, none),
            )
        out = original(*bound.args, **bound.kwargs)
        whole = out[0] if isinstance(out, tuple) else out
        parts = whole.split([size + length for size in sizes], dim=-2)
        kept = [part[..., :size, :] for part, size in zip(parts, sizes, strict=True)]
        joined = torch.cat(kept, dim=-2)
        return (joined, *out[1:]) if isinstance(out, tuple) else joined

    module.forward = forward


def around_packed(block: Any, prompt: Tensor) -> None:
    """Insert around a block that takes a packed sequence."""
    packed(block, prompt.unsqueeze(0))


def at_packed(names: str, path: str, norm: str) -> Rule:
    """Insert in front of the attention of these blocks, which takes a packed sequence."""

    def put(block: Any, prompt: Tensor) -> None:
        packed(block.get_submodule(path), normed(block, norm, prompt))

    return lambda m: named(names)(m) and isinstance(getattr(m, path, None), nn.Module), put


def each_segment(rows: Tensor, sizes: list[int], more: Tensor) -> Tensor:
    """Append the same rows to every segment."""
    parts = rows.split(sizes, dim=-2)
    return torch.cat([x for part in parts for x in (part, more)], dim=-2)


def around(names: str, layout: Layout = ROWS, pads: tuple[str, ...] = ()) -> Rule:
    """Insert tokens in front of the blocks of these classes, and drop them behind.

    Args:
        names: Classes of the blocks.
        layout: How the block takes tokens.
        pads: Methods of the block's parts that return a bias.
    """
    return named(names), lambda block, prompt: insert(block, prompt.unsqueeze(0), layout, pads)


def around_block(block: Any, prompt: Tensor, **options: Any) -> None:
    """Insert tokens in front of a block."""
    insert(block, prompt.unsqueeze(0), **options)


def around_kind(names: str, kind: str, path: str = "attn") -> Rule:
    """Insert around those blocks whose attention at `path` is of a class called `kind`."""
    return named(names, path, kind), around(names)[1]


def at_attention(
    names: str,
    path: str = "attn",
    norm: str = "norm1",
    layout: Layout = ROWS,
    pads: tuple[str, ...] = (),
    kind: str = "",
) -> Rule:
    """Insert tokens in front of the attention at `path` of these blocks, behind its norm."""

    def put(block: Any, prompt: Tensor) -> None:
        insert(block.get_submodule(path), normed(block, norm, prompt), layout, pads)

    return named(names, path, kind), put


def normed(block: Any, norm: str, prompt: Tensor) -> Tensor:
    """Return `(1, length, dim)` behind the block's norm; norms of maps see a row of pixels."""
    tokens = prompt.unsqueeze(0)
    if not norm:
        return tokens
    module = block.get_submodule(norm)
    # MaxViT pools the map in the same sequence; prompts have no place on it.
    return on_tokens(getattr(module, "norm", module), tokens)


def on_tokens(module: nn.Module, tokens: Tensor) -> Tensor:
    """Call a module on tokens, as maps if its class is for maps."""
    name = type(module).__name__
    if not name.startswith(("BatchNorm", "GroupNorm", "Conv", "Sequential")) and "2d" not in name:
        return module(tokens)
    # Every token is a map of one pixel: for one long row in a batch of one, torch 2.15 gives wrong
    # gradients of a BatchNorm2d on the CPU.
    return module(tokens.squeeze(0)[:, :, None, None]).flatten(1).unsqueeze(0)


def pad_square(bias: Tensor | None, length: int) -> Tensor | None:
    """Pad a bias or mask so that every query sees prompts and nothing else changes."""
    if bias is None:
        return None
    value = True if bias.dtype == torch.bool else 0
    return F.pad(bias, (0, length, 0, length if bias.shape[-2] > 1 else 0), value=value)


def pad_rows(values: Tensor | None, length: int, value: float = 0.0) -> Tensor | None:
    """Append rows of one value in front of the last axis."""
    return None if values is None else F.pad(values, (0, 0, 0, length), value=value)


def pad_sin_cos(rope: Tensor | None, length: int) -> Tensor | None:
    """Append rows of identity rotation to timm's `[sin | cos]`."""
    if rope is None:
        return None
    sin, cos = rope.chunk(2, dim=-1)
    return torch.cat([pad_rows(sin, length), pad_rows(cos, length, 1.0)], dim=-1)


def pad_positions(pair: Any, length: int) -> Any:
    """Append rows of identity rotation to transformers' `(cos, sin)`."""
    return None if pair is None else (pad_rows(pair[0], length, 1.0), pad_rows(pair[1], length))


PADS: dict[str, Callable[[Any, int], Any]] = {
    "rope": pad_sin_cos,
    "rope_cos": partial(pad_rows, value=1.0),
    "rope_sin": pad_rows,
    "attn_mask": pad_square,
    "attention_mask": pad_square,
    "shared_rel_pos": pad_square,
    "shared_rel_pos_bias": pad_square,
    "mask": pad_square,
    "position_embeddings": pad_positions,
    # Complex, and one axis more: one is no rotation.
    "freqs_ci": lambda freqs, length: torch.cat([freqs, torch.ones_like(freqs[:length])]),
    # Queries that are the same in all windows; those of prompts are dropped.
    "q_global": lambda query, length: pad_rows(query.flatten(1, -2), length),
}


def pad_methods(module: nn.Module, names: tuple[str, ...], length: int) -> None:
    """Pad the bias that these methods, or children, of a module or its parts return."""
    for part in list(module.modules()):
        for name in names:
            found = getattr(part, name, None)
            if isinstance(found, nn.Module):
                found.forward = partial(_padded, found.forward, length)
            elif found is not None:
                setattr(part, name, partial(_padded, found, length))


def _padded(original: Callable[..., Tensor], length: int, *args: Any, **kwargs: Any) -> Any:
    return pad_square(original(*args, **kwargs), length)


# --- attention written out -----------------------------------------------------------------------


def written(
    names: str, rule: Callable[..., Any], path: str = "attn", norm: str = "norm1", kind: str = ""
) -> Rule:
    """Replace the attention at `path` of these blocks by `rule(attention, tokens, hidden, ...)`."""

    def put(block: Any, prompt: Tensor) -> None:
        attention = block.get_submodule(path)
        attention.forward = partial(called, rule, attention, normed(block, norm, prompt))

    return named(names, path, kind), put


def called(rule: Callable[..., Any], module: Any, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Call a rule with the hidden states first, however the module was called."""
    hidden = args[0] if args else kwargs.pop(next(iter(kwargs)))
    return rule(module, tokens, hidden, *args[1:], **kwargs)


def inside(path: str, oracle: Oracle) -> Oracle:
    """Look for blocks only in a part of the model."""
    return lambda model, prompts: oracle(model.get_submodule(path), prompts)


def rewritten(names: str, rule: Callable[..., Any]) -> Rule:
    """Replace a block's `forward` by `rule(block, tokens, hidden, ...)`."""

    def put(block: Any, prompt: Tensor) -> None:
        block.forward = partial(rule, block, prompt.unsqueeze(0))

    return named(names), put


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    more_keys: Tensor,
    more_values: Tensor,
    *,
    scale: float | Tensor | None = None,
    bias: Tensor | float = 0.0,
) -> Tensor:
    """Return `softmax([Q K^T * scale + bias, Q K_p^T * scale]) [V; V_p]`, scale 1 / sqrt(width)."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    own = query @ keys.mT * scale + bias
    scores = torch.cat([own, (query @ more_keys.mT * scale).expand(*own.shape[:-1], -1)], dim=-1)
    weights = scores.softmax(-1)
    own, more = weights.split([keys.shape[-2], more_keys.shape[-2]], dim=-1)
    return own @ values + more @ more_values


HEADS = "num_heads num_attention_heads heads"


def named_one_of(module: Any, names: str) -> Any:
    """Return the first attribute that a module has."""
    return next(getattr(module, name) for name in names.split() if hasattr(module, name))


def pairs(rule: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, None]]:
    """Return no attention maps beside what a rule returns, as transformers' modules do."""
    return lambda *args, **kwargs: (rule(*args[:3]), None)


def heads(hidden: Tensor, count: int) -> Tensor:
    """Turn `(batch, tokens, dim)` into `(batch, heads, tokens, dim / heads)`."""
    return hidden.unflatten(-1, (count, -1)).transpose(1, 2)


def fold(hidden: Tensor) -> Tensor:
    """Undo `heads`."""
    return hidden.transpose(1, 2).flatten(2)


def thirds(out: Tensor, count: int) -> tuple[Tensor, ...]:
    """Split what a fused layer returns, parts first and heads inside, and split heads."""
    return tuple(heads(part, count) for part in out.chunk(3, dim=-1))


def halves(out: Tensor, count: int) -> tuple[Tensor, ...]:
    """Split fused keys and values, and split heads."""
    return tuple(heads(part, count) for part in out.chunk(2, dim=-1))


def windows(height: int, width: int, size: tuple[int, int]) -> list[tuple[slice, slice]]:
    """List the windows of a map, row by row."""
    return [
        (slice(i, i + size[0]), slice(j, j + size[1]))
        for i in range(0, height, size[0])
        for j in range(0, width, size[1])
    ]


def pad_to(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Pad `(batch, height, width, dim)` with zeros to full windows."""
    return F.pad(grid, (0, 0, 0, -grid.shape[2] % size[1], 0, -grid.shape[1] % size[0]))


# --- Swin ----------------------------------------------------------------------------------------


class Shifted(NamedTuple):
    """The attention of shifted windows: what the versions of Swin share.

    Args:
        size: Of a window.
        shift: By how much the map is rolled.
    """

    size: tuple[int, int]
    shift: tuple[int, int]

    def __call__(self, grid: Tensor, attention: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Give every window and its mask to `attention`, and put the results together.

        Args:
            grid: `(batch, height, width, dim)`.
            attention: From `(batch, tokens, dim)` and `(tokens, tokens)`.
        """
        height, width = grid.shape[1:3]
        rolled = torch.roll(grid, (-self.shift[0], -self.shift[1]), (1, 2))
        rolled = pad_to(rolled, self.size)
        region = self.regions(rolled.shape[1], rolled.shape[2])
        out = torch.zeros_like(rolled)
        for rows, columns in windows(rolled.shape[1], rolled.shape[2], self.size):
            part = rolled[:, rows, columns]
            flat = region[rows, columns].flatten()
            mask = torch.where(flat[:, None] == flat, 0.0, -100.0).to(grid)
            out[:, rows, columns] = attention(part.flatten(1, 2), mask).reshape(part.shape)
        return torch.roll(out[:, :height, :width], self.shift, (1, 2))

    def regions(self, height: int, width: int) -> Tensor:
        """Number the parts of the rolled map that were neighbours before the roll."""
        if not any(self.shift):
            return torch.zeros(height, width)
        down = (torch.arange(height) >= height - self.size[0]).int()
        down += torch.arange(height) >= height - self.shift[0]
        right = (torch.arange(width) >= width - self.size[1]).int()
        right += torch.arange(width) >= width - self.shift[1]
        return 3 * down[:, None] + right


def relative(table: Tensor, size: tuple[int, int]) -> Tensor:
    """Look `(distances, heads)` up for each pair of a window's positions: `(heads, n, n)`."""
    high, wide = size
    y, x = torch.arange(high).repeat_interleave(wide), torch.arange(wide).repeat(high)
    down, right = y[:, None] - y + high - 1, x[:, None] - x + wide - 1
    return table[down * (2 * wide - 1) + right].permute(2, 0, 1)


def swin(block: Any, prompt: Tensor, hidden: Tensor) -> Tensor:
    """timm's Swin block."""
    attn = block.attn
    count, bias = attn.num_heads, relative(attn.relative_position_bias_table, block.window_size)
    _, *more = thirds(attn.qkv(block.norm1(prompt)), count)

    def one(window: Tensor, mask: Tensor) -> Tensor:
        return attn.proj(fold(attend(*thirds(attn.qkv(window), count), *more, bias=bias + mask)))

    hidden = hidden + Shifted(block.window_size, block.shift_size)(block.norm1(hidden), one)
    return hidden + block.mlp(block.norm2(hidden))


def cosine(query: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
    """Give queries and keys the length 1, but leave the zeros of a window's padding."""
    return tuple(x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12) for x in (query, keys))


def cosine_attention(
    split: Callable[[Tensor], tuple[Tensor, ...]], prompt: Tensor, scale: Tensor, bias: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return Swin v2's attention of one window, up to the output projection."""
    query, more_keys, more_values = split(prompt)
    more_keys = cosine(query, more_keys)[1]

    def one(window: Tensor, mask: Tensor) -> Tensor:
        query, keys, values = split(window)
        query, keys = cosine(query, keys)
        more = (more_keys, more_values)
        return fold(attend(query, keys, values, *more, scale=scale, bias=bias + mask))

    return one


def swin_v2(block: Any, prompt: Tensor, hidden: Tensor) -> Tensor:
    """timm's Swin v2 block: norms stand behind attention and MLP."""
    attn = block.attn
    table = attn.cpb_mlp(attn.relative_coords_table).flatten(0, -2)
    qkv_bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    one = cosine_attention(
        lambda x: thirds(x @ attn.qkv.weight.T + qkv_bias, attn.num_heads),
        prompt,
        attn.logit_scale.clamp(max=math.log(100)).exp(),
        16 * relative(table, block.window_size).sigmoid(),
    )
    mixed = Shifted(block.window_size, block.shift_size)(hidden, lambda x, m: attn.proj(one(x, m)))
    hidden = hidden + block.norm1(mixed)
    return hidden + block.norm2(block.mlp(hidden))


def swin_v2_cr(block: Any, prompt: Tensor, hidden: Tensor) -> Tensor:
    """timm's other Swin v2 block: a third norm."""
    attn = block.attn
    one = cosine_attention(
        lambda x: thirds(attn.qkv(x), attn.num_heads),
        prompt,
        attn.logit_scale.reshape(1, -1, 1, 1).clamp(max=math.log(100)).exp(),
        attn._relative_positional_encodings(),
    )
    mixed = Shifted(block.window_size, block.shift_size)(hidden, lambda x, m: attn.proj(one(x, m)))
    hidden = hidden + block.norm1(mixed)
    return block.norm3(hidden + block.norm2(block.mlp(hidden)))


# --- timm's other windows ------------------------------------------------------------------------


def mask_units(attn: Any, tokens: Tensor, hidden: Tensor) -> Tensor:
    """Hiera: tokens of a window stand `number of windows` apart; queries are pooled."""
    stride, count = named_one_of(attn, "q_stride query_stride"), named_one_of(attn, HEADS)
    area = stride * attn.window_size
    number = hidden.shape[1] // area if attn.use_mask_unit_attn else 1
    _, *more = thirds(attn.qkv(tokens), count)
    out = []
    for window in range(number):
        query, keys, values = thirds(attn.qkv(hidden[:, window::number]), count)
        query = query.unflatten(2, (stride, -1)).amax(2)
        out.append(fold(attend(query, keys, values, *more)))
    return attn.proj(torch.stack(out, dim=2).flatten(1, 2))


def pooled_windows(attn: Any, tokens: Tensor, hidden: Tensor) -> Tensor:
    """SAM 2's trunk: a window is a sample; queries are pooled where a stage begins."""
    count = named_one_of(attn, HEADS)
    query, keys, values = thirds(attn.qkv(hidden).flatten(1, 2), count)
    _, *more = thirds(attn.qkv(tokens), count)
    height, width = hidden.shape[1:3]
    stride = getattr(attn, "query_stride", None) or (2 if getattr(attn, "q_pool", None) else None)
    if stride is not None:
        pooled = F.max_pool2d(unmap(fold(query), hidden.permute(0, 3, 1, 2)), stride)
        height, width = pooled.shape[2:]
        query = heads(as_tokens(pooled), count)
    out = fold(attend(query, keys, values, *more))
    return attn.proj(out.unflatten(1, (height, width)))


def decomposed(
    query: Tensor, by_row: Tensor, by_column: Tensor, size: Any, others: Any = None
) -> Tensor:
    """SAM's and MViT's bias: queries times embeddings of distances to keys in rows and columns.

    Args:
        query: `(batch, heads, tokens, dim)`.
        by_row: `(distances, dim)`.
        by_column: The same of columns.
        size: Of the grid of queries.
        others: Of that of keys, where it is coarser or finer.
    """
    tables = []
    for own, far, table in zip(size, others or size, (by_row, by_column), strict=True):
        mine = torch.arange(own)[:, None] * max(far / own, 1.0)
        theirs = torch.arange(far) * max(own / far, 1.0)
        tables.append(table[(mine - theirs + (far - 1) * max(own / far, 1.0)).long()])
    grid = query.unflatten(2, tuple(size))
    down = torch.einsum("bnhwc,hkc->bnhwk", grid, tables[0])
    right = torch.einsum("bnhwc,wkc->bnhwk", grid, tables[1])
    return (down.unsqueeze(-1) + right.unsqueeze(-2)).flatten(4).flatten(2, 3)


def sam(attn: Any, tokens: Tensor, hidden: Tensor) -> Tensor:
    """SAM's and ViTDet's, a window being a sample."""
    count = named_one_of(attn, HEADS)
    query, keys, values = thirds(attn.qkv(hidden).flatten(1, 2), count)
    _, *more = thirds(attn.qkv(tokens), count)
    bias = decomposed(query, attn.rel_pos_h, attn.rel_pos_w, hidden.shape[1:3])
    out = attend(query, keys, values, *more, scale=attn.scale, bias=bias)
    return attn.proj(fold(out)).reshape(hidden.shape)


def local(attn: Any, tokens: Tensor, grid: Tensor) -> Tensor:
    """Attend window by window on a padded map; return tokens."""
    _, *more = thirds(attn.qkv(tokens), attn.num_heads)
    side = named_one_of(attn, "ws window_size")

    def one(window: Tensor, _: Tensor) -> Tensor:
        return fold(attend(*thirds(attn.qkv(window), attn.num_heads), *more))

    return attn.proj(Shifted((side, side), (0, 0))(grid, one).flatten(1, 2))


def twins_windows(attn: Any, tokens: Tensor, hidden: Tensor, size: tuple[int, int]) -> Tensor:
    """Twins' local attention."""
    return local(attn, tokens, hidden.unflatten(1, tuple(size)))


# --- timm's attentions over a reduced map: prompts pass the norm, not the reduction --------------


def reduced(attn: Any, tokens: Tensor, hidden: Tensor, size: tuple[int, int]) -> Tensor:
    """Twins' global attention and PVT v2's."""
    count = attn.num_heads
    query, keys = heads(attn.q(hidden), count), hidden
    pool = getattr(attn, "pool", None)
    if attn.sr is not None:
        pixels = hidden.transpose(1, 2).unflatten(2, tuple(size))
        keys = attn.norm(as_tokens(attn.sr(pixels if pool is None else pool(pixels))))
        tokens = attn.norm(tokens)
    if pool is not None:
        keys, tokens = attn.act(keys), attn.act(tokens)
    own, more = halves(attn.kv(keys), count), halves(attn.kv(tokens), count)
    return attn.proj(fold(attend(query, *own, *more)))


def nextvit(attn: Any, tokens: Tensor, hidden: Tensor) -> Tensor:
    """NextViT's: average pooling and a batch norm in front of keys and values."""
    keys = hidden
    if attn.sr is not None:
        keys = attn.norm(attn.sr(hidden.mT)).mT
        tokens = attn.norm(tokens.mT).mT
    parts = (attn.q(hidden), attn.k(keys), attn.v(keys), attn.k(tokens), attn.v(tokens))
    return attn.proj(fold(attend(*(heads(part, attn.num_heads) for part in parts))))


def mvit(attn: Any, tokens: Tensor, hidden: Tensor, size: list[int]) -> tuple[Tensor, list[int]]:
    """MViT v2's: queries, keys and values pooled behind their projection, and a bias of queries."""
    count = attn.num_heads
    parts, sizes = [], []
    for kind, part in zip("qkv", thirds(attn.qkv(hidden), count), strict=True):
        pool, norm = getattr(attn, f"pool_{kind}"), getattr(attn, f"norm_{kind}")
        area = list(size)
        if pool is not None:
            # The pooling takes one head at a time, as a map of its own.
            first, rest = part.split([part.shape[2] - size[0] * size[1], size[0] * size[1]], dim=2)
            maps = pool(rest.flatten(0, 1).transpose(1, 2).unflatten(2, tuple(size)))
            area = list(maps.shape[2:])
            part = torch.cat([first, as_tokens(maps).unflatten(0, (-1, count))], dim=2)
        parts.append(norm(part) if norm is not None else part)
        sizes.append(area)
    query, keys, values = parts
    _, more_keys, more_values = thirds(attn.qkv(tokens), count)
    more_keys = attn.norm_k(more_keys) if attn.norm_k is not None else more_keys
    more_values = attn.norm_v(more_values) if attn.norm_v is not None else more_values
    prefix = query.shape[2] - sizes[0][0] * sizes[0][1]
    bias = decomposed(query[:, :, prefix:], attn.rel_pos_h, attn.rel_pos_w, *sizes[:2])
    bias = F.pad(bias, (prefix, 0, prefix, 0))
    out = attend(query, keys, values, more_keys, more_values, scale=attn.scale, bias=bias)
    out = out + query if attn.residual_pooling else out
    return attn.proj(fold(out)), sizes[0]


def multi_query(attn: Any, tokens: Tensor, hidden: Tensor) -> Tensor:
    """MobileNet v4's: one head of keys and values; convolutions and their strides left out."""
    query = attn.query(hidden)
    area = query.shape[2:]
    query = heads(as_tokens(query), attn.num_heads)
    own = [as_tokens(layer(hidden)).unsqueeze(1) for layer in (attn.key, attn.value)]
    more = []
    for layer in (attn.key, attn.value):
        passed = tokens
        for name, part in layer.named_children():
            passed = passed if name == "down_conv" else on_tokens(part, passed)
        more.append(passed.unsqueeze(1))
    out = fold(attend(query, *own, *more))
    return attn.output(out.transpose(1, 2).unflatten(2, area))


def convolved(attn: Any, tokens: Tensor, hidden: Tensor) -> Tensor:
    """LowFormer's and CPUBone's: a convolution in front, an upsampling behind."""
    first = attn.conv_proj(hidden)
    for layer in (attn.conv_proj.norm, attn.conv_proj.act):
        tokens = tokens if layer is None else on_tokens(layer, tokens)
    own = head_first(as_tokens(attn.pwise(first)), attn.num_heads)
    _, *more = head_first(on_tokens(attn.pwise, tokens), attn.num_heads)
    out = fold(attend(*own, *more))
    whole = attn.upsampling(attn.o_proj(out.transpose(1, 2).unflatten(2, first.shape[2:])))
    return whole[..., : hidden.shape[2], : hidden.shape[3]]


def head_first(out: Tensor, count: int) -> tuple[Tensor, ...]:
    """Split what a fused layer returns, heads first and parts inside."""
    return heads(out, count).chunk(3, dim=-1)


def talking_map(attn: Any, tokens: Tensor, hidden: Tensor) -> Tensor:
    """EfficientFormer v2's: heads are mixed in front of the softmax and behind it."""
    if attn.stride_conv is not None:
        hidden, tokens = attn.stride_conv(hidden), on_tokens(attn.stride_conv.bn, tokens)
    count = attn.num_heads
    query, keys, values = (
        heads(as_tokens(layer(hidden)), count) for layer in (attn.q, attn.k, attn.v)
    )
    more_keys, more_values = (heads(on_tokens(layer, tokens), count) for layer in (attn.k, attn.v))
    scores = query @ keys.mT * attn.scale + attn.attention_biases[:, attn.attention_bias_idxs]
    more = (query @ more_keys.mT * attn.scale).expand(scores.shape[0], -1, -1, -1)
    scores = attn.talking_head1(torch.cat([scores, more], dim=-1))
    weights = attn.talking_head2(scores.softmax(-1))
    both = torch.cat([values, more_values.expand(values.shape[0], -1, -1, -1)], dim=2)
    out = unmap(fold(weights @ both), hidden) + attn.v_local(attn.v(hidden))
    out = out if attn.upsample is None else attn.upsample(out)
    return attn.proj(attn.act(out))


def gated(attn: Any, tokens: Tensor, hidden: Tensor) -> Tensor:
    """iFormer's: one head; a sigmoid on values and on a gate behind the attention."""
    assert not attn.window_size

    value, gate = attn.v_gate(hidden).sigmoid().chunk(2, dim=1)
    query, keys, values = as_tokens(attn.q(hidden)), as_tokens(attn.k(hidden)), as_tokens(value)
    more_keys = on_tokens(attn.k, tokens)
    more_values, _ = on_tokens(attn.v_gate, tokens).sigmoid().chunk(2, dim=-1)
    out = attend(query, keys, values, more_keys, more_values)
    return attn.proj(unmap(out, hidden) * gate)


def bottleneck(attn: Any, tokens: Tensor, hidden: Tensor) -> Tensor:
    """BoTNet's: a bias of queries and positions."""
    widths = [attn.dim_out_qk, attn.dim_out_qk, attn.dim_out_v]
    query, *own = (heads(x, attn.num_heads) for x in as_tokens(attn.qkv(hidden)).split(widths, -1))
    parts = on_tokens(attn.qkv, tokens).split(widths, dim=-1)[1:]
    more = (heads(part, attn.num_heads) for part in parts)
    bias = attn.pos_embed(query.flatten(0, 1)).unflatten(0, query.shape[:2])
    bias = bias * attn.scale if attn.scale_pos_embed else bias
    out = attend(query, *own, *more, scale=attn.scale, bias=bias)
    return attn.pool(unmap(fold(out), hidden))


def positional(attn: Any, tokens: Tensor, hidden: Tensor) -> Tensor:
    """ConViT's GPSA: prompts have no place, so the positional attention gives them nothing."""
    count = attn.num_heads
    query, keys = halves(attn.qk(hidden), count)
    _, more_keys = halves(attn.qk(tokens), count)
    values, more_values = heads(attn.v(hidden), count), heads(attn.v(tokens), count)
    content = attend(query, keys, values, more_keys, more_values)
    places = attn.pos_proj(attn.get_rel_indices(hidden.shape[1])).permute(0, 3, 1, 2)
    gate = attn.gating_param.view(1, -1, 1, 1).sigmoid()
    return attn.proj(fold((1 - gate) * content + gate * (places.softmax(-1) @ values)))


# --- transformers --------------------------------------------------------------------------------


def swin_transformers(
    block: Any, prompt: Tensor, hidden: Tensor, size: tuple[int, int], *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """Swin, Donut's and MaskFormer's: one block under three spellings."""
    if hasattr(block, "set_shift_and_window_size"):
        block.set_shift_and_window_size(size)
    outer = block.attention
    attn = getattr(outer, "self", outer)
    layers = [named_one_of(attn, names) for names in ("q_proj query", "k_proj key", "v_proj value")]
    out = outer.o_proj if hasattr(outer, "o_proj") else outer.output.dense
    holder = getattr(attn, "relative_position_bias", attn)
    area = (block.window_size, block.window_size)
    bias = relative(holder.relative_position_bias_table, area)
    count = bias.shape[0]
    more = [heads(layer(block.layernorm_before(prompt)), count) for layer in layers[1:]]

    def one(window: Tensor, mask: Tensor) -> Tensor:
        own = (heads(layer(window), count) for layer in layers)
        return out(fold(attend(*own, *more, bias=bias + mask)))

    grid = block.layernorm_before(hidden).unflatten(1, size)
    shift = (block.shift_size, block.shift_size)
    hidden = hidden + Shifted(area, shift)(grid, one).flatten(1, 2)
    inner = block.layernorm_after(hidden)
    if hasattr(block, "mlp"):
        return hidden + block.mlp(inner), None
    return hidden + block.output(block.intermediate(inner)), None


def swin_v2_transformers(
    block: Any, prompt: Tensor, hidden: Tensor, size: tuple[int, int], *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """Swin v2 and Swin2SR, which add the mask of shifted windows twice."""
    attn, out = block.attention.self, block.attention.output.dense
    count, area = attn.num_attention_heads, (block.window_size, block.window_size)
    table = attn.continuous_position_bias_mlp(attn.relative_coords_table).flatten(0, -2)
    layers = (attn.query, attn.key, attn.value)
    one = cosine_attention(
        lambda x: tuple(heads(layer(x), count) for layer in layers),
        prompt,
        attn.logit_scale.clamp(max=math.log(100)).exp(),
        16 * relative(table, area).sigmoid(),
    )
    shifted = Shifted(area, (block.shift_size, block.shift_size))
    mixed = shifted(hidden.unflatten(1, size), lambda x, mask: out(one(x, 2 * mask)))
    hidden = hidden + block.layernorm_before(mixed.flatten(1, 2))
    inner = block.output(block.intermediate(hidden))
    return hidden + block.layernorm_after(inner), None


def reduced_transformers(
    attn: Any, tokens: Tensor, hidden: Tensor, height: int, width: int, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """SegFormer, PVT, PVT v2 and GLPN: the reduction is not for prompts, its norm is."""
    convolution = "sequence_reduction spatial_reduction sr"
    if hasattr(attn, "layer_norm"):
        pixels = hidden.transpose(1, 2).unflatten(2, (height, width))
        pixels = attn.pool(pixels) if getattr(attn, "linear_attention", False) else pixels
        keys = attn.layer_norm(as_tokens(named_one_of(attn, convolution)(pixels)))
        tokens = attn.layer_norm(tokens)
        if getattr(attn, "linear_attention", False):
            keys, tokens = attn.act(keys), attn.act(tokens)
    elif hasattr(attn, "sequence_reduction"):
        keys = attn.sequence_reduction(hidden, height, width)
        tokens = attn.sequence_reduction.layer_norm(tokens)
    else:
        keys = hidden
    query, key, value = (
        named_one_of(attn, names) for names in ("q_proj query", "k_proj key", "v_proj value")
    )
    count = getattr(attn, "num_attention_heads", None) or query.out_features // attn.head_dim
    out = fold(
        attend(
            *(heads(x, count) for x in (query(hidden), key(keys), value(keys))),
            *(heads(x, count) for x in (key(tokens), value(tokens))),
        )
    )
    for name in ("o_proj", "proj"):
        out = getattr(attn, name)(out) if hasattr(attn, name) else out
    return out, None


def convolutional(attn: Any, tokens: Tensor, hidden: Tensor, height: int, width: int) -> Tensor:
    """CvT: convolutions in front of all three projections; prompts pass none, as the CLS token."""
    first = int(attn.with_cls_token)
    prefix, rest = hidden.split([first, hidden.shape[1] - first], dim=1)
    pixels = rest.transpose(1, 2).unflatten(2, (height, width))
    parts = [
        torch.cat([prefix, getattr(attn, f"convolution_projection_{name}")(pixels)], dim=1)
        for name in ("query", "key", "value")
    ]
    layers = (attn.projection_query, attn.projection_key, attn.projection_value)
    own = (heads(layer(x), attn.num_heads) for layer, x in zip(layers, parts, strict=True))
    more = (heads(layer(tokens), attn.num_heads) for layer in layers[1:])
    return fold(attend(*own, *more, scale=attn.scale))


def turned(attn: Any, tokens: Tensor, hidden: Tensor, *_: Any, **kwargs: Any) -> Any:
    """V-JEPA 2: rotations follow from a token's place in the sequence; prompts have none."""
    count = attn.num_attention_heads
    query, keys, values = (heads(f(hidden), count) for f in (attn.query, attn.key, attn.value))
    places = attn.get_position_ids(hidden, masks=kwargs.get("position_mask"))
    query, keys = (attn.apply_rotary_embeddings(x, places) for x in (query, keys))
    more = (heads(f(tokens), count) for f in (attn.key, attn.value))
    return attn.proj(fold(attend(query, keys, values, *more, scale=attn.scaling))), None
