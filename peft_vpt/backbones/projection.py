"""How keys and values come out of an attention's normed input, as plain values: `Projection`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .weights import layer_weight, weights_below

_HEAD_DIMS = ("head_dim", "attention_head_size", "dim_head", "key_dim", "key_value_proj_dim")
_HEADS = ("num_heads", "num_attention_heads", "heads", "n_heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", *_HEADS)
_MAP_NAMES = ("2d", "2dNoBias", "GroupNorm1")


@dataclass(frozen=True, kw_only=True)
class Projection:
    """How keys and values come out of an attention module's normed input.

    Args:
        key_norm: Name of the norm of keys, over a head or over all of them; may be absent.
        value_norm: The same for values.
        unit_keys: Whether keys are scaled to length one (cosine attention).
        before: Modules between the attention's input and its layers, those that act on tokens.
    """

    key_norm: str = "k_norm"
    value_norm: str = "v_norm"
    unit_keys: bool = False
    before: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that keys and values come from, that of keys first."""
        raise NotImplementedError

    def prepare(self, attention: nn.Module, hidden: Tensor) -> Tensor:
        """Apply what stands between the attention's input `(batch, tokens, dim)` and its layers."""
        for module in filter(None, (reach(attention, name) for name in self.before)):
            hidden = per_token(module, hidden)
        return hidden

    def keys_values(self, attention: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Project `(batch, tokens, dim)` to keys and values `(batch, heads, tokens, head_dim)`."""
        keys, values = self._keys_values(attention, hidden)
        # Normed before or behind the split, by the width of the norm.
        keys = _norm_and_split(attention, self.key_norm, keys)
        if self.unit_keys:
            keys = F.normalize(keys, dim=-1)
        return keys, _norm_and_split(attention, self.value_norm, values, like=keys)

    def queries(self, attention: nn.Module, hidden: Tensor) -> Tensor:
        """Project `(batch, tokens, dim)` to queries `(batch, heads, tokens, head_dim)`."""
        query = self._queries(attention, hidden)
        query = _norm_and_split(attention, self.key_norm.replace("k", "q", 1), query)
        return F.normalize(query, dim=-1) if self.unit_keys else query

    def rows(self, attention: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weights of queries, keys and values, in any shape."""
        raise NotImplementedError

    def modules(self, attention: nn.Module) -> list[nn.Module]:
        """Return the modules that keys and values go through, the key layer first."""
        names = (*self.layers, self.key_norm, self.value_norm, *self.before)
        found = (reach(attention, name) for name in names)
        return [m for m in found if m is not None and not isinstance(m, nn.Identity)]

    def _keys_values(self, attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _queries(self, attention: Any, hidden: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Separate(Projection):
    """One layer each for queries, keys and values.

    Args:
        query: Name of the layer; None where queries do not come from tokens.
        key: Name of the layer.
        value: Name of the layer.
        key_half: Whether the key layer gives queries and keys, in this order.
        value_gate: Name of an activation behind a value layer that gives values and gates.
    """

    query: str | None = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    key_half: bool = False
    value_gate: str = ""

    @property
    def layers(self) -> tuple[str, ...]:
        """The key and the value layer."""
        return self.key, self.value

    def rows(self, attention: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Return the three weights."""
        names = (self.query or self.key, *self.layers)
        query, key, value = (weight_of(attention.get_submodule(name)) for name in names)
        return query if self.query else query[:0], key, value

    def _keys_values(self, attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = (per_token(attention.get_submodule(n), hidden) for n in self.layers)
        if self.key_half:
            keys = keys.chunk(2, dim=-1)[1]
        if self.value_gate:
            values = attention.get_submodule(self.value_gate)(values).chunk(2, dim=-1)[0]
        return keys, values

    def _queries(self, attention: Any, hidden: Tensor) -> Tensor:
        assert self.query is not None
        return per_token(attention.get_submodule(self.query), hidden)


@dataclass(frozen=True)
class Fused(Projection):
    """One layer for queries, keys and values, or for keys and values alone.

    Args:
        layer: Its name.
        order: Of its output channels: "qkv", the last ones in three equal parts; "kv", in two;
            "head", each head's query, key and value together.
        value_width: Attribute with the width of all values, where it is not that of keys.
    """

    layer: str = "qkv"
    order: str = "qkv"
    value_width: str = ""

    @property
    def layers(self) -> tuple[str, ...]:
        """The one layer."""
        return (self.layer,)

    def rows(self, attention: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Return the parts of the fused weight that queries, keys and values come from."""
        return self._split(attention, weight_of(attention.get_submodule(self.layer)).t())

    def _keys_values(self, attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Project with the rows of keys and values only, where the layer is a plain one."""
        layer: Any = attention.get_submodule(self.layer)
        width = self._inner_width(attention, layer)
        if width and self.order == "qkv" and is_plain_linear(layer):
            bias = None if layer.bias is None else layer.bias[-2 * width :]
            projected = F.linear(hidden, layer.weight[-2 * width :], bias)
            keys, values = projected.chunk(2, dim=-1)
        else:
            _, keys, values = self._split(attention, per_token(layer, hidden))
        if getattr(attention, "v_bias", None) is not None:
            # The layer has no bias of its own then; EVA, BEiT and SwinV2 keep it beside.
            k_bias = getattr(attention, "k_bias", None)
            keys, values = keys if k_bias is None else keys + k_bias, values + attention.v_bias
        return keys, values

    def _queries(self, attention: Any, hidden: Tensor) -> Tensor:
        query = self._split(attention, per_token(attention.get_submodule(self.layer), hidden))[0]
        bias = getattr(attention, "q_bias", None)
        return query if bias is None else query + bias

    def _inner_width(self, attention: Any, layer: nn.Module) -> int:
        """Return the width of all key heads together, 0 where the attention does not say."""
        size, heads = _number(attention, _HEAD_DIMS), _number(attention, _KEY_HEADS)
        if size and heads:
            return size * heads
        weight = getattr(layer, "weight", None)
        return 0 if weight is None else int(weight.shape[0]) // 3

    def _split(self, attention: Any, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split the last axis into queries, keys and values, heads side by side."""
        if self.order == "kv":
            keys, values = out.chunk(2, dim=-1)
            return out[..., :0], keys, values
        if self.value_width:
            last = int(getattr(attention, self.value_width))
            width = (out.shape[-1] - last) // 2
            query, key, value = torch.split(out, [width, width, last], dim=-1)
            return query, key, value
        if self.order == "qkv":
            layer = attention.get_submodule(self.layer)
            width = self._inner_width(attention, layer) or out.shape[-1] // 3
            heads, key_heads = (_number(attention, n) or 1 for n in (_HEADS, _KEY_HEADS))
            queries = width * heads // key_heads
            keys, values = out[..., -2 * width :].chunk(2, dim=-1)
            return out[..., -2 * width - queries : -2 * width], keys, values
        apart = out.reshape(*out.shape[:-1], _number(attention, _HEADS) or 1, -1)
        size = int(getattr(attention, "key_dim", apart.shape[-1] // 3))
        query, keys, values = torch.split(apart, [size, size, apart.shape[-1] - 2 * size], dim=-1)
        return query.flatten(-2), keys.flatten(-2), values.flatten(-2)


def per_token(module: nn.Module, hidden: Tensor) -> Tensor:
    """Call a module on `(batch, tokens, dim)`, or what of it acts on single tokens.

    Prompts have no place on the map: convolutions and poolings over it are left out for them,
    norms, activations and projections are not. A module made for maps sees each token as a map of
    one pixel.
    """
    if isinstance(module, nn.Sequential):
        for part in module:
            hidden = per_token(part, hidden)
    elif isinstance(module, nn.BatchNorm1d):
        hidden = module(hidden.flatten(0, 1)).reshape(*hidden.shape[:2], -1)
    elif not _is_spatial(module) and _takes_maps(module):
        # One map of one pixel per token: no statistics over tokens, no doubt about memory layout
        # (the CPU's batch norm of torch 2.15 returns wrong gradients for one map with a transposed
        # one).
        maps = hidden.flatten(0, 1)[:, :, None, None]
        hidden = module(maps).flatten(1).reshape(*hidden.shape[:2], -1)
    elif not _is_spatial(module):
        hidden = module(hidden)
    return hidden


def _is_spatial(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size != (1, 1) or module.stride != (1, 1)
    return any(part in type(module).__name__ for part in ("Pool", "Downsample", "Upsample"))


def _takes_maps(module: nn.Module) -> bool:
    return any(
        isinstance(part, nn.Conv2d | nn.BatchNorm2d) or type(part).__name__.endswith(_MAP_NAMES)
        for part in module.modules()
    )


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight `(out, in)` of a layer, or of the first layer inside a wrapper.

    Raises:
        UnreadableWeightsError: It is stored in a way that is not known.
    """
    weight = layer_weight(module)
    if weight is None:
        weight = next(w.values for w in weights_below(module) if w.values.dim() > 1)
    return weight.flatten(1)


def in_width(module: nn.Module) -> int:
    """Return the width of the tokens that a layer, or the first layer of a sequence, takes."""
    for part in module.modules():
        size = getattr(part, "in_features", None) or getattr(part, "in_channels", None)
        if size:
            return int(size)
    return int(weight_of(module).shape[1])


def split_heads(hidden: Tensor, head_dim: int) -> Tensor:
    """Turn `(batch, tokens, heads * head_dim)` into `(batch, heads, tokens, head_dim)`."""
    batch, tokens, width = hidden.shape
    return hidden.reshape(batch, tokens, width // head_dim, head_dim).transpose(1, 2)


def is_plain(module: nn.Module) -> bool:
    """Tell whether calling a module does nothing beyond its class's `forward` on its own tensors.

    False for modules with children (LoRA wrappers, parametrized layers), hooks, or a `forward`
    replaced on the instance (accelerate).
    """
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return not hooked and next(module.children(), None) is None


def is_plain_linear(module: nn.Module) -> bool:
    """Tell whether a layer's weight may be sliced in place of calling the layer."""
    return type(module) is nn.Linear and is_plain(module) and type(module.weight) is nn.Parameter


def _number(attention: Any, names: tuple[str, ...]) -> int:
    """Return what an attention says under the first of these names that it has, or 0."""
    return int(next((getattr(attention, n) for n in names if hasattr(attention, n)), 0) or 0)


def _norm_and_split(
    attention: Any, name: str, hidden: Tensor, like: Tensor | None = None
) -> Tensor:
    size = _number(attention, _HEAD_DIMS)
    if like is not None:
        # Values may be of another width than keys, never in another number of heads.
        size = hidden.shape[-1] // like.shape[1]
    elif not size or hidden.shape[-1] % size:
        size = hidden.shape[-1] // (_number(attention, _HEADS) or 1)
    norm = getattr(attention, name, None) or nn.Identity()
    weight = getattr(norm, "weight", None)
    if weight is not None and weight.numel() == hidden.shape[-1] != size:
        return split_heads(norm(hidden), size)
    normed: Tensor = norm(split_heads(hidden, size))
    return normed


def reach(root: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a dotted path below `root`, or None where there is none."""
    found: object = root
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, nn.Module) else None


def join(*parts: str) -> str:
    """Join path parts with dots, leaving out the empty ones."""
    return ".".join(part for part in parts if part)
