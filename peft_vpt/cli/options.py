"""What the commands that train or measure share: their options, and backbones by name."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SpecError, VPTError, cut, listing
from .output import CALL, complain

if TYPE_CHECKING:
    from torch import nn

    from ..data import Split, Task


LENGTH = 20
Data = Annotated[
    str,
    typer.Option(
        metavar="FOLDER", help="Images: class folders, VTAB-1k lists, FGVC json, hf:NAME."
    ),
]
Model = Annotated[str, typer.Option(metavar="NAME", help="timm name, or Hub id of a model.")]
Weights = Annotated[Path | None, typer.Option(help="Local safetensors weights of a timm model.")]
Size = Annotated[
    int | None, typer.Option(min=16, help="Edge of the images; default: the backbone's.")
]
SkipBroken = Annotated[
    bool, typer.Option("--skip-broken", help="Leave out images that cannot be read.")
]
ProtocolName = Annotated[
    str, typer.Option(metavar="NAME", help="What trains: vpt-deep, linear, bias, full ...")
]
Epochs = Annotated[
    int | None, typer.Option(min=1, help="Default: the preset's, 100 for most backbones.")
]
Length = Annotated[int | None, typer.Option(min=1, help="Prompts per block; default: 20.")]
Reduction = Annotated[int | None, typer.Option(min=1, help="Of the protocol adapter; default: 8.")]
Workers = Annotated[
    int | None,
    typer.Option(min=0, help="Processes that read images; default: 4 with a GPU, else 0."),
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Images per step; default: the preset's.")
]


class Preset(str, Enum):
    """Kinds of recipes."""

    default = "default"
    paper = "paper"


class First(str, Enum):
    """First values of prompts."""

    random = "random"
    tokens = "tokens"


FirstValues = Annotated[
    First | None,
    typer.Option(
        help="Prompts begin at random, as in the paper, or as tokens of training images; default: "
        "tokens with the default preset, where the backbone has them."
    ),
]


def begins_as_tokens(init: First | None, usual: bool, protocols: Sequence[str]) -> bool:
    """Tell whether prompts are to begin as tokens, if the backbone has them.

    Args:
        init: What the user has chosen.
        usual: Whether they do where nothing is chosen.
        protocols: What trains.

    Raises:
        BadParameter: Something was chosen, and none of them trains prompts.
    """
    from ..protocols.options import Protocol

    if any(Protocol(name).trains_prompts for name in protocols):
        return usual if init is None else init is First.tokens
    if init is not None:
        raise typer.BadParameter(
            f"{', '.join(protocols)}: no prompts train there; leave it out", param_hint="--init"
        )
    return False


def build(
    name: str, weights: Path | None, size: int | tuple[int, int] | None, offline: bool
) -> nn.Module:
    """Build a bare backbone by its name, in eval mode.

    Args:
        name: timm name, `timm/...`, `hf-hub:...`, or Hub id of a transformers model.
        weights: Local safetensors weights of a timm model, in place of the published ones.
        size: Edge of its images, or height and width.
        offline: Take Hub files from the cache only.

    Raises:
        VPTError: It cannot be had.
    """
    from ..hub.backbone import build_backbone

    given = True if weights is None else weights
    return build_backbone(None, name, weights=given, image_size=size, local_files_only=offline)


def preprocessing_of(model: Any, offline: bool = False) -> Any:
    """Return how a backbone wants its images: plain values, or a transformers image processor.

    Raises:
        VPTError: It does not say.
    """
    from ..adapter.source import hub_errors
    from ..backbones.identity import describe_timm_config

    config = getattr(model, "pretrained_cfg", None)
    if config:
        centred = {**config, "crop_mode": "center"}
        return describe_timm_config(config) or describe_timm_config(centred)
    import transformers

    auto: Any = transformers.AutoImageProcessor
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        raise VPTError(CALL, "the model does not say how its images are prepared")
    with hub_errors(CALL, f"{name}, its image processor"):
        return auto.from_pretrained(name, trust_remote_code=False, local_files_only=offline)


def need_size(model: Any, size: Sequence[int]) -> None:
    """Raise unless a model takes images of a height and width.

    Raises:
        VPTError: It does not.
    """
    import torch

    from ..rehearsal import rehearse

    height, width = size
    error = rehearse(model, [torch.zeros(1, 3, height, width)], hooks=True).error
    if error is not None:
        raise VPTError(
            CALL,
            f"{type(model).__name__} does not take images of {height}x{width} pixels ({error})",
            "leave --size out, or give one that it takes",
        ) from error


def protocol_options(protocol: str, length: int | None, reduction: int | None) -> dict[str, Any]:
    """Return the options of a protocol, of those that it has.

    Raises:
        SpecError: An unknown protocol, or an option of another one.
    """
    from ..protocols.options import PROMPTED, Protocol

    chosen = Protocol(protocol, reduction=reduction)
    if chosen.prompted:
        return {"length": LENGTH if length is None else length}
    if length is not None:
        raise SpecError(
            CALL,
            f"--length is a number of prompts, and {protocol} has none",
            f"it is for {', '.join(PROMPTED)}",
        )
    return {} if chosen.reduction is None else {"reduction": chosen.reduction}


def need_packages(*names: str) -> None:
    """Raise unless packages are installed.

    Raises:
        VPTError: Some are not.
    """
    absent = [name for name in names if find_spec(name) is None]
    if absent:
        raise VPTError(CALL, f"needs {', '.join(absent)}", "pip install peft-vpt[train]")


def need_folder(folder: Path) -> Path:
    """Return a folder that can be made and written to; nothing is made yet.

    Raises:
        VPTError: It cannot.
    """
    spot = folder.expanduser().absolute()
    while not os.path.lexists(spot):
        spot = spot.parent
    reason = "" if spot.is_dir() else f"{spot} is no folder"
    if not reason and not os.access(spot, os.W_OK | os.X_OK):
        reason = f"{spot} may not be written to"
    if reason:
        raise VPTError(CALL, reason, "give another folder", given={"output": folder})
    return folder.expanduser()


def need_outside(folder: Path, data: str, task: Task) -> None:
    """Raise where files of a run would become classes or images of its task.

    Raises:
        VPTError: The folder is that of the classes, or lies in it.
    """
    from ..data.layouts import FLAT, SPLIT
    from ..data.splits import split_of

    spot, root = folder.resolve(), Path(data).expanduser().resolve()
    if task.layout not in (FLAT, SPLIT) or root not in (spot, *spot.parents):
        return
    parts = spot.relative_to(root).parts
    hidden = any(part.startswith(".") for part in parts)
    if not hidden and (task.layout == FLAT or (parts and split_of(parts[0]))):
        raise VPTError(
            CALL,
            f"lies among the images of {data}, and what is written there would be taken for a "
            "class or images of it",
            "give a folder outside",
            given={"output": folder},
        )


def metric_lines(metrics: Mapping[str, float]) -> dict[str, str]:
    """Return metrics as facts to write."""
    return {name: f"{value:.4f}" for name, value in metrics.items()}


def numbers(text: str, option: str) -> list[float]:
    """Return numbers that are separated by commas.

    Raises:
        BadParameter: They are none.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError as error:
        reason = f"{text!r}: numbers separated by commas"
        raise typer.BadParameter(reason, param_hint=option) from error
    return found


