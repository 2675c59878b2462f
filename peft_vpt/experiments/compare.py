"""The comparison of protocols on one task: rates chosen on val, final runs on train and val."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from ..backbones.find import says_its_size
from ..checks import integer, list_of, number
from ..data import Task
from ..errors import SpecError, VPTError
from ..training import Recipe, preset
from .ensemble import draw_embeddings, ensemble_record, ensemble_stub
from .records import (
    Key,
    Record,
    append_record,
    field,
    make_record,
    read_records,
    record_key,
    same_run,
    select,
)
from .report import CONTROLS
from .run import Build, Pixels, Run, reduced, run_recorded
from .variants import Variant, is_name, named

PROTOCOLS = ("linear", "bias", "adapter", "vpt-shallow", "vpt-deep", "full")
# Multiples of a preset's learning rate among which val chooses.
FACTORS = (0.3, 1.0, 3.0)
RECORDS = "records.jsonl"
# What runs share that stand beside one another in a table.
_SHARED = ("preset", "config.weights", "config.recipe.epochs", "config.preprocessing.size",
           "config.images")  # fmt: skip


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
        rows = tuple(self.variants) or tuple(named(self.protocols, self.options))
        labels = [row.label for row in rows]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            told = f"{', '.join(twice)} stands there twice"
            raise SpecError("Plan", told, "labels tell rows apart")
        return rows

    def recipe(self, variant: Variant, backbone: str, factor: float, seed: int) -> Recipe:
        """Return the recipe of one run."""
        found = preset(
            variant.protocol,
            backbone=backbone,
            kind=self.kind,
            length=variant.options.get("length"),
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
    weights: str | None = None,
    progress: bool = True,
    reopen: Callable[[float], Task] | None = None,
    resize: Callable[[int], tuple[Any, Build]] | None = None,
) -> list[Record]:
    """Run what of a plan has no record yet, and return its records, in the order of the file.

    Per row: one run per rate and choice on train, judged on val; then the best of them on train and
    val over the seeds, judged on test, once. Beside protocols as they are stand baselines without a
    network, and those that other plans have run with this preset on these images and this backbone.
    A run is known by its settings, the images and `weights`: others are run anew.

    Args:
        task: With train, val and test.
        transform: Of its images, without randomness.
        build: Makes the bare backbone.
        backbone: Its name, for the records.
        folder: Of `records.jsonl` and adapters; a comparison that was killed goes on there.
        plan: What to run.
        group: Of the task, for tables.
        weights: What tells the backbone's weights from others of its name: `sums.file_sum` of
            their file, say.
        progress: Show progress bars.
        reopen: Returns the task with a share of its training images. None: they are drawn here.
        resize: Returns transform and builder for another edge of the images.

    Raises:
        SpecError: An empty plan, a recipe that cannot be, or another image size without `resize`.
        VPTError: A split is missing.
    """
    plan = plan or Plan()
    if not ((plan.variants or plan.protocols) and plan.factors and plan.seeds):
        told = "needs a protocol, a factor and a seed at least"
        raise SpecError("compare", told, given={"plan": ...})
    rows = plan.rows()
    _check(task, rows, plan, backbone, resize)
    file = Path(folder) / RECORDS
    file.parent.mkdir(parents=True, exist_ok=True)
    work = _Work(file, Pixels(task, transform), build, backbone, plan, group, weights, progress,
                 reopen or partial(reduced, task), resize)  # fmt: skip
    if not plan.variants:
        work.controls()
    for row in rows:
        work.row(row)
    mine = [r for r in read_records(file) if (r["task"], r["backbone"]) == (task.name, backbone)]
    own = [r for r in mine if record_key(r) in work.used]
    if plan.variants:
        return own
    labels = {row.label for row in rows}
    return [r for r in mine if record_key(r) in work.used or _stands_beside(r, own, labels)]


def _shared(record: Record) -> list[Any]:
    return [field(record, name) for name in _SHARED]


def _init(record: Record) -> str | None:
    """Return how the prompts of a record began, None where there are none."""
    options = field(record, "config.options") or {}
    return options.get("init", "random") if "length" in options else None


def _stands_beside(record: Record, own: Sequence[Record], labels: set[str]) -> bool:
    """Tell whether a record of an earlier plan belongs beside records.

    It is of a protocol as it is, not of the rows of these labels, of the same preset, images and
    backbone, and its prompts, if any, began as those of the records did.
    """
    label = record["protocol"].removesuffix(" ensemble")
    begin = {_init(r) for r in own} - {None}
    return (
        label not in labels
        and is_name(label)
        and any(_shared(record) == _shared(r) for r in own if r["trainable"] != 0)
        and (not begin or _init(record) in {*begin, None})
    )


@dataclasses.dataclass(frozen=True)
class _Work:
    file: Path
    whole: Pixels
    build: Build
    backbone: str
    plan: Plan
    group: str | None
    weights: str | None
    progress: bool
    reopen: Callable[[float], Task]
    resize: Callable[[int], tuple[Any, Build]] | None
    used: set[Key] = dataclasses.field(default_factory=set)
    made: dict[Any, tuple[Pixels, Build]] = dataclasses.field(default_factory=dict)

    def row(self, row: Variant) -> None:
        """Do everything that a plan asks for of one row."""
        row, factor = self.best(row)
        if not self.plan.final:
            return
        final = [self.run(row, factor, s, row.final, "test") for s in self.plan.seeds]
        pixels, build = self.needs(row)
        folder = self.file.parent
        there = [r for r in final if "diverged" not in r["metrics"]]
        if len(there) > 1:
            stub = ensemble_stub(there)
            self.used.add(record_key(stub))
            if self.plan.ensemble and not same_run(self.file, stub):
                append_record(self.file, ensemble_record(there, pixels, build, folder))
        if self.plan.tsne and there:
            draw_embeddings(there[0], pixels, build, folder)

    def needs(self, row: Variant) -> tuple[Pixels, Build]:
        """Return images and builder for a row's share of the images and their size."""
        key = (row.fraction, row.size)
        if key not in self.made:
            pixels, build = self.whole, self.build
            if row.size is not None and self.resize is not None:
                transform, build = self.resize(row.size)
                pixels = Pixels(self.whole.task, transform)
            if row.fraction < 1:
                pixels = Pixels(self.reopen(row.fraction), pixels.transform, pixels)
            size = pixels.transform.preprocessing["size"]
            self.made[key] = pixels, lambda: says_its_size(build(), size)
        return self.made[key]

    def run(self, row: Variant, factor: float, seed: int, train: str, test: str) -> Record:
        """Return the record of a run: the one that is there, or a new one."""
        pixels, build = self.needs(row)
        run = Run(
            pixels, row, build, self.plan.recipe(row, self.backbone, factor, seed), self.backbone,
            train, test, group=self.group, weights=self.weights, progress=self.progress,
            facts={"preset": self.plan.kind, "factor": factor},
            folder=self.file.parent if test == "test" else None,
        )  # fmt: skip
        record = run_recorded(self.file, run)
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
        task, images = self.whole.task, self.whole.sums("trainval", "test")
        known = select(
            read_records(self.file), task=task.name, backbone=self.backbone, config__images=images
        )
        for name, judge in zip(CONTROLS, (_majority, _logistic), strict=True):
            record = next((r for r in known if r["protocol"] == name), None)
            if record is None:
                top1, config = judge(task)
                record = make_record(
                    task=task.name, group=self.group, protocol=name, backbone=self.backbone,
                    seed=0, split="test", metrics={"top1": top1}, trainable=0,
                    config={"images": images, **config},
                )  # fmt: skip
                append_record(self.file, record)
            self.used.add(record_key(record))


