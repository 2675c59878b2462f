"""What a backbone is made of, as plain values: paths into the host, never modules.

Paths survive deepcopy, pickling and a module that a user swaps (a LoRA-wrapped projection, say);
the module behind a path is looked up when it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn import functional as F


def module_at(root: nn.Module, path: str) -> nn.Module:
    """Return the module at a dotted path below `root`; the empty path is `root` itself."""
    module = root
    for name in path.split(".") if path else ():
        module = getattr(module, name)
    return module


def join(*parts: str) -> str:
    """Join path parts with dots, leaving out the empty ones."""
    return ".".join(part for part in parts if part)


def is_kind(module: nn.Module, name: str, package: str = "") -> bool:
    """Tell whether a class called `name` from `package` is in the module's class hierarchy."""
    return any(
        cls.__name__ == name and cls.__module__.startswith(package) for cls in type(module).__mro__
    )


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a block or attention is called with first: its hidden states."""
    return args[0] if args else next(iter(kwargs.values()))


class Projection(Protocol):
    """How keys and values come out of an attention module's normed input."""

    def keys_values(self, attention: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Project `(batch, tokens, dim)` to keys and values `(batch, heads, tokens, head_dim)`."""

    def rows(self, attention: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weight rows `(out, dim)` of queries, keys and values."""

    def modules(self, attention: nn.Module) -> list[nn.Module]:
        """Return the modules that keys and values go through."""


@dataclass(frozen=True)
class Separate:
    """One linear layer each for queries, keys and values."""

    query: str
    key: str
    value: str
    head_dim: str = "head_dim"

    def keys_values(self, attention: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Call the two layers and split the heads."""
        size = getattr(attention, self.head_dim)
        keys = split_heads(getattr(attention, self.key)(hidden), size)
        return keys, split_heads(getattr(attention, self.value)(hidden), size)

    def rows(self, attention: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Return the three weights."""
        query, key, value = (getattr(attention, n) for n in (self.query, self.key, self.value))
        return query.weight, key.weight, value.weight

    def modules(self, attention: nn.Module) -> list[nn.Module]:
        """Return the key and the value layer."""
        return [getattr(attention, self.key), getattr(attention, self.value)]


@dataclass(frozen=True)
class Fused:
    """One linear layer whose last rows are queries, keys and values, in this order.

    Rows in front of them (the MLP half of a parallel block) are left alone. `key_norm` names the
    norm over the head dimension that keys go through.
    """

    layer: str = "qkv"
    key_norm: str = "k_norm"

    def keys_values(self, attention: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Project with the rows of keys and values only, where the layer is a plain one."""
        layer, width = getattr(attention, self.layer), _inner_width(attention)
        if is_plain_linear(layer):
            bias = None if layer.bias is None else layer.bias[-2 * width :]
            projected = F.linear(hidden, layer.weight[-2 * width :], bias)
        else:
            projected = layer(hidden)[..., -2 * width :]
        keys, values = (split_heads(x, _head_dim(attention)) for x in projected.chunk(2, dim=-1))
        return getattr(attention, self.key_norm, nn.Identity())(keys), values

    def rows(self, attention: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Return the three slices of the fused weight."""
        query, key, value = (
            getattr(attention, self.layer).weight[-3 * _inner_width(attention) :].chunk(3)
        )
        return query, key, value

    def modules(self, attention: nn.Module) -> list[nn.Module]:
        """Return the fused layer and the key norm."""
        norm = getattr(attention, self.key_norm, None)
        return [getattr(attention, self.layer)] + ([norm] if norm is not None else [])


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


def _head_dim(attention: Any) -> int:
    return int(attention.head_dim)


def _inner_width(attention: Any) -> int:
    return int(attention.num_heads) * _head_dim(attention)


@dataclass(frozen=True)
class Attention:
    """One softmax over keys inside a block.

    Args:
        path: From the block to the module whose `forward` meets the softmax; "" is the block.
        norm: From the block to the norm in front of the projections; None in post-norm blocks.
        projection: How keys and values come about.
    """

    path: str
    norm: str | None
    projection: Projection


@dataclass(frozen=True)
class Block:
    """A transformer block: its path in the host, its attentions, its width and its stage."""

    path: str
    attentions: tuple[Attention, ...]
    width: int
    stage: int = 0


@dataclass(frozen=True)
class Head:
    """The classifier.

    Args:
        paths: In the host; the second one is the distillation head.
        reads: What it is fed: "cls", "cls+mean", "mean", "map" ..., where the tokens went through
            the final norm first; ":norm-after" (pooled, then normed) or ":no-norm" otherwise.
        width: Number of input features.
    """

    paths: tuple[str, ...]
    reads: str
    width: int


@dataclass(frozen=True)
class Encoder:
    """A vision transformer inside a host, as the family that knows it describes it.

    Args:
        family: Name of the family, "timm ViT" say.
        library: "timm" or "transformers".
        path: Of the encoder in the host ("" where the host is the encoder).
        blocks: All transformer blocks in forward order.
        prefix_tokens: Tokens in front of the image tokens (CLS, registers, distillation).
        has_cls: Whether the first of them is a CLS token.
        final_norm: Path of the module that norms the whole token sequence behind the last block;
            None where the model norms something else or nothing.
        norm_after_pool: Path of the norm between pooling and head, or None.
        norm_weights: Path of the norm whose weights belong to the backbone's fingerprint, or None.
        head: The classifier, or None.
        gate: Path of the module in front of the blocks that no checkpoint encloses, or None where
            the first prompted block's own hooks are outside (transformers).
        input_size: `(channels, height, width)` of an image the encoder takes, a small one.
    """

    family: str
    library: str
    path: str
    blocks: tuple[Block, ...]
    prefix_tokens: int
    has_cls: bool
    final_norm: str | None
    norm_after_pool: str | None
    norm_weights: str | None
    head: Head | None
    gate: str | None
    input_size: tuple[int, int, int]

    def reads(self, pooling: str) -> str:
        """Return what the head is fed under a pooling: `head.reads` of the adapter format."""
        default = "" if self.head is None else self.head.reads
        if pooling == "default":
            return default
        name = {"cls": "cls", "image": "mean"}.get(pooling, f"{pooling}-mean")
        if default.endswith(":no-norm"):
            return f"{name}:no-norm"
        # For a single token it makes no difference on which side of the pooling the norm stands.
        return f"{name}:norm-after" if self.norm_after_pool and pooling != "cls" else name

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def widths(self) -> dict[int, int]:
        """Width of each stage."""
        return {block.stage: block.width for block in self.blocks}


def first_conv_kernel(encoder: nn.Module) -> tuple[int, int]:
    """Return the kernel `(height, width)` of the patch or stem convolution, in pixels."""
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            height, width = module.kernel_size
            return int(height), int(width)
    return 1, 1
