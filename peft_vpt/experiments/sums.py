"""Checksums of what a result depends on: the images of a task, a file of weights."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..backbones.anatomy import is_below
from ..backbones.find import encoder_for
from ..data import Split, Task
from ..data.reading import each
from ..errors import VPTError

_CHUNK = 1 << 24
# By path, size and time of files, so that every run of a comparison may ask.
_known: dict[tuple[str, int, int], str] = {}


def file_sum(path: str | Path) -> str:
    """Return size and checksum of a file.

    Raises:
        VPTError: It cannot be read.
    """
    try:
        state = os.stat(path)
        key = str(path), state.st_size, state.st_mtime_ns
        if key not in _known:
            total = 0
            with open(path, "rb") as file:
                while chunk := file.read(_CHUNK):
                    total = zlib.crc32(chunk, total)
            _known[key] = f"{state.st_size} {total:08x}"
    except OSError as error:
        told = f"cannot be read: {error}"
        raise VPTError("file_sum", told, "replace it, or leave it out", path=path) from error
    return _known[key]


def model_sum(model: nn.Module) -> str:
    """Return number and checksum of the values of a bare backbone, its classifier left out.

    A classifier that a checkpoint lacks is drawn anew whenever the model is built.
    """
    encoder = encoder_for(model, "pad")
    total, count = 0, 0
    for name, tensor in sorted(model.state_dict().items()):
        if not is_below(name, *encoder.head_paths):
            raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            total = zlib.crc32(raw.numpy().data, zlib.crc32(name.encode(), total))
            count += tensor.numel()
    return f"{count} values, sum {total:08x}"


def text_sum(rows: Sequence[str]) -> str:
    """Return number and checksum of lines of text."""
    text = "\n".join(rows)
    return f"{len(rows)}, sum {zlib.crc32(text.encode(errors='surrogatepass')):08x}"


def split_sum(split: Split) -> str:
    """Return what tells a split from every other one.

    That is place, bytes and label of each image; the place is relative to the folder that all have
    in common, so that a folder may be moved. Images without a file count by their pixels.

    Raises:
        VPTError: An image cannot be read.
    """
    root = os.path.commonpath([os.path.dirname(path) for path in split.paths] or [""])
    places = [f"{Path(path).relative_to(root).as_posix()}\t" for path in split.paths]
    rows = zip(places or [""] * len(split), image_marks(split), split.labels, strict=True)
    return text_sum([f"{place}{mark}\t{label}" for place, mark, label in rows])


def image_marks(split: Split) -> list[str]:
    """Return what tells each image of a split from others, wherever it is and whatever its label.

    Raises:
        VPTError: An image cannot be read.
    """

    def mark(index: int) -> str:
        return _pixels(split, index) if split.images is not None else file_sum(split.paths[index])

    return each(mark, split, False)


def image_sums(task: Task, names: Iterable[str]) -> dict[str, str]:
    """Return `split_sum` by split; "trainval" stands for train and val.

    Raises:
        VPTError: The task lacks a split, or an image cannot be read.
    """
    return {part: split_sum(task.split(part)) for part in parts(task, names)}


def parts(task: Task, names: Iterable[str]) -> list[str]:
    """Return the splits behind names, each once: "trainval" stands for train and val."""
    both = [name for name in ("train", "val") if name in task.splits]
    found = [part for name in names for part in (both if name == "trainval" else [name])]
    return list(dict.fromkeys(found))


def _pixels(split: Split, index: int) -> str:
    if isinstance(split.images, torch.Tensor):
        pixels: Any = split.images[index].contiguous().flatten().view(torch.uint8).numpy()
        return f"{tuple(split.images[index].shape)} {zlib.crc32(pixels.data):08x}"
    image = split.image(index)
    return f"{image.size} {zlib.crc32(image.tobytes()):08x}"
