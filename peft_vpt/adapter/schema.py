"""What the metadata of a task adapter must be: fields, types, ranges.

The tensors and the bytes are `adapter_file`'s business.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..backbones.identity import is_hub_name
from ..errors import AdapterError, SpecError, is_text, short
from ..protocols.options import Protocol
from ..spec import PromptSpec

# A bound that no adapter reaches.
_MOST_NESTING = 32


@dataclass(frozen=True)
class Field:
    """What a field must hold.

    Args:
        what: In words, for messages.
        fits: Tells whether a value does.
        required: Whether it must be there.
    """

    what: str
    fits: Callable[[Any], bool]
    required: bool = True


def integer(low: int, high: int) -> Callable[[Any], bool]:
    """Return a test for integers of a range, ends included."""
    return lambda value: type(value) is int and low <= value <= high


def number(value: Any) -> bool:
    """Tell whether a value is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def list_of(fits: Callable[[Any], bool], least: int = 1) -> Callable[[Any], bool]:
    """Return a test for lists of such values, of at least so many."""
    return lambda value: isinstance(value, list) and len(value) >= least and all(map(fits, value))


def or_null(field: Field) -> Field:
    """Return a field that may be null too."""
    return Field(f"{field.what} or null", lambda value: value is None or field.fits(value))


def optional(field: Field) -> Field:
    """Return a field that may be absent."""
    return Field(field.what, field.fits, required=False)


def check_plain(metadata: Mapping[str, Any], where: str) -> None:
    """Refuse nesting, integers and text that other JSON readers stumble over.

    Raises:
        AdapterError: There is some.
    """
    level: list[Any] = [metadata]
    for _ in range(_MOST_NESTING):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict | list):
                inner.extend([*value.keys(), *value.values()] if isinstance(value, dict) else value)
            elif isinstance(value, str) and not is_text(value):
                raise AdapterError(
                    f"{where}: its metadata holds {value!r:.80}, which no text file can: half of a "
                    "surrogate pair."
                )
            elif type(value) is int and not -(2**63) <= value < 2**63:
                raise AdapterError(
                    f"{where}: its metadata holds an integer of more than 64 bits; a JSON reader "
                    "may round it, so store it as a string."
                )
        level = inner
        if not level:
            return
    raise AdapterError(f"{where}: its metadata is nested more than {_MOST_NESTING} deep.")


def check_fields(values: Mapping[str, Any], fields: Mapping[str, Field], where: str) -> None:
    """Compare an object with its table.

    Raises:
        AdapterError: A field is missing, of the wrong type, or unknown.
    """
    for name, field in fields.items():
        if not (field.fits(values[name]) if name in values else not field.required):
            raise AdapterError(
                f"{where}: metadata field {name!r} is missing or of the wrong type; it must be "
                f"{field.what}."
            )
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise AdapterError(
            f"{where}: metadata fields {short(unknown)} are not known to this release; if a newer "
            "one wrote the file, update peft_vpt."
        )


FORMAT_VERSION = 1
INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
# `head.reads` of the decoder of a `Segmenter`: every image token, behind the final norm.
SEGMENTER = "tokens"
_BLOCK_NUMBERS, _NORM_NUMBERS = 9, 3
# Bounds that no adapter reaches: they keep a small file from asking for gigabytes.
_MOST_DEPTH = 10_000
_MOST_PIXELS = 2**12
_MOST_WIDTH = 2**31


