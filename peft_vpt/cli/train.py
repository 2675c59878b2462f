"""`train`: a task adapter from a folder of images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import VPTError
from .options import (
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
    Tell,
    Weights,
    Workers,
    begins_as_tokens,
    build,
    describe_images,
    find_broken,
    metric_lines,
    need_folder,
    need_outside,
    need_packages,
    need_size,
    open_images,
    parts_of,
    preprocessing_of,
    protocol_options,
    split_of,
    tell_copies,
    without_broken,
)
from .output import (
    CALL,
    Json,
    Offline,
    complain,
    in_the_shell,
    quiet_stdout,
    write_facts,
    write_json,
)

if TYPE_CHECKING:
    from torch import nn

    from ..data import Task
    from ..training import Recipe


class Kind(str, Enum):
    """How images become pixels."""

    vtab = "vtab"
    fgvc = "fgvc"
    timm = "timm"


class Part(str, Enum):
    """What is trained on."""

    train = "train"
    trainval = "trainval"


class Measured(str, Enum):
    """What is evaluated at the end."""

    val = "val"
    test = "test"
    none = "none"


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
    need_packages("accelerate", "sklearn", "timm")
    plan = Plan(
        data=data,
        model=model,
        weights=weights,
        size=size,
        offline=offline,
        protocol=protocol,
        options=protocol_options(protocol, length, reduction),
        tokens=begins_as_tokens(init, preset is Preset.default, [protocol]),
        asked=init is not None,
        output=need_folder(output),
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


_EVALUATION_BATCH = 64
_READERS = 4


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `train` was asked for, in the words of its options.

    `measured` is `--evaluate`, `tokens` and `asked` are of `--init`.
    """

    data: str
    model: str
    weights: Path | None
    size: int | None
    offline: bool
    protocol: str
    options: dict[str, Any]
    tokens: bool
    asked: bool
    output: Path
    split: str
    measured: str
    transform: str
    fraction: float
    task: str | None
    skip_broken: bool
    workers: int | None
    checkpoint_every: int | None
    mixed_precision: str | None
    restart: bool

    def recipe(self, kind: str, changes: dict[str, Any]) -> Recipe:
        """Return a preset with those fields changed that are not None."""
        from ..training import preset

        given = {name: value for name, value in changes.items() if value is not None}
        length = self.options.get("length")
        return preset(self.protocol, backbone=self.model, kind=kind, length=length, **given)

    def batches(self, task: Task, name: str, transform: Any, size: int, **options: Any) -> Any:
        """Return a loader over a split whose images have been read already."""
        import torch

        from ..data import loader

        workers = _READERS if torch.cuda.is_available() else 0
        return loader(
            split_of(task, name), transform, batch_size=size, check=False,
            workers=workers if self.workers is None else self.workers, **options,
        )  # fmt: skip


def need_place(plan: Plan) -> None:
    """Raise where an adapter would be replaced that is of no run in this folder.

    Raises:
        VPTError: There is one.
    """
    from ..adapter.file import FILE_NAME
    from ..training.checkpoint import CHECKPOINT

    file = plan.output / FILE_NAME
    if file.exists() and not ((plan.output / CHECKPOINT).exists() or plan.restart):
        raise VPTError(
            CALL,
            f"{file} is there already, without the checkpoint of its run",
            "give another --output, or --restart to replace it",
        )


