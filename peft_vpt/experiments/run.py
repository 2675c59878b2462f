"""One run: a protocol on a task, from a bare backbone to a record."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters import save_task_adapter
from ..data import Split, Task, decode, loader
from ..inject import count_parameters
from ..protocols import apply_protocol
from ..training import Recipe, evaluate, fit
from ..training.describe import library_versions
from .records import Record, make_record

Build = Callable[[], nn.Module]


class Pixels:
    """The images of a task, transformed once and held in memory.

    Args:
        task: The task.
        transform: Without randomness.
    """

    def __init__(self, task: Task, transform: Any) -> None:
        self.task, self.transform = task, transform
        self._splits: dict[str, Split] = {}

    def split(self, name: str) -> Split:
        """Return "train", "val", "test", or "trainval"."""
        if name not in self._splits:
            split = self.task.trainval() if name == "trainval" else self.task.split(name)
            self._splits[name] = decode(split, self.transform)
        return self._splits[name]


def config_of(
    recipe: Recipe, options: Mapping[str, Any], pixels: Pixels, train: str
) -> dict[str, Any]:
    """Return what makes a run another run, beside task, protocol, backbone and seed."""
    return {
        "recipe": recipe.to_dict(),
        "options": dict(options),
        "preprocessing": pixels.transform.preprocessing,
        "train": train,
    }


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
        options: Of the protocol.
        folder: Where the adapter goes; None: it is saved to be measured, and dropped.
        progress: Show progress bars on a terminal.
    """
    options = dict(options or {})
    torch.manual_seed(recipe.seed)
    model = build()
    generator = torch.Generator().manual_seed(recipe.seed)
    classes = len(pixels.task.classes)
    apply_protocol(model, protocol, num_classes=classes, generator=generator, **options)
    if torch.cuda.is_available():
        model.cuda()
    batches = loader(
        pixels.split(train), None, batch_size=recipe.batch_size, shuffle=True, seed=recipe.seed,
        drop_last=protocol.startswith("mlp"),
    )  # fmt: skip
    result = fit(model, batches, recipe=recipe, progress=progress)
    metrics = evaluate(model, loader(pixels.split(test), None, batch_size=100))
    counts = count_parameters(model)
    with tempfile.TemporaryDirectory() as scratch:
        path = save_task_adapter(
            model,
            scratch if folder is None else Path(folder) / f"{protocol}-{recipe.seed}",
            task=pixels.task.name,
            labels=pixels.task.classes,
            preprocessing=pixels.transform.preprocessing,
            metrics=metrics,
        )
        stored = path.stat().st_size
    steps = recipe.epochs * len(batches)
    return make_record(
        task=pixels.task.name,
        group=group,
        protocol=protocol,
        backbone=backbone,
        seed=recipe.seed,
        split=test,
        metrics=metrics | {"train_loss": result.history[-1]["train_loss"]},
        trainable=counts.trainable,
        total=counts.total,
        stored_bytes=stored,
        seconds=result.seconds,
        step_seconds=result.seconds / steps,
        config=config_of(recipe, options, pixels, train),
        versions=library_versions(),
    )
