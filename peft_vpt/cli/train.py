"""`train`: a task adapter from a folder of images."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import Json, Offline, quiet_stdout, write_facts, write_json
from .run import CALL, Plan, need_place, work
from .sources import (
    BatchSize,
    Data,
    Epochs,
    FirstValues,
    Length,
    Model,
    Preset,
    ProtocolName,
    Reduction,
    Size,
    SkipBroken,
    Weights,
    Workers,
    begins_as_tokens,
    metric_lines,
    need_folder,
    need_packages,
    protocol_options,
)


class Part(str, Enum):
    """What is trained on."""

    train = "train"
    trainval = "trainval"


class Measured(str, Enum):
    """What is evaluated at the end."""

    val = "val"
    test = "test"
    none = "none"


class Kind(str, Enum):
    """How images become pixels."""

    vtab = "vtab"
    fgvc = "fgvc"
    timm = "timm"


class Precision(str, Enum):
    """Numbers that a forward pass computes with."""

    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


def train(
    data: Data,
    model: Model,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="For adapter and checkpoint.")],
    weights: Weights = None,
    protocol: ProtocolName = "vpt-deep",
    length: Length = None,
    reduction: Reduction = None,
    size: Size = None,
    epochs: Epochs = None,
    preset: Annotated[Preset, typer.Option(help="Recipe to begin with.")] = Preset.default,
    init: FirstValues = None,
    lr: Annotated[
        float | None, typer.Option(help="Rate for a batch of 256; default: the preset's.")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Default: the preset's.")] = None,
    batch_size: BatchSize = None,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts, head, order and dropout.")] = 0,
    split: Annotated[Part, typer.Option(help="Images to train on.")] = Part.train,
    evaluate: Annotated[
        Measured | None,
        typer.Option(help="Images to measure on; default: val, or none with --split trainval."),
    ] = None,
    transform: Annotated[
        Kind, typer.Option(help="vtab, timm: no augmentation; fgvc: random crop and flip.")
    ] = Kind.vtab,
    fraction: Annotated[float, typer.Option(help="Share of the training images to use.")] = 1.0,
    checkpoint_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints; default: an epoch.")
    ] = None,
    mixed_precision: Annotated[
        Precision | None, typer.Option(help="Default: as accelerate launch says, else no.")
    ] = None,
    workers: Workers = None,
    skip_broken: SkipBroken = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start over where there is a run in the folder.")
    ] = False,
    task: Annotated[
        str | None, typer.Option(help="Name of the task; default: the folder's.")
    ] = None,
    as_json: Json = False,
    offline: Offline = False,
) -> None:
    """Train prompts, or what another protocol trains, on a folder of images; save the adapter.

    Every image is read once before training begins. A run that was stopped goes on by the same
    command. In several processes: accelerate launch -m peft_vpt train ...
    """
    need_packages(CALL, "accelerate", "timm")
    plan = Plan(
        data=data,
        model=model,
        weights=weights,
        size=size,
        offline=offline,
        protocol=protocol,
        options=protocol_options(CALL, protocol, length, reduction),
        tokens=begins_as_tokens(init, preset is Preset.default, [protocol]),
        asked=init is not None,
        output=need_folder(CALL, output),
        split=split.value,
        measured=_measured(split, evaluate),
        transform=transform.value,
        fraction=fraction,
        task=task,
        skip_broken=skip_broken,
        workers=workers,
        checkpoint_every=checkpoint_every,
        mixed_precision=None if mixed_precision is None else mixed_precision.value,
        restart=restart,
    )
    changes = {"base_lr": lr, "weight_decay": weight_decay, "batch_size": batch_size}
    recipe = plan.recipe(preset.value, {**changes, "epochs": epochs, "seed": seed})
    need_place(plan)
    with quiet_stdout():
        found = work(plan, recipe)
    if found is not None:
        write_json(found) if as_json else write_facts(_facts(found))


def _measured(split: Part, evaluate: Measured | None) -> str:
    if split is Part.trainval and evaluate is Measured.val:
        raise typer.BadParameter(
            "val is among the training images of --split trainval", param_hint="--evaluate"
        )
    usual = Measured.val if split is Part.train else Measured.none
    return (evaluate or usual).value


def _facts(found: dict[str, Any]) -> dict[str, str]:
    from rich.filesize import decimal

    measured = {} if found["split"] is None else {"measured on": found["split"]}
    return {
        "adapter": found["adapter"],
        "trained": f"{found['trainable']:,} of {found['total']:,} parameters",
        "file": decimal(found["bytes"]),
        **measured,
        **metric_lines(found["metrics"]),
    }
