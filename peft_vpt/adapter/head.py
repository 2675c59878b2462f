"""The head in an adapter file and in a model: names, shapes, and whether one fits the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.anatomy import Encoder
from ..backbones.heads import class_count
from ..errors import AdapterError, AdapterMismatchError
from ..protocols.modules import MlpHead
from ..spec import PromptSpec
from ..undo import READS, decoder_names, decoder_tensors, describe_decoder
from .file import Adapter

HEAD_NAMES = ("head", "head_dist")


def check_head(
    adapter: Adapter, host: nn.Module, encoder: Encoder, spec: PromptSpec, where: str
) -> None:
    """Compare the head of a file with the one that a model has, or could get in its place.

    Args:
        adapter: The file.
        host: The model; it is left alone.
        encoder: Its anatomy.
        spec: The adapter's resolved options.
        where: The call and the file, for messages.

    Raises:
        AdapterMismatchError: It is of another kind or size.
        AdapterError: The file's tensors are not those that its metadata calls for.
    """
    head = adapter.metadata["head"]
    if head is None:
        adapter.expect({}, prefix="head")
        return
    hint = "strict='prompts' loads the prompts alone."
    if head["reads"] == READS:
        _check_decoder(adapter, host, encoder, f"; {hint}")
        return
    reads = None if encoder.head is None else encoder.reads(spec.pooling)
    if reads != head["reads"]:
        has = "has no classifier" if reads is None else f"has a head that reads {reads!r}"
        raise AdapterMismatchError(
            f"{where}: its head reads {head['reads']!r}, this model {has}; {hint}"
        )
    assert encoder.head is not None
    width = encoder.head.width if spec.pooling == "default" else encoder.blocks[-1].width
    if head["in_features"] != width:
        raise AdapterMismatchError(
            f"{where}: its head takes {head['in_features']} features, this model gives "
            f"{width}; {hint}"
        )
    own = host.get_submodule(encoder.head.paths[0])
    protocol = adapter.protocol
    if protocol is not None and protocol.head_layers:
        _check_mlp(adapter, width, protocol.head_layers, where)
        return
    if head.get("class") not in (None, type(own).__name__):
        raise AdapterMismatchError(
            f"{where}: its head is a {head['class']}, which only the same class can take, "
            f"this model's is a {type(own).__name__}; {hint}"
        )
    if not encoder.head.simple and class_count(host, encoder.head) != head["classes"]:
        raise AdapterMismatchError(
            f"{where}: its head has {head['classes']} classes, this model's, which is more than "
            f"one linear layer, {class_count(host, encoder.head)}; call the model's own "
            f"reset_classifier({head['classes']}) first, or {hint}"
        )
    adapter.expect(_head_shapes(head, host, encoder, width), prefix="head")


def _check_mlp(adapter: Adapter, width: int, layers: int, where: str) -> None:
    """Compare a head of several layers with the file, without building what a file asks for."""
    if layers > len(adapter.tensors):
        raise AdapterError(f"{where}: a head of {layers} layers in {len(adapter.tensors)} tensors.")
    with torch.device("meta"):
        module = MlpHead(width, adapter.metadata["head"]["classes"], layers)
    state = {n: t for n, t in module.state_dict().items() if t.is_floating_point()}
    shapes = {f"head.module.{n}": tuple(t.shape) for n, t in state.items()}
    adapter.expect(shapes, prefix="head")


def _check_decoder(adapter: Adapter, host: nn.Module, encoder: Encoder, hint: str) -> None:
    """Compare a decoder of the file with the one around this encoder."""
    head, where = adapter.metadata["head"], f"load_task_adapter: {adapter.path}"
    if not decoder_names(host, encoder) or head.get("class") != type(host).__name__:
        raise AdapterMismatchError(
            f"{where}: it holds the decoder of a {head.get('class')}, which only the same class "
            f"can take, this model is a {type(host).__name__}{hint}"
        )
    own = describe_decoder(host, encoder)
    for name in ("classes", "in_features"):
        if head[name] != own[name]:
            raise AdapterMismatchError(
                f"{where}: its decoder has {name} {head[name]}, this model's has {own[name]}; "
                f"build the model for that many{hint}"
            )
    tensors = decoder_tensors(host, encoder)
    adapter.expect({name: tuple(t.shape) for name, t in tensors.items()}, prefix="head")


def _head_shapes(
    head: Mapping[str, Any], host: nn.Module, encoder: Encoder, width: int
) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the head's tensors, by the file's metadata."""
    assert encoder.head is not None
    if head.get("class") is not None or not encoder.head.simple:
        return {name: tuple(t.shape) for name, t in head_tensors(host, encoder).items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in HEAD_NAMES[: len(encoder.head.paths)]:
        shapes[f"{name}.weight"] = (head["classes"], width)
        if head.get("bias", True):
            shapes[f"{name}.bias"] = (head["classes"],)
    return shapes


def trains_decoder(adapter: Adapter) -> bool:
    """Tell whether an adapter is of a model whose decoder trained whole."""
    head = adapter.metadata["head"]
    return head is not None and head["reads"] == READS


def new_classes(adapter: Adapter, encoder: Encoder, *, with_head: bool) -> int | None:
    """Return the size of the head to put in, or None where the model's own one is filled."""
    head = adapter.metadata["head"]
    protocol = adapter.protocol
    mlp = protocol is not None and protocol.head_layers > 0
    filled = head is None or (head.get("class") is not None and not mlp)
    if not with_head or filled or not (encoder.head and encoder.head.simple):
        return None
    return int(head["classes"])


def head_tensors(host: nn.Module, encoder: Encoder) -> dict[str, Tensor]:
    """Return the head's parameters under their names in the file."""
    tensors: dict[str, Tensor] = {}
    for path, name in zip(encoder.head_paths, HEAD_NAMES, strict=False):
        module = host.get_submodule(path)
        prefix = name if isinstance(module, nn.Linear) else f"{name}.module"
        state = module.state_dict(keep_vars=True)
        floats = {k: t for k, t in state.items() if isinstance(t, Tensor) and t.is_floating_point()}
        tensors |= {f"{prefix}.{key}": t for key, t in floats.items()}
    return tensors
