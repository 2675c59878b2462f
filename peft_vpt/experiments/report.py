"""Pages of a comparison and of an ablation, and their tables, made from records alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import VPTError
from .plots import Figure, bar_chart, curve, heat_map
from .records import Record, field, figure_name, is_ensemble, select
from .stats import by_task, holm, spread, task_means, welch, wilcoxon, wins
from .variants import Ablation, Variant

OLDER = "Of several runs of one row, task and seed with other settings the last one counts"
# Rows without a network: no rivals in the tests.
CONTROLS = ("majority class", "16x16 pixels")
# Columns of costs: field of the records, and its unit.
_COSTS = {
    "trained parameters": ("trainable", 1),
    "bytes stored": ("stored_bytes", 1),
    "ms per step": ("step_seconds", 1e-3),
    "training memory (MB)": ("train_bytes", 1e6),
}
_TOGETHER = {
    "top1 (%)": "top1",
    "mean of members (%)": "members_mean_top1",
    "best member (%)": "members_best_top1",
}
# Places that span more than this are drawn on a logarithmic axis.
_WIDE = 20
_NOTHING = "-"


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
    # Ensembles are of the runs beside them, so they are no further rivals in the tests.
    together = select(records, is_ensemble)
    alone, older = newest([record for record in records if not is_ensemble(record)])
    chart = bar_chart(alone, Path(folder) / figure, title=title)
    figures = {"Accuracy": chart.svg.name, **_embeddings(alone, Path(folder))}
    notes = ["## Ensembles of the seeds", _ensembles(newest(together)[0])] if together else []
    if older:
        notes.append(f"{OLDER} ({older} left out).")
    notes += failures(alone)
    page = Path(folder) / f"{name}.md"
    text = report_page(alone, title=title, intro=intro, figures=figures, notes=notes)
    page.write_text(text, encoding="utf-8")
    return page


def write_ablation(
    records: Sequence[Record],
    rows: Sequence[Variant],
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
    labels = list(dict.fromkeys(row.label for row in rows))
    labels += [f"{label} ensemble" for label in labels]
    found = select(records, protocol=labels, split=split)
    if not found:
        told = f"no record of split {split!r} is of its rows"
        raise VPTError("write_ablation", told, given={"name": name})
    at_rows = placed(found, rows)
    figures = _figures(found, at_rows, ablation, Path(folder) / name, title)
    table = _table(found, labels) if ablation.final else _best(at_rows)
    images = {figure.svg.stem: figure.svg.name for figure in figures}
    images |= _embeddings(found, Path(folder))
    shown = [f"![{caption}]({file})" for caption, file in images.items()]
    head = f"Jia et al. 2022, {ablation.paper}: {ablation.what}."
    page = Path(folder) / f"{name}.md"
    parts = [f"# {title}", head, intro, facts(found, split), table, *shown]
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


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
    legend = f"{metric} on {split}, percent: mean ± standard deviation over seeds; best in bold."
    parts = [f"# {title}", *([intro] if intro else []), facts(records, split)]
    parts += ["## Accuracy", legend, accuracy_table(records, **chosen)]
    parts += ["## By group", group_table(records, **chosen)]
    rows = set(by_task(records, **chosen))
    if method in rows and rows - {method, *CONTROLS}:
        parts += ["## Tests", significance_table(records, method=method, **chosen)]
    for caption, path in (figures or {}).items():
        parts.append(f"![{caption}]({path})")
    return "\n\n".join([*parts, *notes]) + "\n"


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
    records = select(records, split=split)
    values = by_task(records, metric=metric, split=split)
    tasks = sorted({task for of in values.values() for task in of})
    spreads = {p: {t: spread(runs) for t, runs in of.items()} for p, of in values.items()}
    rows: dict[str, list[str]] = {p: [p] for p in values}
    for task in tasks:
        here = {p: of.get(task) for p, of in spreads.items()}
        # The best as printed is bold, ties are all bold.
        for p, text in _bold({p: s and s.mean for p, s in here.items()}, 1).items():
            found = here[p]
            lost = mark(select(records, protocol=p, task=task))
            rows[p].append(text + (found.deviation if found else "") + lost)
    means = {p: spread(s.mean for s in of.values()) for p, of in spreads.items()}
    for p, text in _bold({p: mean.mean for p, mean in means.items()}, 2).items():
        some = means[p].number < len(tasks)
        rows[p].append(text + (f" ({means[p].number} of {len(tasks)})" if some else ""))
    names = sorted(values, key=lambda p: (-means[p].mean, p) if order == "mean" else (0.0, p))
    return markdown_table(["protocol", *tasks, "mean"], [rows[name] for name in names])


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
    groups: dict[str, set[str]] = {}
    for record in records:
        groups.setdefault(record.get("group") or "all", set()).add(record["task"])
    header = [f"{group} ({len(tasks)})" for group, tasks in sorted(groups.items())]
    means = {p: task_means(of) for p, of in by_task(records, metric=metric, split=split).items()}
    rows = {p: [p] for p in means}
    for _, tasks in sorted(groups.items()):
        inside = {p: {t: x for t, x in of.items() if t in tasks} for p, of in means.items()}
        # No mean unless every task of the group is there.
        whole = {p: spread(of.values()).mean if len(of) == len(tasks) else None
                 for p, of in inside.items()}  # fmt: skip
        for p, text in _bold(whole, 2).items():
            rival = reference in means and p != reference and inside[p]
            rows[p].append(text + (f" ({wins(inside[p], means[reference])})" if rival else ""))
    order = sorted(means, key=lambda p: (-spread(means[p].values()).mean, p))
    lines = [[*rows[p], *costs(select(records, protocol=p))] for p in order]
    return markdown_table(["protocol", *header, *_COSTS], lines)


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
    values = by_task(records, metric=metric, split=split)
    if method not in values:
        told = f"the records hold {', '.join(sorted(values))}"
        raise VPTError("significance_table", told, given={"method": method})
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
    lines = [[_plain(row.get(key)) for key in titles] for row in rows]
    return markdown_table(list(titles.values()), lines)


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


def facts(records: list[Record], split: str) -> str:
    """Say what was run: backbones, seeds, versions."""
    used = select(records, split=split)
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


def costs(runs: Sequence[Record]) -> list[str]:
    """Return what runs of one row cost, as medians; "-" where records do not say."""
    cells = []
    for name, unit in _COSTS.values():
        found = sorted(run[name] for run in runs if run.get(name))
        cells.append(f"{round(found[len(found) // 2] / unit):,}" if found else _NOTHING)
    return cells


def newest(records: Sequence[Record]) -> tuple[list[Record], int]:
    """Return records without the older of several test runs of one row, task, backbone and seed.

    Returns:
        The records that are left, and how many are not.
    """
    last: dict[Any, int] = {}
    for index, r in enumerate(records):
        # Runs on val are of many rates on purpose.
        on_test = r["split"] == "test"
        last[(r["protocol"], r["task"], r["backbone"], r["seed"]) if on_test else index] = index
    left = [records[index] for index in sorted(last.values())]
    return left, len(records) - len(left)


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


def placed(records: Iterable[Record], rows: Sequence[Variant]) -> list[Record]:
    """Return records with `series` and `place`; one may stand on several lines."""
    records = list(records)
    return [
        record | {"series": row.series or row.label, "place": row.place}
        for row in rows
        for record in select(records, protocol=row.label)
    ]


def _settings(record: Record, ignore: Sequence[str]) -> str:
    config = record["config"]
    options = {k: v for k, v in (field(record, "config.options") or {}).items() if k not in ignore}
    names = ("preset", "config.recipe.optimizer", "config.recipe.epochs", "config.weights",
             "config.preprocessing.size", "config.train")  # fmt: skip
    told = [field(record, name) for name in names]
    row = [record["protocol"], record["backbone"], record["split"], config.get("fraction")]
    return json.dumps([*row, *told, options], sort_keys=True)


def _figures(
    found: list[Record], at_rows: list[Record], ablation: Ablation, path: Path, title: str
) -> list[Figure]:
    if ablation.axis:
        at = [record["place"] for record in at_rows]
        log = max(at) > _WIDE * min(at)
        axis = ablation.axis
        return [curve(at_rows, path, x="place", by="series", label=axis, log=log, title=title)]
    if ablation.final:
        return [bar_chart(found, path, title=title)]
    series = list(dict.fromkeys(record["series"] for record in at_rows))
    return [
        heat_map(select(at_rows, series=name), path.with_name(f"{path.name}-{number}"), title=name)
        for number, name in enumerate(series, start=1)
    ]


def _ensembles(records: Sequence[Record]) -> str:
    rows = [
        [r["task"], r["protocol"], str(len(r["config"]["members"]))]
        + [f"{100 * r['metrics'][key]:.1f}" for key in _TOGETHER.values()]
        for r in records
    ]
    return markdown_table(["task", "row", "members", *_TOGETHER], rows)


def _table(found: list[Record], labels: Sequence[str]) -> str:
    """Return accuracy and cost of the final runs, a line per row."""
    rows = []
    for label in labels:
        if runs := select(found, protocol=label):
            top1 = spread(run["metrics"]["top1"] for run in runs)
            options = runs[0]["config"]["options"]
            rows.append([
                label,
                f"{100 * top1.mean:.1f}{top1.deviation}{mark(runs)}",
                f"{runs[0]['config']['recipe']['base_lr']:g}",
                f"p={options['length']}" if "length" in options else _NOTHING,
                *costs(runs),
            ])  # fmt: skip
    header = ["row", "top1 on test (%)", "learning rate", "options chosen", *_COSTS]
    return markdown_table(header, rows)


def _best(at_rows: list[Record]) -> str:
    """Return the best rate of every row on val."""
    rows = []
    for label in dict.fromkeys(record["protocol"] for record in at_rows):
        best = max(select(at_rows, protocol=label), key=lambda r: float(r["metrics"]["top1"]))
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


def _bold(shares: Mapping[str, float | None], digits: int) -> dict[str, str]:
    """Return shares in percent, those in bold that are the best as printed."""
    shown = {p: _NOTHING if x is None else f"{100 * x:.{digits}f}" for p, x in shares.items()}
    best = max((float(text) for text in shown.values() if text != _NOTHING), default=math.nan)
    return {
        p: f"**{text}**" if text != _NOTHING and float(text) == best else text
        for p, text in shown.items()
    }


def _rejected(first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]]) -> str:
    """Count the tasks on which Welch's test rejects, of those with two seeds on both sides."""
    shared = [t for t in first if t in second and min(len(first[t]), len(second[t])) > 1]
    rejected = sum(welch(first[task], second[task]).p_value < 0.05 for task in shared)
    return f"{rejected} of {len(shared)}" if shared else _NOTHING


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return _NOTHING if value is None else f"{value:,}" if type(value) is int else str(value)
