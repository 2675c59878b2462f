"""The comparison of protocols on one task: rates chosen on val, final runs on train and val."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..data import Task
from ..errors import SpecError, VPTError
from ..training import Recipe, preset
from . import control
from .records import Key, Record, append_record, make_record, read_records, record_key
from .run import Build, Pixels, Settings, run_recorded
from .saved import draw_embeddings, ensemble_record, ensemble_stub
from .variants import Variant, folder_name, is_name, plain, reduced

PROTOCOLS = ("linear", "bias", "adapter", "vpt-shallow", "vpt-deep", "full")
# Multiples of a preset's learning rate among which val chooses.
FACTORS = (0.3, 1.0, 3.0)
RECORDS = "records.jsonl"
CONTROLS = ("majority class", "16x16 pixels")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a comparison runs.

    Args:
        protocols: As in `apply_protocol`.
        options: Of protocols, by name: `{"vpt-deep": {"length": 20}}`.
        epochs: Of every run.
        factors: Multiples of the preset's learning rate, tried on val; one value: nothing is tried.
        seeds: Of the final runs on train and val.
        kind: Preset, "default" or "paper".
        changes: Fields of the recipe to set.
        variants: In place of protocols and options.
        final: False: nothing but the runs on val.
        ensemble: Also the final adapters of all seeds together, a record per row.
        tsne: Also a figure of the final embeddings per row.
    """

    protocols: Sequence[str] = PROTOCOLS
    options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    epochs: int = 100
    factors: Sequence[float] = FACTORS
    seeds: Sequence[int] = (0, 1, 2)
    kind: str = "default"
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    variants: Sequence[Variant] = ()
    final: bool = True
    ensemble: bool = False
    tsne: bool = False

    def rows(self) -> tuple[Variant, ...]:
        """Return the variants: those given, or the protocols as they are.

        Raises:
            SpecError: An unknown protocol, or two variants of one label.
        """
        rows = tuple(self.variants) or plain(self.protocols, self.options)
        labels = [row.label for row in rows]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise SpecError(f"Plan: {', '.join(twice)} stands there twice; labels tell rows apart.")
        return rows

    def recipe(self, variant: Variant, backbone: str, factor: float, seed: int) -> Recipe:
        """Return the recipe of one run."""
        # The length matters to the paper's batch size; protocols as they are do without.
        length = variant.options.get("length") if self.variants else None
        found = preset(
            variant.protocol,
            backbone=backbone,
            kind=self.kind,
            length=length,
            **{"epochs": self.epochs, "seed": seed, **self.changes, **variant.changes},
        )
        return dataclasses.replace(found, base_lr=found.base_lr * factor)


def compare(
    task: Task,
    transform: Any,
    build: Build,
    *,
    backbone: str,
    folder: str | Path,
    plan: Plan | None = None,
    group: str | None = None,
    progress: bool = True,
    reopen: Callable[[float], Task] | None = None,
    resize: Callable[[int], tuple[Any, Build]] | None = None,
) -> list[Record]:
    """Run what of a plan has no record yet, and return its records, in the order of the file.

    Per row: one run per rate and choice on train, judged on val; then the best of them on train and
    val over the seeds, judged on test, once. Beside protocols as they are stand baselines without a
    network, and those that other plans have run on this task and backbone.

    Args:
        task: With train, val and test.
        transform: Of its images, without randomness.
        build: Makes the bare backbone.
        backbone: Its name, for the records.
        folder: Of `records.jsonl` and adapters; a comparison that was killed goes on there.
        plan: What to run.
        group: Of the task, for tables.
        progress: Show progress bars.
        reopen: Returns the task with a share of its training images. None: they are drawn here.
        resize: Returns transform and builder for another edge of the images.

    Raises:
        SpecError: An empty plan, or another image size without `resize`.
        VPTError: A split is missing.
    """
    plan = plan or Plan()
    if not ((plan.variants or plan.protocols) and plan.factors and plan.seeds):
        raise SpecError("compare(plan=...): needs a protocol, a factor and a seed at least.")
    rows = plan.rows()
    _check(task, rows, plan, resize)
    file = Path(folder) / RECORDS
    file.parent.mkdir(parents=True, exist_ok=True)
    reopen = reopen or partial(reduced, task)
    work = _Work(file, Settings(Pixels(task, transform), build, reopen, resize), backbone, plan,
                 group, progress)  # fmt: skip
    if not plan.variants:
        work.controls()
    for row in rows:
        work.row(row)
    labels = {row.label for row in rows}
    mine = [r for r in read_records(file) if _about(r) == (task.name, backbone)]
    return [r for r in mine if record_key(r) in work.used or _beside(r, labels, plan)]


