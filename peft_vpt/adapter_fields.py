"""Fields of a JSON object: what each must hold, and the check of an object against a table of them.

Which fields an adapter has is `adapter_metadata`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import AdapterError
from .wording import is_text, short

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
