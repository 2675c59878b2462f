"""Finding the transformer blocks of a model by the attention modules that it holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..errors import UnsupportedArchitectureError
from .anatomy import Attention, Block
from .projection import Fused, Projection, Separate, in_width, join, reach

_FUSED = Fused()
_PLAIN = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"), ("qkv",))


@dataclass(frozen=True)
class Row:
    """What a table says about a class of attention modules.

    Args:
        attention: What is known of it; path and norm are those of the block that it is found in.
        norms: Names beside the attention or on the block, the first that exists is in front of
            the attention; empty in post-norm blocks.
        up: Levels from the attention up to its block.
    """

    attention: Attention
    norms: tuple[str, ...] = ("norm1", "norm")
    up: int = 1

    def but(self, **facts: Any) -> Row:
        """Return the same row with other facts of the attention."""
        return replace(self, attention=replace(self.attention, **facts))


def row(
    projection: Projection = _FUSED, norms: tuple[str, ...] = Row.norms, up: int = 1, **facts: Any
) -> Row:
    """Return a row by the fields of `Attention`: at="" is the block."""
    return Row(Attention("", None, projection, **facts), norms, up)


@dataclass(frozen=True)
class Refused:
    """Why a class of modules that mix tokens or channels takes no prompts."""

    reason: str


@dataclass
class Found:
    """Blocks in forward order, and what was met that takes no prompts: class name to reason."""

    blocks: tuple[Block, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)

    def missing(self, model: nn.Module, path: str) -> str:
        """Return the path of a block of the list `blocks` that is without attention, or ""."""
        known = tuple(f"{block.path}." for block in self.blocks)
        listed = reach(model, "blocks")
        for index, _ in enumerate(listed.children() if listed is not None else ()):
            block = join(path, "blocks", str(index))
            if not any(found.startswith(f"{block}.") for found in known):
                return block
        return ""

    def unsupported(self, name: str, reason: str = "") -> UnsupportedArchitectureError:
        """Return the error of a model that holds nothing else than what was refused."""
        reason = reason or "; ".join(f"{part}: {why}" for part, why in self.refused.items())
        return UnsupportedArchitectureError(
            "inject_prompts",
            f"{name} has no attention that prompts could join as keys and values "
            f"({reason or 'it holds no softmax attention over tokens'})",
        )

    def one_list(self) -> bool:
        """Tell whether all blocks are of one list and one width, none of them cut into windows."""
        whole = all(a.at is None and not a.many for b in self.blocks for a in b.attentions)
        return whole and {block.stage for block in self.blocks} == {0}


Rule = Callable[[str, nn.Module, nn.Module], Row | Refused | None]


def find_blocks(model: nn.Module, path: str, rule: Rule) -> Found:
    """Find every attention that a rule knows, grouped by block.

    Args:
        model: The encoder.
        path: Its path in the host.
        rule: Says what a module is, from its path in the encoder, itself and its parent; None: no
            attention.
    """
    found = Found()
    blocks: dict[str, list[Attention]] = {}
    for name, module in model.named_modules():
        row = rule(name, module, model.get_submodule(name.rpartition(".")[0]))
        if isinstance(module, nn.MultiheadAttention):
            row = Refused("torch.nn.MultiheadAttention computes its softmax out of reach")
        if isinstance(row, Refused):
            found.refused[type(module).__name__] = row.reason
        elif row is not None:
            parts = name.split(".")
            end = len(parts) - row.up
            block, inside = ".".join(parts[:end]), ".".join(parts[end:])
            blocks.setdefault(block, []).append(_attention(model.get_submodule(block), inside, row))
    widths = [_width(model.get_submodule(name), parts[0]) for name, parts in blocks.items()]
    stages = _stages(list(blocks), widths)
    found.blocks = tuple(
        Block(join(path, name), tuple(attentions), width, stage)
        for (name, attentions), width, stage in zip(blocks.items(), widths, stages, strict=True)
    )
    return found


def _attention(block: nn.Module, inside: str, row: Row) -> Attention:
    beside = [join(inside.rpartition(".")[0], n) for n in row.norms]
    norms = (name for name in (*beside, *row.norms) if reach(block, name) is not None)
    return replace(row.attention, path=inside, norm=next(norms, None))


def _width(block: nn.Module, attention: Attention) -> int:
    """Return the width of the tokens that the attention's block takes."""
    if attention.norm is not None:
        weight = getattr(block.get_submodule(attention.norm), "weight", None)
        if weight is not None:
            return int(weight.numel())
    owner: Any = block.get_submodule(attention.path)
    return in_width(attention.projection.modules(owner)[0])


def _stages(paths: list[str], widths: list[int]) -> list[int]:
    """Number the groups of blocks: of one width, in one list or one member of a list of lists."""
    keys = []
    for path, width in zip(paths, widths, strict=True):
        parts = path.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        nested = len(numbers) > 1
        end = (numbers[0] + 1 if nested else numbers[0]) if numbers else len(parts)
        keys.append((".".join(parts[:end]), width))
    order = list(dict.fromkeys(keys))
    return [order.index(key) for key in keys]


def plain_layers(module: nn.Module) -> Projection | None:
    """Recognise ordinary projections by the names of a module's layers."""
    for names in _PLAIN:
        if all(reach(module, name) is not None for name in names):
            return Separate(*names) if len(names) > 1 else Fused(*names)
    return None
