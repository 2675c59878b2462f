"""Where adapters stand: the feed-forward layers of a model's blocks, as they really run."""

from __future__ import annotations

from inspect import signature
from typing import Any, NamedTuple

from torch import nn

from ..backbones.anatomy import Block, Encoder
from ..backbones.paths import join, module_at
from ..errors import UnsupportedArchitectureError
from .trial import Calls, Shape, dummy_calls

_NAMES = ("mlp", "ffn", "feed_forward", "mlp_channels", "output")
# Of a map `(batch, channels, height, width)` and of tokens `(..., channels)`.
_MAPS, _TOKENS = 1, -1


class FeedForward(NamedTuple):
    """The feed-forward layer of a block.

    Args:
        path: In the host, in front of the residual sum.
        width: Of what comes out of it.
        axis: Of the channels there.
    """

    path: str
    width: int
    axis: int


def feed_forwards(host: nn.Module, encoder: Encoder) -> list[FeedForward]:
    """Return the feed-forward layers of all blocks, in their order.

    Raises:
        UnsupportedArchitectureError: A block shows none, a model has more of them than those of
            known blocks, or one is called in another way than known.
    """
    name = type(host).__name__
    if not encoder.blocks:
        raise UnsupportedArchitectureError(
            f"apply_protocol('adapter'): {name} has no transformer blocks."
        )
    paths = []
    for index, block in enumerate(encoder.blocks):
        inside = _inside(module_at(host, block.path))
        if inside is None:
            raise UnsupportedArchitectureError(
                f"apply_protocol('adapter'): block {index} ({block.path}) of "
                f"{name} shows no feed-forward layer called {' or '.join(_NAMES)}."
            )
        paths.append(join(block.path, inside))
    _refuse_others(host, encoder)
    calls = dummy_calls(host, encoder, paths)
    pairs = zip(paths, encoder.blocks, strict=True)
    return [_described(host, path, block, calls) for path, block in pairs]


def _inside(block: nn.Module) -> str | None:
    """Return the path of the block's feed-forward layer, in front of the residual sum."""
    children = dict(block.named_children())
    name = next((name for name in _NAMES if name in children), None)
    # DPT's, VideoMAE's and others' `output` takes the residual too, and adds it behind `dense`.
    if name != "output" or len(signature(children[name].forward).parameters) == 1:
        return name
    return "output.dense" if hasattr(children[name], "dense") else None


def _refuse_others(host: nn.Module, encoder: Encoder) -> None:
    """Raise where blocks without known attention have feed-forward layers too.

    Such layers stand among the known blocks; what pools behind the last one is no block.
    """
    blocks = tuple(f"{block.path}." for block in encoder.blocks)
    paths = [path for path, _ in module_at(host, encoder.path).named_modules()]
    paths = [join(encoder.path, path) for path in paths]
    last = max(i for i, path in enumerate(paths) if f"{path}." in blocks)
    for path in paths[:last]:
        owner, _, name = path.rpartition(".")
        if name in _NAMES[:-1] and not f"{path}.".startswith(blocks):
            raise UnsupportedArchitectureError(
                f"apply_protocol('adapter'): {type(host).__name__} has feed-forward layers in "
                f"other blocks than those with attention ({owner}), so adapters behind all of them "
                "are not possible. Use prompts, 'bias' or 'partial-k'."
            )


def _described(host: nn.Module, path: str, block: Block, calls: Calls | None) -> FeedForward:
    """Return what is behind a layer: as its dummy call showed, or else as its parts say."""
    width, axis = _last_layer(module_at(host, path), block.width)
    if calls is None:
        return FeedForward(path, width, axis)
    shape = calls.outputs.get(path, ())
    for at in dict.fromkeys((axis, _TOKENS)):
        if _fits(shape, at) and shape[at] in (width, block.width):
            return FeedForward(path, shape[at], at)
    what = f"gives something of shape {shape}" if path in calls.order else "is not called as such"
    raise UnsupportedArchitectureError(
        f"apply_protocol('adapter'): the feed-forward layer {path} of {type(host).__name__} "
        f"{what}, where tokens or maps of {width} channels were expected. Use prompts, 'bias' or "
        "'partial-k'."
    )


def _fits(shape: Shape, axis: int) -> bool:
    return len(shape) == 4 if axis == _MAPS else len(shape) > 1


def _last_layer(layer: nn.Module, width: int) -> tuple[int, int]:
    """Return the outputs of the last layer with weights inside, and where they stand."""
    axis = _TOKENS
    for module in layer.modules():
        part: Any = module
        if isinstance(part, nn.Conv2d) and part.groups == 1:
            width, axis = part.out_channels, _MAPS
        elif isinstance(getattr(part, "out_features", None), int):
            width, axis = part.out_features, _TOKENS
    return width, axis
