"""`compare`: protocols side by side on a user's own images, and the paper's ablations."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import VPTError
from .options import (
    LENGTH,
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
    build,
    counts,
    need_folder,
    need_packages,
    need_size,
    numbers,
    open_three,
    preprocessing_of,
)
from .output import CALL, Offline, complain, complain_once, in_the_shell, write_facts

if TYPE_CHECKING:
    from ..data import Task
    from ..experiments.compare import Plan
    from ..experiments.records import Record
    from ..experiments.variants import Variant


_BEGINNINGS = {
    "random": "at random",
    "tokens": "as tokens of training images",
    "prototypes": "as class prototypes",
}


def list_ablations(value: str | None) -> str | None:
    """Print the ablations and end, for `--ablation list`."""
    if value != "list":
        return value
    from ..experiments.variants import ABLATIONS

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

    need_packages("accelerate", "matplotlib", "scipy", "sklearn", "timm")
    _check_words(protocols, ablation, fraction, init)
    _check_numbers(length, lengths, ensemble, seeds)
    output = need_folder(output)
    chosen, tell = tuple(numbers(factors, "--factors")), complain_once()
    task = open_three(data, output, skip_broken, tell)
    backbone = Backbone(model, weights, size, offline, pool)
    bare, transform = backbone.told()
    edge, classes = transform.preprocessing["size"][0], len(task.classes)
    named = with_options(
        named_rows(protocols, ablation, bare, edge, classes), length, lengths, fraction
    )
    rows = taken(named, backbone, task, "--protocols" if protocols else None)
    usual, names = preset is Preset.default, [row.protocol for row in rows]
    if not ablation and begins_as_tokens(init, usual, names):
        rows = as_tokens(rows, backbone, task, asked=init is not None)
    # All images are read before anything is written.
    wanted = {row.fraction for row in rows} - {1.0}
    shares = {share: open_three(data, output, skip_broken, tell, share) for share in sorted(wanted)}
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


def _check_words(
    protocols: str | None, ablation: str | None, fraction: float, init: First | None
) -> None:
    """Refuse options that exclude one another."""
    from ..experiments.variants import ABLATIONS

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
    from ..experiments.variants import ABLATIONS

    return ablation is None or ABLATIONS[ablation].final


def named_rows(
    protocols: str | None, ablation: str | None, bare: Any, edge: int, classes: int
) -> Iterable[Variant]:
    """Return the rows of an ablation, or of protocols as they are."""
    from ..experiments.backbones import facts_of
    from ..experiments.compare import PROTOCOLS
    from ..experiments.variants import named, rows_of

    if ablation:
        return rows_of(ablation, facts_of(bare, edge, classes))
    return named(PROTOCOLS if protocols is None else protocols.split(","))


def with_options(
    rows: Iterable[Variant], length: int | None, lengths: str | None, fraction: float
) -> list[Variant]:
    """Return rows with prompt lengths and a share of the images.

    Raises:
        BadParameter: Lengths were given, and no row takes them.
    """
    from ..experiments.variants import with_fraction, with_lengths

    rows = list(rows)
    given = "--length" if lengths is None else "--lengths"
    free = any(row.prompted and "length" not in row.options for row in rows)
    if not free and (length is not None or lengths is not None):
        raise typer.BadParameter(
            "no row takes it: there are no prompts, or they have lengths of their own; leave it "
            "out",
            param_hint=given,
        )
    tried = [length or LENGTH] if lengths is None else counts(lengths, given)
    return list(with_fraction(with_lengths(rows, tried), fraction))


def rows_of_plan(rows: list[Variant], own: bool) -> dict[str, Any]:
    """Return rows in the words of a plan; protocols as they are keep the records they have had."""
    from ..experiments.variants import distinct

    if own:
        return {"variants": distinct(rows)}
    names = tuple(row.protocol for row in rows)
    options = {row.protocol: row.options for row in rows if row.prompted}
    return {"protocols": names, "options": options}


def beginnings(rows: list[Variant]) -> str:
    """Say how the prompts of rows begin, "" where there are none that train."""
    from ..protocols.options import Protocol

    labels: dict[str, list[str]] = {}
    for variant in (row for row in rows if Protocol(row.protocol).trains_prompts):
        first = _BEGINNINGS[variant.options.get("init", "random")]
        labels.setdefault(first, []).append(variant.label)
    if len(labels) == 1:
        return f" Prompts begin {next(iter(labels))}."
    told = (f"{how} in {', '.join(names)}" for how, names in labels.items())
    return f" Prompts begin {'; '.join(told)}." if labels else ""


def write_pages(
    records: list[Record],
    rows: list[Variant],
    ablation: str | None,
    folder: Path,
    intro: str,
    suffix: str,
    chosen_lengths: bool,
) -> list[Path]:
    """Write the page of this task, and one of all tasks whose records lie in the folder.

    `report.md` is of the task whose records came first into the folder.
    """
    from ..experiments.compare import RECORDS
    from ..experiments.records import file_name, read_records
    from ..experiments.report import like, write_ablation, write_report
    from ..experiments.variants import ABLATIONS

    task = records[0]["task"]
    place = file_name(task)
    if ablation:
        chosen = ABLATIONS[ablation]
        title = f"{chosen.paper}: {ablation}, {task}"
        return [
            write_ablation(
                records,
                rows,
                chosen,
                folder,
                name=f"{ablation}-{place}{suffix}",
                title=title,
                intro=intro,
            )
        ]
    there = read_records(folder / RECORDS)
    end = suffix if there[0]["task"] == task else f"-{place}{suffix}"
    names = {"name": f"report{end}", "figure": f"accuracy{end}"}
    pages = [write_report(records, folder, title=f"Comparison on {task}", intro=intro, **names)]
    every = like(records, there, ("length",) if chosen_lengths else ())
    if len({record["task"] for record in every}) > 1:
        names = {"name": f"all-tasks{suffix}", "figure": f"all-tasks{suffix}"}
        try:
            pages.append(write_report(every, folder, title="All tasks", intro="", **names))
        except VPTError as error:
            complain(f"no page of all tasks: {in_the_shell(error)}")
    return pages


class Backbone:
    """The backbone that was asked for, at any image size."""

    def __init__(
        self, model: str, weights: Path | None, size: int | None, offline: bool, pool: str | None
    ) -> None:
        from ..experiments.backbones import usual_pool

        self.model, self.weights, self.size, self.offline = model, weights, size, offline
        self.pool = pool or usual_pool(model)
        self.preprocessing: Any = None

    @cached_property
    def checksum(self) -> str:
        """What tells its weights from others of its name: of their file, or of the model."""
        from ..experiments.sums import file_sum, model_sum

        return model_sum(self.make()) if self.weights is None else file_sum(self.weights)

    @property
    def name(self) -> str:
        """Return its name in records."""
        return f"{self.model} ({self.pool})" if self.pool else self.model

    def make(self, edge: int | None = None) -> Any:
        """Build it, bare."""
        from ..experiments.backbones import pooled

        found = build(self.model, self.weights, edge or self.size, self.offline)
        if self.preprocessing is None:
            self.preprocessing = preprocessing_of(found, self.offline)
        return pooled(found, self.pool)

    def transform(self, edge: int | None) -> Any:
        """Return the transform of its images."""
        from ..data import eval_transform

        return eval_transform(self.preprocessing, edge)

    def told(self) -> tuple[Any, Any]:
        """Build it with the transform of its images, which it must take, and tell of both."""
        found, transform = self.make(), self.transform(self.size)
        need_size(found, transform.preprocessing["size"])
        complain(f"{transform.describe()}\n{self.describe()}")
        return found, transform

    def at(self, edge: int) -> tuple[Any, Any]:
        """Return transform and builder for another size."""
        return self.transform(edge), lambda: self.make(edge)

    def describe(self) -> str:
        """Say what the head reads."""
        told = {"token": "the CLS token", "avg": "the mean of the patch tokens"}
        what = told.get(self.pool or "", "what the model gives it")
        return f"the head reads {what}" + (f" (--pool {self.pool})" if self.pool else "")


def taken(rows: list[Variant], backbone: Backbone, task: Task, asked: str | None) -> list[Variant]:
    """Leave out the rows that a backbone refuses, and say so.

    Args:
        rows: Of the comparison.
        backbone: Built anew for every row.
        task: What the rows train on.
        asked: Option by which the user has named the rows, of which none is left out then.

    Raises:
        VPTError: It refuses all of them, or one that was asked for.
    """
    from ..experiments.variants import distinct

    reasons = {row.label: _reason(row, backbone, task) for row in distinct(rows)}
    told = [f"{label}: {in_the_shell(why)}" for label, why in reasons.items() if why]
    if told and asked:
        raise VPTError(CALL, f"{asked}: {'; '.join(told)}")
    for line in told:
        complain(f"left out: {line}")
    if len(told) == len(reasons):
        raise VPTError(CALL, "this backbone takes none of the rows")
    return [row for row in rows if not reasons[row.label]]


def as_tokens(rows: list[Variant], backbone: Backbone, task: Task, *, asked: bool) -> list[Variant]:
    """Let prompts begin as tokens of training images in the rows that can, and say which cannot.

    Args:
        rows: Of the comparison.
        backbone: Built anew for every row.
        task: Whose training images give the tokens.
        asked: Whether the user asked for it.

    Raises:
        VPTError: It was asked for, and a row cannot.
    """
    from ..experiments.variants import with_tokens

    changed = []
    for row in rows:
        variant = with_tokens(row)
        reason = None if variant is row else _reason(variant, backbone, task)
        if reason and asked:
            told = f"{variant.label}: {in_the_shell(reason)}"
            raise VPTError(CALL, told, given={"init": "tokens"})
        if reason:
            complain(f"{variant.label}: prompts begin at random: {in_the_shell(reason)}")
            variant = row
        changed.append(variant)
    return changed


def _reason(variant: Variant, backbone: Backbone, task: Task) -> VPTError | None:
    """Return why a backbone refuses a variant, None where it takes it."""
    from ..backbones.find import says_its_size
    from ..experiments.backbones import refusal

    images = int(len(task.split("train")) * variant.fraction)
    size = backbone.transform(variant.size or backbone.size).preprocessing["size"]
    model = says_its_size(backbone.make(variant.size), size)
    return refusal(variant, model, len(task.classes), size, images)