def counts(text: str, option: str) -> list[int]:
    """Return whole numbers from 1 up that are separated by commas.

    Raises:
        BadParameter: They are none.
    """
    found = numbers(text, option)
    if not all(number.is_integer() and number >= 1 for number in found):
        reason = f"{text!r}: whole numbers from 1 up, separated by commas"
        raise typer.BadParameter(reason, param_hint=option)
    return [int(number) for number in found]


Broken = dict[str, dict[int, str]]
Tell = Callable[[str], None]
_PARTS = {"trainval": ("train", "val"), "all": ("train", "val", "test")}


def parts_of(task: Task, *names: str) -> list[str]:
    """Return the splits of a task that stand behind names, "trainval" and "all" among them.

    Raises:
        VPTError: The task lacks one; "all" is what is there.
    """
    found: dict[str, None] = {}
    for name in names:
        for part in _PARTS.get(name, (name,)):
            if name != "all":
                task.split(part)
            found |= {part: None} if part in task.splits else {}
    return list(found)


def open_images(data: str, *names: str, tell: Tell = complain, **options: Any) -> Task:
    """Open a task that has the splits that are named, and tell of it.

    Args:
        data: As in `open_task`.
        names: Of splits.
        tell: Takes what there is to tell.
        options: Of `open_task`. Not the seed: all commands have to cut splits alike, or one would
            measure on images that another one trained on.

    Raises:
        VPTError: There is no task, it lacks a split, or it has one class to train on.
    """
    from ..data import open_task

    if not data:
        raise VPTError(CALL, "it is empty", "give a folder of images", given={"data": ...})
    task = open_task(data, **options)
    parts_of(task, *names)
    trained = next((name for name in ("trainval", "train") if name in names), None)
    labels = sorted(set(task.split(trained).labels)) if trained else []
    if len(labels) == 1:
        raise VPTError(
            CALL,
            f"{trained} has one class only, {task.classes[labels[0]]}; there is nothing to tell "
            "apart",
            "Give a folder with a folder per class",
            path=data,
        )
    tell(task.describe())
    return task


