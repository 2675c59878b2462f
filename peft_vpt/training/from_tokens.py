"""First values of prompts from the tokens of real images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.anatomy import first_floating
from ..backbones.find import image_path
from ..errors import SpecError, UnsupportedArchitectureError
from ..hosts import device_of, host_and_prompts
from ..prompts import Prompts
from ..rehearsal import rehearse

_CALL = "prompts_from_tokens"
# These have tokens of every kind that a task has.
MOST_IMAGES = 64
# Images per forward, so that it needs no more memory than a training step.
_AT_ONCE = 8
_IMAGES_ONLY = ("image", "guess")
_KEEP = "keep `init='xavier'`"


@torch.no_grad()
def prompts_from_tokens(
    model: nn.Module, pixels: Tensor, *, generator: torch.Generator | None = None
) -> None:
    """Give prompts the directions of tokens that the bare backbone makes of images, in place.

    Each prompt becomes a token drawn from those that enter its own block (of shared prompts: the
    first of their blocks), scaled to the root mean square that the prompts of that block have now.
    Prefix tokens are left out where the model's own are known. In pre-norm blocks the norm takes
    the scale away, so prompts look like tokens that the block was pretrained on, while learning
    rates mean what they mean for random prompts. Random directions at every block can drown what
    images differ in: see `docs/decisions/0010-prompts-begin-as-tokens.md`. A file written later
    says that prompts began from given values.

    Args:
        model: Freshly prompted: every value that prompts have is replaced.
        pixels: Images of the task, preprocessed, `(images, channels, height, width)`; some dozens
            are enough.
        generator: Of the draw; None: torch's global one.

    Raises:
        NotPromptedError: The model carries no prompts.
        SpecError: Prompts that are no tokens of a block's width (other locations than "prepend",
            projected ones), that are all zero, on meta or sharded; too few images, or images that
            give tokens that are not finite.
        UnsupportedArchitectureError: A model that takes no images of this shape, or a block that
            takes something else than tokens.

    Example:
        >>> inject_prompts(vit, length=50, deep=True)
        >>> prompts_from_tokens(vit, next(iter(loader))[0])
    """
    host, prompts = host_and_prompts(model, _CALL)
    _check(prompts, pixels)
    entries = _entries(prompts)
    # A generator of its own: that of torch is put back behind the forward.
    device = "cpu" if generator is None else generator.device
    seed = int(torch.randint(2**62, (1,), generator=generator, device=device))
    draw = torch.Generator().manual_seed(seed)
    kept: dict[int, list[Tensor]] = {entry: [] for entry in entries}
    counts = dict.fromkeys(entries, 0)

    def keep(entry: int, tokens: Tensor) -> None:
        counts[entry] += len(tokens)
        order = torch.randperm(len(tokens), generator=draw)[: len(prompts.stored(entry))]
        kept[entry].append(tokens[order.to(tokens.device)])

    _watch(host, prompts, pixels, entries, keep)
    values = {e: _chosen(prompts, e, torch.cat(kept[e]), counts[e], draw) for e in entries}
    for entry, value in values.items():
        prompts.stored(entry).copy_(value)
    prompts.clear_cache()
    prompts.spec = dataclasses.replace(prompts.spec, init="tensor")


@torch.no_grad()
def fewest_tokens(model: nn.Module, pixels: Tensor) -> float:
    """Return how many tokens an image gives the prompted block that gets fewest.

    Args:
        model: Prompted.
        pixels: `(images, channels, height, width)`.

    Raises:
        VPTError: As `prompts_from_tokens`, but for too few images.
    """
    host, prompts = host_and_prompts(model, _CALL)
    _check(prompts, pixels)
    counts = dict.fromkeys(_entries(prompts), 0)

    def count(entry: int, tokens: Tensor) -> None:
        counts[entry] += len(tokens)

    _watch(host, prompts, pixels, list(counts), count)
    return min(counts.values()) / len(pixels)


def begin_as_tokens(
    model: nn.Module, image: Callable[[int], Tensor], number: int, generator: torch.Generator
) -> None:
    """Call `prompts_from_tokens` with as many of a number of images as it needs, drawn.

    Args:
        model: Freshly prompted.
        image: Returns the pixels of an index, `(channels, height, width)`.
        number: Of images.
        generator: Of both draws.

    Raises:
        VPTError: As `prompts_from_tokens`.
    """
    chosen = torch.randperm(number, generator=generator)[:MOST_IMAGES].tolist()
    pixels = torch.stack([image(index) for index in chosen])
    prompts_from_tokens(model, pixels, generator=generator)


def _entries(prompts: Prompts) -> list[int]:
    """Return the first of the blocks behind each stored prompt."""
    first: dict[int, int] = {}
    for entry in prompts.entries:
        first.setdefault(id(prompts.stored(entry)), entry)
    return list(first.values())


def _check(prompts: Prompts, pixels: Tensor) -> None:
    spec, inputs = prompts.spec, prompts.encoder.inputs
    among_tokens = spec.where.tokens and not spec.is_pixel
    if not among_tokens or spec.project:
        what = "project=..." if among_tokens else f"location={spec.location!r}"
        problem = f"prompts with `{what}` are no tokens of a block"
        raise SpecError(_CALL, problem, "it needs `location='prepend'` without projection")
    if inputs not in _IMAGES_ONLY:
        problem = f"the model does not take images (batch, channels, height, width) but {inputs}"
        raise UnsupportedArchitectureError(_CALL, problem, _KEEP)
    if not (isinstance(pixels, Tensor) and pixels.dim() == 4 and len(pixels)):
        got = tuple(getattr(pixels, "shape", ())) or type(pixels).__name__
        problem = (
            f"must be a tensor (images, channels, height, width) of one image or more, got {got}"
        )
        raise SpecError(_CALL, problem, given={"pixels": ...})
    stored = [prompts.stored(entry) for entry in prompts.entries]
    if prompts.sharded() or any(values.is_meta for values in stored):
        raise SpecError(_CALL, "call it before the model is sharded or offloaded")
    if any(not bool(values.any()) for values in stored):
        problem = "prompts that are all zero give no size to scale tokens to"
        raise SpecError(_CALL, problem, "inject them with `init='xavier'`")


def _watch(
    host: nn.Module,
    prompts: Prompts,
    pixels: Tensor,
    entries: list[int],
    take: Callable[[int, Tensor], None],
) -> None:
    """Run images through the bare model; give the tokens `(tokens, width)` that enter blocks."""
    module: Any = host.get_submodule(image_path(host, prompts.encoder))
    dtype = first_floating(module).dtype
    device = device_of(host, prompts.encoder)
    blocks = {prompts.encoder.blocks[e].path: e for e in entries}
    watch = {path: host.get_submodule(path) for path in blocks}

    def see(path: str, hidden: Any) -> None:
        take(blocks[path], _tokens(prompts, blocks[path], hidden, watch[path]))

    for part in torch.split(pixels, _AT_ONCE):
        inputs = part.to(device, dtype)
        shown = rehearse(module, [inputs], watch, see=see, within=prompts.disable)
        if shown.error is not None:
            raise shown.error
        for path in watch.keys() - shown.order.keys():
            _refuse(prompts, blocks[path], "does not run")


def _tokens(prompts: Prompts, entry: int, hidden: Any, block: nn.Module) -> Tensor:
    """Return the hidden states of a block as rows, without prefix tokens."""
    encoder, width = prompts.encoder, prompts.encoder.blocks[entry].width
    shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else (type(hidden).__name__,)
    # A map as wide as its channels says nothing; convolutions take channels first.
    unclear = len(shape) == 4 and shape[1] == width
    channels_first = unclear and any(isinstance(m, nn.Conv2d) for m in block.modules())
    if len(shape) < 2 or shape[-1] != width or channels_first:
        _refuse(prompts, entry, f"takes {shape}")
    if len(shape) == 3 and encoder.known:
        hidden = hidden[:, encoder.prefix_tokens :]
    rows: Tensor = hidden.reshape(-1, width).float()
    return rows


def _chosen(
    prompts: Prompts, entry: int, tokens: Tensor, seen: int, draw: torch.Generator
) -> Tensor:
    """Choose as many tokens as there are prompts, scaled to their root mean square.

    Raises:
        SpecError: There are fewer, or one is not finite.
    """
    stored, path = prompts.stored(entry), prompts.encoder.blocks[entry].path
    if seen < len(stored):
        problem = (
            f"these images give block {entry} ({path}) {seen} tokens, fewer than its "
            f"{len(stored)} prompts"
        )
        raise SpecError(_CALL, problem, "give more images")
    order = torch.randperm(len(tokens), generator=draw)[: len(stored)]
    chosen = tokens[order.to(tokens.device)]
    if not bool(chosen.isfinite().all()):
        problem = f"these images give block {entry} ({path}) tokens that are not finite"
        raise SpecError(_CALL, problem, "look for broken pixels")
    size = stored.float().square().mean().sqrt()
    scaled: Tensor = chosen / chosen.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
    return scaled * size.to(scaled.device)


def _refuse(prompts: Prompts, entry: int, what: str) -> None:
    block = prompts.encoder.blocks[entry]
    problem = (
        f"block {entry} ({block.path}) {what}, where tokens of the width {block.width} are needed"
    )
    raise UnsupportedArchitectureError(_CALL, problem, _KEEP)
