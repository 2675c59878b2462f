"""Where the locations beside "prepend" meet a model, and whether they can.

Everything here leaves the model as it was.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.anatomy import Encoder
from ..backbones.projection import join
from ..errors import SpecError, UnsupportedArchitectureError
from ..prompts import PixelPlace
from ..rehearsal import ENTRANCES, Probe, Trial
from ..spec import NOWHERE, PromptSpec
from .add import check_addable

# How far from a length that breaks the grid another one is looked for.
_REACH = 32


def survey(
    host: nn.Module, encoder: Encoder, spec: PromptSpec, device: torch.device
) -> PixelPlace | None:
    """Check a location against a model; return where pixel prompts meet it, None for others.

    Args:
        host: The bare model, or a prompted one while its prompts are disabled.
        encoder: Its anatomy.
        spec: Resolved options.
        device: Where its forward runs.

    Raises:
        SpecError: A length that the model cannot take at this location.
        UnsupportedArchitectureError: The model offers no place for it.
    """
    if spec.location in ("prepend", NOWHERE):
        return None
    probe = Probe(host, encoder, device)
    if spec.location == "add":
        _check_add(probe, spec)
        return None
    return {"pad": _pad, "concat-channel": _concat, "prepend-pixel": _patches}[spec.location](
        probe, spec
    )


def _call(spec: PromptSpec) -> str:
    return f"inject_prompts(location='{spec.location}', length={spec.length})"


def _check_add(probe: Probe, spec: PromptSpec) -> None:
    assert spec.layers is not None
    blocks = probe.encoder.blocks
    trial = _worked(probe.first(spec.layers, small=True), probe, spec)
    for index in spec.layers:
        count = trial.counts.get(index, 0)
        if count != 1 or not isinstance(trial.hidden[index], Tensor):
            raise UnsupportedArchitectureError(
                f"{_call(spec)}: block {index} ({blocks[index].path}) was called {count} times "
                "with hidden states in one forward, where once is needed."
            )
        hidden = trial.hidden[index]
        try:
            check_addable(hidden, spec.length, blocks[index], index)
        except SpecError:
            # Another image size means another number of tokens: the first forward will tell.
            if hidden.dim() == 4 or not probe.any_size():
                raise


def _pad(probe: Probe, spec: PromptSpec) -> PixelPlace:
    facts, p = probe.facts, spec.length
    if facts.channels != 3:
        raise SpecError(
            f"{_call(spec)}: a border needs a model for images of 3 channels, {probe.name} takes "
            f"{facts.channels}; build it for 3."
        )
    trial = None if facts.fixed else _grown(probe, spec)
    image = facts.sizes[0]
    if trial is None:
        trial = _worked(probe.first(), probe, spec)
        image = (trial.size[0] - 2 * p, trial.size[1] - 2 * p)
        if min(image) < 1:
            raise SpecError(
                f"{_call(spec)}: {probe.name} takes images of {trial.size[0]} x {trial.size[1]} "
                f"only, and a border of {p} leaves nothing of them; length can be up to "
                f"{(min(trial.size) - 1) // 2}."
            )
    _check_seen(probe, trial, spec)
    return PixelPlace(
        (3, *image),
        trial.size,
        facts.mean,
        facts.std,
        module=probe.path,
        entrances=_entrances(probe, trial),
    )


def _grown(probe: Probe, spec: PromptSpec) -> Trial | None:
    """Try the default image with a border; None where that shows that the size is fixed."""
    (height, width), p = probe.facts.sizes[0], spec.length
    trial = probe.run((height + 2 * p, width + 2 * p))
    if trial.error is None:
        return trial
    if probe.facts.fixed is None:
        return None
    why = str(trial.error) or type(trial.error).__name__
    raise SpecError(
        f"{_call(spec)}: the border makes an image of {height} x {width} one of {trial.size[0]} x "
        f"{trial.size[1]}, which {probe.name} cannot take ({why}). {_advice(probe, p)}"
    ) from trial.error


def _entrances(probe: Probe, trial: Trial) -> tuple[str, ...]:
    if trial.entered != 1:
        return ("forward",)
    return tuple(name for name in ENTRANCES if hasattr(probe.module, name))


def _concat(probe: Probe, spec: PromptSpec) -> PixelPlace:
    trial = _worked(probe.first(), probe, spec)
    return _at_conv(probe, spec, trial)


def _patches(probe: Probe, spec: PromptSpec) -> PixelPlace:
    if not probe.encoder.plain:
        raise UnsupportedArchitectureError(
            f"{_call(spec)}: the blocks of {probe.name} do not work on one sequence of tokens, "
            "through which patches could be carried; use location='prepend'."
        )
    trial = _worked(probe.first(small=True), probe, spec)
    place = _at_conv(probe, spec, trial)
    conv: Any = probe.host.get_submodule(place.conv)
    if place.width != probe.encoder.blocks[0].width or any((*_padding(conv), *_dilated(conv))):
        raise UnsupportedArchitectureError(
            f"{_call(spec)}: the convolution that meets the image in {probe.name} ({place.conv}) "
            "does not turn one patch into one token; use location='prepend'."
        )
    return place


def _dilated(conv: nn.Conv2d) -> tuple[int, ...]:
    return tuple(d - 1 for d in conv.dilation)


def _at_conv(probe: Probe, spec: PromptSpec, trial: Trial) -> PixelPlace:
    """Return the place at the one plain convolution that meets the image."""
    facts, convs = probe.facts, [probe.module.get_submodule(path) for path in trial.convs]
    if len(convs) != 1 or not _is_plain_conv(convs[0]):
        raise UnsupportedArchitectureError(
            f"{_call(spec)}: needs exactly one plain torch.nn.Conv2d over the image, in "
            f"{probe.name} {len(convs)} meet it; use location='prepend'."
        )
    conv: Any = convs[0]
    return PixelPlace(
        (facts.channels, *trial.size),
        trial.size,
        facts.mean,
        facts.std,
        conv=join(probe.path, trial.convs[0]),
        kernel=tuple(conv.kernel_size),
        width=int(conv.out_channels),
    )


def _is_plain_conv(conv: Any) -> bool:
    plain = type(conv).forward is nn.Conv2d.forward and conv.padding_mode == "zeros"
    return plain and conv.groups == 1 and conv.padding != "same"


def _padding(conv: Any) -> tuple[int, int]:
    return (0, 0) if conv.padding == "valid" else conv.padding


def _worked(trial: Trial, probe: Probe, spec: PromptSpec) -> Trial:
    if trial.error is not None:
        raise UnsupportedArchitectureError(
            f"{_call(spec)}: a forward of {probe.name} on an image of {trial.size[0]} x "
            f"{trial.size[1]} failed, so the location cannot be checked: {trial.error}"
        ) from trial.error
    return trial


def _check_seen(probe: Probe, trial: Trial, spec: PromptSpec) -> None:
    """Refuse a border of which the patch grid leaves one side out; warn of a part of it."""
    lost, p = _unseen(probe, trial), spec.length
    if lost >= p:
        raise SpecError(
            f"{_call(spec)}: the patches of {probe.name} leave out the last {lost} pixels of an "
            f"image of {trial.size[0]} x {trial.size[1]}, and with them the whole border on that "
            f"side. {_advice(probe, p)}"
        )
    if lost:
        warnings.warn(
            f"{_call(spec)}: the patches of {probe.name} leave out the last {lost} pixels of an "
            f"image of {trial.size[0]} x {trial.size[1]}, so as many of the border's {p} rows or "
            "columns there do nothing.",
            stacklevel=7,
        )


def _unseen(probe: Probe, trial: Trial) -> int:
    """Return how many pixels at the end of a side no window of the first convolution reaches."""
    conv: Any = probe.module.get_submodule(trial.convs[0]) if trial.convs else None
    if conv is None or not _is_plain_conv(conv):
        return 0
    sides = zip(
        trial.size, conv.kernel_size, conv.stride, _padding(conv), conv.dilation, strict=True
    )
    lost = 0
    for size, kernel, stride, padding, dilation in sides:
        reach = dilation * (kernel - 1) + 1
        steps = math.floor((size + 2 * padding - reach) / stride)
        lost = max(lost, size - (steps * stride + reach - padding))
    return lost


def _advice(probe: Probe, length: int) -> str:
    """Name the nearest lengths at which the model sees the whole border."""
    if probe.facts.fixed:
        return "Use a larger length, or a model whose image size its patches divide."
    height, width = probe.facts.sizes[0]
    good: list[int] = []
    for side in (-1, 1):
        for other in range(length + side, length + side * (_REACH + 1), side):
            trial = None if other < 1 else probe.run((height + 2 * other, width + 2 * other))
            if trial is not None and trial.error is None and not _unseen(probe, trial):
                good.append(other)
                break
    if not good:
        return f"No length up to {length + _REACH} does; build the model for another image size."
    return f"Lengths that do: {', '.join(str(x) for x in good)}."