def _majority(task: Task) -> tuple[float, dict[str, Any]]:
    return majority(task.trainval().labels, task.split("test").labels), {}


def _logistic(task: Task) -> tuple[float, dict[str, Any]]:
    parts = [task.split(name) for name in ("train", "val", "test")]
    found = logistic(*((raw_pixels(part), part.labels) for part in parts))
    return found.top1, {"C": found.strength}


def _check(task: Task, rows: Sequence[Variant], plan: Plan, backbone: str, resize: Any) -> None:
    """Raise before the first run where a row cannot be run.

    Raises:
        SpecError: Another image size and no `resize`, too few images for a figure, or a recipe that
            cannot be.
        VPTError: A split is missing.
    """
    for name in ("train", "val", "test"):
        task.split(name)
    for row, seed, factor in product(rows, plan.seeds, plan.factors):
        for choice in row.choices:
            chosen = dataclasses.replace(row, options={**row.options, **choice})
            plan.recipe(chosen, backbone, factor, seed)
    for row in rows:
        if row.size is not None and resize is None:
            raise SpecError("compare", f"the row {row.label!r} needs `resize=...`")
    if plan.tsne and len(task.split("test")) < 4:
        raise SpecError("compare", "t-SNE needs four test images or more")


STRENGTHS = tuple(10.0**power for power in range(-4, 6))
_STEPS = 1000


