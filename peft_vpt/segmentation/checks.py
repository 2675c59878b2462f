"""What a `Segmenter` cannot use, refused before anything changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..backbones.anatomy import Encoder
from ..backbones.image_model import encoder_for
from ..data.drawing import check_counts
from ..errors import SpecError, UnsupportedArchitectureError
from ..hosts import carries, host_and_prompts, unwrap
from ..protocols.options import Protocol
from .evaluation import check_classes

_UNREAD = {
    "sidetune": "its network is added in front of the classifier",
    "mlp": "its layers are the classifier",
}


def plain_encoder(backbone: nn.Module) -> Encoder:
    """Return the anatomy of a bare or prompted plain ViT.

    Raises:
        UnsupportedArchitectureError: It is wrapped, or has no one sequence of image tokens.
        SpecError: It carries what a decoder cannot use.
    """
    if unwrap(backbone) is not backbone:
        raise UnsupportedArchitectureError(
            f"Segmenter: the backbone is wrapped ({type(backbone).__name__}); give the bare model, "
            "and wrap the Segmenter."
        )
    if not carries(backbone):
        encoder = encoder_for(backbone, "prepend")
    else:
        prompts = host_and_prompts(backbone, "Segmenter")[1]
        protocol = None if prompts.delta is None else prompts.delta.protocol
        refuse_unread("Segmenter", protocol, prompts.spec.location)
        encoder = prompts.encoder
    if not (encoder.plain and encoder.known and encoder.blocks):
        raise UnsupportedArchitectureError(
            f"Segmenter: {encoder.family} has no one sequence of image tokens; SETR-PUP takes "
            "plain ViTs. For a model with a decoder of its own, use apply_to_encoder."
        )
    return encoder


def refuse_unread(call: str, protocol: Protocol | None, location: Any) -> None:
    """Refuse a protocol that a decoder does not read, and prompts that move the image.

    Raises:
        SpecError: It is one.
    """
    if protocol is not None and protocol.kind in _UNREAD:
        raise SpecError(
            f"{call}: of the protocol {protocol.name!r}, {_UNREAD[protocol.kind]}, which a decoder "
            "does not read; take another protocol."
        )
    if location == "pad":
        raise SpecError(
            f"{call}: with a border around the image (location='pad'), tokens no longer lie over "
            "its pixels; take another location."
        )


def check_options(
    encoder: Encoder, classes: Any, channels: Any, auxiliary: Any, protocol: Any
) -> None:
    """Check the options of a `Segmenter` but those of its protocol.

    Raises:
        SpecError: One is wrong.
    """
    check_classes("Segmenter", classes)
    check_counts("Segmenter", channels=(channels, 1))
    listed = isinstance(auxiliary, Sequence) and not isinstance(auxiliary, str | bytes)
    blocks = list(auxiliary) if listed else [None]
    whole = all(isinstance(i, int) and not isinstance(i, bool) for i in blocks)
    if not whole or not set(blocks) <= set(range(encoder.depth)) or len(set(blocks)) < len(blocks):
        raise SpecError(
            f"Segmenter(auxiliary={auxiliary!r}): must be a list of blocks, each once; they are 0 "
            f"to {encoder.depth - 1}."
        )
    refuse_unread("Segmenter", None if protocol is None else Protocol(protocol), None)


def check_protocol_options(protocol: str | None, options: Mapping[str, Any]) -> None:
    """Check what of a protocol's options a decoder rules out.

    Raises:
        SpecError: One has no place here.
    """
    given = ", ".join(f"{name}={value!r}" for name, value in options.items())
    if protocol is None and options:
        raise SpecError(
            f"Segmenter(protocol=None, {given}): without a protocol there is nothing that takes "
            "options; name one, or leave them out."
        )
    for name, default in (("num_classes", None), ("pooling", "default")):
        if options.get(name, default) != default:
            raise SpecError(
                f"Segmenter({name}={options[name]!r}): is about the backbone's classifier, which a "
                "decoder does not read; leave it out."
            )
    refuse_unread("Segmenter", None, options.get("location"))
