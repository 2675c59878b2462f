"""Bringing a model to an adapter: its structure, then its values. All or nothing."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backbones.anatomy import Encoder
from ..backbones.heads import FormerHead, class_count, head_owner, set_labels
from ..backbones.identity import label_names
from ..errors import AdapterMismatchError, SpecError, UnsupportedArchitectureError
from ..hosts import carries, host_and_prompts
from ..inject import freeze, inject_spec, remove_prompts
from ..prompts import Prompts
from ..protocols.apply import apply_delta
from ..protocols.delta import given_features
from ..protocols.options import Protocol
from ..spec import PromptSpec
from ..undo import claim_decoder, decoder_names, decoder_tensors, has_decoder, unchanged_on_error
from .file import Adapter
from .head import HEAD_NAMES, head_tensors, new_classes, trains_decoder

_CALL = "load_task_adapter"


class Structure(NamedTuple):
    """What a model carries.

    Args:
        protocol: Beside or in place of prompts.
        spec: Of the prompts.
        classes: Of a new head; 0: none; None: the head that the model has.
        bias: Whether a new head has one.
        decoder: Whether a decoder around the encoder trains whole.
    """

    protocol: Protocol | None
    spec: PromptSpec
    classes: int | None
    bias: bool
    decoder: bool


def install(
    host: nn.Module,
    adapter: Adapter,
    spec: PromptSpec,
    encoder: Encoder,
    *,
    prompts_only: bool,
    parallel: str | None,
) -> None:
    """Bring a model to an adapter that fits it; one that raises all the same is left as it was.

    Args:
        host: The model, not wrapped.
        adapter: The file.
        spec: Its resolved options.
        encoder: Anatomy of the model.
        prompts_only: Keep the model's own head.
        parallel: Class of a wrapper that has counted the model's parameters already.

    Raises:
        AdapterMismatchError: The model cannot take this structure.
    """
    wanted = _wanted(host, adapter, spec, encoder, prompts_only)
    same = carries(host) and _carried(host, wanted, encoder)
    if not same and parallel is not None:
        raise AdapterMismatchError(
            f"{_CALL}: {adapter.path}: this model would get other parameters, which the "
            f"{parallel} around it does not know, so that its replicas would drift apart. Load "
            "into the bare model first, then wrap it."
        )
    changing = (
        stored_tensors(host, with_head=True) if carries(host) else head_tensors(host, encoder)
    )
    try:
        with unchanged_on_error(host, changing.values()):
            _install(host, adapter, wanted, encoder, prompts_only=prompts_only, same=same)
    except (SpecError, UnsupportedArchitectureError) as error:
        raise AdapterMismatchError(
            f"{_CALL}: {adapter.path}: does not fit this model: {error}"
        ) from error


def _install(
    host: nn.Module,
    adapter: Adapter,
    wanted: Structure,
    encoder: Encoder,
    *,
    prompts_only: bool,
    same: bool,
) -> None:
    names = _labels(host, adapter, encoder, prompts_only)
    kept: dict[str, Tensor] = {}
    if not same:
        if prompts_only and carries(host):
            present = stored_tensors(host, with_head=True).items()
            kept = {n: t.detach().clone() for n, t in present if n.startswith("head")}
        _build(host, wanted, encoder)
    prompts = host_and_prompts(host, _CALL)[1]
    source = adapter.tensors | kept
    with_head = bool(kept) or not prompts_only
    targets = stored_tensors(host, with_head=with_head).items()
    _copy(host, encoder, {n: (target, source[n]) for n, target in targets if n in source})
    freeze(host, encoder)
    for parameter in host.parameters():
        # Of the task before, which a step of an optimizer would still apply.
        parameter.grad = None
    prompts.clear_cache()
    prompts.info = {n: adapter.metadata[n] for n in ("task", "preprocessing", "metrics")}
    prompts.info["labels"] = names
    if with_head and _has_task_head(prompts) and wanted.classes:
        _name_labels(host, encoder, names)


def _wanted(
    host: nn.Module, adapter: Adapter, spec: PromptSpec, encoder: Encoder, prompts_only: bool
) -> Structure:
    """Return what the model shall carry."""
    head = adapter.metadata["head"]
    classes, bias = new_classes(adapter, encoder, with_head=not prompts_only), True
    decoder = trains_decoder(adapter) and not prompts_only
    if prompts_only and carries(host):
        prompts = host_and_prompts(host, _CALL)[1]
        decoder = has_decoder(prompts)
        if _has_task_head(prompts) and encoder.head is not None:
            classes = class_count(host, encoder.head)
            bias = "head.bias" in head_tensors(host, encoder) or not classes
    elif not prompts_only and head is None and encoder.head and encoder.head.simple:
        classes = 0 if _own_classes(host, encoder) else None
    elif head is not None:
        bias = head.get("bias", True)
    decoder = decoder and bool(decoder_names(host, encoder))
    return Structure(adapter.protocol, spec, classes, bias, decoder)


def _carried(host: nn.Module, wanted: Structure, encoder: Encoder) -> bool:
    """Tell whether a model carries such a structure already."""
    prompts = host_and_prompts(host, _CALL)[1]
    present = _protocol(prompts)
    same = present is None if wanted.protocol is None else wanted.protocol.same(present)
    if prompts.spec != wanted.spec or not same or has_decoder(prompts) != wanted.decoder:
        return False
    if wanted.classes is None or encoder.head is None:
        return True
    head: Any = host.get_submodule(encoder.head.paths[0])
    has_bias = getattr(head, "bias", None) is not None or not isinstance(head, nn.Linear)
    count = class_count(host, encoder.head)
    return _has_task_head(prompts) and (count, has_bias) == (wanted.classes, wanted.bias)


def _build(host: nn.Module, wanted: Structure, encoder: Encoder) -> None:
    """Take away what a model carries, and put in what is wanted, without its values."""
    former = host_and_prompts(host, _CALL)[1].delta if carries(host) else None
    if carries(host):
        remove_prompts(host)
    # Every value is overwritten afterwards, so the global random state is left alone.
    options: Any = {
        "num_classes": wanted.classes,
        "head_bias": wanted.bias,
        "generator": torch.Generator().manual_seed(0),
    }
    if wanted.protocol is None:
        inject_spec(host, wanted.spec, encoder, **options)
    else:
        features = given_features(former)
        apply_delta(host, wanted.protocol, wanted.spec, encoder, features=features, **options)
    if wanted.decoder:
        claim_decoder(host, host_and_prompts(host, _CALL)[1])


def stored_tensors(host: nn.Module, *, with_head: bool) -> dict[str, Tensor]:
    """Return what a file holds of a prompted model, under the names there."""
    prompts = host_and_prompts(host, "save_task_adapter")[1]
    found: dict[str, Tensor] = {f"prompts.{n}": p for n, p in prompts.own_parameters().items()}
    if prompts.delta is not None:
        found |= prompts.delta.tensors(host)
    find = decoder_tensors if has_decoder(prompts) else head_tensors
    return found | (find(host, prompts.encoder) if with_head else {})


@torch.no_grad()
def _copy(host: nn.Module, encoder: Encoder, pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Copy values into parameters; into ones on `meta`, which hold nothing, put the values."""
    meta = {}
    decoder = has_decoder(host_and_prompts(host, _CALL)[1])
    for name, (target, value) in pairs.items():
        if target.is_meta:
            meta[_host_name(encoder, name, decoder)] = value.to(target.dtype)
        else:
            target.copy_(value)
    if meta:
        host.load_state_dict(meta, strict=False, assign=True)


