"""What a backbone is made of, as plain values: paths into the host, never modules.

Paths survive deepcopy, pickling and a module that a user swaps (a LoRA-wrapped projection, say);
the module behind a path is looked up when it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from .projection import Projection


def is_kind(module: nn.Module, name: str, package: str = "") -> bool:
    """Tell whether a class called `name` from `package` is in the module's class hierarchy."""
    kind: Any = type(module)
    return _is_subclass(kind, name, package)


@lru_cache(maxsize=4096)
def _is_subclass(kind: Any, name: str, package: str) -> bool:
    return any(c.__name__ == name and c.__module__.startswith(package) for c in kind.__mro__)


def is_below(name: str, *paths: str) -> bool:
    """Tell whether a name is one of these paths, or stands below one; all stand below ""."""
    return any(not path or name == path or name.startswith(f"{path}.") for path in paths)


def ancestors(host: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module of what stands around a path, from the nearest out to the host."""
    while path:
        path = path.rpartition(".")[0]
        yield path, host.get_submodule(path)


def as_pair(size: Any) -> tuple[int, int] | None:
    """Return height and width of a size as models write it, one number or a list; None for none."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, tuple | list) and len(size) >= 2:
        return int(size[-2]), int(size[-1])
    return None


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a block or attention is called with first: its hidden states."""
    return args[0] if args else next(iter(kwargs.values()))


@dataclass(frozen=True)
class Attention:
    """One softmax over keys inside a block.

    Args:
        path: From the block to the module that holds the projections; "" is the block.
        norm: From the block to the norm in front of the projections; None in post-norm blocks.
        projection: How keys and values come about.
        at: From the block to the module whose `forward` meets the softmax, where it is not `path`:
            a block that cuts its tokens into windows before it calls its attention.
        rotates: Whether keys are rotated by their position behind the projection: "" (no), "yes",
            or "skewed" where the rotation of the model's own code keeps no lengths.
        behind: Whether the block changes its tokens (a convolution, say) in front of the norm;
            prompts then enter behind that.
        reduces: Whether the model's own keys and values are pooled or convolved over the map,
            in front of the projections ("input") or behind them ("output"); prompts are not.
        many: Whether there is a softmax per segment of a packed sequence.
        scores: "lengthen" an explicit score matrix from the start, or only in front of its
            softmax ("late"), where the model slices it; its scale must be in the queries then.
            "unused": the model computes one for nobody, beside its fused attention.
        heads_axis: Of five-dimensional keys, with windows on the other of axes 1 and 2.
    """

    path: str
    norm: str | None
    projection: Projection
    at: str | None = None
    rotates: str = ""
    behind: bool = False
    reduces: str = ""
    many: bool = False
    scores: str = "lengthen"
    heads_axis: int = 1

    @property
    def target(self) -> str:
        """From the block to the module whose `forward` is replaced."""
        return self.path if self.at is None else self.at


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
        simple: Whether each of them is one layer that another linear layer can stand in for.
    """

    paths: tuple[str, ...]
    reads: str
    width: int
    simple: bool = True


@dataclass(frozen=True)
class Encoder:
    """A vision transformer inside a host, as the family that knows it describes it.

    Args:
        family: Name of the family, "timm ViT" say.
        library: "timm" or "transformers".
        path: Of the encoder in the host ("" where the host is the encoder).
        input_size: `(channels, height, width)` of an image the encoder takes, a small one.
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
        known: Whether prefix tokens and final norm above are facts, so that tokens may be pooled.
        skipped: Parts that mix tokens or channels in another way and get no prompts.
        inputs: Of a dummy forward: "image", "video", "patches" (cut and padded), "guess" (an image,
            if that works), or "none" where only real ones will do.
    """

    family: str
    library: str
    path: str
    input_size: tuple[int, int, int]
    blocks: tuple[Block, ...] = ()
    prefix_tokens: int = 0
    has_cls: bool = False
    final_norm: str | None = None
    norm_after_pool: str | None = None
    norm_weights: str | None = None
    head: Head | None = None
    gate: str | None = None
    known: bool = True
    skipped: tuple[str, ...] = ()
    inputs: str = "image"

    @property
    def plain(self) -> bool:
        """Whether all blocks work on one sequence `(batch, tokens, dim)`.

        Prompts may be carried through them as tokens then. So it is where all are of one list and
        one width, none of them cut into windows.
        """
        whole = all(a.at is None and not a.many for b in self.blocks for a in b.attentions)
        return self.known or (whole and {block.stage for block in self.blocks} == {0})

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
    def head_paths(self) -> tuple[str, ...]:
        """Paths of the classifier's parts in the host; none where there is no classifier."""
        return () if self.head is None else self.head.paths

    @property
    def headless(self) -> str | None:
        """What the model has in place of one classifier, in words; None where it has one."""
        if self.head is None:
            return "no classifier"
        return "two classifiers (distillation)" if len(self.head.paths) > 1 else None

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def start(self) -> str:
        """Path of the first block, or of the encoder where no blocks are known."""
        return self.blocks[0].path if self.blocks else self.path

    def widths_at(self, entries: list[int]) -> list[int]:
        """Return the distinct widths of the blocks that prompts enter, in rising order."""
        return sorted({self.blocks[entry].width for entry in entries})

    @property
    def widths(self) -> dict[int, int]:
        """Width of each stage."""
        return {block.stage: block.width for block in self.blocks}


@dataclass(frozen=True)
class ImageFacts:
    """What a model says about the images it takes.

    Args:
        channels: Of an image.
        sizes: `(height, width)`, the likeliest first; the default one where it takes several.
        fixed: Whether it takes no other size; None where only trying tells.
        mean: Of the normalisation, per channel; 0.5 where nothing is said.
        std: Likewise.
    """

    channels: int
    sizes: tuple[tuple[int, int], ...]
    fixed: bool | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


def first_floating(module: nn.Module) -> nn.Parameter:
    """Return the first parameter that is no integer: new tensors go to its device and dtype."""
    return next(p for p in module.parameters() if p.is_floating_point())


def first_conv_kernel(encoder: nn.Module) -> tuple[int, int]:
    """Return the kernel `(height, width)` of the patch or stem convolution, in pixels."""
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            height, width = module.kernel_size
            return int(height), int(width)
    return 1, 1