def work(plan: Plan, recipe: Recipe) -> dict[str, Any] | None:
    """Train, measure and save; return what it came to, None in all processes but the main one."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    from ..experiments.run import fitted

    # The flag of `accelerate launch`, which an Accelerator reads and a PartialState does not.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    tell: Tell = complain if state.is_main_process else lambda message: None
    task = _images(plan, state, tell)
    model, preprocessing = _model(plan, task, recipe.seed)
    tell(_transform(plan, preprocessing, train=True).describe())
    begin = _begin(plan, task, model.to(state.device), preprocessing, recipe.seed, tell)
    recipe = fitted(recipe, len(split_of(task, plan.split)), state.num_processes)
    metrics = _train(plan, recipe, task, model, preprocessing, begin, tell)
    found = _save(plan, task, model, preprocessing, metrics) if state.is_main_process else None
    if state.num_processes > 1:
        state.wait_for_everyone()
        state.destroy_process_group()
    return found


def _images(plan: Plan, state: Any, tell: Tell) -> Task:
    """Open the task; the main process reads every image that the run will use."""
    from accelerate.utils import broadcast_object_list

    wanted = [plan.split] if plan.measured == "none" else [plan.split, plan.measured]
    task = open_images(plan.data, *wanted, tell=tell, name=plan.task, fraction=plan.fraction)
    need_outside(plan.output, plan.data, task)
    names = parts_of(task, *wanted)
    broken = [find_broken(task, names) if state.is_main_process else {}]
    task = without_broken(task, broadcast_object_list(broken)[0], plan.skip_broken, tell)
    if state.is_main_process and plan.measured != "none":
        tell_copies(task, parts_of(task, plan.split), [plan.measured], tell)
    return task


def _model(plan: Plan, task: Task, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    import torch

    from ..backbones.find import says_its_size
    from ..data import preprocessing_for
    from ..protocols.apply import apply_protocol

    torch.manual_seed(seed)
    model = build(plan.model, plan.weights, plan.size, plan.offline)
    wanted = preprocessing_of(model, plan.offline)
    preprocessing = preprocessing_for(wanted, plan.transform, plan.size)
    need_size(model, preprocessing["size"])
    model = says_its_size(model, preprocessing["size"])
    generator = torch.Generator().manual_seed(seed)
    classes = len(task.classes)
    apply_protocol(model, plan.protocol, num_classes=classes, generator=generator, **plan.options)
    need_size(model.eval(), preprocessing["size"])
    return model, preprocessing


def _begin(
    plan: Plan,
    task: Task,
    model: nn.Module,
    preprocessing: dict[str, Any],
    seed: int,
    tell: Tell,
) -> dict[str, str]:
    """Let prompts begin as tokens of training images, if they can; return what tells the run so.

    Raises:
        VPTError: It was asked for, and they cannot.
    """
    import torch

    from ..training.from_tokens import begin_as_tokens

    if not plan.tokens:
        return {}
    split, still = split_of(task, plan.split), _transform(plan, preprocessing, train=False)
    generator = torch.Generator().manual_seed(seed)
    try:
        begin_as_tokens(model, lambda index: still(split.image(index)), len(split), generator)
    except VPTError as error:
        if plan.asked:
            raise type(error)(
                CALL, error.problem, error.advice, **error.facts | {"given": {"init": "tokens"}}
            ) from error
        tell(f"prompts begin at random: {in_the_shell(error)}")
        return {}
    return {"init": "tokens"}


def _transform(plan: Plan, preprocessing: dict[str, Any], *, train: bool) -> Any:
    from ..data import Transform

    return Transform(preprocessing, plan.transform, train=train)


def _train(
    plan: Plan,
    recipe: Recipe,
    task: Task,
    model: nn.Module,
    preprocessing: dict[str, Any],
    begin: dict[str, str],
    tell: Tell,
) -> dict[str, float]:
    """Fit the model, and return its metrics; none if none were asked for."""
    from ..training import evaluate, fit, loader_batch_size
    from ..training.batches import leaves_one
    from ..training.loop import new_accelerator

    batch = loader_batch_size(recipe)
    batches = plan.batches(
        task, plan.split, _transform(plan, preprocessing, train=True), batch,
        shuffle=True, seed=recipe.seed,
        drop_last=leaves_one(model, len(split_of(task, plan.split)), batch),
    )  # fmt: skip
    measured = None
    if plan.measured != "none":
        still = _transform(plan, preprocessing, train=False)
        measured = plan.batches(task, plan.measured, still, _EVALUATION_BATCH)
    with _in_words_of_options(plan.output, tell):
        fit(
            model,
            batches,
            measured if plan.measured == "val" else None,
            recipe=recipe,
            folder=plan.output,
            resume=not plan.restart,
            checkpoint_every=plan.checkpoint_every,
            mixed_precision=plan.mixed_precision,
            data=describe_images(task, parts_of(task, plan.split))
            | {"preprocessing": preprocessing, "transform": plan.transform}
            | begin,
        )
    # Anew: a run that was done before knows the images of that time; in the precision of `eval`.
    return {} if measured is None else evaluate(model, measured, new_accelerator("no"))


@contextmanager
def _in_words_of_options(output: Path, tell: Tell) -> Iterator[None]:
    """Say how a run goes on, or starts over, by an option of the command."""
    from ..training.checkpoint import CHECKPOINT

    if (output / CHECKPOINT).exists():
        tell(f"there is a checkpoint: {output / CHECKPOINT}")
    try:
        yield
    except KeyboardInterrupt:
        if (output / CHECKPOINT).exists():
            tell("stopped; the same command goes on from the last checkpoint")
        raise


def _save(
    plan: Plan,
    task: Task,
    model: nn.Module,
    preprocessing: dict[str, Any],
    metrics: dict[str, float],
) -> dict[str, Any]:
    from ..adapter.verbs import save_task_adapter
    from ..inject import count_parameters

    path = save_task_adapter(
        model,
        plan.output,
        task=task.name,
        labels=task.classes,
        preprocessing=preprocessing,
        metrics={"split": plan.measured, **metrics} if metrics else None,
    )
    counts = count_parameters(model)
    return {
        "adapter": str(path),
        "trainable": counts.trainable,
        "total": counts.total,
        "bytes": path.stat().st_size,
        "split": plan.measured if metrics else None,
        "metrics": metrics,
    }