def _host_name(encoder: Encoder, name: str, decoder: bool) -> str:
    """Turn a tensor's name in the file into its name in the host."""
    kind, _, rest = name.partition(".")
    if decoder and kind == "head":
        return rest.removeprefix("module.")
    if encoder.head is None or kind not in HEAD_NAMES:
        return name
    return f"{encoder.head.paths[HEAD_NAMES.index(kind)]}.{rest.removeprefix('module.')}"


def _protocol(prompts: Prompts) -> Protocol | None:
    found: Protocol | None = None if prompts.delta is None else prompts.delta.protocol
    return found


def _has_task_head(prompts: Prompts) -> bool:
    return isinstance(prompts.undo["head"], FormerHead)


def _own_classes(host: nn.Module, encoder: Encoder) -> int:
    """Return the classes of the head that the model has without any adapter."""
    assert encoder.head is not None
    if carries(host):
        former = host_and_prompts(host, _CALL)[1].undo["head"]
        if isinstance(former, FormerHead):
            return former.classes
    return class_count(host, encoder.head)


def _labels(
    host: nn.Module, adapter: Adapter, encoder: Encoder, prompts_only: bool
) -> list[str] | None:
    """Return the names of the classes of the head that the model will have."""
    head = adapter.metadata["head"]
    if not prompts_only:
        names: list[str] | None = None if head is None else head["labels"]
        return names
    own = label_names(host, encoder)
    return own or (host_and_prompts(host, _CALL)[1].info.get("labels") if carries(host) else None)


def _name_labels(host: nn.Module, encoder: Encoder, labels: list[str] | None) -> None:
    """Write label names, or numbers where there are none, into a transformers config."""
    assert encoder.head is not None
    owner = host.get_submodule(head_owner(host, encoder.head.paths[0]))
    config = vars(owner).get("config")
    if config is not None and hasattr(config, "id2label"):
        count = class_count(host, encoder.head)
        set_labels(config, labels or [f"LABEL_{i}" for i in range(count)])