def open_three(
    data: str, output: Path, skip: bool, tell: Tell = complain, fraction: float = 1.0
) -> Task:
    """Return a task of images that can all be read, among which nothing will be written."""
    names = ("train", "val", "test")
    task = open_images(data, *names, tell=tell, fraction=fraction)
    need_outside(output, data, task)
    task = without_broken(task, find_broken(task, names), skip, tell)
    tell_copies(task, ["train"], ["val", "test"], tell)
    tell_copies(task, ["val"], ["test"], tell)
    return task


def split_of(task: Task, name: str) -> Split:
    """Return a split, or several joined: "trainval", "all"."""
    first, *rest = (task.split(part) for part in parts_of(task, name))
    for other in rest:
        first = first.joined(other)
    return first


def find_broken(task: Task, names: Iterable[str]) -> Broken:
    """Read every image of splits, and return which ones cannot be read, and why."""
    found = {name: task.split(name).broken() for name in names}
    return {name: indices for name, indices in found.items() if indices}


def without_broken(
    task: Task, broken: Mapping[str, dict[int, str]], skip: bool, tell: Tell = complain
) -> Task:
    """Return a task without its broken images, which are listed on stderr.

    Raises:
        VPTError: There are some and `skip` is False, or a split or a class of train has no others.
    """
    if not broken:
        return task
    number = sum(map(len, broken.values()))
    for name, reasons in broken.items():
        for index, reason in reasons.items():
            where = task.split(name).where(index)
            tell(f"cannot be read: {name}, {where}: {cut(reason, 200)}")
    if not skip:
        raise VPTError(
            CALL,
            f"{number} of the images cannot be read",
            "replace them, or leave them out by --skip-broken",
        )
    rest = {name: _rest(split, broken.get(name, ())) for name, split in task.splits.items()}
    if "train" in broken:
        lost = sorted(set(task.split("train").labels) - set(rest["train"].labels))
        if lost:
            raise VPTError(
                CALL,
                f"no image of {listing([task.classes[i] for i in lost])} in train can be read",
                "replace some, or take the class out of every split",
            )
    tell(f"left out: {number} of the images")
    return dataclasses.replace(task, splits=rest)


def tell_copies(task: Task, seen: Iterable[str], measured: Iterable[str], tell: Tell) -> None:
    """Say how many images that results are measured on are among those that are trained on.

    Args:
        task: Of images that can be read.
        seen: Splits that are trained on.
        measured: Splits that are measured on.
        tell: Takes what there is to tell.
    """
    from ..experiments.sums import image_marks

    known = {mark: name for name in seen for mark in image_marks(task.split(name))}
    for name in measured:
        marks = image_marks(task.split(name))
        copies = [known[mark] for mark in marks if mark in known]
        if copies:
            tell(
                f"note: {len(copies)} of the {len(marks)} images of {name} are in "
                f"{' and '.join(sorted(set(copies)))} too, byte for byte; what is measured on "
                "them says little of new images"
            )


def describe_images(
    task: Task, names: Iterable[str], sums: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return what a result depends on: checksums of classes, and of images and labels per split.

    Args:
        task: The task.
        names: Of splits.
        sums: Of `image_sums`, where they are known.

    Raises:
        VPTError: An image cannot be read.
    """
    from ..experiments.sums import image_sums, text_sum

    return {
        "task": task.name,
        "classes": text_sum(task.classes),
        "images": image_sums(task, names) if sums is None else dict(sums),
    }


def _rest(split: Split, broken: Iterable[int]) -> Split:
    left = set(broken)
    return split.subset(i for i in range(len(split)) if i not in left) if left else split
