"""What the metadata of a task adapter must be: fields, their rules, their defaults.

The tensors and the bytes are `file`'s business. `docs/adapter-format.md` has the same tables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from ..backbones.identity import is_hub_name
from ..checks import FLAG, Rule, instance, integer, list_of, misfits, number, optional, or_none
from ..errors import AdapterError, SpecError, is_text, reason, short
from ..preprocessing import IMAGE_RULES, check_images
from ..protocols.options import Protocol
from ..spec import PromptSpec

FORMAT_VERSION = 1
_BLOCK_NUMBERS, _NORM_NUMBERS = 9, 3
# Bounds that no adapter reaches: they keep a small file from asking for gigabytes.
_MOST_NESTING = 32
_MOST_DEPTH = 10_000
_MOST_WIDTH = 2**31
# Makes the error of a file from a problem and an advice.
Fail = Callable[..., AdapterError]


class Content(NamedTuple):
    """What metadata says, with the defaults of fields that the file lacks."""

    metadata: dict[str, Any]
    spec: PromptSpec
    protocol: Protocol | None


def check_metadata(values: Any, fail: Fail) -> Content:
    """Check parsed metadata, and fill in what a file may leave out.

    Args:
        values: What the JSON text holds.
        fail: Makes the error of the call and the file.

    Raises:
        AdapterError: Another format version; a field that is missing, of the wrong type or out of
            range; one that is unknown where it changes what is computed; fields that contradict
            each other.
    """
    if not isinstance(values, dict):
        raise fail("its metadata is not a JSON object")
    version = values.get("format_version")
    if version != FORMAT_VERSION or type(version) is not int:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        raise fail(
            f"has format version {short(version)}; this release reads version {FORMAT_VERSION}",
            "It was written by a newer release. Update peft_vpt" if newer else "It is damaged",
        )
    _check_plain(values, fail)
    metadata = _filled(values)
    fields = dict(_fields(metadata))
    held = {path.rpartition(".")[0] for path in fields}
    rules = {path: rule for path, rule in FIELDS.items() if path.rpartition(".")[0] in held}
    for path in misfits(fields, rules):
        raise fail(
            f"metadata field {path!r} is missing or of the wrong type",
            f"it must be {rules[path].what}",
        )
    _check_head(metadata["head"], fail)
    _check_backbone(metadata["backbone"], fail)
    spec, protocol = _options(metadata, fail)
    check_images(metadata["preprocessing"] or {}, fail)
    return Content(metadata, spec, protocol)


def _check_plain(metadata: Mapping[str, Any], fail: Fail) -> None:
    """Refuse nesting, integers and text that other JSON readers stumble over."""
    level: list[Any] = [metadata]
    for _ in range(_MOST_NESTING):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict | list):
                inner.extend([*value.keys(), *value.values()] if isinstance(value, dict) else value)
            elif isinstance(value, str) and not is_text(value):
                raise fail(
                    f"its metadata holds {value!r:.80}, which no text file can: half of a "
                    "surrogate pair"
                )
            elif type(value) is int and not -(2**63) <= value < 2**63:
                raise fail(
                    "its metadata holds an integer of more than 64 bits",
                    "a JSON reader may round it, so store it as a string",
                )
        level = inner
        if not level:
            return
    raise fail(f"its metadata is nested more than {_MOST_NESTING} deep")


def _filled(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata with the defaults of fields that it lacks."""
    full = dict(values)
    # Objects come before what is in them.
    for path, default in DEFAULTS.items():
        parent, _, name = path.rpartition(".")
        if not parent:
            full.setdefault(name, default)
        elif isinstance(full.get(parent), dict):
            full[parent] = {name: default} | full[parent]
    return full


