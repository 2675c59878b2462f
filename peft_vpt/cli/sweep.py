"""`sweep`: settings of one protocol chosen on val, then final runs over seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .compare import Backbone, as_tokens, taken
from .options import (
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
    describe_images,
    need_folder,
    need_packages,
    open_three,
    protocol_options,
)
from .output import CALL, Offline, complain, quiet_stdout

if TYPE_CHECKING:
    from torch import nn

    from ..data import Task
    from ..experiments.records import Record
    from ..experiments.run import Pixels
    from ..training import Recipe, SweepResult


RECORDS = "records.jsonl"
_OPTIONS = ("length", "reduction")
Settings = dict[str, Any]


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
    its own. What was stopped goes on by the same command; what is done is not run again.
    """
    need_packages("accelerate", "optuna", "sklearn", "timm")
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
        folder=need_folder(output),
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

    task = open_three(data, output, skip_broken)
    return Pixels(task, backbone.told()[1])


@dataclasses.dataclass(frozen=True)
class Search:
    """What `sweep` was asked for.

    Args:
        backbone: Builds it, knows its name and its weights.
        protocol: What trains.
        grid: "default", "paper" or "wide".
        choices: Values to try of options of the protocol.
        changes: Fields of the recipe to set in every run.
        folder: For everything that is written.
        group: Of the task, for tables.
        tokens: Whether prompts begin as tokens of training images.
    """

    backbone: Backbone
    protocol: str
    grid: str
    choices: Mapping[str, Sequence[int]]
    changes: Mapping[str, Any]
    folder: Path
    group: str | None
    tokens: bool = False

    def points(self) -> dict[str, list[Any]]:
        """Return the values to try, by setting.

        Raises:
            SpecError: An unknown protocol, an option of another one, or a wrong value.
        """
        from ..experiments.compare import FACTORS
        from ..training import paper_grid

        found: dict[str, list[Any]] = {}
        for name in _OPTIONS:
            for value in self.choices.get(name, [None]):
                own = protocol_options(self.protocol, **_only(name, value))
                found |= {name: [*found.get(name, []), own[name]]} if name in own else {}
        if self.grid != "default":
            return found | paper_grid(self.protocol, wide=self.grid == "wide")
        return found | {"base_lr": [self.recipe({}, 0).base_lr * factor for factor in FACTORS]}

    def recipe(self, settings: Mapping[str, Any], seed: int) -> Recipe:
        """Return the recipe of one point."""
        from ..training import preset

        fields = {name: value for name, value in settings.items() if name not in _OPTIONS}
        return preset(
            self.protocol,
            backbone=self.backbone.name,
            kind=self._preset,
            length=settings.get("length"),
            **{**self.changes, **fields, "seed": seed},
        )

    def need_taken(self, points: Mapping[str, Sequence[Any]], task: Task) -> None:
        """Raise where the backbone refuses a point; nothing is written.

        Raises:
            VPTError: It does.
        """
        from ..experiments.variants import Variant

        names = [name for name in _OPTIONS if name in points]
        for values in product(*(points[name] for name in names)):
            options = dict(zip(names, values, strict=True))
            row = Variant(describe(options) or self.protocol, self.protocol, options)
            taken([row], self.backbone, task, f"--protocol {self.protocol}")

    def begun(self, points: Mapping[str, Sequence[Any]], task: Task, *, asked: bool) -> Search:
        """Return the search with prompts that begin as tokens, where the backbone has them.

        Raises:
            VPTError: It was asked for, and the backbone has none.
        """
        from ..experiments.variants import Variant

        options = {name: max(points[name]) for name in _OPTIONS if name in points}
        row = Variant(self.protocol, self.protocol, options)
        (found,) = as_tokens([row], self.backbone, task, asked=asked)
        return dataclasses.replace(self, tokens="init" in found.options)

    def on_val(self, pixels: Pixels, points: Mapping[str, Sequence[Any]]) -> SweepResult:
        """Run every point of the grid on train, judged on val, once among all workers."""
        from ..training import sweep

        def objective(settings: Settings) -> float:
            return self._top1(pixels, settings, 0, "train", "val")

        return sweep(
            objective, points, folder=self.folder, name=self.protocol,
            settings=self._about(pixels, "train", "val"), progress=False,
        )  # fmt: skip

    def on_test(self, pixels: Pixels, best: Settings, seeds: int) -> list[Record]:
        """Run the best point on train and val over seeds, and return the records on test."""
        from ..training import sweep

        def objective(settings: Settings) -> float:
            return self._top1(pixels, best, settings["seed"], "trainval", "test")

        sweep(
            objective, {"seed": list(range(seeds))}, folder=self.folder,
            name=f"{self.protocol}-final-{seeds}", progress=False,
            settings={**self._about(pixels, "train", "val", "test"), "best": best},
        )  # fmt: skip
        # Read, or run where somebody has deleted a record.
        return [self._record(pixels, best, seed, "trainval", "test") for seed in range(seeds)]

    def _top1(self, pixels: Pixels, settings: Settings, seed: int, train: str, test: str) -> float:
        from ..training import DivergedError

        record = self._record(pixels, settings, seed, train, test)
        top1: float = record["metrics"]["top1"]
        if "failure" in record:
            told = f"{describe(settings)}, seed {seed}: {record['failure']}"
            # On val the study remembers it; a final run counts as wrong everywhere.
            if test == "val":
                raise DivergedError(CALL, told)
            complain(f"diverged: {told}")
        complain(f"{test} top1 {top1:.4f}: {describe(settings)}, seed {seed}")
        return top1

    def _record(
        self, pixels: Pixels, settings: Settings, seed: int, train: str, test: str
    ) -> Record:
        """Return the record of a run: the one that is there, or a new one."""
        from ..experiments.run import Run, run_recorded
        from ..experiments.variants import Variant

        options = {name: settings[name] for name in _OPTIONS if name in settings}
        options |= {"init": "tokens"} if self.tokens else {}
        run = Run(
            pixels, Variant(self.protocol, self.protocol, options), partial(self._sized, pixels),
            self.recipe(settings, seed), self.backbone.name, train, test, group=self.group,
            weights=self.backbone.checksum, facts={"preset": self._preset},
            folder=self.folder if test == "test" else None,
        )  # fmt: skip
        return run_recorded(self.folder / RECORDS, run)

    @property
    def _preset(self) -> str:
        return "default" if self.grid == "default" else "paper"

    def _sized(self, pixels: Pixels) -> nn.Module:
        from ..backbones.find import says_its_size

        return says_its_size(self.backbone.make(), pixels.transform.preprocessing["size"])

    def _about(self, pixels: Pixels, *splits: str) -> dict[str, Any]:
        """Return what results depend on beside the grid."""
        return {
            "model": self.backbone.name,
            "weights": self.backbone.checksum,
            "grid": self.grid,
            "changes": dict(self.changes),
            "preprocessing": pixels.transform.preprocessing,
            **({"init": "tokens"} if self.tokens else {}),
            **describe_images(pixels.task, splits, pixels.sums(*splits)),
        }


