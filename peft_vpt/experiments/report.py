"""Pages of a comparison and of an ablation, made from records alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import VPTError
from .ablations import Ablation, Row
from .ensemble import figure_name, is_ensemble
from .plots import Figure, bar_chart, curve, heat_map
from .records import Record, field, select
from .stats import Spread, by_task, holm, spread, task_means, welch, wilcoxon, wins

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


_NOTHING = "-"
# Rows without a network: no rivals in the tests.
CONTROLS = ("majority class", "16x16 pixels")
_COSTS = {"trained parameters": "trainable", "bytes stored": "stored_bytes",
          "ms per step": "step_seconds", "training memory (MB)": "train_bytes"}  # fmt: skip
_UNITS = {"step_seconds": 1e-3, "train_bytes": 1e6}
Values = Mapping[str, Mapping[str, Sequence[float]]]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows in Markdown with aligned columns; all but the first are right-aligned."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, *rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))]  # noqa: B905
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:]))


def accuracy_table(
    records: Iterable[Record], *, metric: str = "top1", split: str = "test", order: str = "mean"
) -> str:
    """Return mean +- standard deviation over seeds, by protocol and task, in percent.

    The best protocol of each task is bold. The last column is the mean over the tasks that a
    protocol has, with their number where some lack. Runs that diverged count as wrong everywhere;
    how many did stands beside the mean.

    Args:
        records: Of all runs.
        metric: Of the records, a share.
        split: Of the records.
        order: Of the rows: "mean" (best first) or "name".
    """
    records = [record for record in records if record["split"] == split]
    values = _values(records, metric, split)
    tasks = _tasks(values)
    spreads = {p: {t: spread(runs) for t, runs in of.items()} for p, of in values.items()}
    columns = [_column({p: of.get(task) for p, of in spreads.items()}) for task in tasks]
    for task, column in zip(tasks, columns, strict=True):
        for p in column:
            column[p] += mark(r for r in records if (r["protocol"], r["task"]) == (p, task))
    means = {p: spread(s.mean for s in of.values()) for p, of in spreads.items()}
    last = _bold({p: mean.mean for p, mean in means.items()}, 2)
    for protocol, mean in means.items():
        if mean.number < len(tasks):
            last[protocol] += f" ({mean.number} of {len(tasks)})"
    names = sorted(values, key=lambda p: (-means[p].mean, p) if order == "mean" else (0.0, p))
    rows = [[name, *(column[name] for column in columns), last[name]] for name in names]
    return markdown_table(["protocol", *tasks, "mean"], rows)


def mark(runs: Iterable[Record]) -> str:
    """Return how many of some runs diverged, in brackets; "" where none did."""
    lost = ["diverged" in run["metrics"] for run in runs]
    return f" ({sum(lost)} of {len(lost)} diverged)" if any(lost) else ""


def failures(records: Iterable[Record]) -> list[str]:
    """Return paragraphs that name the runs that diverged, and the step where they did."""
    lines = [
        f"- {r['protocol']} on {r['task']}, {r['split']}, seed {r['seed']}, learning rate "
        f"{r['config']['recipe']['base_lr']:g}: {r.get('failure') or 'not told'}"
        for r in records
        if "diverged" in r["metrics"]
    ]
    told = "Runs that diverged. They count as wrong everywhere."
    return [told, "\n".join(lines)] if lines else []


def group_table(
    records: Iterable[Record],
    *,
    metric: str = "top1",
    split: str = "test",
    reference: str = "full",
) -> str:
    """Return group means with the number of tasks that beat a reference, as the paper's Table 1.

    Beside them, as medians over runs: trained parameters and bytes stored per task, the time of a
    training step, and its memory (`experiments.cost`: the allocator's peak on a GPU; parameters,
    buffers and what autograd keeps on a CPU).

    Args:
        records: Of all runs; `group` says where a task belongs.
        metric: Of the records, a share.
        split: Of the records.
        reference: Protocol to beat; a tie is no win.
    """
    records = list(records)
    values = _values(records, metric, split)
    groups = _groups(records)
    means = {protocol: task_means(of) for protocol, of in values.items()}
    columns: list[dict[str, str]] = []
    for tasks in groups.values():
        averages = {p: _mean_over(of, tasks) for p, of in means.items()}
        column = _bold(averages, 2)
        for protocol in means:
            inside = {t: x for t, x in means[protocol].items() if t in tasks}
            if reference in means and protocol != reference and inside:
                column[protocol] += f" ({wins(inside, means[reference])})"
        columns.append(column)
    order = sorted(means, key=lambda p: (-spread(means[p].values()).mean, p))
    rows = [
        [p, *(column[p] for column in columns), *costs(r for r in records if r["protocol"] == p)]
        for p in order
    ]
    header = [f"{group} ({len(tasks)})" for group, tasks in groups.items()]
    return markdown_table(["protocol", *header, *_COSTS], rows)


def significance_table(
    records: Iterable[Record],
    *,
    method: str = "vpt-deep",
    metric: str = "top1",
    split: str = "test",
    zeros: str = "wilcox",
) -> str:
    """Return one-sided tests of a method against each other protocol, as the paper's Table 10.

    Wilcoxon over task means, also Holm-adjusted for the number of protocols, and on how many tasks
    Welch's test over seeds rejects equality at 5 %. Rows without a network are left out.

    Args:
        records: Of all runs.
        method: The protocol that is claimed to be better.
        metric: Of the records, a share.
        split: Of the records.
        zeros: As in `wilcoxon`.

    Raises:
        VPTError: No records of that method.
    """
    values = _values(records, metric, split)
    if method not in values:
        raise VPTError(
            f"significance_table(method={method!r}): the records hold {', '.join(sorted(values))}."
        )
    own = task_means(values[method])
    tested = []
    for name in sorted(set(values) - {method, *CONTROLS}):
        other = task_means(values[name])
        shared = [task for task in own if task in other]
        if shared:
            pair = ({t: x[t] for t in shared} for x in (own, other))
            tested.append((name, wins(own, other), len(shared), wilcoxon(*pair, zeros=zeros)))
    adjusted = holm([result.p_value for *_, result in tested])
    rows = [
        [f"{method} > {name}", f"{better} of {tasks}", f"{result.p_value:.2g}", f"{after:.2g}",
         _rejected(values[method], values[name])]
        for (name, better, tasks, result), after in zip(tested, adjusted, strict=True)
    ]  # fmt: skip
    header = ["hypothesis", "better on", "Wilcoxon p", "Holm-adjusted p", "Welch p < 0.05"]
    return markdown_table(header, rows)


def rows_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | None = None) -> str:
    """Lay out rows of plain values, of `experiments.cost` say.

    Args:
        rows: One mapping per line.
        columns: Title by key, in order. None: the keys of the first row.
    """
    titles = columns or {key: key for key in (rows[0] if rows else {})}
    return markdown_table(
        list(titles.values()), [[_plain(row.get(key)) for key in titles] for row in rows]
    )


def report_page(
    records: Iterable[Record],
    *,
    title: str = "Results",
    intro: str = "",
    figures: Mapping[str, str] | None = None,
    method: str = "vpt-deep",
    metric: str = "top1",
    split: str = "test",
    notes: Sequence[str] = (),
) -> str:
    """Return a Markdown page made from records alone; the same records give the same page.

    Args:
        records: Of all runs.
        title: Heading.
        intro: First paragraph.
        figures: Path of an image, relative to the page, by caption.
        method: Protocol whose superiority is tested.
        metric: Of the records.
        split: Of the records.
        notes: Further paragraphs at the end.

    Raises:
        VPTError: No records of that split.
    """
    records = list(records)
    chosen = {"metric": metric, "split": split}
    parts = [f"# {title}", *([intro] if intro else []), facts(records, split)]
    parts += ["## Accuracy", _legend(metric, split), accuracy_table(records, **chosen)]
    parts += ["## By group", group_table(records, **chosen)]
    rows = set(_values(records, metric, split))
    if method in rows and rows - {method, *CONTROLS}:
        parts += ["## Tests", significance_table(records, method=method, **chosen)]
    for caption, path in (figures or {}).items():
        parts.append(f"![{caption}]({path})")
    return "\n\n".join([*parts, *notes]) + "\n"


def _values(records: Iterable[Record], metric: str, split: str) -> Values:
    values = by_task(records, metric=metric, split=split)
    if not values:
        raise VPTError(f"tables: no record of split {split!r} has the metric {metric!r}.")
    return values


def _tasks(values: Values) -> list[str]:
    return sorted({task for of in values.values() for task in of})


def _groups(records: list[Record]) -> dict[str, set[str]]:
    groups: dict[str, set[str]] = {}
    for record in records:
        groups.setdefault(record.get("group") or "all", set()).add(record["task"])
    return dict(sorted(groups.items()))


def _column(spreads: Mapping[str, Spread | None]) -> dict[str, str]:
    """Return the cells of a task; the best as printed is bold, ties are all bold."""
    bold = _bold({p: s.mean if s else None for p, s in spreads.items()}, 1)
    for protocol, found in spreads.items():
        if found and found.number > 1:
            bold[protocol] += f" ± {100 * found.std:.1f}"
    return bold


def _bold(shares: Mapping[str, float | None], digits: int) -> dict[str, str]:
    shown = {p: _NOTHING if x is None else f"{100 * x:.{digits}f}" for p, x in shares.items()}
    best = max((float(text) for text in shown.values() if text != _NOTHING), default=math.nan)
    return {
        p: f"**{text}**" if text != _NOTHING and float(text) == best else text
        for p, text in shown.items()
    }


def _mean_over(means: Mapping[str, float], tasks: set[str]) -> float | None:
    """Return the mean over a group; None unless every task of it is there."""
    found = [means[task] for task in tasks if task in means]
    return spread(found).mean if len(found) == len(tasks) else None


def cost_names() -> list[str]:
    """Return the columns of `costs`."""
    return list(_COSTS)


def costs(records: Iterable[Record]) -> list[str]:
    """Return what runs of one row cost, as medians; "-" where records do not say."""
    runs = list(records)
    found = {n: sorted(r[n] for r in runs if r.get(n)) for n in _COSTS.values()}
    middle = {name: values[len(values) // 2] for name, values in found.items() if values}
    return [
        f"{round(middle[name] / _UNITS.get(name, 1)):,}" if name in middle else _NOTHING
        for name in _COSTS.values()
    ]


def _rejected(first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]]) -> str:
    """Count the tasks on which Welch's test rejects, of those with two seeds on both sides."""
    shared = [t for t in first if t in second and min(len(first[t]), len(second[t])) > 1]
    rejected = sum(welch(first[task], second[task]).p_value < 0.05 for task in shared)
    return f"{rejected} of {len(shared)}" if shared else _NOTHING


def _plain(value: Any) -> str:
    if value is None:
        return _NOTHING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def facts(records: list[Record], split: str) -> str:
    """Say what was run: backbones, seeds, versions."""
    used = [record for record in records if record["split"] == split]
    backbones = ", ".join(sorted({record["backbone"] for record in used}))
    seeds = ", ".join(str(seed) for seed in sorted({record["seed"] for record in used}))
    versions = sorted({
        f"{name} {version}"
        for record in used
        for name, version in (record.get("versions") or {}).items()
        if version
    })  # fmt: skip
    text = f"{len(used)} runs; backbone {backbones}; seeds {seeds}."
    return text + (f" Versions: {', '.join(versions)}." if versions else "")


def _legend(metric: str, split: str) -> str:
    return f"{metric} on {split}, percent: mean ± standard deviation over seeds; best in bold."
