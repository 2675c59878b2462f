"""The errors of the library: every one is a `ValueError` whose message says what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class VPTError(ValueError):
    """Base of everything that this library raises on purpose."""


class UnsupportedArchitectureError(VPTError):
    """The model, or a part of it, cannot take prompts exactly; the message says which and why."""


class AlreadyPromptedError(VPTError):
    """The model already carries prompts."""


class NotPromptedError(VPTError):
    """The call needs a prompted model."""


class SpecError(VPTError):
    """An option, or a pair of options, is wrong."""


class AdapterError(VPTError):
    """A task adapter file cannot be read or written."""


class AdapterMismatchError(AdapterError):
    """A sound task adapter file that was made for another backbone or another head."""


_VALUE = 80
_LONGEST = 600


def cut(text: str, most: int = _LONGEST) -> str:
    """Return a text on one line and not longer than a message should be."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]} ..."


def shown(value: Any) -> str:
    """Return a value for a message: plain ones, cut where they are long, of others the type."""
    if not isinstance(value, str | bytes | int | float | Path | None):
        return f"<{type(value).__name__}>"
    return cut(repr(value), _VALUE)


def listing(items: Sequence[str], most: int = 10) -> str:
    """Return at most `most` items in a row, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def short(value: Any) -> str:
    """Return a value or an error as text of a length that a message can bear."""
    return cut(str(value) if isinstance(value, Exception) else repr(value), 400)


def is_text(value: str) -> bool:
    """Tell whether a file can hold a text: not with half of a surrogate pair in it."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
