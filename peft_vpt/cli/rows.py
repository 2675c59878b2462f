"""The rows of a comparison: which they are, and how its page tells of their prompts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import typer

from .sources import LENGTH, counts

if TYPE_CHECKING:
    from ..experiments.ablations import Row

_BEGINNINGS = {
    "random": "at random",
    "tokens": "as tokens of training images",
    "prototypes": "as class prototypes",
}


def named_rows(
    protocols: str | None, ablation: str | None, bare: Any, edge: int, classes: int
) -> Iterable[Row]:
    """Return the rows of an ablation, or of protocols as they are."""
    from ..experiments.ablations import Row, rows_of
    from ..experiments.backbones import facts_of
    from ..experiments.compare import PROTOCOLS
    from ..experiments.variants import plain

    if ablation:
        return rows_of(ablation, facts_of(bare, edge, classes))
    names = PROTOCOLS if protocols is None else protocols.split(",")
    return [Row(variant) for variant in plain(names, {})]


def with_options(
    rows: Iterable[Row], length: int | None, lengths: str | None, fraction: float
) -> list[Row]:
    """Return rows with prompt lengths and a share of the images.

    Raises:
        BadParameter: Lengths were given, and no row takes them.
    """
    from ..experiments.variants import with_fraction, with_lengths

    rows = list(rows)
    given = "--length" if lengths is None else "--lengths"
    free = any(row.variant.prompted and "length" not in row.variant.options for row in rows)
    if not free and (length is not None or lengths is not None):
        raise typer.BadParameter(
            "no row takes it: there are no prompts, or they have lengths of their own; leave it "
            "out",
            param_hint=given,
        )
    tried = [length or LENGTH] if lengths is None else counts(lengths, given)
    variants = with_fraction(with_lengths((row.variant for row in rows), tried), fraction)
    return [row._replace(variant=v) for row, v in zip(rows, variants, strict=True)]


def rows_of_plan(rows: list[Row], own: bool) -> dict[str, Any]:
    """Return rows in the words of a plan; protocols as they are keep the records they have had."""
    from ..experiments.ablations import variants_of

    if own:
        return {"variants": variants_of(rows)}
    names = tuple(row.variant.protocol for row in rows)
    options = {row.variant.protocol: row.variant.options for row in rows if row.variant.prompted}
    return {"protocols": names, "options": options}


def beginnings(rows: list[Row]) -> str:
    """Say how the prompts of rows begin, "" where there are none that train."""
    from ..protocols.options import Protocol

    labels: dict[str, list[str]] = {}
    for variant in (row.variant for row in rows if Protocol(row.variant.protocol).trains_prompts):
        first = _BEGINNINGS[variant.options.get("init", "random")]
        labels.setdefault(first, []).append(variant.label)
    if len(labels) == 1:
        return f" Prompts begin {next(iter(labels))}."
    told = (f"{how} in {', '.join(names)}" for how, names in labels.items())
    return f" Prompts begin {'; '.join(told)}." if labels else ""
