"""`predict` and `eval`: an adapter and the backbone that it names, on images."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import AdapterError, VPTError, listing
from .adapters import find, need_classes
from .options import (
    Data,
    SkipBroken,
    Weights,
    build,
    find_broken,
    metric_lines,
    open_images,
    parts_of,
    preprocessing_of,
    split_of,
    without_broken,
)
from .output import (
    CALL,
    Json,
    Offline,
    Revision,
    Source,
    complain,
    in_the_shell,
    plain,
    quiet_stdout,
    write_facts,
    write_json,
)

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress
    from torch import Tensor, nn

    from ..adapter.file import Adapter
    from ..data import Split, Task, Transform


_COLUMNS = ("file", "label", "probability")
Best = list[dict[str, Any]]


def predict(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGES", help="Files and folders.", show_default=False),
    ],
    adapter: Annotated[
        str, typer.Option(metavar="FILE|FOLDER|HUB_ID", help="A task adapter with a head.")
    ],
    as_json: Json = False,
    top_k: Annotated[int, typer.Option(min=1, help="Classes per image.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 16,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: a GPU if there is one.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Backbone to use in place of the one in the adapter."),
    ] = None,
    weights: Weights = None,
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Classify images: a table of file, label and probability, or a line of JSON per image.

    Probabilities are the softmax over the adapter's classes. A table that is not for a terminal
    has its columns separated by tabs. An image that cannot be read is named on stderr, the others
    are classified, and the exit code is 1.
    """
    place = find_device(device)
    paths, failed = _expand(images)
    total = len(paths) + failed
    if paths:
        found = find(adapter, revision, offline)
        need_classes(found)
        with quiet_stdout():
            network, preprocess = model_of(found, model, weights, offline)
        labels = found.metadata["head"]["labels"]
        classifier = _Classifier(network.to(place), preprocess, labels, place, top_k)
        failed += _write(classifier, paths, batch_size, as_json)
    if failed:
        complain(f"{failed} of {total} could not be predicted")
        raise typer.Exit(1)


def _expand(names: Sequence[str]) -> tuple[list[str], int]:
    """Return the files behind names of files and folders, each once, and how many led to none."""
    found: dict[str, None] = {}
    missing = 0
    for name in names:
        try:
            files = _images_in(name) if os.path.isdir(name) else [name]
        except VPTError as error:
            missing += 1
            complain(in_the_shell(error))
            continue
        if not (files and os.path.exists(name)):
            missing += 1
            complain(f"{plain(name)}: no such file, or a folder without images")
            continue
        found |= dict.fromkeys(files)
    return list(found), missing


def _images_in(folder: str) -> list[str]:
    """Return the images under a folder, by paths that begin as the folder was written."""
    from ..data.layouts import files_under

    root = os.path.abspath(folder)
    found = files_under(Path(folder), CALL).images
    # Pipes would be waited for; links that lead nowhere are told of when they are read.
    files = [path for path in found if os.path.isfile(path) or not os.path.exists(path)]
    return [os.path.join(folder, os.path.relpath(path, root)) for path in files]


