"""`compare`: protocols side by side on a user's own images."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import Offline, complain

if TYPE_CHECKING:
    from torch import nn


def compare(
    data: Annotated[
        str, typer.Option(metavar="FOLDER", help="Images: class folders, VTAB-1k lists, FGVC json.")
    ],
    model: Annotated[str, typer.Option(metavar="NAME", help="timm name, or Hub id of a model.")],
    output: Annotated[Path, typer.Option(help="Folder of records, adapters and report.")] = Path(
        "comparison"
    ),
    weights: Annotated[
        Path | None, typer.Option(help="Local safetensors weights of a timm model.")
    ] = None,
    protocols: Annotated[
        str | None, typer.Option(help="Separated by commas; default: the paper's main rows.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=16, help="Edge of the images; default: the backbone's.")
    ] = None,
    length: Annotated[int, typer.Option(min=1, help="Prompts per block.")] = 20,
    epochs: Annotated[int, typer.Option(min=1)] = 100,
    factors: Annotated[
        str, typer.Option(help="Multiples of the preset's rate, tried on val.")
    ] = "0.3,1,3",
    seeds: Annotated[int, typer.Option(min=1, help="Final runs per protocol.")] = 3,
    preset: Annotated[str, typer.Option(help="default or paper.")] = "default",
    group: Annotated[str | None, typer.Option(help="Of the task, for tables.")] = None,
    offline: Offline = False,
) -> None:
    """Compare prompts with their rivals on your images; print and save the table.

    Rates are chosen on val; final runs train on train and val, and see test once. A run that has a
    record is not run again, so a comparison that was stopped goes on.
    """
    from ..data import eval_transform, open_task
    from ..experiments.compare import PROTOCOLS, Plan, need_splits, write_report
    from ..experiments.compare import compare as work

    task = open_task(data)
    need_splits(task)
    build = partial(_build, model, weights, size, offline)
    transform = eval_transform(_preprocessing(build()), size)
    complain(f"{task.describe()}\n{transform.describe()}")
    names = tuple(protocols.split(",")) if protocols else PROTOCOLS
    prompted: dict[str, Any] = {n: {"length": length} for n in names if n.startswith("vpt")}
    plan = Plan(
        protocols=names,
        options=prompted,
        epochs=epochs,
        factors=tuple(_numbers(factors)),
        seeds=tuple(range(seeds)),
        kind=preset,
    )
    records = work(task, transform, build, backbone=model, folder=output, plan=plan, group=group)
    intro = (
        f"{model} on {task.name}: {epochs} epochs, preset {preset}, rates x {factors} chosen on "
        f"val, {seeds} seeds."
    )
    page = write_report(records, output, title=f"Comparison on {task.name}", intro=intro)
    print(page.read_text(encoding="utf-8"))
    complain(f"written: {page}")


def _build(name: str, weights: Path | None, size: int | None, offline: bool) -> nn.Module:
    from ..pretrained import build_backbone

    known = "/" not in name or name.startswith(("timm/", "hf-hub:"))
    edges = None if size is None else (size, size)
    if weights is None:
        return build_backbone(
            "timm" if known else "transformers", name, image_size=edges, local_files_only=offline
        )
    import timm

    sized: dict[str, Any] = {} if size is None else {"img_size": size}
    overlay = {"file": str(weights)}
    model: nn.Module = timm.create_model(
        name.removeprefix("timm/"), pretrained=True, pretrained_cfg_overlay=overlay, **sized
    )
    return model.eval()


def _preprocessing(model: Any) -> Any:
    from ..backbones.identity import describe_timm_config
    from ..errors import VPTError

    config = getattr(model, "pretrained_cfg", None)
    if config:
        return describe_timm_config({**config, "crop_mode": "center"})
    import transformers

    auto: Any = transformers.AutoImageProcessor
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        raise VPTError("peft-vpt compare: the model does not say how its images are prepared.")
    return auto.from_pretrained(name, trust_remote_code=False)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r}: numbers separated by commas", param_hint="--factors"
        ) from error
