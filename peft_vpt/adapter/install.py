"""Bringing a model to an adapter: its structure, then its values. All or nothing."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backbones.anatomy import Encoder
from ..backbones.heads import FormerHead, class_count, head_owner, set_labels
from ..backbones.identity import label_names
from ..errors import AdapterMismatchError, SpecError, UnsupportedArchitectureError, reason
from ..hosts import carries, host_and_prompts
from ..inject import freeze, inject_spec, remove_prompts
from ..prompts import Prompts
from ..protocols.apply import apply_delta
from ..protocols.delta import Delta, given_features
from ..protocols.options import Protocol
from ..spec import PromptSpec
from ..undo import claim_decoder, has_decoder, unchanged_on_error
from .file import Adapter
from .head import LINEAR, kind_in
from .layout import stored_tensors
from .match import CALL, Fit


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


def install(host: nn.Module, adapter: Adapter, fit: Fit, parallel: str | None) -> None:
    """Bring a model to an adapter that fits it; one that raises all the same is left as it was.

    Args:
        host: The model, not wrapped.
        adapter: The file.
        fit: How it goes into the model.
        parallel: Class of a wrapper that has counted the model's parameters already.

    Raises:
        AdapterMismatchError: The model cannot take this structure.
    """
    wanted = _wanted(host, adapter, fit)
    same = carries(host) and _carried(host, wanted, fit.encoder)
    if not same and parallel is not None:
        raise AdapterMismatchError(
            CALL,
            f"this model would get other parameters, which the {parallel} around it does not know, "
            "so that its replicas would drift apart",
            "Load into the bare model first, then wrap it",
            path=adapter.path,
        )
    kind = fit.kind if fit.with_head else LINEAR
    present = _present(host) if carries(host) else kind.tensors(host, fit.encoder)
    changing = list(present.values())
    former = host_and_prompts(host, CALL)[1].delta if carries(host) else None
    changing += [] if former is None else former.touched(host)
    if adapter.protocol is not None and adapter.protocol.moves:
        changing += Delta(adapter.protocol, host, fit.encoder).touched(host)
    try:
        with unchanged_on_error(host, changing):
            _install(host, adapter, wanted, fit, same=same)
    except (SpecError, UnsupportedArchitectureError) as error:
        problem = f"does not fit this model: {reason(error)}"
        raise AdapterMismatchError(CALL, problem, error.advice, path=adapter.path) from error


def _install(host: nn.Module, adapter: Adapter, wanted: Structure, fit: Fit, *, same: bool) -> None:
    names = _labels(host, adapter, fit)
    source = dict(adapter.tensors)
    if not fit.with_head:
        present = _present(host).items() if carries(host) and not same else ()
        own = {n: t.detach().clone() for n, t in present if n.startswith("head")}
        source = {n: t for n, t in source.items() if not n.startswith("head")} | own
    if not same:
        _build(host, wanted, fit.encoder)
    prompts = host_and_prompts(host, CALL)[1]
    kind = kind_in(host, prompts)
    targets = stored_tensors(host, prompts, kind.tensors(host, fit.encoder))
    if fit.with_head:
        # A head was compared with the one that the model had before; now it may have another.
        found, wanting = ({n: tuple(t.shape) for n, t in ts.items()} for ts in (source, targets))
        if found != wanting:
            problem = "its head is of another kind than the one that these options give this model"
            raise AdapterMismatchError(CALL, problem, path=adapter.path)
    _copy(host, kind.names(host, fit.encoder), targets, source)
    freeze(host, fit.encoder)
    for parameter in host.parameters():
        # Of the task before, which a step of an optimizer would still apply.
        parameter.grad = None
    prompts.clear_cache()
    prompts.info = {n: adapter.metadata[n] for n in ("task", "preprocessing", "metrics")}
    prompts.info["labels"] = names
    if _has_task_head(prompts) and wanted.classes:
        _name_labels(host, fit.encoder, names)


def _present(host: nn.Module) -> dict[str, Tensor]:
    """Return what a file would hold of a prompted model as it is."""
    prompts = host_and_prompts(host, CALL)[1]
    head = kind_in(host, prompts).tensors(host, prompts.encoder)
    return stored_tensors(host, prompts, head)


def _wanted(host: nn.Module, adapter: Adapter, fit: Fit) -> Structure:
    """Return what the model shall carry."""
    about, encoder = adapter.metadata["head"], fit.encoder
    classes, bias, decoder = None, True, False
    if fit.with_head:
        classes, decoder = fit.classes, fit.kind.decoder
        bias = (about or {}).get("bias", True)
    elif carries(host):
        prompts = host_and_prompts(host, CALL)[1]
        decoder = has_decoder(prompts)
        if _has_task_head(prompts) and encoder.head is not None:
            classes = class_count(host, encoder.head)
            bias = "head.bias" in LINEAR.names(host, encoder) or not classes
    return Structure(adapter.protocol, fit.spec, classes, bias, decoder)


def _carried(host: nn.Module, wanted: Structure, encoder: Encoder) -> bool:
    """Tell whether a model carries such a structure already."""
    prompts = host_and_prompts(host, CALL)[1]
    present = None if prompts.delta is None else prompts.delta.protocol
    same = present is None if wanted.protocol is None else wanted.protocol.same(present)
    if prompts.spec != wanted.spec or not same or has_decoder(prompts) != wanted.decoder:
        return False
    if wanted.classes is None or encoder.head is None:
        return not _has_task_head(prompts)
    head: Any = host.get_submodule(encoder.head.paths[0])
    has_bias = getattr(head, "bias", None) is not None or not isinstance(head, nn.Linear)
    count = class_count(host, encoder.head)
    return _has_task_head(prompts) and (count, has_bias) == (wanted.classes, wanted.bias)


def _build(host: nn.Module, wanted: Structure, encoder: Encoder) -> None:
    """Take away what a model carries, and put in what is wanted, without its values."""
    former = host_and_prompts(host, CALL)[1].delta if carries(host) else None
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
        claim_decoder(host, host_and_prompts(host, CALL)[1])


@torch.no_grad()
def _copy(
    host: nn.Module, inside: dict[str, str], targets: dict[str, Tensor], source: dict[str, Tensor]
) -> None:
    """Copy values into parameters; into ones on `meta`, which hold nothing, put the values.

    Args:
        host: The model.
        inside: Names in the model of tensors of the head.
        targets: Tensors of the model by their names in a file.
        source: The values.
    """
    meta = {}
    for name in targets.keys() & source.keys():
        target, value = targets[name], source[name]
        if target.is_meta:
            meta[inside.get(name, name)] = value.to(target.dtype)
        else:
            target.copy_(value)
    if meta:
        host.load_state_dict(meta, strict=False, assign=True)


def _has_task_head(prompts: Prompts) -> bool:
    return isinstance(prompts.undo["head"], FormerHead)


def _labels(host: nn.Module, adapter: Adapter, fit: Fit) -> list[str] | None:
    """Return the names of the classes of the head that the model will have."""
    if fit.with_head:
        names: list[str] | None = (adapter.metadata["head"] or {}).get("labels")
        return names
    own = label_names(host, fit.encoder)
    return own or (host_and_prompts(host, CALL)[1].info.get("labels") if carries(host) else None)


def _name_labels(host: nn.Module, encoder: Encoder, labels: list[str] | None) -> None:
    """Write label names, or numbers where there are none, into a transformers config."""
    assert encoder.head is not None
    owner = host.get_submodule(head_owner(host, encoder.head.paths[0]))
    config = vars(owner).get("config")
    if config is not None and hasattr(config, "id2label"):
        count = class_count(host, encoder.head)
        set_labels(config, labels or [f"LABEL_{i}" for i in range(count)])
