"""Does a task adapter fit a model? Every check that a load makes before anything changes."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from ..backbones.anatomy import Encoder
from ..backbones.find import encoder_for
from ..backbones.fingerprint import compare
from ..backbones.identity import describe_backbone
from ..backbones.weights import UnreadableWeightsError
from ..errors import (
    AdapterError,
    AdapterMismatchError,
    SpecError,
    UnsupportedArchitectureError,
    VPTWarning,
    reason,
    renamed,
)
from ..hosts import bare, carries, host_and_prompts, refuse_unfit
from ..inject import prepare, survey
from ..prompts import Place
from ..spec import PromptSpec
from ..undo import decoder_names
from .file import Adapter
from .head import Kind, kind_of
from .layout import check_layout, layout
from .schema import Fail

CALL = "load_task_adapter"
_SIDE_HINT = (
    "The file holds no code: on a bare model, first call `apply_protocol(model, 'sidetune', "
    "features=...)` with the features that it was made with"
)
_PATH_HINT = (
    "What is named by its path has no name that both libraries share, so such a file loads into "
    "{} models alone; 'adapter', 'linear' and prompts cross"
)
_PIXEL_HINT = (
    "it was made for another image size or patch size. Build the model for that size first"
)


class Fit(NamedTuple):
    """How an adapter goes into a model.

    Args:
        encoder: Anatomy of the model.
        spec: Resolved options of the prompts.
        kind: Of the file's head.
        classes: Of a new linear head; 0: none; None: the model's stays.
        with_head: Whether the head is loaded too; the model's own stays otherwise.
    """

    encoder: Encoder
    spec: PromptSpec
    kind: Kind
    classes: int | None
    with_head: bool


def check_fit(adapter: Adapter, host: nn.Module, strict: bool | str) -> Fit:
    """Compare an adapter with a model, which is left alone.

    Raises:
        AdapterError: The file holds nothing of what is asked for.
        AdapterMismatchError: It was made for another model, or another kind of head.
        UnsupportedArchitectureError: The model cannot take prompts.
    """
    fail: Fail = partial(AdapterMismatchError, CALL, path=adapter.path)
    encoder, with_head = _encoder(host, adapter), strict != "prompts"
    own = describe_backbone(host, encoder)
    _check_sizes(adapter.metadata["backbone"], own, fail)
    place = _place(adapter, host, encoder, fail, with_head=with_head)
    _check_protocol(adapter, host, fail, with_head=with_head)
    hint, tensors = _hint(adapter, encoder), adapter.tensors
    kind, about, classes, head = kind_of(adapter), adapter.metadata["head"], None, {}
    if with_head:
        kind.check(about, host, encoder, place.spec.pooling, fail)
        head = kind.shapes(about, host, encoder)
        classes = kind.build(about, host, encoder)
    else:
        tensors = {name: t for name, t in tensors.items() if not name.startswith("head")}
    apart = decoder_names(host, encoder) if kind.decoder else []
    with _fitting(fail):
        shapes = layout(host, place, adapter.protocol, head, apart)
    check_layout(tensors, shapes, fail, hint)
    _check_fingerprint(adapter, host, encoder, own, fail, strict=strict is not False)
    if not carries(host):
        with _fitting(fail):
            prepare(host, place.spec, encoder, num_classes=classes)
    return Fit(encoder, place.spec, kind, classes, with_head)


@contextmanager
def _fitting(fail: Fail) -> Iterator[None]:
    """Raise what a model refuses as a mismatch of the file."""
    try:
        yield
    except (SpecError, UnsupportedArchitectureError) as error:
        raise fail(f"does not fit this model: {reason(error)}", error.advice) from error


def _encoder(host: nn.Module, adapter: Adapter) -> Encoder:
    """Return the anatomy of a model that shall take an adapter, bare or not."""
    if carries(host):
        return host_and_prompts(host, CALL)[1].encoder
    refuse_unfit(host, CALL)
    with renamed(CALL, path=adapter.path):
        return encoder_for(host, adapter.spec.location)


def _check_sizes(made_for: Mapping[str, Any], own: Mapping[str, Any], fail: Fail) -> None:
    for name in ("depth", "dims"):
        if made_for[name] != own[name]:
            raise fail(
                f"made for {_title(made_for)} with {name} {made_for[name]}, this model is "
                f"{_title(own)} with {name} {own[name]}"
            )


def _place(
    adapter: Adapter, host: nn.Module, encoder: Encoder, fail: Fail, *, with_head: bool
) -> Place:
    """Return where the prompts meet a model, with their options."""
    spec = adapter.spec
    if not with_head:
        # The model's own head goes on reading what it reads.
        pooling = host_and_prompts(host, CALL)[1].spec.pooling if carries(host) else "default"
        spec = dataclasses.replace(spec, pooling=pooling)
    with _fitting(fail), bare(host):
        return survey(host, encoder, spec.resolve(encoder.depth))


def _check_protocol(adapter: Adapter, host: nn.Module, fail: Fail, *, with_head: bool) -> None:
    """Refuse what a protocol's own head, or weights that nobody kept, stand against."""
    protocol = adapter.protocol
    present = host_and_prompts(host, CALL)[1].delta if carries(host) else None
    if present is not None and not present.protocol.same(protocol):
        present.check_restorable(CALL)
        if present.protocol.head_layers and not with_head:
            raise fail(
                "`strict='prompts'` keeps the model's head, but that of the protocol "
                f"{present.protocol.name!r} goes with it",
                "`remove_prompts(model)` first",
            )
    if protocol is not None and protocol.head_layers and not with_head:
        raise AdapterError(
            CALL,
            "it holds a head and nothing else, so `strict='prompts'` leaves nothing",
            path=adapter.path,
        )