def describe(settings: Mapping[str, Any]) -> str:
    """Return settings in words."""
    return ", ".join(f"{name} {value:g}" for name, value in settings.items())


def write_report(
    search: Search, task: Task, result: SweepResult, records: Sequence[Record]
) -> Path:
    """Write what was tried and what came of it; return the page's path."""
    from ..files import replace_file

    page = search.folder / f"{search.protocol}.md"
    parts = [
        f"# {search.protocol} on {task.name}",
        f"{search.backbone.name}; {task.describe()}".replace("\n", "  \n"),
        *(["Prompts begin as tokens of training images."] if search.tokens else []),
        f"## Grid {search.grid}: trained on train, judged on val",
        _trials(result),
        f"## Final: {describe(result.best.params)}, trained on train and val, judged on test",
        _finals(records),
    ]
    replace_file(page, ("\n\n".join(parts) + "\n").encode())
    return page


def _trials(result: SweepResult) -> str:
    from ..experiments.report import rows_table

    rows = [
        {
            **trial.params,
            "val top1, %": "diverged" if trial.value is None else f"{100 * trial.value:.1f}",
            "seconds": f"{trial.seconds:.0f}",
            "": "best" if trial is result.best else "",
        }
        for trial in result.trials
    ]
    return rows_table(rows)


def _finals(records: Sequence[Record]) -> str:
    from ..experiments.report import rows_table
    from ..experiments.stats import spread

    found = spread(record["metrics"]["top1"] for record in records)
    rows = [
        {
            "seed": str(record["seed"]),
            "test top1, %": f"{100 * record['metrics']['top1']:.1f}",
            "trained parameters": record["trainable"],
            "bytes stored": record["stored_bytes"],
            "seconds": f"{record['seconds'] or 0:.0f}",
        }
        for record in records
    ]
    mean = f"test top1 {100 * found.mean:.1f} ± {100 * found.std:.1f} % over {found.number} seeds"
    return f"{rows_table(rows)}\n\n{mean}"


def _only(name: str, value: int | None) -> dict[str, Any]:
    return {"length": None, "reduction": None, name: value}
