"""Does a task adapter fit a model? Every check that a load makes before anything changes."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..backbones.anatomy import Encoder
from ..backbones.fingerprint import Fingerprint, compare
from ..backbones.identity import describe_backbone
from ..backbones.weights import UnreadableWeightsError
from ..errors import AdapterError, AdapterMismatchError, SpecError, UnsupportedArchitectureError
from ..hosts import bare, carries, host_and_prompts
from ..inject import prepare, survey
from ..prompts import Place
from ..protocols.delta import shapes
from ..spec import PromptSpec
from ..undo import decoder_names
from .file import Adapter
from .head import check_head, new_classes, trains_decoder

_SIDE_HINT = (
    " The file holds no code: on a bare model, first call apply_protocol(model, 'sidetune', "
    "features=...) with the features that it was made with."
)
_PATH_HINT = (
    " What is named by its path has no name that both libraries share, so such a file loads into "
    "{} models alone; 'adapter', 'linear' and prompts cross."
)


def check_fit(
    adapter: Adapter, host: nn.Module, encoder: Encoder, strict: bool | str
) -> PromptSpec:
    """Compare an adapter with a model; return its spec, or raise before anything changes."""
    made_for, where = adapter.metadata["backbone"], f"load_task_adapter: {adapter.path}"
    own = describe_backbone(host, encoder)
    for name in ("depth", "dims"):
        if made_for[name] != own[name]:
            raise AdapterMismatchError(
                f"{where}: made for {_title(made_for)} with {name} {made_for[name]}, "
                f"this model is {_title(own)} with {name} {own[name]}."
            )
    spec = adapter.spec
    if strict == "prompts":
        own_pooling = host_and_prompts(host, where)[1].spec.pooling if carries(host) else "default"
        spec = dataclasses.replace(spec, pooling=own_pooling)
    try:
        spec = spec.resolve(encoder.depth)
    except SpecError as error:
        raise AdapterError(f"{where}: its prompt options are wrong: {error}") from error
    _check_border(adapter, spec, where)
    place = _place(host, encoder, spec, where)
    expected: dict[str, tuple[int, ...]] = {
        f"prompts.{name}": shape for name, shape in place.shapes().items()
    }
    if spec.where.tensors:
        _check_pixels(adapter, expected, where)
    if spec.project:
        for width in encoder.widths_at([enter for enter, _ in spec.spans(encoder.depth)]):
            expected[f"prompts.project.{width}.weight"] = (width, spec.project)
            expected[f"prompts.project.{width}.bias"] = (width,)
    adapter.expect(expected, prefix="prompts.")
    if strict != "prompts":
        check_head(adapter, host, encoder, spec, where)
    _check_fingerprint(adapter, host, encoder, own, strict=strict is not False)
    _check_protocol(adapter, host, encoder, with_head=strict != "prompts")
    if not carries(host):
        try:
            classes = new_classes(adapter, encoder, with_head=strict != "prompts")
            prepare(host, spec, encoder, num_classes=classes)
        except (SpecError, UnsupportedArchitectureError) as error:
            raise AdapterMismatchError(f"{where}: does not fit this model: {error}") from error
    return spec


def _place(host: nn.Module, encoder: Encoder, spec: PromptSpec, where: str) -> Place:
    """Return where prompts meet this model, after the checks of their location."""
    try:
        with bare(host):
            return survey(host, encoder, spec)
    except (SpecError, UnsupportedArchitectureError) as error:
        raise AdapterMismatchError(f"{where}: does not fit this model: {error}") from error


def _check_border(adapter: Adapter, spec: PromptSpec, where: str) -> None:
    """Compare pixels with their declared length before an image of that size goes through."""
    for name, (axis, times) in spec.where.tensors.items():
        border = adapter.tensors.get(f"prompts.{name}")
        if border is not None and border.shape[axis : axis + 1] != (times * spec.length,):
            raise AdapterError(
                f"{where}: tensor prompts.{name} of shape {tuple(border.shape)} is not of "
                f"{spec.length} prompts, as its metadata says."
            )


def _check_pixels(adapter: Adapter, expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    for name, shape in expected.items():
        have = adapter.tensors.get(name)
        if have is not None and tuple(have.shape) != shape:
            raise AdapterMismatchError(
                f"{where}: its tensor {name} has shape {tuple(have.shape)}, this model calls for "
                f"{shape}: it was made for another image size or patch size. Build the model for "
                "that size first."
            )


def _check_fingerprint(
    adapter: Adapter, host: nn.Module, encoder: Encoder, own: dict[str, Any], *, strict: bool
) -> None:
    made_for = adapter.metadata["backbone"]
    problem = _difference(made_for, host, encoder, _title(own))
    if problem is None:
        return
    text, refuse = problem
    message = f"load_task_adapter: {adapter.path}: {text}."
    if strict and refuse:
        raise AdapterMismatchError(message + " strict=False loads it all the same.")
    warnings.warn(message, stacklevel=4)


def _difference(
    made_for: Mapping[str, Any], host: nn.Module, encoder: Encoder, name: str
) -> tuple[str, bool] | None:
    """Say how a model's weights differ from the file's, and whether that is a reason to refuse."""
    saved = made_for["fingerprint"]
    if saved is None:
        return "the backbone's weights cannot be compared, since the file has no fingerprint", True
    try:
        found = compare(saved, host, encoder, _first_fingerprint(host))
    except UnreadableWeightsError as error:
        return f"the backbone's weights cannot be compared: {error}", True
    how = (
        f"(fingerprints differ by {found.difference:.1e} in {found.place}, allowed "
        f"{found.allowed:.0e})"
    )
    if not found.same:
        return (
            f"it was made for the weights of {_title(made_for)}, and this {name} has others {how}; "
            "the usual causes: pretrained=True was left out, so that they are random, the backbone "
            "was fine-tuned, or they are of another revision of its repository",
            True,
        )
    if found.loose:
        return (
            f"the weights of {_title(made_for)} and of this {name} agree as far as quantized "
            f"weights can be compared {how}",
            False,
        )
    return None


def _first_fingerprint(host: nn.Module) -> Fingerprint | None:
    """Return the fingerprint of weights that a protocol has moved since, None for others."""
    delta = host_and_prompts(host, "")[1].delta if carries(host) else None
    return None if delta is None else delta.fingerprint


def _check_protocol(
    adapter: Adapter, host: nn.Module, encoder: Encoder, *, with_head: bool
) -> None:
    """Compare what a protocol adds or moves with the file; the model is left alone."""
    protocol, where = adapter.protocol, f"load_task_adapter: {adapter.path}"
    present = host_and_prompts(host, where)[1].delta if carries(host) else None
    if present is not None and not present.protocol.same(protocol):
        present.check_restorable("load_task_adapter")
        if present.protocol.head_layers and not with_head:
            raise AdapterMismatchError(
                f"{where}: strict='prompts' keeps the model's head, but that of the protocol "
                f"{present.protocol.name!r} goes with it; remove_prompts(model) first."
            )
    if protocol is None:
        adapter.expect({}, prefix="delta.")
        return
    if protocol.head_layers and not with_head:
        raise AdapterError(
            f"{where}: it holds a head and nothing else, so strict='prompts' leaves nothing."
        )
    try:
        decoder = decoder_names(host, encoder) if trains_decoder(adapter) else []
        expected = shapes(host, encoder, protocol, present, apart=decoder)
    except (SpecError, UnsupportedArchitectureError) as error:
        raise AdapterMismatchError(f"{where}: does not fit this model: {error}") from error
    have = {n: tuple(t.shape) for n, t in adapter.tensors.items() if n.startswith("delta.")}
    if have != expected:
        names = sorted(n for n in {*have, *expected} if have.get(n) != expected.get(n))
        listed = [f"{n} (file: {have.get(n)}, model: {expected.get(n)})" for n in names[:5]]
        made_in = adapter.metadata["backbone"]["library"]
        foreign = made_in != encoder.library and any("path." in name for name in names)
        raise AdapterMismatchError(
            f"{where}: its weights of protocol {protocol.name!r} do not fit this model: "
            f"{', '.join(listed)}{' ...' if len(names) > 5 else ''}."
            f"{_PATH_HINT.format(made_in) if foreign else ''}"
            f"{_SIDE_HINT if 'features' in protocol.row.options else ''}"
        )


def _title(backbone: Mapping[str, Any]) -> str:
    return str(backbone["hub_id"] or f"{backbone['library']} {backbone['architecture']}")