def _hint(adapter: Adapter, encoder: Encoder) -> str:
    """Return what to do where the tensors of a sound file are not those that a model calls for."""
    made_in, protocol = adapter.metadata["backbone"]["library"], adapter.protocol
    if protocol is not None and "features" in protocol.row.options:
        return _SIDE_HINT
    if made_in != encoder.library and any("path." in name for name in adapter.tensors):
        return _PATH_HINT.format(made_in)
    return _PIXEL_HINT if adapter.spec.is_pixel else ""


def _check_fingerprint(
    adapter: Adapter,
    host: nn.Module,
    encoder: Encoder,
    own: dict[str, Any],
    fail: Fail,
    *,
    strict: bool,
) -> None:
    problem = _difference(adapter.metadata["backbone"], host, encoder, _title(own))
    if problem is None:
        return
    text, refuse = problem
    if strict and refuse:
        raise fail(text, "`strict=False` loads it all the same")
    warnings.warn(VPTWarning(fail(text)), stacklevel=4)


def _difference(
    made_for: Mapping[str, Any], host: nn.Module, encoder: Encoder, name: str
) -> tuple[str, bool] | None:
    """Say how a model's weights differ from the file's, and whether that is a reason to refuse."""
    saved = made_for["fingerprint"]
    if saved is None:
        return "the backbone's weights cannot be compared, since the file has no fingerprint", True
    # A protocol may have moved the weights since its beginning.
    delta = host_and_prompts(host, CALL)[1].delta if carries(host) else None
    try:
        found = compare(saved, host, encoder, None if delta is None else delta.fingerprint)
    except UnreadableWeightsError as error:
        return f"the backbone's weights cannot be compared: {error}", True
    how = (
        f"(fingerprints differ by {found.difference:.1e} in {found.place}, allowed "
        f"{found.allowed:.0e})"
    )
    if not found.same:
        return (
            f"it was made for the weights of {_title(made_for)}, and this {name} has others {how}; "
            "the usual causes: `pretrained=True` was left out, so that they are random, the "
            "backbone was fine-tuned, or they are of another revision of its repository",
            True,
        )
    if found.loose:
        return (
            f"the weights of {_title(made_for)} and of this {name} agree as far as quantized "
            f"weights can be compared {how}",
            False,
        )
    return None


def _title(backbone: Mapping[str, Any]) -> str:
    return str(backbone["hub_id"] or f"{backbone['library']} {backbone['architecture']}")
