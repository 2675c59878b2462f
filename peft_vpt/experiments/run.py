"""One run: a protocol on a task, from a bare backbone to a record."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapter.verbs import save_task_adapter
from ..backbones.find import says_its_size
from ..data import Split, Task, decode, loader
from ..inject import count_parameters
from ..protocols.apply import apply_protocol
from ..training import DivergedError, Recipe, evaluate, fit
from ..training.batches import leaves_one
from ..training.checkpoint import library_versions
from ..training.from_tokens import begin_as_tokens
from .backbones import device
from .cost import step, used_bytes
from .embeddings import class_prototypes, prompt_values
from .records import Record, append_record, make_record, read_records, record_key
from .sums import parts, split_sum, text_sum
from .variants import Variant, adapter_folder

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
        if self._whole is not None and self._shared(self._whole, name):
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

    def _shared(self, whole: Pixels, name: str) -> bool:
        """Tell whether a split is that of the whole task, image by image."""
        if name not in ("val", "test"):
            return False
        mine, theirs = self.task.split(name), whole.task.split(name)
        return mine == theirs and mine.images is theirs.images


@dataclasses.dataclass(frozen=True)
class Settings:
    """Images and backbones for every share of the training images and every image size."""

    whole: Pixels
    build: Build
    reopen: Callable[[float], Task]
    resize: Callable[[int], tuple[Any, Build]] | None
    made: dict[Any, tuple[Pixels, Build]] = dataclasses.field(default_factory=dict)

    def of(self, row: Variant) -> tuple[Pixels, Build]:
        """Return the images and the builder of a row."""
        key = (row.fraction, row.size)
        if key not in self.made:
            whole, build = self.whole, self.build
            if row.size is not None and self.resize is not None:
                transform, build = self.resize(row.size)
                whole = Pixels(self.whole.task, transform)
            if row.fraction < 1:
                whole = Pixels(self.reopen(row.fraction), whole.transform, whole)
            size = whole.transform.preprocessing["size"]
            self.made[key] = whole, lambda: says_its_size(build(), size)
        return self.made[key]


def config_of(
    recipe: Recipe,
    options: Mapping[str, Any],
    pixels: Pixels,
    train: str,
    test: str,
    weights: str | None = None,
    fraction: float = 1.0,
) -> dict[str, Any]:
    """Return what makes a run another run, beside task, protocol, backbone and seed.

    Args:
        recipe: Of the run.
        options: Of the protocol.
        pixels: Images of the task.
        train: Split to train on.
        test: Split to evaluate on.
        weights: What tells the backbone's weights from others of its name.
        fraction: Share of the training images that `pixels` hold.

    Raises:
        VPTError: An image cannot be read.
    """
    config = {
        "recipe": recipe.to_dict(),
        "options": dict(options),
        "preprocessing": pixels.transform.preprocessing,
        "train": train,
        "images": pixels.sums(train, test),
        "classes": text_sum(pixels.task.classes),
        "weights": weights,
    }
    return config if fraction == 1 else config | {"fraction": fraction}


def fitted(recipe: Recipe, images: int, parts: int = 1) -> Recipe:
    """Return a recipe whose batch is no larger than the training images are many.

    Args:
        recipe: The recipe; its learning rate follows the batch.
        images: Number of training images.
        parts: Processes among which a batch is shared out.
    """
    most = max(images // parts, 1) * parts
    return dataclasses.replace(recipe, batch_size=min(recipe.batch_size, most))


def run_once(
    pixels: Pixels,
    protocol: str,
    build: Build,
    recipe: Recipe,
    *,
    backbone: str,
    train: str = "train",
    test: str = "val",
    group: str | None = None,
    options: Mapping[str, Any] | None = None,
    label: str | None = None,
    fraction: float = 1.0,
    weights: str | None = None,
    facts: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Record:
    """Train a fresh model by a protocol, evaluate it, save its adapter, and return the record.

    Args:
        pixels: Images of the task.
        protocol: As in `apply_protocol`.
        build: Makes the bare backbone.
        recipe: How to train; its seed also seeds head and prompts.
        backbone: Its name, for the record.
        train: Split to train on.
        test: Split to evaluate on, once, at the end.
        group: Of the task.
        options: Of the protocol; `init` may be "prototypes", or "tokens" (`prompts_from_tokens`).
        label: Name of the protocol with these options. None: the protocol.
        fraction: Share of the training images that `pixels` hold.
        weights: As in `config_of`.
        facts: Further fields of the record.
        folder: Below which the adapter goes, in a folder of its own that the record names; None: it
            is saved to be measured, and dropped.
        progress: Show progress bars on a terminal.
    """
    options, label = dict(options or {}), label or protocol
    config = config_of(recipe, options, pixels, train, test, weights, fraction)
    place = adapter_folder(pixels.task.name, label, backbone, recipe.seed, config)
    torch.manual_seed(recipe.seed)
    model = prepared(pixels, protocol, build, recipe.seed, options, train)
    batches = loader(
        pixels.split(train), None, batch_size=recipe.batch_size, shuffle=True, seed=recipe.seed,
        drop_last=leaves_one(model, len(pixels.split(train)), recipe.batch_size),
    )  # fmt: skip
    result = fit(model, batches, recipe=recipe, progress=progress)
    metrics = evaluate(model, loader(pixels.split(test), None, batch_size=TEST_BATCH))
    counts = count_parameters(model)
    with tempfile.TemporaryDirectory() as scratch:
        path = save_task_adapter(
            model,
            scratch if folder is None else Path(folder) / place,
            task=pixels.task.name,
            labels=pixels.task.classes,
            preprocessing=pixels.transform.preprocessing,
            metrics=metrics,
        )
        stored = path.stat().st_size
    return make_record(
        **(facts or {}),
        task=pixels.task.name,
        group=group,
        protocol=label,
        backbone=backbone,
        seed=recipe.seed,
        split=test,
        metrics=metrics | {"train_loss": result.history[-1]["train_loss"]},
        trainable=counts.trainable,
        total=counts.total,
        stored_bytes=stored,
        seconds=result.seconds,
        step_seconds=result.seconds / (recipe.epochs * len(batches)),
        train_bytes=_memory(model, pixels.split(train), recipe.batch_size),
        adapter=None if folder is None else place,
        config=config,
        versions=library_versions(),
    )


def run_recorded(
    file: Path, pixels: Pixels, protocol: str, build: Build, recipe: Recipe, **about: Any
) -> Record:
    """Return the record of a run in a file: the one that is there, or that of a new run.

    A run that diverged is recorded as wrong everywhere, with the metric `diverged`, and with the
    step and what happened there in `failure`.

    Args:
        file: Of records.
        pixels: As in `run_once`.
        protocol: As in `run_once`.
        build: As in `run_once`.
        recipe: As in `run_once`; its batch is cut to the number of training images.
        about: The other arguments of `run_once`.
    """
    train, test = about.get("train", "train"), about.get("test", "val")
    recipe = fitted(recipe, len(pixels.task.split(train)))
    options, fraction = about.get("options") or {}, about.get("fraction", 1.0)
    stub = make_record(
        **(about.get("facts") or {}),
        task=pixels.task.name, group=about.get("group"), protocol=about.get("label") or protocol,
        backbone=about["backbone"], seed=recipe.seed, split=test,
        metrics={"top1": 0.0, "diverged": 1.0},
        config=config_of(recipe, options, pixels, train, test, about.get("weights"), fraction),
    )  # fmt: skip
    known = {record_key(record): record for record in read_records(file)}
    if record_key(stub) in known:
        return known[record_key(stub)]
    try:
        record = run_once(pixels, protocol, build, recipe, **about)
    except DivergedError as error:
        record = stub | {"failure": str(error)}
    append_record(file, record)
    return record


def prepared(
    pixels: Pixels,
    protocol: str,
    build: Build,
    seed: int,
    options: Mapping[str, Any],
    train: str,
) -> nn.Module:
    """Return a new model under a protocol, on the device of comparisons."""
    model, options = build(), dict(options)
    if options.get("init") == "prototypes":
        options["init"] = _prototypes(model.to(device()), pixels, options, train)
    generator = torch.Generator().manual_seed(seed)
    classes = len(pixels.task.classes)
    from_tokens = options.get("init") == "tokens"
    if from_tokens:
        del options["init"]
    apply_protocol(model, protocol, num_classes=classes, generator=generator, **options)
    model.to(device())
    if from_tokens:
        images = pixels.split(train).images
        begin_as_tokens(model, images.__getitem__, len(images), generator)
    return model


def _memory(model: nn.Module, split: Split, batch: int) -> int:
    """Return the memory of a training step, as `cost.measure` does; the model is used up."""
    pixels, labels = split.images[:batch], torch.tensor(split.labels[:batch])
    return used_bytes(step, model.train(), (pixels.to(device()), labels.to(device())))


def _prototypes(
    model: nn.Module, pixels: Pixels, options: Mapping[str, Any], train: str
) -> torch.Tensor:
    """Return the mean features of each class as first values of prompts."""
    batches = loader(pixels.split(train), None, batch_size=TEST_BATCH)
    found = class_prototypes(model, batches, len(pixels.task.classes), options.get("length"))
    return prompt_values(model, found, deep=options.get("deep", True))