class Regression(NamedTuple):
    """A logistic regression: accuracies as shares, and the C that was chosen on val."""

    top1: float
    val_top1: float
    strength: float
    converged: bool


def majority(train: Sequence[int], test: Sequence[int]) -> float:
    """Return the accuracy on test of the class that is most frequent in train.

    Of equally frequent classes the lowest counts.

    Raises:
        VPTError: An empty split.
    """
    if not len(train) or not len(test):
        raise VPTError("majority", "an empty split", "give labels of train and of test")
    counts = Counter(int(label) for label in train)
    best = min(counts, key=lambda label: (-counts[label], label))
    return sum(int(label) == best for label in test) / len(test)


def raw_pixels(split: Any, size: int = 16) -> Any:
    """Return the images of a split as rows of `size` x `size` RGB values in 0 to 1.

    Args:
        split: Of a task (`peft_vpt.data.Split`), of image files or PIL images.
        size: Edge that images are squeezed to, averaging over areas.

    Raises:
        SpecError: A size below 1.
        VPTError: An empty split, or an image that cannot be read.
    """
    import numpy as np
    from PIL import Image

    integer(1).check("raw_pixels", "size", size)
    if not len(split):
        raise VPTError("raw_pixels", "the split is empty")
    rows = [
        np.asarray(split.image(i).resize((size, size), Image.Resampling.BOX), dtype=np.float32)
        for i in range(len(split))
    ]
    return np.stack(rows).reshape(len(rows), -1) / 255


def logistic(
    train: tuple[Any, Sequence[int]],
    val: tuple[Any, Sequence[int]],
    test: tuple[Any, Sequence[int]],
    *,
    strengths: Sequence[float] = STRENGTHS,
) -> Regression:
    """Fit a regularised logistic regression; C is chosen on val, then train and val are joined.

    Values are standardised by the images it is fitted on. Of equal C on val the smallest wins.

    Args:
        train: Rows `(images, values)` of pixels or frozen features, and labels.
        val: Likewise.
        test: Likewise; used once.
        strengths: Values of C, scikit-learn's inverse of the penalty.

    Raises:
        SpecError: No strengths, or one that is not positive.
        VPTError: An empty split.
    """
    positive = list_of(number(0, above=True), "positive values of C")
    positive.check("logistic", "strengths", list(strengths))
    for name, (_, labels) in (("train", train), ("val", val), ("test", test)):
        if not len(labels):
            raise VPTError("logistic", f"the split {name} is empty")
    import numpy as np
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, PredefinedSplit
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=_STEPS)),
        {"logisticregression__C": sorted(strengths)},
        # Fitted on train, judged on val; then the best one is fitted on both.
        cv=PredefinedSplit([-1] * len(train[1]) + [0] * len(val[1])),
        error_score="raise",
    )
    rows, classes = (
        np.concatenate([np.asarray(x) for x in pair]) for pair in zip(train, val, strict=True)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        search.fit(rows.astype(np.float64), classes)
    top1 = search.score(np.asarray(test[0], dtype=np.float64), np.asarray(test[1]))
    steps = search.best_estimator_[-1].n_iter_.max()
    strength = search.best_params_["logisticregression__C"]
    return Regression(float(top1), float(search.best_score_), strength, bool(steps < _STEPS))
