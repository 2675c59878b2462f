"""`predict`: classify images with an adapter and the backbone that it names."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .files import find, need_classes
from .output import Json, Offline, Revision, complain, plain, quiet_stdout, write_json
from .sources import Weights

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress
    from torch import Tensor

_CALL = "peft-vpt predict"
_COLUMNS = ("file", "label", "probability")

Best = list[dict[str, Any]]


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

        from ..preprocessing import output_logits

        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        with torch.inference_mode():
            logits = output_logits(self.model(torch.cat(pixels).to(self.device, dtype)), _CALL)
            best = logits.double().softmax(-1).topk(min(self.top, logits.shape[-1]))
        return [
            [
                {"index": i, "label": self.labels[i] if self.labels else None, "probability": p}
                for i, p in zip(indices, values, strict=True)
            ]
            for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


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
        classifier = _load(adapter, model, weights, revision, offline, place, top_k)
        failed += _write(classifier, paths, batch_size, as_json)
    if failed:
        complain(f"{failed} of {total} could not be predicted")
        raise typer.Exit(1)


def _expand(names: Sequence[str]) -> tuple[list[str], int]:
    """Return the files behind names of files and folders, each once, and how many led to none."""
    from ..errors import VPTError

    found: dict[str, None] = {}
    missing = 0
    for name in names:
        try:
            files = _images_in(name) if os.path.isdir(name) else [name]
        except VPTError as error:
            missing += 1
            complain(str(error))
            continue
        if not (files and os.path.exists(name)):
            missing += 1
            complain(f"{plain(name)}: no such file, or a folder without images")
            continue
        found |= dict.fromkeys(files)
    return list(found), missing


def _images_in(folder: str) -> list[str]:
    """Return the images under a folder, by paths that begin as the folder was written."""
    from ..data.folders import files_under

    root = os.path.abspath(folder)
    found = files_under(Path(folder), _CALL).images
    # Pipes would be waited for; links that lead nowhere are told of when they are read.
    files = [path for path in found if os.path.isfile(path) or not os.path.exists(path)]
    return [os.path.join(folder, os.path.relpath(path, root)) for path in files]


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


def _load(
    source: str,
    backbone: str | None,
    weights: Path | None,
    revision: str | None,
    offline: bool,
    device: torch.device,
    top: int,
) -> _Classifier:
    from ..hub import load_backbone_with_adapter
    from .local import from_weights, need_name

    adapter = find(source, _CALL, revision, offline)
    head = adapter.metadata["head"]
    need_classes(adapter, _CALL)
    with quiet_stdout():
        if weights is not None:
            model, preprocess = from_weights(_CALL, adapter, backbone, weights)
        else:
            need_name(_CALL, adapter, backbone)
            model, preprocess = load_backbone_with_adapter(
                adapter.path, backbone=backbone, local_files_only=offline
            )
        model = model.to(device)
    return _Classifier(model, preprocess, head["labels"], device, top)


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


def progress_bar(shown: bool) -> Progress:
    """Return a bar on stderr; it is silent where that is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    hidden = not (shown and console.is_terminal)
    # It would send stdout to stderr otherwise.
    return Progress(console=console, disable=hidden, redirect_stdout=False)
