"""Show how much a training recipe depends on its learning rate: `default` against `paper` preset.

Each preset trains at multiples of its own base rate. Those of ``--factors`` lie within a factor of
ten; their spread, the best accuracy minus the worst, is what a user loses who does not search.
Those of ``--beyond`` are shown beside them and not counted. Every run leaves a record in
``--output``, and a run that has one there is not repeated, so a measurement that was stopped goes
on; records of ``peft-vpt compare`` with the same settings count as well. Both presets get the batch
of ``--batch``, so that one budget of steps serves both: the ``paper`` row is with that batch (64
unless another is asked for), not with the paper's own.

Usage: ``python examples/recipe_spread.py --data FOLDER --model NAME --weights FILE``. The model is
timm's, nothing is downloaded. A model of other sizes than its name says is described by
``--model-args '{"embed_dim": 144, "depth": 6}'``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from peft_vpt.backbones.identity import describe_timm_config
from peft_vpt.data import eval_transform, open_task
from peft_vpt.experiments.records import Record, append_record, same_run
from peft_vpt.experiments.report import markdown_table
from peft_vpt.experiments.run import Pixels, Run, fitted, run_once
from peft_vpt.experiments.sums import file_sum
from peft_vpt.experiments.variants import Variant
from peft_vpt.hub.backbone import build_backbone
from peft_vpt.protocols.options import Protocol
from peft_vpt.training import DivergedError, Recipe, preset
from peft_vpt.training.health import RisenLossWarning


class Point(NamedTuple):
    """A preset at a multiple of its learning rate."""

    kind: str
    factor: float


class Measurement:
    """The runs that the arguments ask for, and the records that are there.

    Args:
        args: As `parse` returns them.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.file = args.output / "records.jsonl"
        self.build = partial(
            build_backbone,
            "timm",
            args.model,
            weights=args.weights,
            image_size=args.size,
            options=args.model_args,
        )
        self.task = open_task(args.data)
        self.train = "train" if args.split == "val" else "trainval"

    @cached_property
    def pixels(self) -> Pixels:
        """The images, for as long as runs need them."""
        config: Any = self.build().pretrained_cfg
        look = describe_timm_config({**config, "crop_mode": "center"})
        return Pixels(self.task, eval_transform(look, self.args.size))

    @property
    def points(self) -> list[Point]:
        """All runs, in the order of the table."""
        factors = sorted({*self.args.factors, *self.args.beyond})
        return [Point(kind, factor) for kind in self.args.presets for factor in factors]

    def options(self, point: Point) -> dict[str, Any]:
        """Return the options of the protocol; prompts begin as the commands let them."""
        if not Protocol(self.args.protocol).trains_prompts:
            return {}
        usual = "tokens" if point.kind == "default" else "random"
        init = self.args.init or usual
        # A record without the field is one of random first values.
        return {"length": self.args.length} | ({} if init == "random" else {"init": init})

    def recipe(self, point: Point) -> Recipe:
        """Return the recipe of a run."""
        args = self.args
        images = len(self.task.trainval() if self.train == "trainval" else self.task.split("train"))
        found = preset(
            args.protocol,
            backbone=args.model,
            kind=point.kind,
            length=args.length,
            epochs=args.epochs,
            seed=args.seed,
            **{"batch_size": args.batch, **args.changes},
        )
        return fitted(dataclasses.replace(found, base_lr=found.base_lr * point.factor), images)

    def run(self, point: Point) -> Record:
        """Return the record of a run: the one that is there, or a new one."""
        args = self.args
        run = Run(
            self.pixels,
            Variant(args.protocol, args.protocol, self.options(point)),
            self.build,
            self.recipe(point),
            args.model,
            self.train,
            args.split,
            group=args.group,
            weights=file_sum(args.weights),
            facts={"preset": point.kind, "factor": point.factor},
        )
        if known := same_run(self.file, run.record({})):
            return known
        record = self._train(run)
        append_record(self.file, record)
        return record

    def _train(self, run: Run) -> Record:
        """Run, and note whether the loss rose; values that are not finite are no accuracy."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                record = run_once(run)
            except DivergedError:
                return run.record({"top1": 0.0, "diverged": 1.0})
        return record | {"risen": any(issubclass(w.category, RisenLossWarning) for w in caught)}


def table(found: dict[Point, Record], counted: Sequence[float]) -> str:
    """Lay out accuracy by preset and factor, in percent, with its spread.

    Args:
        found: Records of the runs.
        counted: Factors that the spread is over.
    """
    factors = sorted({point.factor for point in found})
    rows = []
    for kind in dict.fromkeys(point.kind for point in found):
        mine = {f: found[Point(kind, f)] for f in factors}
        inside = [mine[f]["metrics"]["top1"] for f in counted]
        spread = f"{100 * (max(inside) - min(inside)):.1f}"
        rows.append([describe(kind, mine), *(cell(mine[f]) for f in factors), spread])
    header = [
        "preset",
        *(f"x {f:g}" for f in factors),
        f"spread x {min(counted):g}-{max(counted):g}",
    ]
    return markdown_table(header, rows)


def describe(kind: str, mine: dict[float, Record]) -> str:
    """Name a preset with its optimizer and the rate that the factors multiply."""
    factor, record = next(iter(mine.items()))
    recipe = record["config"]["recipe"]
    return f"{kind} ({recipe['optimizer']}, {recipe['base_lr'] / factor:g})"


def cell(record: Record) -> str:
    """Return the accuracy of a run, marked where the loss rose or was not finite."""
    if record["metrics"].get("diverged"):
        return "diverged"
    return f"{100 * record['metrics']['top1']:.1f}" + (" !" if record.get("risen") else "")


def numbers(text: str) -> list[float]:
    """Read positive numbers separated by commas; nothing is an empty list."""
    found = [float(part) for part in text.split(",") if part]
    if any(not 0 < value < float("inf") for value in found):
        raise argparse.ArgumentTypeError(f"{text!r}: positive numbers separated by commas")
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of images, as for peft-vpt compare")
    add("--model", required=True, help="timm's name")
    add("--weights", type=Path, required=True, help="its weights, a safetensors file")
    add("--model-args", type=json.loads, default={}, help="further arguments of the model, JSON")
    add("--output", type=Path, default=Path("recipe_spread"), help="folder of records.jsonl")
    add("--size", type=int, help="edge of the images; default: the backbone's")
    add("--protocol", default="vpt-deep")
    add("--length", type=int, default=20, help="prompts per block")
    add("--init", choices=("random", "tokens"), help="how prompts begin; default: by preset")
    add("--epochs", type=int, default=12)
    add("--batch", type=int, default=64)
    add("--presets", default="default,paper", type=lambda text: text.split(","))
    add("--factors", type=numbers, default=[0.3, 1.0, 3.0], help="multiples, counted in the spread")
    add("--beyond", type=numbers, default=[10.0], help="further multiples, which are not")
    add("--changes", type=json.loads, default={}, help="fields of the recipes to set, JSON")
    add("--split", choices=("val", "test"), default="val", help="test: trained on train and val")
    add("--seed", type=int, default=0)
    add("--group", help="of the task, for tables")
    args = parser.parse_args(arguments)
    if args.init and not Protocol(args.protocol).trains_prompts:
        parser.error(f"--init: {args.protocol} trains no prompts")
    if not args.factors:
        parser.error("--factors: needs one number at least")
    if not args.weights.is_file():
        parser.error(f"--weights {args.weights}: no such file")
    return args


def main(arguments: Sequence[str] | None = None) -> str:
    """Run what has no record yet; print and return the table."""
    args = parse(arguments)
    work = Measurement(args)
    found: dict[Point, Record] = {}
    for point in work.points:
        found[point] = work.run(point)
        print(f"{point.kind} x {point.factor:g}: {cell(found[point])}", flush=True)
    images = len(work.task.split(args.split))
    text = (
        f"Accuracy in percent on {images} {args.split} images of {work.task.name}: {args.model}, "
        f"{args.protocol}, {args.epochs} epochs, seed {args.seed}, batch {args.batch} in both "
        "presets, in place of the paper's own; '!': `fit` warned that the loss had risen above its "
        f"start.\n\n{table(found, args.factors)}"
    )
    print(f"\n{text}")
    return text


if __name__ == "__main__":
    main()
