"""`sweep`: settings of one protocol chosen on val, then final runs over seeds."""

from __future__ import annotations

from enum import Enum
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .images import find_broken, open_images, without_broken
from .output import Offline, complain, quiet_stdout
from .search import CALL, Search, write_report
from .sources import (
    BatchSize,
    Data,
    Epochs,
    Model,
    ProtocolName,
    Size,
    SkipBroken,
    Weights,
    build,
    counts,
    need_folder,
    need_packages,
    need_size,
    preprocessing_of,
)

if TYPE_CHECKING:
    from ..experiments.run import Build, Pixels


class Grid(str, Enum):
    """Which rates and weight decays are tried."""

    default = "default"
    paper = "paper"
    wide = "wide"


def sweep(
    data: Data,
    model: Model,
    output: Annotated[
        Path, typer.Option(metavar="FOLDER", help="For study, records, adapters and report.")
    ],
    weights: Weights = None,
    protocol: ProtocolName = "vpt-deep",
    grid: Annotated[
        Grid,
        typer.Option(
            help="default: 3 rates; paper: its rates x decays; wide: with 4 more of vpt-shallow."
        ),
    ] = Grid.default,
    lengths: Annotated[
        str | None, typer.Option(help="Prompts per block to try, 1,5,10,50 say; default: 20.")
    ] = None,
    reductions: Annotated[
        str | None, typer.Option(help="Of the protocol adapter, 8,64,256 say; default: 8.")
    ] = None,
    size: Size = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    seeds: Annotated[int, typer.Option(min=1, help="Final runs.")] = 3,
    group: Annotated[str | None, typer.Option(help="Of the task, for tables.")] = None,
    skip_broken: SkipBroken = False,
    offline: Offline = False,
) -> None:
    """Choose settings on val, train with the best ones on train and val, and judge on test.

    Start the same command in several shells, on machines that share the folder: each takes runs of
    its own. What was stopped goes on by the same command, and nothing is run twice.
    """
    need_packages(CALL, "accelerate", "optuna", "psutil", "timm")
    choices = {
        "length": counts(lengths, "--lengths") if lengths else None,
        "reduction": counts(reductions, "--reductions") if reductions else None,
    }
    search = Search(
        model=model,
        weights=weights,
        protocol=protocol,
        grid=grid.value,
        choices={name: values for name, values in choices.items() if values},
        changes={k: v for k, v in (("epochs", epochs), ("batch_size", batch_size)) if v},
        folder=need_folder(CALL, output),
        group=group,
        build=partial(build, model, weights, size, offline),
    )
    points = search.points()
    complain(f"{prod(map(len, points.values()))} settings to try, then {seeds} final runs")
    with quiet_stdout():
        pixels = _pixels(data, search.build, size, skip_broken, offline)
        result = search.on_val(pixels, points)
        records = search.on_test(pixels, result.best.params, seeds)
        page = write_report(search, pixels.task, result, records)
    print(page.read_text(encoding="utf-8"), end="")
    complain(f"written: {page}")


def _pixels(data: str, make: Build, size: int | None, skip_broken: bool, offline: bool) -> Pixels:
    """Return the task's images, all of which can be read, as the backbone wants them."""
    from ..data import eval_transform
    from ..experiments.run import Pixels

    names = ("train", "val", "test")
    task = open_images(data, *names)
    task = without_broken(CALL, task, find_broken(task, names), skip_broken)
    model: Any = make()
    transform = eval_transform(preprocessing_of(model, offline), size)
    need_size(CALL, model, transform.preprocessing["size"])
    complain(transform.describe())
    return Pixels(task, transform)
