"""`compare`: protocols side by side on a user's own images, and the paper's ablations."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import Offline, complain, write_facts
from .sources import Data, Model, Size, Weights, build, counts, numbers, preprocessing_of

if TYPE_CHECKING:
    from ..experiments.ablations import Row
    from ..experiments.records import Record


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
    length: Annotated[int, typer.Option(min=1, help="Prompts per block.")] = 20,
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
    preset: Annotated[str, typer.Option(help="default or paper.")] = "default",
    group: Annotated[str | None, typer.Option(help="Of the task, for tables.")] = None,
    offline: Offline = False,
) -> None:
    """Compare prompts with their rivals on your images; print and save the table.

    Rates are chosen on val; final runs train on train and val, and see test once. A run that has a
    record is not run again, so a comparison that was stopped goes on.
    """
    from ..data import open_task
    from ..experiments.ablations import Row, rows_of
    from ..experiments.compare import PROTOCOLS, Plan, need_splits
    from ..experiments.compare import compare as work
    from ..experiments.variants import facts_of, plain

    _check_words(protocols, ablation, fraction)
    task = open_task(data)
    need_splits(task)
    backbone = _Backbone(model, weights, size, offline, pool)
    bare = backbone.make()
    transform = backbone.transform(size)
    complain(f"{task.describe()}\n{transform.describe()}")
    complain(backbone.describe())
    edge, classes = transform.preprocessing["size"][0], len(task.classes)
    tried = counts(lengths, "--lengths") if lengths else [length]
    if ablation:
        rows = _rows(rows_of(ablation, facts_of(bare, edge, classes)), tried, fraction)
        rows = _taken(rows, backbone, classes)
    else:
        names = tuple(protocols.split(",")) if protocols else PROTOCOLS
        rows = _rows([Row(variant) for variant in plain(names, {})], tried, fraction)
    own = bool(ablation or lengths or fraction < 1)
    plan = Plan(
        **_rows_of_plan(rows, own, length),
        epochs=epochs,
        factors=tuple(numbers(factors, "--factors")),
        seeds=tuple(range(seeds)),
        kind=preset,
        final=_shows_test(ablation),
        ensemble=ensemble,
        tsne=tsne,
    )
    records = work(
        task, transform, backbone.make, backbone=backbone.name, folder=output, plan=plan,
        group=group, reopen=lambda share: open_task(data, fraction=share), resize=backbone.at,
    )  # fmt: skip
    intro = (
        f"{backbone.name} on {task.name}: {epochs} epochs, preset {preset}, rates x {factors} "
        f"chosen on val, {seeds} seeds."
    )
    suffix = "" if fraction == 1 else f"-{100 * fraction:g}"
    for page in _pages(records, rows, ablation, output, intro, suffix, bool(lengths)):
        print(page.read_text(encoding="utf-8"))
        complain(f"written: {page}")


class _Backbone:
    """The backbone that was asked for, at any image size."""

    def __init__(
        self, model: str, weights: Path | None, size: int | None, offline: bool, pool: str | None
    ) -> None:
        from ..experiments.variants import usual_pool

        self.model, self.weights, self.size, self.offline = model, weights, size, offline
        self.pool = pool or usual_pool(model)
        self.preprocessing: Any = None

    @property
    def name(self) -> str:
        """Return its name in records."""
        return f"{self.model} ({self.pool})" if self.pool else self.model

    def make(self, edge: int | None = None) -> Any:
        """Build it, bare."""
        from ..experiments.variants import pooled

        found = build(self.model, self.weights, edge or self.size, self.offline)
        if self.preprocessing is None:
            self.preprocessing = preprocessing_of(found, self.offline)
        return pooled(found, self.pool)

    def transform(self, edge: int | None) -> Any:
        """Return the transform of its images."""
        from ..data import eval_transform

        return eval_transform(self.preprocessing, edge)

    def at(self, edge: int) -> tuple[Any, Any]:
        """Return transform and builder for another size."""
        return self.transform(edge), lambda: self.make(edge)

    def describe(self) -> str:
        """Say what the head reads."""
        told = {"token": "the CLS token", "avg": "the mean of the patch tokens"}
        what = told.get(self.pool or "", "what the model gives it")
        return f"the head reads {what}" + (f" (--pool {self.pool})" if self.pool else "")


def _check_words(protocols: str | None, ablation: str | None, fraction: float) -> None:
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
    if ablation == "fraction" and fraction != 1:
        raise typer.BadParameter(
            "the ablation 'fraction' has its own; leave it out", param_hint="--fraction"
        )


def _rows(rows: Iterable[Row], lengths: list[int], fraction: float) -> list[Row]:
    """Return rows with prompt lengths and a share of the images."""
    from ..experiments.variants import with_fraction, with_lengths

    rows = list(rows)
    variants = with_fraction(with_lengths((row.variant for row in rows), lengths), fraction)
    return [row._replace(variant=v) for row, v in zip(rows, variants, strict=True)]


def _taken(rows: list[Row], backbone: _Backbone, classes: int) -> list[Row]:
    """Leave out the rows that the backbone refuses, before anything is trained, and say so.

    Raises:
        VPTError: It refuses all of them.
    """
    from ..backbones.image_model import says_its_size
    from ..errors import VPTError
    from ..experiments.ablations import variants_of
    from ..experiments.variants import refusal

    reasons = {}
    for variant in variants_of(rows):
        size = backbone.transform(variant.size or backbone.size).preprocessing["size"]
        model = says_its_size(backbone.make(variant.size), size)
        reasons[variant.label] = refusal(variant, model, classes)
        if reasons[variant.label]:
            complain(f"left out: {variant.label}: {reasons[variant.label]}")
    if all(reasons.values()):
        raise VPTError("peft-vpt compare: this backbone takes none of the rows of the ablation.")
    return [row for row in rows if not reasons[row.variant.label]]


def _rows_of_plan(rows: list[Row], own: bool, length: int) -> dict[str, Any]:
    """Return rows in the words of a plan; protocols as they are keep the records they have had."""
    from ..experiments.ablations import variants_of

    if own:
        return {"variants": variants_of(rows)}
    names = tuple(row.variant.protocol for row in rows)
    options = {name: {"length": length} for name in names if name.startswith("vpt")}
    return {"protocols": names, "options": options}


def _shows_test(ablation: str | None) -> bool:
    from ..experiments.ablations import ABLATIONS

    return ablation is None or ABLATIONS[ablation].final


def _pages(
    records: list[Record],
    rows: list[Row],
    ablation: str | None,
    folder: Path,
    intro: str,
    suffix: str,
    chosen_lengths: bool,
) -> list[Path]:
    """Write the page of this task, and one of all tasks whose records lie in the folder."""
    from ..experiments.ablations import ABLATIONS
    from ..experiments.compare import RECORDS
    from ..experiments.records import read_records
    from ..experiments.report import like, write_ablation, write_report

    task = records[0]["task"]
    if ablation:
        chosen = ABLATIONS[ablation]
        title = f"{chosen.paper}: {ablation}, {task}"
        return [
            write_ablation(
                records,
                rows,
                chosen,
                folder,
                name=f"{ablation}-{task}{suffix}",
                title=title,
                intro=intro,
            )
        ]
    names = {"name": f"report{suffix}", "figure": f"accuracy{suffix}"}
    pages = [write_report(records, folder, title=f"Comparison on {task}", intro=intro, **names)]
    ignore = ("length",) if chosen_lengths else ()
    every = like(records, read_records(folder / RECORDS), ignore)
    if len({record["task"] for record in every}) > 1:
        names = {"name": f"all-tasks{suffix}", "figure": f"all-tasks{suffix}"}
        pages.append(write_report(every, folder, title="All tasks", intro="", **names))
    return pages