def _about(record: Record) -> tuple[str, str]:
    return record["task"], record["backbone"]


def _beside(record: Record, labels: set[str], plan: Plan) -> bool:
    """Tell whether a record that is not of the plan's runs stands beside them.

    What its rows have from other settings does not.
    """
    label = record["protocol"].removesuffix(" ensemble")
    return not plan.variants and label not in labels and (label in CONTROLS or is_name(label))


@dataclasses.dataclass(frozen=True)
class _Work:
    file: Path
    settings: Settings
    backbone: str
    plan: Plan
    group: str | None
    progress: bool
    used: set[Key] = dataclasses.field(default_factory=set)

    def row(self, row: Variant) -> None:
        """Do everything that a plan asks for of one row."""
        row, factor = self.best(row)
        if not self.plan.final:
            return
        final = [self.run(row, factor, s, row.final, "test") for s in self.plan.seeds]
        pixels, build = self.settings.of(row)
        folder = self.file.parent / pixels.task.name
        there = [r for r in final if "diverged" not in r["metrics"]]
        if len(there) > 1:
            key = record_key(ensemble_stub(there))
            self.used.add(key)
            if self.plan.ensemble and key not in map(record_key, self._records()):
                append_record(self.file, ensemble_record(there, pixels, build, folder))
        if self.plan.tsne and there:
            adapter = folder / folder_name(row.label, there[0]["seed"])
            draw_embeddings(there[0], pixels, build, adapter, self.file.parent)

    def run(self, row: Variant, factor: float, seed: int, train: str, test: str) -> Record:
        """Return the record of a run: the one that is there, or a new one."""
        pixels, build = self.settings.of(row)
        record = run_recorded(
            self.file, pixels, row.protocol, build,
            self.plan.recipe(row, self.backbone, factor, seed), backbone=self.backbone,
            train=train, test=test, group=self.group, options=row.options, label=row.label,
            fraction=row.fraction, progress=self.progress,
            folder=self.file.parent / pixels.task.name if test == "test" else None,
        )  # fmt: skip
        self.used.add(record_key(record))
        return record

    def best(self, row: Variant) -> tuple[Variant, float]:
        """Return a row with the choice that val prefers, and the multiple of the rate.

        Of equals the first choice and the smallest multiple.
        """
        rows = [dataclasses.replace(row, options={**row.options, **choice}, choices=({},))
                for choice in row.choices]  # fmt: skip
        tried = [(option, factor) for option in rows for factor in sorted(self.plan.factors)]
        if len(tried) == 1 and self.plan.final:
            return tried[0]
        seed = self.plan.seeds[0]
        runs = [self.run(*one, seed, "train", "val")["metrics"]["top1"] for one in tried]
        return tried[runs.index(max(runs))]

    def controls(self) -> None:
        """Record the majority class, and logistic regression on 16 x 16 pixels."""
        task = self.settings.whole.task
        here = (task.name, self.backbone)
        known = {r["protocol"] for r in self._records() if _about(r) == here}
        for name in CONTROLS:
            if name in known:
                continue
            config: dict[str, Any] = {}
            if name == "majority class":
                top1 = control.majority(task.trainval().labels, task.split("test").labels)
            else:
                parts = [task.split(s) for s in ("train", "val", "test")]
                fitted = control.logistic(*((control.raw_pixels(p), p.labels) for p in parts))
                top1, config = fitted.top1, {"C": fitted.strength}
            append_record(
                self.file,
                make_record(
                    task=task.name,
                    group=self.group,
                    protocol=name,
                    backbone=self.backbone,
                    seed=0,
                    split="test",
                    metrics={"top1": top1},
                    trainable=0,
                    config=config,
                ),
            )

    def _records(self) -> list[Record]:
        return read_records(self.file) if self.file.exists() else []


def _check(task: Task, rows: Sequence[Variant], plan: Plan, resize: Any) -> None:
    """Raise before the first run where a row cannot be run.

    Raises:
        SpecError: Another image size and no `resize`, or too few images for a figure.
    """
    for row in rows:
        if row.size is not None and resize is None:
            raise SpecError(f"compare: the row {row.label!r} needs resize=...")
    if plan.tsne and len(task.split("test")) < 4:
        raise SpecError("compare(tsne): needs four test images or more.")


def need_splits(task: Task) -> None:
    """Raise unless a task has train, val and test.

    Raises:
        VPTError: One is missing.
    """
    for name in ("train", "val", "test"):
        if name not in task.splits:
            raise VPTError(f"compare: the task {task.name} has no {name} images.")
