"""`sweep`: settings of one protocol chosen on val, then final runs over seeds."""

from __future__ import annotations

from enum import Enum
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .backbone import Backbone
from .images import find_broken, open_images, tell_copies, without_broken
from .output import Offline, complain, quiet_stdout
from .search import CALL, Search, write_report
from .sources import (
    BatchSize,
    Data,
    Epochs,
    FirstValues,
    Model,
    ProtocolName,
    Size,
    SkipBroken,
    Weights,
    begins_as_tokens,
    counts,
    need_folder,
    need_outside,
    need_packages,
    need_size,
)

if TYPE_CHECKING:
    from ..experiments.run import Pixels


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
    init: FirstValues = None,
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
        "length": None if lengths is None else counts(lengths, "--lengths"),
        "reduction": None if reductions is None else counts(reductions, "--reductions"),
    }
    search = Search(
        backbone=Backbone(model, weights, size, offline, None),
        protocol=protocol,
        grid=grid.value,
        choices={name: values for name, values in choices.items() if values},
        changes={k: v for k, v in (("epochs", epochs), ("batch_size", batch_size)) if v},
        folder=need_folder(CALL, output),
        group=group,
    )
    points = search.points()
    tokens = begins_as_tokens(init, grid is Grid.default, [protocol])
    complain(f"{prod(map(len, points.values()))} settings to try, then {seeds} final runs")
    with quiet_stdout():
        pixels = _pixels(data, search.backbone, skip_broken, search.folder)
        search.need_taken(points, pixels.task)
        if tokens:
            search = search.begun(points, pixels.task, asked=init is not None)
        result = search.on_val(pixels, points)
        records = search.on_test(pixels, result.best.params, seeds)
        page = write_report(search, pixels.task, result, records)
    print(page.read_text(encoding="utf-8"), end="")
    complain(f"written: {page}")


def _pixels(data: str, backbone: Backbone, skip_broken: bool, output: Path) -> Pixels:
    """Return the task's images, all of which can be read, as the backbone wants them."""
    from ..experiments.run import Pixels

    names = ("train", "val", "test")
    task = open_images(data, *names)
    need_outside(CALL, output, data, task)
    task = without_broken(CALL, task, find_broken(task, names), skip_broken)
    tell_copies(task, ["train"], ["val", "test"], complain)
    tell_copies(task, ["val"], ["test"], complain)
    model = backbone.make()
    transform = backbone.transform(backbone.size)
    need_size(CALL, model, transform.preprocessing["size"])
    complain(f"{transform.describe()}\n{backbone.describe()}")
    return Pixels(task, transform)
