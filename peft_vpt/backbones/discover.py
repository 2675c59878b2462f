"""Finding the transformer blocks of a model by the attention modules that it holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import UnsupportedArchitectureError
from .anatomy import Attention, Block
from .projection import Fused, Projection, Separate, in_width, join, reach

# Of what stands in front of an attention, in either library; the first that a block has.
_NORMS = (
    "layernorm_before",
    "layer_norm1",
    "norm1",
    "operator_norm",
    "rms_norm1",
    "input_layernorm",
    "attention_norm",
    "pre_attention_layer_norm",
    "layer_norm_1",
    "ln_1",
    "layer_norm",
    "norm",
)
_PLAIN = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"), ("qkv",))


class Row:
    """What a table says about a class of attention modules.

    Args:
        projection: How keys and values come about; None: as the names of its layers say.
        norms: Names beside the attention or on the block, the first that exists is in front of
            the attention; empty in post-norm blocks.
        up: Levels from the attention up to its block.
        facts: Fields of `Attention`; at="" is the block.
    """

    def __init__(
        self,
        projection: Projection | None = None,
        norms: tuple[str, ...] = _NORMS,
        up: int = 1,
        **facts: Any,
    ) -> None:
        self.projection, self.norms, self.up, self.facts = projection, norms, up, facts

    def but(self, **changes: Any) -> Row:
        """Return the same row with other values."""
        own = {"projection": self.projection, "norms": self.norms, "up": self.up}
        return Row(**own | self.facts | changes)


@dataclass(frozen=True)
class Refused:
    """Why a class of modules that mix tokens or channels takes no prompts."""

    reason: str


CHANNEL = Refused("channel attention: its softmax runs over channels, not over tokens")
LINEAR = Refused("linear attention: no softmax over keys that prompts could join")
MERGING = Refused("a transition between stages; prompts take no part in merging")


@dataclass
class Found:
    """Blocks in forward order, and what was met that takes no prompts: class name to reason."""

    blocks: tuple[Block, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)

    def unsupported(self, name: str, reason: str = "") -> UnsupportedArchitectureError:
        """Return the error of a model that holds nothing else than what was refused."""
        reason = reason or "; ".join(self.skipped)
        return UnsupportedArchitectureError(
            "inject_prompts",
            f"{name} has no attention that prompts could join as keys and values "
            f"({reason or 'it holds no softmax attention over tokens'})",
        )

    @property
    def skipped(self) -> tuple[str, ...]:
        """What was met that takes no prompts, and why."""
        return tuple(f"{name}: {reason}" for name, reason in self.refused.items())


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
        if isinstance(row, Refused):
            found.refused[type(module).__name__] = row.reason
        elif row is not None and (projection := row.projection or plain_layers(module)):
            parts = name.split(".")
            end = len(parts) - row.up
            block, inside = ".".join(parts[:end]), ".".join(parts[end:])
            norm = _norm(model.get_submodule(block), inside, row.norms)
            blocks.setdefault(block, []).append(Attention(inside, norm, projection, **row.facts))
    widths = [_width(model.get_submodule(name), parts[0]) for name, parts in blocks.items()]
    stages = _stages(list(blocks), widths)
    found.blocks = tuple(
        Block(join(path, name), tuple(attentions), width, stage)
        for (name, attentions), width, stage in zip(blocks.items(), widths, stages, strict=True)
    )
    return found


def _norm(block: nn.Module, inside: str, names: tuple[str, ...]) -> str | None:
    """Return the path of the norm in front of an attention, beside it or on the block."""
    beside = [join(inside.rpartition(".")[0], name) for name in names]
    return next((name for name in (*beside, *names) if reach(block, name) is not None), None)


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


def first_layer(root: nn.Module, path: str, *names: str | None) -> str | None:
    """Return the path in the host of the first of some layers of a module at a path that it has.

    An identity, in the place of a norm that stands elsewhere, is none.
    """
    layers = ((name, reach(root, name)) for name in filter(None, names))
    found = (name for name, layer in layers if not isinstance(layer, nn.Identity | None))
    return next((join(path, name) for name in found), None)
