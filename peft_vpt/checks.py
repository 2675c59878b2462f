"""What a value must be: rules that options, recipes and files share, each with its words.

>>> COUNT = integer(1)
>>> COUNT.fits(3), COUNT.fits(True), COUNT.what
(True, False, 'an integer >= 1')
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from .errors import SpecError, VPTError


@dataclass(frozen=True)
class Rule:
    """What a value must be.

    Args:
        what: In words, to stand behind "must be".
        fits: Tells whether a value is that.
        required: Whether it must be there at all, as a field of an object.
    """

    what: str
    fits: Callable[[Any], bool]
    required: bool = True

    def check(
        self, call: str, name: str, value: Any, error: type[VPTError] = SpecError, **facts: Any
    ) -> None:
        """Raise unless the value of an argument fits."""
        if not self.fits(value):
            raise error(call, f"must be {self.what}", given={name: value}, **facts)


def integer(least: int | None = None, most: int | None = None) -> Rule:
    """Return a rule for integers of a range, ends included; numpy's count, True does not."""

    def fits(value: Any) -> bool:
        try:
            number = operator.index(value)
        except TypeError:
            return False
        within = (least is None or least <= number) and (most is None or number <= most)
        return within and not isinstance(value, bool)

    bound = "" if least is None else f" >= {least}" if most is None else f" from {least} to {most}"
    return Rule(f"an integer{bound}", fits)


def number(
    least: float = -math.inf, most: float = math.inf, *, above: bool = False, below: bool = False
) -> Rule:
    """Return a rule for finite numbers of a range; `above`, `below`: without its ends."""

    def fits(value: Any) -> bool:
        if not isinstance(value, Real) or isinstance(value, bool):
            return False
        try:
            given = float(value)
        except OverflowError:
            return False
        over = least < given if above else least <= given
        return math.isfinite(given) and over and (given < most if below else given <= most)

    ends = [f"{'>' if above else '>='} {least:g}"] if least > -math.inf else []
    ends += [f"{'<' if below else '<='} {most:g}"] if most < math.inf else []
    return Rule(" ".join(["a finite number", " and ".join(ends)]).strip(), fits)


def one_of(*names: Any) -> Rule:
    """Return a rule for one of a few values."""
    return Rule(
        f"one of {', '.join(map(str, names))}",
        lambda value: any(value == name and type(value) is type(name) for name in names),
    )


def instance(kind: type | tuple[type, ...], what: str) -> Rule:
    """Return a rule for values of a type."""
    return Rule(what, lambda value: isinstance(value, kind))


def list_of(
    rule: Rule, what: str, least: int = 1, most: int | None = None, *, tuples: bool = False
) -> Rule:
    """Return a rule for lists (and tuples) of so many values that fit another rule."""
    kinds = (list, tuple) if tuples else list

    def fits(value: Any) -> bool:
        listed = isinstance(value, kinds) and least <= len(value) <= (most or len(value))
        return listed and all(map(rule.fits, value))

    return Rule(what, fits)


def or_none(rule: Rule, none: str = "None") -> Rule:
    """Return a rule for values that may be None too."""
    return Rule(f"{rule.what} or {none}", lambda value: value is None or rule.fits(value))


def optional(rule: Rule) -> Rule:
    """Return a rule for a field that may be absent."""
    return replace(rule, required=False)


FLAG = instance(bool, "True or False")


def misfits(values: Mapping[str, Any], rules: Mapping[str, Rule]) -> list[str]:
    """Return the names of required fields that are missing, and of fields that do not fit."""
    return [
        name
        for name, rule in rules.items()
        if not (rule.fits(values[name]) if name in values else not rule.required)
    ]
