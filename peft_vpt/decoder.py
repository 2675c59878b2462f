"""A decoder around the encoder that trains whole: its tensors, and how they are put back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .backbones.anatomy import Encoder
from .prompts import Prompts

# `head.reads` of the format: what the encoder gives, all of it.
READS = "encoder"
_PREFIX = "head.module."


def decoder_names(host: nn.Module, encoder: Encoder) -> list[str]:
    """Return parameters and buffers outside the encoder and its classifier."""
    if not encoder.path:
        return []
    heads = encoder.head.paths if encoder.head is not None else ()
    apart = ("prompts.", f"{encoder.path}.", *(f"{path}." for path in heads))
    return [name for name in _state(host) if not name.startswith(apart)]


def claim_decoder(host: nn.Module, prompts: Prompts) -> None:
    """Note that the decoder trains whole, and keep what it is now; `freeze` lets it train."""
    names, state = decoder_names(host, prompts.encoder), _state(host)
    if not names:
        return
    prompts.undo["decoder"] = {name: kept(state[name]) for name in names}
    if prompts.delta is not None:
        prompts.delta.leave(names)


def kept(tensor: Tensor) -> Tensor:
    """Return a copy to put back later, on the CPU; on `meta` there is nothing to bring there."""
    tensor = tensor.detach()
    return tensor.clone() if tensor.is_meta else tensor.to("cpu", copy=True)


def has_decoder(prompts: Prompts) -> bool:
    """Tell whether a decoder trains beside the prompts."""
    return "decoder" in prompts.undo


def decoder_tensors(host: nn.Module, encoder: Encoder) -> dict[str, Tensor]:
    """Return the decoder's tensors, and a classifier's, under their names in the file."""
    heads = tuple(f"{path}." for path in (encoder.head.paths if encoder.head else ()))
    names, state = set(decoder_names(host, encoder)), _state(host)
    names |= {name for name in state if heads and name.startswith(heads)}
    return {f"{_PREFIX}{n}": t for n, t in state.items() if n in names and t.is_floating_point()}


def describe_decoder(host: nn.Module, encoder: Encoder) -> dict[str, Any]:
    """Return `head` of the metadata: sizes are those of the first and the last weight."""
    state = _state(host)
    weights = [state[n] for n in decoder_names(host, encoder) if state[n].dim() > 1]
    first, last = (weights[0].shape[1], weights[-1].shape[0]) if weights else (1, 1)
    classes = getattr(getattr(host, "config", None), "num_labels", last)
    return {
        "classes": int(classes),
        "in_features": int(first),
        "reads": READS,
        "class": type(host).__name__,
    }


@torch.no_grad()
def restore_decoder(host: nn.Module, prompts: Prompts) -> None:
    """Put back the values from before training."""
    state = _state(host)
    for name, value in prompts.undo.get("decoder", {}).items():
        state[name].copy_(value)
        state[name].grad = None


def _state(host: nn.Module) -> dict[str, Tensor]:
    state = host.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
