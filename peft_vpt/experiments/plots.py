"""Figures from records, as PNG and SVG; the same records give the same SVG bytes."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import VPTError
from ..files import replace_file
from .records import Record, field, values_of
from .stats import by_task, spread, task_means

_SETTINGS: Any = {
    "svg.hashsalt": "peft_vpt",
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.dpi": 150,
}
_SIZE = (6.4, 4.0)
# The palette of Okabe and Ito, which colour-blind readers can tell apart too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


class Figure(NamedTuple):
    """The files of a figure."""

    png: Path
    svg: Path


def bar_chart(
    records: Iterable[Record],
    path: str | Path,
    *,
    metric: str = "top1",
    split: str = "test",
    title: str = "",
) -> Figure:
    """Draw a comparison: bars by task and protocol, whiskers of one standard deviation over seeds.

    Args:
        records: Of all runs.
        path: Of the files, without or with a suffix, which is replaced.
        metric: Of the records, a share.
        split: Of the records.
        title: Of the figure.

    Raises:
        VPTError: No records to draw.
    """
    values = by_task(records, metric=metric, split=split)
    tasks = sorted({task for of in values.values() for task in of})
    order = sorted(values, key=lambda p: spread(task_means(values[p]).values()).mean)
    width = 0.8 / len(order)
    # The legend has a line per protocol.
    wide = max(_SIZE[0], 1.5 + 0.25 * len(tasks) * len(order))
    high = max(_SIZE[1], 0.25 * len(order))
    with _figure(path, title, width=wide, height=high) as (axes, files):
        for place, protocol in enumerate(order):
            there = [(i, spread(values[protocol][t])) for i, t in enumerate(tasks)
                     if t in values[protocol]]  # fmt: skip
            axes.bar(
                [i + (place - (len(order) - 1) / 2) * width for i, _ in there],
                [100 * s.mean for _, s in there],
                width,
                yerr=[100 * s.std for _, s in there],
                label=protocol,
                color=_COLOURS[place % len(_COLOURS)],
                error_kw={"elinewidth": 1},
            )
        axes.set_xticks(range(len(tasks)), tasks, rotation=20 if len(tasks) > 3 else 0)
        axes.set_ylabel(f"{metric} on {split} (%)")
        _legend_outside(axes)
    return files


def curve(
    records: Iterable[Record],
    path: str | Path,
    *,
    x: str,
    by: str = "protocol",
    log: bool = False,
    metric: str = "top1",
    split: str = "test",
    title: str = "",
    label: str | None = None,
    scale: float = 100.0,
    unit: str | None = None,
) -> Figure:
    """Draw a metric against a field of the records, one line per value of another field.

    Figures 3, 6 and 7 of the paper are such, with the fields that `report.place` gives to records.

    Points are means over all runs there, whiskers one standard deviation.

    Args:
        records: Of all runs; those without the field are left out.
        path: Of the files.
        x: Dotted name of the field; text is drawn as categories, in the order of the records.
        by: Dotted name of the field that tells lines apart.
        log: Logarithmic x axis.
        metric: Of the records, a share.
        split: Of the records.
        title: Of the figure.
        label: Of the x axis. None: the field's name.
        scale: What the metric is multiplied by.
        unit: Of the y axis. None: percent of a share.

    Raises:
        VPTError: No records to draw.
    """
    lines = _lines("curve", records, x, by, metric, split)
    places = list(dict.fromkeys(at for points in lines.values() for at in points))
    numbers = all(isinstance(at, int | float) for at in places)
    with _figure(path, title) as (axes, files):
        for index, (name, points) in enumerate(lines.items()):
            at = sorted(points) if numbers else [place for place in places if place in points]
            axes.errorbar(
                at if numbers else [places.index(place) for place in at],
                [scale * points[place].mean for place in at],
                yerr=[scale * points[place].std for place in at],
                label=str(name),
                color=_COLOURS[index % len(_COLOURS)],
                marker="o",
                capsize=3,
            )
        if log:
            axes.set_xscale("log")
        if not numbers:
            axes.set_xticks(range(len(places)), [str(place) for place in places])
        axes.set_xlabel(label or x)
        axes.set_ylabel(unit or f"{metric} on {split} (%)")
        _legend_outside(axes)
    return files


def heat_map(
    records: Iterable[Record],
    path: str | Path,
    *,
    x: str = "config.recipe.base_lr",
    y: str = "config.recipe.weight_decay",
    metric: str = "top1",
    split: str = "val",
    title: str = "",
) -> Figure:
    """Draw a metric over two settings, learning rate by weight decay say (paper, Figure 17).

    Args:
        records: Of all runs; several of one cell are averaged.
        path: Of the files.
        x: Dotted name of the field along the columns.
        y: Dotted name of the field along the rows.
        metric: Of the records, a share.
        split: Of the records.
        title: Of the figure.

    Raises:
        VPTError: No records to draw.
    """
    rows = _lines("heat_map", records, x, y, metric, split)
    columns, order = sorted({at for cells in rows.values() for at in cells}), sorted(rows)
    nothing = float("nan")
    shares = [
        [100 * rows[row][at].mean if at in rows[row] else nothing for at in columns]
        for row in order
    ]
    with _figure(path, title, width=max(_SIZE[0], 1.5 + 0.7 * len(columns))) as (axes, files):
        image = axes.imshow(shares, cmap="viridis", aspect="auto", origin="lower")
        middle = sum(image.get_clim()) / 2
        for i, line in enumerate(shares):
            for j, share in enumerate(line):
                if share == share:
                    colour = "black" if share > middle else "white"
                    axes.text(j, i, f"{share:.1f}", ha="center", va="center", color=colour)
        axes.set_xticks(range(len(columns)), [f"{at:g}" for at in columns])
        axes.set_yticks(range(len(order)), [f"{at:g}" for at in order])
        axes.set_xlabel(x.rpartition(".")[2])
        axes.set_ylabel(y.rpartition(".")[2])
        axes.figure.colorbar(image, label=f"{metric} on {split} (%)")
    return files


def scatter(
    points: Any,
    labels: Sequence[int],
    path: str | Path,
    *,
    names: Sequence[str] | None = None,
    title: str = "",
) -> Figure:
    """Draw points `(n, 2)` coloured by class, of `embeddings.tsne` say (paper, Figures 9 and 21).

    Args:
        points: Coordinates.
        labels: Class of each.
        path: Of the files.
        names: Of the classes.
        title: Of the figure.

    Raises:
        VPTError: No points, or another number of labels.
    """
    if not len(labels) or len(points) != len(labels):
        told = f"{len(points)} points and {len(labels)} labels"
        raise VPTError("scatter", told, "one label each")
    import matplotlib

    classes = sorted(set(labels))
    map_name = "tab10" if len(classes) <= 10 else "viridis"
    colours = matplotlib.colormaps[map_name].resampled(max(2, len(classes)))
    with _figure(path, title, height=_SIZE[0] * 0.8) as (axes, files):
        for place, label in enumerate(classes):
            own = [p for p, at in zip(points, labels, strict=True) if at == label]
            xs, ys = ([float(p[axis]) for p in own] for axis in (0, 1))
            name = names[label] if names else str(label)
            axes.scatter(xs, ys, s=8, label=name, color=colours(place))
        axes.set_xticks([])
        axes.set_yticks([])
        if len(classes) <= 20:
            _legend_outside(axes)
    return files


@contextmanager
def _figure(
    path: str | Path, title: str, *, width: float = _SIZE[0], height: float = _SIZE[1]
) -> Iterator[tuple[Any, Figure]]:
    """Give axes, then write the figure; no state of pyplot is touched, no date is written."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    stem = Path(path)
    name = stem.stem if stem.suffix in (".png", ".svg") else stem.name
    files = Figure(stem.parent / f"{name}.png", stem.parent / f"{name}.svg")
    with matplotlib.rc_context(_SETTINGS):
        figure: Any = Canvas(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        if title:
            axes.set_title(title)
        yield axes, files
        stem.parent.mkdir(parents=True, exist_ok=True)
        metadata = ({"Software": None}, {"Date": None, "Creator": None})
        for file, kind, without in zip(files, Figure._fields, metadata, strict=True):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, metadata=without)
            replace_file(file, buffer.getvalue())


def _legend_outside(axes: Any) -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _lines(
    call: str, records: Iterable[Record], x: str, by: str, metric: str, split: str
) -> dict[Any, Any]:
    """Return the spread of a metric by line and place, in the order of the records."""
    found: dict[Any, dict[Any, list[float]]] = {}
    for record, value in values_of(call, records, metric, split):
        own = (field(record, name) for name in (x, by))
        at, line = (tuple(v) if isinstance(v, list) else v for v in own)
        if at is not None and line is not None:
            found.setdefault(line, {}).setdefault(at, []).append(value)
    if not found:
        raise VPTError(call, f"no record of split {split!r} has {x} and {by}")
    return {line: {at: spread(v) for at, v in of.items()} for line, of in found.items()}
