"""Pages of a comparison and of an ablation, made from records alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import VPTError
from .ablations import Ablation, Row
from .plots import Figure, bar_chart, curve, heat_map
from .records import Record, field, select
from .saved import figure_name, is_ensemble
from .stats import spread
from .tables import (
    cost_names,
    costs,
    facts,
    failures,
    mark,
    markdown_table,
    report_page,
    rows_table,
)

_TOGETHER = {
    "top1 (%)": "top1",
    "mean of members (%)": "members_mean_top1",
    "best member (%)": "members_best_top1",
}
OLDER = "Of several runs of one row, task and seed with other settings the last one counts"
# Places that span more than this are drawn on a logarithmic axis.
_WIDE = 20


def write_report(
    records: Sequence[Record],
    folder: str | Path,
    *,
    title: str,
    intro: str,
    name: str = "report",
    figure: str = "accuracy",
) -> Path:
    """Write a page and its bar chart from records; return the page's path.

    Args:
        records: Of all runs.
        folder: Of the page; figures of embeddings that lie there are shown too.
        title: Heading.
        intro: First paragraph.
        name: Of the page, without suffix.
        figure: Of the bar chart, without suffix.
    """
    together = [record for record in records if is_ensemble(record)]
    # Ensembles are of the runs beside them, so they are no further rivals in the tests.
    alone, older = newest([record for record in records if not is_ensemble(record)])
    chart = bar_chart(alone, Path(folder) / figure, title=title)
    figures = {"Accuracy": chart.svg.name, **_embeddings(alone, Path(folder))}
    page = Path(folder) / f"{name}.md"
    notes = ["## Ensembles of the seeds", _ensembles(newest(together)[0])] if together else []
    if older:
        notes.append(f"{OLDER} ({older} left out).")
    notes += failures(alone)
    text = report_page(alone, title=title, intro=intro, figures=figures, notes=notes)
    page.write_text(text, encoding="utf-8")
    return page


def write_ablation(
    records: Sequence[Record],
    rows: Sequence[Row],
    ablation: Ablation,
    folder: str | Path,
    *,
    name: str,
    title: str,
    intro: str,
) -> Path:
    """Write the page of an ablation and its figure from records; return the page's path.

    Args:
        records: Of its runs; others are left out.
        rows: Of the ablation.
        ablation: What it shows.
        folder: Of the page.
        name: Of page and figure, without suffix.
        title: Heading.
        intro: First paragraph.

    Raises:
        VPTError: No record of its rows.
    """
    split = "test" if ablation.final else "val"
    labels = list(dict.fromkeys(row.variant.label for row in rows))
    labels += [f"{label} ensemble" for label in labels]
    found = select(records, protocol=labels, split=split)
    if not found:
        raise VPTError(f"write_ablation({name!r}): no record of split {split!r} is of its rows.")
    placed = place(found, rows)
    figures = _figures(found, placed, ablation, Path(folder) / name, title)
    table = _table(found, labels) if ablation.final else _best(placed)
    images = {figure.svg.stem: figure.svg.name for figure in figures}
    images |= _embeddings(found, Path(folder))
    shown = [f"![{caption}]({file})" for caption, file in images.items()]
    head = f"Jia et al. 2022, {ablation.paper}: {ablation.what}."
    page = Path(folder) / f"{name}.md"
    parts = [f"# {title}", head, intro, facts(found, split), table, *shown]
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def newest(records: Sequence[Record]) -> tuple[list[Record], int]:
    """Return records without the older of several test runs of one row, task, backbone and seed.

    Returns:
        The records that are left, and how many are not.
    """
    # Runs on val are of many rates on purpose.
    last = {_run(record): i for i, record in enumerate(records) if record["split"] == "test"}
    left = [
        record
        for i, record in enumerate(records)
        if record["split"] != "test" or last[_run(record)] == i
    ]
    return left, len(records) - len(left)


def _run(record: Record) -> tuple[Any, ...]:
    return record["protocol"], record["task"], record["backbone"], record["seed"]


def place(records: Iterable[Record], rows: Sequence[Row]) -> list[Record]:
    """Return records with `series` and `place`; one may stand on several lines."""
    records = list(records)
    return [
        record | {"series": row.series or row.variant.label, "place": row.place}
        for row in rows
        for record in records
        if record["protocol"] == row.variant.label
    ]


def like(
    records: Sequence[Record], others: Iterable[Record], ignore: Sequence[str] = ()
) -> list[Record]:
    """Return records, and those of other tasks whose rows have the same settings.

    Learning rates, seeds and batches may differ; images do.

    Args:
        records: Of one task.
        others: Of any tasks.
        ignore: Options that may differ too, "length" where val has chosen it.
    """
    tasks = {record["task"] for record in records}
    known = {_settings(record, ignore) for record in records}
    found = [r for r in others if r["task"] not in tasks and _settings(r, ignore) in known]
    return [*records, *found]


def _settings(record: Record, ignore: Sequence[str]) -> str:
    config = record["config"]
    options = {k: v for k, v in (field(record, "config.options") or {}).items() if k not in ignore}
    names = ("preset", "config.recipe.optimizer", "config.recipe.epochs", "config.weights",
             "config.preprocessing.size", "config.train")  # fmt: skip
    told = [field(record, name) for name in names]
    row = [record["protocol"], record["backbone"], record["split"], config.get("fraction")]
    return json.dumps([*row, *told, options], sort_keys=True)


def _figures(
    found: list[Record], placed: list[Record], ablation: Ablation, path: Path, title: str
) -> list[Figure]:
    if ablation.axis:
        at = [record["place"] for record in placed]
        log = max(at) > _WIDE * min(at)
        axis = ablation.axis
        return [curve(placed, path, x="place", by="series", label=axis, log=log, title=title)]
    if ablation.final:
        return [bar_chart(found, path, title=title)]
    series = list(dict.fromkeys(record["series"] for record in placed))
    return [
        heat_map(select(placed, series=name), path.with_name(f"{path.name}-{number}"), title=name)
        for number, name in enumerate(series, start=1)
    ]


def _ensembles(records: Sequence[Record]) -> str:
    rows = [
        {"task": r["task"], "row": r["protocol"], "members": len(r["config"]["members"])}
        | {name: f"{100 * r['metrics'][key]:.1f}" for name, key in _TOGETHER.items()}
        for r in records
    ]
    return rows_table(rows)


def _table(found: list[Record], labels: Sequence[str]) -> str:
    """Return accuracy and cost of the final runs, a line per row."""
    rows = []
    for label in labels:
        runs = select(found, protocol=label)
        if not runs:
            continue
        top1 = spread(run["metrics"]["top1"] for run in runs)
        text = f"{100 * top1.mean:.1f}" + (f" ± {100 * top1.std:.1f}" if top1.number > 1 else "")
        text += mark(runs)
        rows.append([label, text, *_chosen(runs[0]), *costs(runs)])
    header = ["row", "top1 on test (%)", "learning rate", "options chosen", *cost_names()]
    return markdown_table(header, rows)


def _chosen(run: Record) -> list[str]:
    options = run["config"]["options"]
    rate = f"{run['config']['recipe']['base_lr']:g}"
    return [rate, f"p={options['length']}" if "length" in options else "-"]


def _best(placed: list[Record]) -> str:
    """Return the best rate of every row on val."""
    rows = []
    for label in dict.fromkeys(record["protocol"] for record in placed):
        best = max(select(placed, protocol=label), key=lambda r: float(r["metrics"]["top1"]))
        rate = best["config"]["recipe"]["base_lr"]
        rows.append([label, f"{100 * best['metrics']['top1']:.1f}", f"{rate:g}"])
    return markdown_table(["row", "best top1 on val (%)", "at learning rate"], rows)


def _embeddings(records: Iterable[Record], folder: Path) -> dict[str, str]:
    """Return the figures of embeddings that are there, by caption."""
    found = {}
    for record in sorted(records, key=lambda r: (r["task"], r["protocol"], r["seed"])):
        file = f"{figure_name(record)}.svg"
        if record["split"] == "test" and (folder / file).exists():
            found[f"t-SNE, {record['protocol']} on {record['task']}"] = file
    return found