@dataclass
class _Classifier:
    """A model with its adapter, and what is needed to run and read it."""

    model: Any
    preprocess: Any
    labels: list[str] | None
    device: torch.device
    top: int

    def rows(self, paths: Sequence[str], batch_size: int) -> Iterator[tuple[str, Best | None]]:
        """Yield the best classes of every image in order, None where it could not be read."""
        images = ((path, self._pixels(path)) for path in paths)
        while batch := list(islice(images, batch_size)):
            read = [pixels for _, pixels in batch if pixels is not None]
            found = iter(self._classify(read) if read else ())
            for path, pixels in batch:
                yield path, None if pixels is None else next(found)

    def _pixels(self, path: str) -> Tensor | None:
        from ..preprocessing import load_image, to_batch

        try:
            return to_batch(self.preprocess, [load_image(path)])
        except Exception as error:
            # PIL and its decoders raise anything; one image never stops the others.
            name = plain(path)
            complain(f"{name}: cannot be read as an image: {type(error).__name__}: {error}")
            return None

    def _classify(self, pixels: list[Tensor]) -> list[Best]:
        import torch

        from ..backbones.anatomy import first_floating
        from ..preprocessing import output_logits

        dtype = first_floating(self.model).dtype
        with torch.inference_mode():
            logits = output_logits(self.model(torch.cat(pixels).to(self.device, dtype)), CALL)
            best = logits.double().softmax(-1).topk(min(self.top, logits.shape[-1]))
        return [
            [
                {"index": i, "label": self.labels[i] if self.labels else None, "probability": p}
                for i, p in zip(indices, values, strict=True)
            ]
            for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


def _write(classifier: _Classifier, paths: list[str], batch_size: int, as_json: bool) -> int:
    """Write what is predicted as it comes, a table for a terminal at the end.

    Returns:
        How many images could not be read.
    """
    to_terminal, failed = sys.stdout.isatty(), 0
    table: list[tuple[str, ...]] = []
    if not (as_json or to_terminal):
        print("\t".join(_COLUMNS))
    # A bar and lines on one terminal would write over each other.
    with progress_bar(shown=not (as_json and to_terminal)) as bar:
        rows = classifier.rows(paths, batch_size)
        for path, best in bar.track(rows, total=len(paths), description="images"):
            if best is None:
                failed += 1
            elif as_json:
                write_json({"file": path, "predictions": best})
            elif to_terminal:
                table += _cells(path, best)
            else:
                print(*map("\t".join, _cells(path, best)), sep="\n")
    if table:
        _write_table(table)
    return failed


def _cells(path: str, best: Best) -> list[tuple[str, ...]]:
    return [
        (plain(path), plain(row["label"] or str(row["index"])), f"{row['probability']:.4f}")
        for row in best
    ]


def _write_table(rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in _COLUMNS:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


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
    from ..data import Transform, loader
    from ..training import evaluate as measure

    place = find_device(device)
    adapter = find(source, revision, offline)
    need_classes(adapter)
    with quiet_stdout():
        task = open_images(data, split.value)
        numbers = _numbers(adapter, task)
        names = parts_of(task, split.value)
        task = without_broken(task, find_broken(task, names), skip_broken)
        images = _relabelled(split_of(task, split.value), numbers)
        network, preprocess = model_of(adapter, model, weights, offline)
        prepare = adapter.metadata["preprocessing"]
        transform: Any = partial(_pixels, preprocess)
        transform = Transform(prepare, "timm", train=False) if prepare else transform
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
    head, classes = adapter.metadata["head"], task.classes
    labels = head["labels"]
    if labels is None:
        if head["classes"] != len(classes):
            raise AdapterError(
                CALL,
                f"has {head['classes']} classes without names, {task.name} has {len(classes)}: "
                f"{listing(classes)}",
                "Give the images that it was made for",
                path=adapter.path,
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
            CALL,
            f"its classes are not those of {task.name}: {'; '.join(told)}",
            "Name the classes as its labels, and give images of all of them",
            path=adapter.path,
        )
    return [labels.index(name) for name in classes]


def _relabelled(split: Split, numbers: Sequence[int]) -> Split:
    from ..data import Split

    return Split(split.paths, tuple(numbers[label] for label in split.labels), split.images)


def _pixels(preprocess: Any, image: Any) -> Tensor:
    from ..preprocessing import to_batch

    return to_batch(preprocess, [image])[0]


def model_of(adapter: Adapter, name: str | None, weights: Path | None, offline: bool) -> Any:
    """Return the backbone with its adapter, and what prepares its images.

    Raises:
        AdapterError: Neither the adapter nor the caller says which backbone it is.
    """
    from ..hub.verbs import load_backbone_with_adapter

    if weights is not None:
        return from_weights(adapter, name, weights)
    made_for = adapter.metadata["backbone"]
    if name is None and made_for["hub_id"] is None:
        raise AdapterError(
            CALL,
            f"does not say where its backbone ({made_for['library']} {made_for['architecture']}) "
            "comes from",
            "give --model NAME, and --weights FILE for weights of a timm model that are in a file",
            path=adapter.path,
        )
    return load_backbone_with_adapter(adapter.path, backbone=name, local_files_only=offline)


def from_weights(adapter: Adapter, name: str | None, weights: Path) -> tuple[nn.Module, Transform]:
    """Return a timm backbone with an adapter, its weights from a file, and its transform of images.

    Raises:
        VPTError: The adapter is of another library, or does not fit.
    """
    from ..adapter.verbs import load_task_adapter
    from ..backbones.find import says_its_size
    from ..data import Transform, eval_transform
    from ..hub.backbone import match_head

    made_for, images = adapter.metadata["backbone"], adapter.metadata["preprocessing"] or {}
    if made_for["library"] != "timm":
        raise AdapterError(
            CALL,
            f"was made for a {made_for['library']} model, and --weights is a file of a timm "
            "model's weights",
            "give --model NAME alone",
            path=adapter.path,
        )
    # The name on the Hub says more than the architecture: the size of images, say.
    named = made_for["hub_id"] or ""
    known = named if named.startswith("timm/") else made_for["architecture"]
    size = images.get("size")
    padded = adapter.spec.where.moves_image
    edges = None if size is None or padded else (size[0], size[1])
    network = build(name or known, weights, edges, True)
    match_head(network, adapter)
    network = says_its_size(network, size) if size else network
    load_task_adapter(network, adapter.path)
    if images:
        return network, Transform(images, "timm", train=False)
    return network, eval_transform(preprocessing_of(network), kind="timm")


def find_device(name: str | None) -> torch.device:
    """Return the device of an option, the best one where it was left out.

    Raises:
        BadParameter: torch has none of that name.
    """
    import torch

    if name is None:
        best = "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device("cuda" if torch.cuda.is_available() else best)
    try:
        found = torch.empty(0, device=name)
        if found.is_meta:
            raise RuntimeError("it holds no values")
        return found.device
    # What torch raises for a device that is not there depends on the device.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = f"{name!r} is no device that torch has here"
        raise typer.BadParameter(reason, param_hint="--device") from error


def progress_bar(shown: bool) -> Progress:
    """Return a bar on stderr; it is silent where that is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    hidden = not (shown and console.is_terminal)
    # It would send stdout to stderr otherwise.
    return Progress(console=console, disable=hidden, redirect_stdout=False)
