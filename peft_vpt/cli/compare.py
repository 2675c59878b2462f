"""`compare`: protocols side by side on a user's own images, and the paper's ablations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .backbone import Backbone, as_tokens, taken
from .images import find_broken, open_images, tell_copies, without_broken
from .output import Offline, complain, complain_once, write_facts
from .pages import write_pages
from .rows import beginnings, named_rows, rows_of_plan, with_options
from .sources import (
    Data,
    First,
    FirstValues,
    Length,
    Model,
    Preset,
    Size,
    SkipBroken,
    Weights,
    begins_as_tokens,
    need_folder,
    need_outside,
    need_packages,
    need_size,
    numbers,
)

if TYPE_CHECKING:
    from ..data import Task
    from ..experiments.compare import Plan
    from ..experiments.records import Record

CALL = "peft-vpt compare"
_SPLITS = ("train", "val", "test")


def list_ablations(value: str | None) -> str | None:
    """Print the ablations and end, for `--ablation list`."""
    if value != "list":
        return value
    from ..experiments.ablations import ABLATIONS

    write_facts({name: f"{one.what} ({one.paper})" for name, one in ABLATIONS.items()})
    raise typer.Exit


def compare(
    data: Data,
    model: Model,
    output: Annotated[Path, typer.Option(help="Folder of records, adapters and report.")] = Path(
        "comparison"
    ),
    weights: Weights = None,
    protocols: Annotated[
        str | None, typer.Option(help="Separated by commas; default: the paper's main rows.")
    ] = None,
    ablation: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            callback=list_ablations,
            is_eager=True,
            help="An ablation of the paper in place of protocols; 'list' names them.",
        ),
    ] = None,
    size: Size = None,
    length: Length = None,
    lengths: Annotated[
        str | None, typer.Option(help="In place of --length: val chooses, per row.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 100,
    factors: Annotated[
        str, typer.Option(help="Multiples of the preset's rate, tried on val.")
    ] = "0.3,1,3",
    seeds: Annotated[int, typer.Option(min=1, help="Final runs per protocol.")] = 3,
    fraction: Annotated[
        float, typer.Option(help="Share of the training images; final runs leave val out then.")
    ] = 1.0,
    ensemble: Annotated[
        bool, typer.Option("--ensemble", help="Also the adapters of all seeds together.")
    ] = False,
    tsne: Annotated[
        bool, typer.Option("--tsne", help="Also figures of the final embeddings.")
    ] = False,
    pool: Annotated[
        str | None, typer.Option(help="What the head of a timm ViT reads: token or avg.")
    ] = None,
    preset: Annotated[Preset, typer.Option(help="Recipes to begin with.")] = Preset.default,
    init: FirstValues = None,
    group: Annotated[str | None, typer.Option(help="Of the task, for tables.")] = None,
    skip_broken: SkipBroken = False,
    offline: Offline = False,
) -> None:
    """Compare prompts with their rivals on your images; print and save the table.

    Rates are chosen on val; final runs train on train and val, and see test once. A run that has a
    record is not run again, so a comparison that was stopped goes on.
    """
    from ..experiments.compare import Plan
    from ..experiments.compare import compare as work

    need_packages(CALL, "accelerate", "matplotlib", "scipy", "sklearn", "timm")
    _check_words(protocols, ablation, fraction, init)
    _check_numbers(length, lengths, ensemble, seeds)
    output = need_folder(CALL, output)
    chosen, tell = tuple(numbers(factors, "--factors")), complain_once()
    task = _open(data, skip_broken, tell, output)
    backbone = Backbone(model, weights, size, offline, pool)
    bare, transform = backbone.make(), backbone.transform(size)
    need_size(CALL, bare, transform.preprocessing["size"])
    complain(f"{transform.describe()}\n{backbone.describe()}")
    edge, classes = transform.preprocessing["size"][0], len(task.classes)
    named = with_options(
        named_rows(protocols, ablation, bare, edge, classes), length, lengths, fraction
    )
    rows = taken(CALL, named, backbone, task, "--protocols" if protocols else None)
    usual, names = preset is Preset.default, [row.variant.protocol for row in rows]
    if not ablation and begins_as_tokens(init, usual, names):
        rows = as_tokens(CALL, rows, backbone, task, asked=init is not None)
    # All images are read before anything is written.
    wanted = {row.variant.fraction for row in rows} - {1.0}
    shares = {share: _open(data, skip_broken, tell, output, share) for share in sorted(wanted)}
    own = bool(ablation or lengths is not None or fraction < 1)
    plan = Plan(
        **rows_of_plan(rows, own),
        epochs=epochs,
        factors=chosen,
        seeds=tuple(range(seeds)),
        kind=preset.value,
        final=_shows_test(ablation),
        ensemble=ensemble,
        tsne=tsne,
    )
    records = work(
        task, transform, backbone.make, backbone=backbone.name, folder=output, plan=plan,
        group=group, weights=backbone.checksum, reopen=shares.__getitem__, resize=backbone.at,
    )  # fmt: skip
    _tell_failures(records)
    intro = f"{backbone.name} on {task.name}: {_told(plan, factors)}{beginnings(rows)}"
    suffix = "" if fraction == 1 else f"-{100 * fraction:g}"
    for page in write_pages(records, rows, ablation, output, intro, suffix, lengths is not None):
        print(page.read_text(encoding="utf-8"))
        complain(f"written: {page}")


def _open(
    data: str, skip: bool, tell: Callable[[str], None], output: Path, fraction: float = 1.0
) -> Task:
    """Return a task of images that can all be read, among which nothing will be written."""
    task = open_images(data, *_SPLITS, tell=tell, fraction=fraction)
    need_outside(CALL, output, data, task)
    task = without_broken(CALL, task, find_broken(task, _SPLITS), skip, tell)
    tell_copies(task, ["train"], ["val", "test"], tell)
    tell_copies(task, ["val"], ["test"], tell)
    return task


def _check_words(
    protocols: str | None, ablation: str | None, fraction: float, init: First | None
) -> None:
    """Refuse options that exclude one another."""
    from ..experiments.ablations import ABLATIONS

    if ablation is not None and ablation not in ABLATIONS:
        raise typer.BadParameter(
            f"{ablation!r}: must be list or one of {', '.join(ABLATIONS)}", param_hint="--ablation"
        )
    if ablation is not None and protocols is not None:
        raise typer.BadParameter(
            "an ablation has its own protocols; leave it out", param_hint="--protocols"
        )
    if ablation is not None and init is not None:
        raise typer.BadParameter(
            "an ablation has its own first values (see init); leave it out", param_hint="--init"
        )
    if ablation == "fraction" and fraction != 1:
        raise typer.BadParameter(
            "the ablation 'fraction' has its own; leave it out", param_hint="--fraction"
        )


def _check_numbers(length: int | None, lengths: str | None, ensemble: bool, seeds: int) -> None:
    """Refuse numbers that would be of no effect."""
    if length is not None and lengths is not None:
        raise typer.BadParameter("stands in place of --length", param_hint="--lengths")
    if ensemble and seeds == 1:
        raise typer.BadParameter("needs --seeds 2 or more", param_hint="--ensemble")


def _told(plan: Plan, factors: str) -> str:
    """Say how runs were made."""
    tried = f"rates x {factors}{' chosen on val' if len(plan.factors) > 1 else ''}"
    return f"{plan.epochs} epochs, preset {plan.kind}, {tried}, {len(plan.seeds)} seeds."


def _tell_failures(records: Iterable[Record]) -> None:
    for record in records:
        if "failure" in record:
            complain(f"diverged: {record['protocol']}, {record['split']}: {record['failure']}")


def _shows_test(ablation: str | None) -> bool:
    from ..experiments.ablations import ABLATIONS

    return ablation is None or ABLATIONS[ablation].final
