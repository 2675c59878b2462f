"""One run: a variant of a protocol on a task, from a bare backbone to a record."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapter.verbs import save_task_adapter
from ..data import Split, Task, decode, loader
from ..data.open import share_of
from ..inject import count_parameters
from ..protocols.apply import apply_protocol
from ..training import DivergedError, Recipe, evaluate, fit
from ..training.batches import leaves_one
from ..training.checkpoint import library_versions
from ..training.from_tokens import begin_as_tokens
from .backbones import device
from .cost import step, used_bytes
from .embeddings import class_prototypes, prompt_values
from .records import Record, append_record, config_hash, file_name, make_record, same_run
from .sums import parts, split_sum, text_sum
from .variants import Variant

Build = Callable[[], nn.Module]
TEST_BATCH = 100


class Pixels:
    """The images of a task, transformed once and held in memory.

    Args:
        task: The task.
        transform: Without randomness.
        whole: Of the same task with all training images, whose val and test serve here too.
    """

    def __init__(self, task: Task, transform: Any, whole: Pixels | None = None) -> None:
        self.task, self.transform, self._whole = task, transform, whole
        self._splits: dict[str, Split] = {}
        self._sums: dict[str, str] = {}

    def split(self, name: str) -> Split:
        """Return "train", "val", "test", or "trainval"."""
        if self._whole is not None and name in ("val", "test"):
            mine, theirs = self.task.split(name), self._whole.task.split(name)
            if mine == theirs and mine.images is theirs.images:
                return self._whole.split(name)
        if name not in self._splits:
            self._splits[name] = decode(self.task.split(name), self.transform)
        return self._splits[name]

    def sums(self, *names: str) -> dict[str, str]:
        """Return the checksums of splits, as `image_sums`."""
        wanted = parts(self.task, names)
        for part in wanted:
            if part not in self._sums:
                self._sums[part] = split_sum(self.task.split(part))
        return {part: self._sums[part] for part in wanted}


def reduced(task: Task, fraction: float, seed: int = 0) -> Task:
    """Return a task with a stratified share of its training images, as `open_task` draws it."""
    if fraction == 1:
        return task
    splits = {**task.splits, "train": share_of(task.split("train"), fraction, seed)}
    return dataclasses.replace(task, splits=splits)


@dataclasses.dataclass(frozen=True)
class Run:
    """What is trained on what, and where it is judged.

    Args:
        pixels: Images of the task.
        variant: The protocol with its options, one of its choices made; its label names the row.
        build: Makes the bare backbone.
        recipe: How to train; its seed also seeds head and prompts.
        backbone: Its name, for the record.
        train: Split to train on.
        test: Split to evaluate on, once, at the end.
        group: Of the task.
        weights: What tells the backbone's weights from others of its name.
        facts: Further fields of the record.
        folder: Below which the adapter goes, in a folder of its own that the record names; None: it
            is saved to be measured, and dropped.
        progress: Show progress bars on a terminal.
    """

    pixels: Pixels
    variant: Variant
    build: Build
    recipe: Recipe
    backbone: str
    train: str = "train"
    test: str = "val"
    group: str | None = None
    weights: str | None = None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    folder: Path | None = None
    progress: bool = True

    def config(self) -> dict[str, Any]:
        """Return what makes a run another run, beside task, protocol, backbone and seed.

        Raises:
            VPTError: An image cannot be read.
        """
        config = {
            "recipe": self.recipe.to_dict(),
            "options": dict(self.variant.options),
            "preprocessing": self.pixels.transform.preprocessing,
            "train": self.train,
            "images": self.pixels.sums(self.train, self.test),
            "classes": text_sum(self.pixels.task.classes),
            "weights": self.weights,
        }
        fraction = self.variant.fraction
        return config if fraction == 1 else config | {"fraction": fraction}

    def record(self, metrics: Mapping[str, float], **results: Any) -> Record:
        """Return the record of this run with its results."""
        return make_record(
            **self.facts,
            task=self.pixels.task.name,
            group=self.group,
            protocol=self.variant.label,
            backbone=self.backbone,
            seed=self.recipe.seed,
            split=self.test,
            config=self.config(),
            metrics=metrics,
            **results,
        )

    def place(self) -> str:
        """Return the folder of the adapter, below that of all runs; every run has another one."""
        told = config_hash({**self.config(), "backbone": self.backbone})
        name = f"{file_name(self.variant.label)}-{self.recipe.seed}-{told}"
        return f"{file_name(self.pixels.task.name)}/{name}"


def fitted(recipe: Recipe, images: int, parts: int = 1) -> Recipe:
    """Return a recipe whose batch is no larger than the training images are many.

    Args:
        recipe: The recipe; its learning rate follows the batch.
        images: Number of training images.
        parts: Processes among which a batch is shared out.
    """
    most = max(images // parts, 1) * parts
    return dataclasses.replace(recipe, batch_size=min(recipe.batch_size, most))


def run_once(run: Run) -> Record:
    """Train a fresh model, evaluate it, save its adapter, and return the record."""
    pixels, recipe = run.pixels, run.recipe
    images = pixels.split(run.train)
    torch.manual_seed(recipe.seed)
    model = prepared(run)
    batches = loader(
        images, None, batch_size=recipe.batch_size, shuffle=True, seed=recipe.seed,
        drop_last=leaves_one(model, len(images), recipe.batch_size),
    )  # fmt: skip
    result = fit(model, batches, recipe=recipe, progress=run.progress)
    metrics = evaluate(model, loader(pixels.split(run.test), None, batch_size=TEST_BATCH))
    counts = count_parameters(model)
    with tempfile.TemporaryDirectory() as scratch:
        path = save_task_adapter(
            model,
            scratch if run.folder is None else run.folder / run.place(),
            task=pixels.task.name,
            labels=pixels.task.classes,
            preprocessing=pixels.transform.preprocessing,
            metrics=metrics,
        )
        stored = path.stat().st_size
    return run.record(
        metrics | {"train_loss": result.history[-1]["train_loss"]},
        trainable=counts.trainable,
        total=counts.total,
        stored_bytes=stored,
        seconds=result.seconds,
        step_seconds=result.seconds / (recipe.epochs * len(batches)),
        train_bytes=_memory(model, images, recipe.batch_size),
        adapter=None if run.folder is None else run.place(),
        versions=library_versions(),
    )


def run_recorded(file: Path, run: Run) -> Record:
    """Return the record of a run in a file: the one that is there, or that of a new run.

    A run that diverged is recorded as wrong everywhere, with the metric `diverged`, and with the
    step and what happened there in `failure`.

    Args:
        file: Of records.
        run: Its batch is cut to the number of training images.
    """
    recipe = fitted(run.recipe, len(run.pixels.task.split(run.train)))
    run = dataclasses.replace(run, recipe=recipe)
    stub = run.record({"top1": 0.0, "diverged": 1.0})
    if known := same_run(file, stub):
        return known
    try:
        record = run_once(run)
    except DivergedError as error:
        record = stub | {"failure": str(error)}
    append_record(file, record)
    return record


def prepared(run: Run) -> nn.Module:
    """Return a new model under the protocol of a run, on the device of comparisons."""
    model, options = run.build(), dict(run.variant.options)
    classes = len(run.pixels.task.classes)
    images = run.pixels.split(run.train)
    init = options.get("init")
    if init == "prototypes":
        # The mean features of each class.
        batches = loader(images, None, batch_size=TEST_BATCH)
        found = class_prototypes(model.to(device()), batches, classes, options.get("length"))
        options["init"] = prompt_values(model, found, deep=options.get("deep", True))
    elif init == "tokens":
        del options["init"]
    generator = torch.Generator().manual_seed(run.recipe.seed)
    protocol = run.variant.protocol
    apply_protocol(model, protocol, num_classes=classes, generator=generator, **options)
    model.to(device())
    if init == "tokens":
        begin_as_tokens(model, images.images.__getitem__, len(images), generator)
    return model


def _memory(model: nn.Module, split: Split, batch: int) -> int:
    """Return the memory of a training step, as `cost.measure` does; the model is used up."""
    pixels, labels = split.images[:batch], torch.tensor(split.labels[:batch])
    return used_bytes(step, model.train(), (pixels.to(device()), labels.to(device())))
