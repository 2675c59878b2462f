"""The errors of the library, as data: what was called, what is wrong, what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_VALUE = 80
_PLAIN = (str, bytes, int, float, Path, list, tuple, dict, set, range, type(None))
_LONGEST = 600
# Code in a message stands between backticks, so that the shell can put its own words there.
CODE = re.compile(r"`([^`\n]+)`")


class VPTError(ValueError):
    """Base of everything that this library raises on purpose.

    `str()` joins the parts into one sentence: `call(name=value): path: problem; advice.` Whoever
    wants to know what happened reads the parts, never the sentence.

    Args:
        call: What was called: "inject_prompts".
        problem: What is wrong, or what would be right: a clause without a full stop. Code in it and
            in the advice stands between backticks, which `str()` leaves out.
        advice: What to do. One with a capital letter is a sentence of its own.
        facts: Whatever a handler may want to know. Two are shown: `given`, a mapping of arguments
            to the values given (`...` for one that is not shown); `path`, the file.
    """

    def __init__(self, call: str, problem: str = "", advice: str = "", **facts: Any) -> None:
        super().__init__(call, problem, advice)
        self.call, self.problem, self.advice, self.facts = call, problem, advice, facts

    def __str__(self) -> str:
        """Return the sentence for somebody who calls from Python."""
        given = self.facts.get("given")
        shows = [f"{n}={'...' if v is ... else shown(v)}" for n, v in (given or {}).items()]
        call = f"{self.call}({', '.join(shows)})" if shows else self.call
        return sentence(call, self.facts.get("path"), self.problem, self.advice)


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


class VPTWarning(UserWarning):
    """A warning with the parts of an error, so that the shell can say it in its own words."""

    def __init__(self, error: VPTError) -> None:
        super().__init__(str(error))
        self.error = error


def sentence(call: str, path: Any, problem: str, advice: str) -> str:
    """Join the parts of an error, without the backticks around code."""
    text = ": ".join(str(part) for part in (call, path, CODE.sub(r"\1", problem)) if part)
    if advice:
        joint = " " if text.endswith((".", "?", "!")) else ". " if advice[0].isupper() else "; "
        text += joint + CODE.sub(r"\1", advice)
    # A worker of a DataLoader raises its error again with a whole traceback as the only part.
    return text if not problem or text.endswith((".", "?", "!")) else f"{text}."


def cut(text: str, most: int = _LONGEST) -> str:
    """Return a text on one line and not longer than a message should be."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]} ..."


def shown(value: Any) -> str:
    """Return a value for a message: plain ones, cut where they are long, of others the type."""
    return cut(repr(value), _VALUE) if isinstance(value, _PLAIN) else f"<{type(value).__name__}>"


def listing(items: Sequence[str], most: int = 10) -> str:
    """Return at most `most` items in a row, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def short(value: Any) -> str:
    """Return a value or an error as text of a length that a message can bear."""
    return cut(str(value) if isinstance(value, Exception) else repr(value), 400)


def reason(error: Exception) -> str:
    """Return what is wrong without the call, for the error of a call around it."""
    if not isinstance(error, VPTError) or not error.problem:
        return short(error)
    given = (error.facts.get("given") or {}).items()
    values = ", ".join(f"{name}={shown(value)}" for name, value in given if value is not ...)
    return f"{values}: {error.problem}" if values else error.problem


@contextmanager
def renamed(call: str, **facts: Any) -> Iterator[None]:
    """Raise errors of the body again as those of another call, with further facts or others."""
    try:
        yield
    except VPTError as error:
        if not error.problem:
            raise
        raise type(error)(call, error.problem, error.advice, **(error.facts | facts)) from error


def is_text(value: str) -> bool:
    """Tell whether a file can hold a text: not with half of a surrogate pair in it."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
