"""`eval`: how good an adapter is on a folder of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .files import find, need_classes
from .images import find_broken, open_images, parts_of, split_of, without_broken
from .output import (
    Json,
    Offline,
    Revision,
    Source,
    quiet_stdout,
    write_facts,
    write_json,
)
from .predict import find_device, progress_bar
from .sources import Data, SkipBroken, Weights, metric_lines

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..adapter_file import Adapter
    from ..data import Split, Task

_CALL = "peft-vpt eval"


class Part(str, Enum):
    """What is measured on."""

    test = "test"
    val = "val"
    train = "train"
    trainval = "trainval"
    all = "all"


def evaluate(
    source: Source,
    data: Data,
    split: Annotated[Part, typer.Option(help="Images to measure on.")] = Part.test,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Backbone to use in place of the one in the adapter."),
    ] = None,
    weights: Weights = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: a GPU if there is one.")
    ] = None,
    skip_broken: SkipBroken = False,
    as_json: Json = False,
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Measure an adapter on labelled images, whose classes must be those of the adapter.

    Images are prepared as the adapter says. Where the folder has no test split, the one that
    `train` would cut from it is used.
    """
    from ..data import loader
    from ..training import evaluate as measure

    place = find_device(device)
    adapter = find(source, _CALL, revision, offline)
    need_classes(adapter, _CALL)
    with quiet_stdout():
        task = open_images(data, split.value)
        numbers = _numbers(adapter, task)
        names = parts_of(task, split.value)
        task = without_broken(_CALL, task, find_broken(task, names), skip_broken)
        images = _relabelled(split_of(task, split.value), numbers)
        network, transform = _load(adapter, model, weights, offline)
        batches = loader(images, transform, batch_size=batch_size, workers=workers, check=False)
        with progress_bar(shown=True) as bar:
            shown = bar.track(batches, total=len(batches), description=split.value)
            metrics = measure(network.to(place), shown)
    if as_json:
        facts = {"adapter": str(adapter.path), "task": task.name, "split": split.value}
        write_json({**facts, "images": len(images), "metrics": metrics})
    else:
        write_facts({split.value: f"{len(images):,} images", **metric_lines(metrics)})


def _numbers(adapter: Adapter, task: Task) -> list[int]:
    """Return the output of the adapter that stands for each class of a task.

    Raises:
        AdapterError: It has other classes.
    """
    from ..errors import AdapterError
    from ..wording import listing

    head, where = adapter.metadata["head"], f"{_CALL}: {adapter.path}"
    labels, classes = head["labels"], task.classes
    if labels is None:
        if head["classes"] != len(classes):
            raise AdapterError(
                f"{where}: has {head['classes']} classes without names, {task.name} has "
                f"{len(classes)}: {listing(classes)}. Give the images that it was made for."
            )
        return list(range(len(classes)))
    strange = [name for name in classes if name not in labels]
    missing = [name for name in labels if name not in classes]
    if strange or missing:
        told = [
            f"{what} {listing(names)}"
            for what, names in (("the adapter lacks", strange), (f"{task.name} lacks", missing))
            if names
        ]
        raise AdapterError(
            f"{where}: its classes are not those of {task.name}: {'; '.join(told)}. Name the "
            "classes as its labels, and give images of all of them."
        )
    return [labels.index(name) for name in classes]


def _relabelled(split: Split, numbers: Sequence[int]) -> Split:
    from ..data import Split

    return Split(split.paths, tuple(numbers[label] for label in split.labels), split.images)


def _load(
    adapter: Adapter, name: str | None, weights: Path | None, offline: bool
) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    """Return the backbone with its adapter, and the transform of images that the adapter names."""
    from ..data import Transform
    from ..hub import load_backbone_with_adapter
    from ..preprocessing import to_batch
    from .local import from_weights, need_name

    if weights is not None:
        return from_weights(_CALL, adapter, name, weights)
    need_name(_CALL, adapter, name)
    network, processor = load_backbone_with_adapter(
        adapter.path, backbone=name, local_files_only=offline
    )
    images = adapter.metadata["preprocessing"]
    if images is None:
        return network, lambda image: to_batch(processor, [image])[0]
    return network, Transform(images, "timm", train=False)