def _fields(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every field with its path, of objects whose fields have rules."""
    for name, value in values.items():
        if "." in name:
            # No field of this release; its path would be that of another.
            continue
        yield path + name, value
        if isinstance(value, dict) and path + name in _OBJECTS:
            # An object without fields has a path too, so that those it must have are missed.
            yield f"{path}{name}.", None
            yield from _fields(value, f"{path}{name}.")


def _check_head(head: Mapping[str, Any] | None, fail: Fail) -> None:
    if head is None:
        return
    unknown = sorted(name for name in head if f"head.{name}" not in FIELDS)
    if unknown:
        raise fail(
            f"head: metadata fields {short(unknown)} are not known to this release",
            "if a newer one wrote the file, update peft_vpt",
        )
    if head["labels"] is not None and len(head["labels"]) != head["classes"]:
        raise fail("its head's classes, features and labels do not fit together")


def _check_backbone(backbone: Mapping[str, Any], fail: Fail) -> None:
    depth, dims, table = (backbone[name] for name in ("depth", "dims", "fingerprint"))
    if bool(dims) != bool(depth):
        raise fail(f"its backbone's depth {depth} and dims {dims} contradict")
    if table is None:
        return
    # A backbone whose blocks are not known has one row for all of it.
    lengths = [_BLOCK_NUMBERS] * max(depth, 1) + [_NORM_NUMBERS]
    if [len(row) for row in (*table["blocks"], table["norm"])] != lengths:
        raise fail(
            f"its backbone fingerprint is not a table of numbers, {_BLOCK_NUMBERS} for each of "
            f"{max(depth, 1)} blocks and {_NORM_NUMBERS} for the final norm"
        )


def _options(metadata: dict[str, Any], fail: Fail) -> tuple[PromptSpec, Protocol | None]:
    """Return prompts and protocol, and put their defaults into the metadata."""
    if metadata["spec"] is None and metadata["protocol"] is None:
        raise fail("it names neither prompts nor a protocol")
    spec, protocol = PromptSpec.none(), None
    if metadata["spec"] is not None:
        with _refused("its prompt options are wrong", fail):
            # Filling in "all layers" is for files that lack the field, not for a null in it.
            spec = PromptSpec.from_dict(metadata["spec"]).resolve(metadata["backbone"]["depth"])
        metadata["spec"] = _settled(metadata["spec"], spec.to_dict(), "prompt options", fail)
    if metadata["protocol"] is None:
        del metadata["protocol"]
        return spec, None
    with _refused("its protocol is wrong", fail):
        protocol = Protocol.from_dict(metadata["protocol"])
    metadata["protocol"] = _settled(metadata["protocol"], protocol.to_dict(), "protocol", fail)
    if protocol.prompted != (metadata["spec"] is not None):
        raise fail("its protocol and its prompts contradict")
    return spec, protocol


@contextmanager
def _refused(what: str, fail: Fail) -> Iterator[None]:
    """Raise what options refuse as the error of a file."""
    try:
        yield
    except SpecError as error:
        advice = error.advice or "If a newer release wrote the file, update peft_vpt"
        raise fail(f"{what}: {reason(error)}", advice) from error


def _settled(
    given: Mapping[str, Any], full: dict[str, Any], what: str, fail: Fail
) -> dict[str, Any]:
    """Return options with all their fields; those that a file gives are as it saved them."""
    if any(value != full.get(name) for name, value in given.items()):
        raise fail(f"its {what} are not resolved, as a saved file's are")
    return full


def _text(what: str, pattern: str) -> Rule:
    """Return a rule for strings that match a pattern as a whole."""
    whole = re.compile(pattern)
    return Rule(what, lambda value: isinstance(value, str) and bool(whole.fullmatch(value)))


_STRING = instance(str, "a string")
_NAME = _text("a string that is not empty", r"(?s:.+)")
# Values that end up in names of classes, in addresses, and in a card's text.
_WORD = _text("a word", r"[\w.+!/-]{1,200}")
# A path below the Hub's cache, so that it must not lead out of there.
REVISION = _text(
    "a branch, tag or commit, no path that leads elsewhere",
    r"(?a)(?=.{1,200}\Z)(?!.*\.\.)\w[\w.+!-]*(/\w[\w.+!-]*)*",
)
_OBJECT = instance(dict, "an object")
_COUNT = integer(1, _MOST_WIDTH)
_HUB_ID = Rule("the name of a Hub repository", lambda v: isinstance(v, str) and is_hub_name(v))
_SUMS = list_of(number(0), "a list of numbers >= 0")
# Every field that this release knows. Those of `spec` and `protocol` are `PromptSpec`'s and
# `Protocol`'s own.
FIELDS = {
    "format_version": _COUNT,
    "spec": or_none(_OBJECT, "null"),
    "protocol": or_none(_OBJECT, "null"),
    "backbone": _OBJECT,
    "backbone.library": _NAME,
    "backbone.architecture": _WORD,
    "backbone.hub_id": or_none(_HUB_ID, "null"),
    "backbone.revision": or_none(REVISION, "null"),
    "backbone.dims": list_of(_COUNT, "a list of widths", least=0),
    "backbone.depth": integer(0, _MOST_DEPTH),
    "backbone.fingerprint": or_none(_OBJECT, "null"),
    "backbone.fingerprint.dtype": _NAME,
    "backbone.fingerprint.blocks": list_of(_SUMS, "a list of lists of numbers >= 0"),
    "backbone.fingerprint.norm": _SUMS,
    "backbone.fingerprint.rest": optional(
        Rule("six numbers >= 0", lambda value: _SUMS.fits(value) and len(value) == 6)
    ),
    "backbone.fingerprint.quantized": optional(Rule("true", lambda value: value is True)),
    "head": or_none(_OBJECT, "null"),
    "head.classes": _COUNT,
    "head.labels": or_none(list_of(_STRING, "a list of strings"), "null"),
    "head.in_features": _COUNT,
    "head.reads": _NAME,
    "head.class": optional(_WORD),
    "head.bias": optional(FLAG),
    "preprocessing": or_none(_OBJECT, "null"),
    **{f"preprocessing.{name}": rule for name, rule in IMAGE_RULES.items()},
    "task": or_none(_STRING, "null"),
    "metrics": or_none(_OBJECT, "null"),
    "library_version": _WORD,
    "checksum": _text("64 hexadecimal digits", "[0-9a-f]{64}"),
}
_OBJECTS = {path.rpartition(".")[0] for path in FIELDS}
# What a reader takes where a file lacks a field.
DEFAULTS: dict[str, Any] = {
    "spec": None,
    "protocol": None,
    "backbone.hub_id": None,
    "backbone.revision": None,
    "backbone.fingerprint": None,
    "head": None,
    "head.labels": None,
    "preprocessing": None,
    "task": None,
    "metrics": None,
    "library_version": "unknown",
}


def plain_metrics(metrics: Mapping[str, Any], call: str = "save_task_adapter") -> dict[str, Any]:
    """Return metrics as plain JSON values; numbers of numpy and tensors of one number are turned.

    Raises:
        AdapterError: They are no mapping, or hold what JSON cannot say.
    """
    try:
        text = json.dumps(dict(metrics), allow_nan=False, default=_as_number)
        # Through JSON, as a reader will see them: tuples become lists.
        found: dict[str, Any] = json.loads(text)
        return found
    except (TypeError, ValueError, RecursionError) as error:
        raise AdapterError(
            call,
            "must be a dict of plain, finite JSON values, such as {'accuracy': 0.93}: "
            f"{short(error)}",
            "`float(...)` makes a number of what is none",
            given={"metrics": ...},
        ) from error


def _as_number(value: Any) -> Any:
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        return value.item()
    raise TypeError(f"a {type(value).__name__} is no JSON value")
