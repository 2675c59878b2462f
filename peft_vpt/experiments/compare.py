"""The comparison of protocols on one task: rates chosen on val, final runs on train and val."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data import Task
from ..errors import SpecError, VPTError
from ..training import DivergedError, Recipe, preset
from . import control
from .plots import bar_chart
from .records import Record, append_record, make_record, read_records, record_key
from .run import Build, Pixels, config_of, run_once
from .tables import report_page

PROTOCOLS = ("linear", "bias", "adapter", "vpt-shallow", "vpt-deep", "full")
# Multiples of a preset's learning rate among which val chooses.
FACTORS = (0.3, 1.0, 3.0)
RECORDS = "records.jsonl"


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
    """

    protocols: Sequence[str] = PROTOCOLS
    options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    epochs: int = 100
    factors: Sequence[float] = FACTORS
    seeds: Sequence[int] = (0, 1, 2)
    kind: str = "default"
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def recipe(self, protocol: str, backbone: str, factor: float, seed: int) -> Recipe:
        """Return the recipe of one run."""
        found = preset(
            protocol,
            backbone=backbone,
            kind=self.kind,
            epochs=self.epochs,
            seed=seed,
            **self.changes,
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
) -> list[Record]:
    """Run what of a plan has no record yet, and return the records of this task and backbone.

    Per protocol: one run per rate on train, judged on val; then the best rate on train and val
    over the seeds, judged on test, once. Baselines without a network stand beside them.

    Args:
        task: With train, val and test.
        transform: Of its images, without randomness.
        build: Makes the bare backbone.
        backbone: Its name, for the records.
        folder: Of `records.jsonl` and adapters; a comparison that was killed goes on there.
        plan: What to run.
        group: Of the task, for tables.
        progress: Show progress bars.

    Raises:
        SpecError: An empty plan.
        VPTError: A split is missing.
    """
    plan = plan or Plan()
    if not (plan.protocols and plan.factors and plan.seeds):
        raise SpecError("compare(plan=...): needs a protocol, a factor and a seed at least.")
    file = Path(folder) / RECORDS
    file.parent.mkdir(parents=True, exist_ok=True)
    work = _Work(file, Pixels(task, transform), build, backbone, plan, group, progress)
    work.controls()
    for protocol in plan.protocols:
        factor = work.best_factor(protocol)
        for seed in plan.seeds:
            work.run(protocol, factor, seed, "trainval", "test")
    return [r for r in read_records(file) if r["task"] == task.name and r["backbone"] == backbone]


def write_report(records: Sequence[Record], folder: str | Path, *, title: str, intro: str) -> Path:
    """Write `report.md` and its bar chart from records alone; return the page's path."""
    figure = bar_chart(records, Path(folder) / "accuracy", title=title)
    page = Path(folder) / "report.md"
    text = report_page(records, title=title, intro=intro, figures={"Accuracy": figure.svg.name})
    page.write_text(text, encoding="utf-8")
    return page


@dataclasses.dataclass(frozen=True)
class _Work:
    file: Path
    pixels: Pixels
    build: Build
    backbone: str
    plan: Plan
    group: str | None
    progress: bool

    def run(self, protocol: str, factor: float, seed: int, train: str, test: str) -> Record:
        """Return the record of a run: the one that is there, or a new one."""
        task = self.pixels.task
        images = len(task.trainval() if train == "trainval" else task.split(train))
        recipe = self.plan.recipe(protocol, self.backbone, factor, seed)
        recipe = dataclasses.replace(recipe, batch_size=min(recipe.batch_size, images))
        options = self.plan.options.get(protocol, {})
        stub = make_record(
            task=task.name,
            protocol=protocol,
            backbone=self.backbone,
            seed=seed,
            split=test,
            metrics={},
            config=config_of(recipe, options, self.pixels, train),
        )
        known = {record_key(r): r for r in self._records()}
        if record_key(stub) in known:
            return known[record_key(stub)]
        try:
            record = run_once(
                self.pixels, protocol, self.build, recipe, backbone=self.backbone, train=train,
                test=test, group=self.group, options=options, progress=self.progress,
                folder=self.file.parent / task.name if test == "test" else None,
            )  # fmt: skip
        except DivergedError:
            record = stub | {"group": self.group, "metrics": {"top1": 0.0, "diverged": 1.0}}
        append_record(self.file, record)
        return record

    def best_factor(self, protocol: str) -> float:
        """Return the multiple of the rate that val prefers; of equals the smallest."""
        if len(self.plan.factors) == 1:
            return self.plan.factors[0]
        seed = self.plan.seeds[0]
        tried = {f: self.run(protocol, f, seed, "train", "val") for f in sorted(self.plan.factors)}
        return max(tried, key=lambda factor: (tried[factor]["metrics"]["top1"], -factor))

    def controls(self) -> None:
        """Record the majority class, and logistic regression on 16 x 16 pixels."""
        task, known = self.pixels.task, {(r["task"], r["protocol"]) for r in self._records()}
        for name in ("majority class", "16x16 pixels"):
            if (task.name, name) in known:
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


def need_splits(task: Task) -> None:
    """Raise unless a task has train, val and test.

    Raises:
        VPTError: One is missing.
    """
    for name in ("train", "val", "test"):
        if name not in task.splits:
            raise VPTError(f"compare: the task {task.name} has no {name} images.")