def check_metadata(metadata: Any, where: str) -> PromptSpec:
    """Check parsed metadata, and return the prompt options in it.

    Args:
        metadata: What the JSON text holds.
        where: The call and the file, for messages.

    Raises:
        AdapterError: Another format version; a field that is missing, unknown, of the wrong type or
            out of range; fields that contradict each other.
    """
    if not isinstance(metadata, dict):
        raise AdapterError(f"{where}: its metadata is not a JSON object.")
    version = metadata.get("format_version")
    if version != FORMAT_VERSION or type(version) is not int:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        advice = (
            "It was written by a newer release. Update peft_vpt." if newer else "It is damaged."
        )
        raise AdapterError(
            f"{where}: has format version {short(version)}; this release reads version "
            f"{FORMAT_VERSION}. {advice}"
        )
    check_plain(metadata, where)
    check_fields(metadata, _FIELDS, where)
    check_fields(metadata["backbone"], _BACKBONE, f"{where}: backbone")
    if metadata["head"] is not None:
        check_fields(metadata["head"], _HEAD, f"{where}: head")
        _check_labels(metadata["head"], where)
    if metadata["preprocessing"] is not None:
        _check_images(metadata["preprocessing"], f"{where}: preprocessing")
    _check_backbone(metadata["backbone"], where)
    _check_protocol(metadata, where)
    if metadata["spec"] is None:
        return PromptSpec.none()
    return _spec(metadata["spec"], metadata["backbone"]["depth"], where)


def is_segmenter(head: Mapping[str, Any] | None) -> bool:
    """Tell whether a head is the decoder of a `Segmenter`."""
    return head is not None and head["reads"] == SEGMENTER


_TEXT = Field("a string", lambda value: isinstance(value, str))
_NAME = Field("a string that is not empty", lambda value: isinstance(value, str) and value != "")
# Values that end up in names of classes, in addresses, and in a card's text.
_WORD = Field(
    "a word", lambda v: isinstance(v, str) and re.fullmatch(r"[\w.+!/-]{1,200}", v) is not None
)
# A path below the Hub's cache, so that it must not lead out of there.
_PATH = re.compile(r"(?=.{1,200}\Z)(?!.*\.\.)\w[\w.+!-]*(/\w[\w.+!-]*)*", re.ASCII)


def is_revision(value: Any) -> bool:
    """Tell whether a value can be the revision of a backbone's repository."""
    return isinstance(value, str) and _PATH.fullmatch(value) is not None


_REVISION = Field("a branch, tag or commit, no path that leads elsewhere", is_revision)
_OBJECT = Field("an object", lambda value: isinstance(value, dict))
_COUNT = Field("an integer of at least 1", integer(1, _MOST_WIDTH))
_FIELDS = {
    "format_version": _COUNT,
    "spec": or_null(_OBJECT),
    "protocol": optional(_OBJECT),
    "backbone": _OBJECT,
    "head": or_null(_OBJECT),
    "preprocessing": or_null(_OBJECT),
    "task": or_null(_TEXT),
    "metrics": or_null(_OBJECT),
    "library_version": _WORD,
    "checksum": Field(
        "64 hexadecimal digits",
        lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None,
    ),
}
_BACKBONE = {
    "library": _NAME,
    "architecture": _WORD,
    "hub_id": or_null(
        Field(
            "the name of a Hub repository",
            lambda value: isinstance(value, str) and is_hub_name(value),
        )
    ),
    "revision": or_null(_REVISION),
    "dims": Field("a list of widths", list_of(_COUNT.fits, least=0)),
    "depth": Field(f"an integer from 0 to {_MOST_DEPTH}", integer(0, _MOST_DEPTH)),
    "fingerprint": or_null(_OBJECT),
}
_HEAD = {
    "classes": _COUNT,
    "labels": or_null(Field("a list of strings", list_of(_TEXT.fits))),
    "in_features": _COUNT,
    "reads": _NAME,
    "class": optional(_WORD),
    "bias": optional(Field("true or false", lambda value: isinstance(value, bool))),
}
_PREPROCESSING = {
    "size": optional(
        Field(
            f"[height, width], each from 1 to {_MOST_PIXELS}",
            lambda value: list_of(integer(1, _MOST_PIXELS), least=2)(value) and len(value) == 2,
        )
    ),
    "mean": optional(Field("a list of numbers", list_of(number))),
    "std": optional(
        Field("a list of numbers above 0", list_of(lambda value: number(value) and value > 0))
    ),
    "interpolation": optional(
        Field(
            f"one of {', '.join(INTERPOLATIONS)}",
            lambda value: isinstance(value, str) and value in INTERPOLATIONS,
        )
    ),
    "crop": optional(
        or_null(
            Field("a number from 0.1 to 10", lambda value: number(value) and 0.1 <= value <= 10)
        )
    ),
}
IMAGE_FIELDS = tuple(_PREPROCESSING)
_FINGERPRINT = {
    "dtype": _NAME,
    "blocks": Field("a list", lambda value: isinstance(value, list)),
    "norm": Field("a list", lambda value: isinstance(value, list)),
    "rest": optional(
        Field("six numbers", lambda value: list_of(_sum, least=6)(value) and len(value) == 6)
    ),
    "quantized": optional(Field("true", lambda value: value is True)),
}


def _check_images(images: Mapping[str, Any], where: str) -> None:
    check_fields(images, _PREPROCESSING, where)
    if len(images.get("mean", [])) != len(images.get("std", [])):
        raise AdapterError(f"{where}: it has unlike numbers of means and stds.")
    # What an image is resized to before the middle is cut out of it.
    edge = max(images.get("size", [0])) / (images.get("crop") or 1)
    if edge > _MOST_PIXELS:
        raise AdapterError(
            f"{where}: size {images['size']} and crop {images['crop']} make an edge of {edge:.0f} "
            f"pixels; it may be {_MOST_PIXELS} at most."
        )


def _check_labels(head: Mapping[str, Any], where: str) -> None:
    if head["labels"] is not None and len(head["labels"]) != head["classes"]:
        raise AdapterError(f"{where}: its head's classes, features and labels do not fit together.")


def _check_backbone(backbone: Mapping[str, Any], where: str) -> None:
    depth, dims, table = (backbone[name] for name in ("depth", "dims", "fingerprint"))
    if bool(dims) != bool(depth):
        raise AdapterError(f"{where}: its backbone's depth {depth} and dims {dims} contradict.")
    if table is None:
        return
    rows = table.get("blocks")
    # A backbone whose blocks are not known has one row for all of it.
    lengths = [_BLOCK_NUMBERS] * max(depth, 1) + [_NORM_NUMBERS]
    lists = [*rows, table.get("norm")] if isinstance(rows, list) else []
    right = [isinstance(row, list) and all(map(_sum, row)) and len(row) for row in lists]
    if right != lengths:
        raise AdapterError(
            f"{where}: its backbone fingerprint is not a table of numbers, {_BLOCK_NUMBERS} for "
            f"each of {max(depth, 1)} blocks and {_NORM_NUMBERS} for the final norm."
        )
    check_fields(table, _FINGERPRINT, f"{where}: fingerprint")


def _sum(value: Any) -> bool:
    return type(value) is float and math.isfinite(value) and value >= 0


def _spec(values: Mapping[str, Any], depth: int, where: str) -> PromptSpec:
    wrong = f"{where}: its prompt options are wrong"
    try:
        spec = PromptSpec.from_dict(values)
        # Filling in "all layers" of a depth that a file made up could take any time.
        settled = isinstance(values.get("layers"), list) and spec.dropout is not None
        resolved = settled and spec.resolve(depth) == spec
    except SpecError as error:
        raise AdapterError(f"{wrong}: {short(error)}") from error
    if not resolved:
        raise AdapterError(f"{wrong}: they are not resolved, as a saved file's are.")
    return spec


def _check_protocol(metadata: Mapping[str, Any], where: str) -> None:
    if "protocol" not in metadata:
        if metadata["spec"] is None:
            raise AdapterError(f"{where}: it names neither prompts nor a protocol.")
        return
    try:
        protocol = Protocol.from_dict(metadata["protocol"])
    except SpecError as error:
        raise AdapterError(
            f"{where}: its protocol is wrong: {short(error)} If a newer release wrote the file, "
            "update peft_vpt."
        ) from error
    if protocol.to_dict() != metadata["protocol"] or protocol.prompted != (
        metadata["spec"] is not None
    ):
        raise AdapterError(f"{where}: its protocol and its prompts contradict.")


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
            f"{call}(metrics=...): must be a dict of plain, finite JSON values, such as "
            f"{{'accuracy': 0.93}}: {short(error)}; float(...) makes a number of what is none."
        ) from error


def _as_number(value: Any) -> Any:
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        return value.item()
    raise TypeError(f"a {type(value).__name__} is no JSON value")
