"""`fit`: the training loop, on accelerate."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..backbones.anatomy import first_floating
from ..checks import instance, integer, one_of, or_none
from ..errors import SpecError
from ..files import plain, write_lines
from ..randomness import derive
from .batches import check_last_batch, check_shown_labels, pair_of, shown_labels, training_loader
from .checkpoint import (
    Position,
    begin_folder,
    describe_machine,
    describe_model,
    library_versions,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
    trained_tensors,
)
from .health import DivergedError, LossWatch
from .losses import Loss, checksum_of
from .metrics import evaluate, forward_logits
from .optim import lr_factor, make_optimizer, set_rate, trains_backbone
from .recipes import Recipe


@dataclass(frozen=True)
class Result:
    """What `fit` returns.

    Args:
        history: A row per epoch: `epoch` (from 1), `step`, `lr_factor`, `train_loss`, `val` (the
            metrics of `evaluate`, or None), `seconds` since the start.
        best: The row with the highest top1 on val, the earliest of equals; None without val. The
            model is left as the last epoch left it.
        seconds: Time spent, over all sessions of a resumed run.
        config: The resolved configuration, as in `config.json`.
    """

    history: list[dict[str, Any]]
    best: dict[str, Any] | None
    seconds: float
    config: dict[str, Any]


def fit(
    model: nn.Module,
    train: Any,
    val: Any = None,
    *,
    recipe: Recipe,
    folder: str | Path | None = None,
    resume: bool = True,
    evaluate_every: int = 1,
    checkpoint_every: int | None = None,
    accumulation: int = 1,
    mixed_precision: str | None = None,
    data: Mapping[str, Any] | None = None,
    labels: Sequence[int] | None = None,
    accelerator: Any = None,
    progress: bool = True,
) -> Result:
    """Train what of a model requires gradients, in place, and leave the model in eval mode.

    Order, augmentation and dropout follow from the recipe's seed alone, so a run that was killed
    goes on to the same weights, on the same kind of machine to the bit. In several processes
    (`accelerate launch`) each one takes its share of every batch. `folder` is first written to
    behind the first step, so that what fails before it leaves nothing.

    Args:
        model: A prompted model, or any classifier of which something requires gradients.
        train: DataLoader of `(pixels, labels)`, or of mappings with `pixel_values` and `labels`,
            over a dataset with indices; labels are class numbers `(batch,)`, or shares of classes
            `(batch, classes)` as mixup makes them. Its batch size x processes x `accumulation`
            must be `recipe.batch_size`; see `loader_batch_size`.
        val: Batches to evaluate on, which can be gone through again and again, or None.
        recipe: Optimizer, schedule and loss.
        folder: Where `config.json`, `history.jsonl` and `checkpoint.pt` go; None: nowhere.
        resume: Go on from the checkpoint in `folder`; False: start over.
        evaluate_every: Epochs between evaluations; the last epoch is always evaluated.
        checkpoint_every: Optimizer steps between checkpoints, beside the one after each epoch.
        accumulation: Batches per optimizer step.
        mixed_precision: "no", "bf16" or "fp16"; None: as `accelerate launch` says, else "no".
        data: The caller's description of the data, JSON values; part of the configuration.
        labels: Of all training images, as many as `train` has, for class weights.
        accelerator: accelerate's own, in place of a new one.
        progress: Show progress bars on a terminal.

    Raises:
        SpecError: A wrong option, or a checkpoint of another run; nothing was written.
        VPTError: Batches of another form, or a label of train or val that is no class of the model;
            where the datasets show their labels (as `labels` or `targets`), before the first step.
        DivergedError: A loss, what a step made of the weights, or a logit on val is not finite. A
            step whose loss is not finite is not made; the former checkpoint stays.

    Source: Jia et al. 2022, section A.1.
    """
    _check_arguments(
        model=model,
        recipe=recipe,
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
        accumulation=accumulation,
        mixed_precision=mixed_precision,
    )
    _check_places(val, folder, data)
    loader = training_loader(train, recipe.seed)
    accelerator = _accelerator(accelerator, mixed_precision, trains_backbone(model))
    _check_batch(recipe, loader, accumulation, accelerator)
    check_last_batch(model, loader, accelerator.num_processes)
    loss = Loss(recipe, labels, len(loader.dataset))  # type: ignore[arg-type]
    bars = Bars(accelerator, recipe.epochs, progress)
    with wrapped(model, accelerator) as outer, bars.shown:
        run = _Run(model, outer, recipe, accelerator, accumulation, loss, bars)
        run.prepare(loader, val)
        run.begin(folder, resume, data)
        run.train(evaluate_every, checkpoint_every)
    rows = [row for row in run.at.history if row["val"]]
    best = max(rows, key=lambda row: row["val"]["top1"], default=None)
    return Result(run.at.history, best, run.at.seconds, run.config)


class _Run:
    """The state of one call of `fit`."""

    def __init__(
        self,
        host: nn.Module,
        model: nn.Module,
        recipe: Recipe,
        accelerator: Any,
        accumulation: int,
        loss: Loss,
        bars: Bars,
    ) -> None:
        self.host, self.model, self.recipe, self.accelerator = host, model, recipe, accelerator
        self.accumulation, self.loss, self.bars = accumulation, loss, bars

    def prepare(self, loader: DataLoader[Any], val: Any) -> None:
        """Make everything that training needs; nothing is written."""
        accelerator = self.accelerator
        self.given = self.unchecked = {"train": loader, "val": val}
        self.loader = accelerator.prepare_data_loader(loader)
        parallel = accelerator.num_processes > 1 and hasattr(val, "dataset")
        self.val = accelerator.prepare_data_loader(val) if parallel else val
        self.optimizer = accelerator.prepare_optimizer(make_optimizer(self.host, self.recipe))
        self.steps = -(-len(self.loader) // self.accumulation)
        was_training = self.host.training
        self.tensors = trained_tensors(self.host.train())
        self.host.train(was_training)

    def begin(self, folder: str | Path | None, resume: bool, data: Any) -> None:
        """Take up the checkpoint, if there is one; nothing is written."""
        self.folder = None if folder is None else Path(folder)
        self.config: dict[str, Any] = plain(
            {
                "recipe": self.recipe.to_dict(),
                "model": describe_model(self.host, self.tensors, folder is not None),
                "data": dict(data or {}),
                "loader": self._about(self.given["train"]),
                "mixed_precision": str(self.accelerator.mixed_precision),
                "versions": library_versions(),
                "machine": describe_machine(self.accelerator),
            }
        )
        content = None
        if self.folder is not None:
            content = read_checkpoint(self.folder, self.config) if resume else None
            # Nobody may write before everybody has read.
            self.accelerator.wait_for_everyone()
        self.resumed, self.at = content is not None, Position()
        if content is not None:
            scaler = self.accelerator.scaler
            self.at = load_checkpoint(content, self.tensors, self.optimizer, scaler)
        self.first = self.at.step + 1
        total = self.steps * self.recipe.epochs
        self.watch = LossWatch(self.steps, self.at.watch, total=total)
        self.at.watch = self.watch.state
        self.began = time.perf_counter() - self.at.seconds

    def _about(self, loader: Any) -> dict[str, Any]:
        """Return what a run depends on of its batches."""
        labels = shown_labels(loader.dataset)
        sums = {
            "labels": self.loss.checksum,
            "dataset_labels": None if labels is None else checksum_of(labels),
        }
        return {
            "images": len(loader.dataset),
            "sampler": type(loader.sampler.inner).__name__,
            "steps_per_epoch": self.steps,
            "accumulation": self.accumulation,
            **{name: value for name, value in sums.items() if value is not None},
        }

    def train(self, evaluate_every: int, checkpoint_every: int | None) -> None:
        """Run what is left of the epochs."""
        epochs, main = self.recipe.epochs, self.accelerator.is_main_process
        for epoch in range(len(self.at.history), epochs):
            self.host.train()
            self.model.train()
            for batches in self._steps(epoch):
                self._note(self._step(batches))
                if self.at.step == self.first and self.folder is not None and main:
                    begin_folder(self.folder, self.config, self.at.history, self.resumed)
                inside = self.at.step % self.steps
                if checkpoint_every and inside and not self.at.step % checkpoint_every:
                    self._save()
            last = epoch + 1 == epochs
            self._finish_epoch(last or not (epoch + 1) % evaluate_every)
        self.host.eval()
        self.model.eval()

    def _steps(self, epoch: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Yield the batches of each step that is left of an epoch."""
        from accelerate import skip_first_batches

        done = self.at.step - epoch * self.steps
        loader = skip_first_batches(self.loader, done * self.accumulation) if done else self.loader
        loader.set_epoch(epoch)
        batches = iter(loader)
        while group := list(islice(batches, self.accumulation)):
            yield [pair_of(batch, "fit", soft=True) for batch in group]

    def _step(self, batches: list[tuple[Tensor, Tensor]]) -> float:
        """Do one optimizer step over batches, and return its mean loss over all processes."""
        from accelerate.utils import set_seed

        at, accelerator = self.at.step, self.accelerator
        # So that dropout follows from the step's number.
        set_seed(derive(self.recipe.seed, "step", at, accelerator.process_index))
        set_rate(self.optimizer, lr_factor(at, self.steps, self.recipe))
        self.optimizer.zero_grad()
        first = at % self.steps * self.accumulation
        counts = [self._counted(first + i, len(labels)) for i, (_, labels) in enumerate(batches)]
        images, parts = sum(counts), []
        if accelerator.num_processes > 1:
            images = int(accelerator.reduce(torch.tensor(images, device=accelerator.device), "sum"))
        for index, (pixels, labels) in enumerate(batches):
            # The exchange of gradients between processes is left to the last batch.
            last = index + 1 == len(batches)
            with nullcontext() if last else accelerator.no_sync(self.model):
                # DistributedDataParallel takes the mean over processes, not the sum.
                total = self._loss(pixels, labels, counts[index]) * accelerator.num_processes
                parts.append(total / images)
                accelerator.backward(parts[-1])
        loss = float(accelerator.reduce(torch.stack(parts).detach().sum(), "mean").item())
        if not math.isfinite(loss):
            self.optimizer.zero_grad()
            kept = "The weights are those of before this step"
            self._diverge(f"the loss is {loss}", kept, ", or look for images that are not finite")
        if self.recipe.clip_norm is not None:
            accelerator.clip_grad_norm_(self.host.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        if not _all_finite(self.tensors.values()):
            what = f"the update after a loss of {loss:.4g} made weights that are not finite"
            self._diverge(what, "The model is left with them", "")
        return loss

    def _counted(self, index: int, size: int) -> int:
        """Return how many of the `size` images of this process's batch `index` count.

        accelerate gives all processes equally many full batches: it fills the last ones, from
        behind, with images from the start of the epoch. These do not count, so that several
        processes come to the result of one.
        """
        count: int = self.accelerator.num_processes
        if count == 1:
            return size
        train = self.given["train"]
        end: int = (index * count + self.accelerator.process_index + 1) * train.batch_size
        return max(size - max(end - len(train.sampler), 0), 0)

    def _loss(self, pixels: Tensor, labels: Tensor, count: int) -> Tensor:
        """Return the sum of the losses of the first `count` images of a batch."""
        like = first_floating(self.host)
        logits = forward_logits(self.model, pixels.to(like), self.accelerator, call="fit")
        for name, batches in self.unchecked.items():
            check_shown_labels(name, batches, logits.shape[1])
        self.unchecked = {}
        return self.loss(logits, labels.to(like.device), count)

    def _diverge(self, what: str, left: str, more: str) -> None:
        step, steps = self.at.step, self.steps
        kept = "" if self.folder is None else ", the checkpoint is that of before"
        raise DivergedError(
            "fit",
            f"epoch {step // steps + 1}, step {step % steps + 1} of {steps}: {what}",
            f"{left}{kept}. Lower base_lr ({self.recipe.base_lr:g}), or set clip_norm{more}",
        )

    def _note(self, loss: float) -> None:
        self.at.step += 1
        self.at.loss_sum += loss
        warning = self.watch.see(loss)
        self.bars.show(self.at.step, self.steps, f"loss {loss:.4f}")
        if warning and self.accelerator.is_main_process:
            warnings.warn(warning, stacklevel=4)

    def _finish_epoch(self, measure: bool) -> None:
        metrics = None
        if measure and self.val is not None:
            metrics = evaluate(self.model, self.val, self.accelerator)
        self.at.seconds = time.perf_counter() - self.began
        row = {
            "epoch": len(self.at.history) + 1,
            "step": self.at.step,
            "lr_factor": lr_factor(self.at.step - 1, self.steps, self.recipe),
            "train_loss": self.at.loss_sum / self.steps,
            "val": metrics,
            "seconds": round(self.at.seconds, 3),
        }
        self.at.history.append(row)
        self.at.loss_sum = 0.0
        told = f", val top1 {metrics['top1']:.4f}" if metrics else ""
        self.bars.tell(f"train loss {row['train_loss']:.4f}{told}")
        self._save()
        if self.folder is not None and self.accelerator.is_main_process:
            write_lines(self.folder / "history.jsonl", self.at.history)

    def _save(self) -> None:
        if self.folder is None or not self.accelerator.is_main_process:
            return
        self.at.seconds = time.perf_counter() - self.began
        save_checkpoint(
            self.folder,
            self.at,
            self.config,
            self.tensors,
            self.optimizer,
            self.accelerator.scaler,
        )


def _check_arguments(**given: Any) -> None:
    """Check the arguments of `fit` that can be judged by themselves."""
    count = integer(1)
    rules = {
        "model": instance(nn.Module, "a model, an nn.Module"),
        "recipe": instance(Recipe, "a Recipe, as `preset(protocol)` gives"),
        "evaluate_every": count,
        "checkpoint_every": or_none(count),
        "accumulation": count,
        "mixed_precision": one_of(None, "no", "bf16", "fp16"),
    }
    for name, rule in rules.items():
        rule.check("fit", name, given[name])


def _check_places(val: Any, folder: str | Path | None, data: Mapping[str, Any] | None) -> None:
    """Check what `fit` evaluates on, where it writes, and what it writes down.

    Raises:
        SpecError: No batches that can be gone through again and again, a file in place of the
            folder, or no JSON values.
    """
    reason = "" if val is None else _unfit(val)
    if reason:
        advice = "give a DataLoader or a list of batches, or None"
        raise SpecError("fit", reason, advice, given={"val": val})
    if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
        raise SpecError("fit", "is no folder", "give another", given={"folder": str(folder)})
    try:
        json.dumps(data, allow_nan=False)
    except (TypeError, ValueError) as error:
        problem = f"must be plain, finite JSON values: {error}"
        raise SpecError("fit", problem, given={"data": ...}) from error


def _unfit(val: Any) -> str:
    """Return why something cannot be evaluated on again and again, or ""."""
    if isinstance(val, Iterator):
        return "is used up by one evaluation"
    if isinstance(val, Dataset) and not isinstance(val, IterableDataset):
        return "holds images, not batches"
    if not (isinstance(val, Iterable) or hasattr(val, "__getitem__")):
        return "holds no batches"
    try:
        return "" if len(val) else "is empty"
    except TypeError:
        # It does not know how long it is.
        return ""


def _accelerator(given: Any, mixed_precision: str | None, unused: bool) -> Any:
    """Return the accelerator of a run, given or new.

    Args:
        given: The caller's, or None.
        mixed_precision: As in `fit`.
        unused: As in `new_accelerator`.

    Raises:
        SpecError: An impossible precision, or an accelerator that shares images out otherwise.
    """
    if given is not None and mixed_precision is not None:
        parts = {"accelerator": ..., "mixed_precision": mixed_precision}
        raise SpecError("fit", "it is the accelerator's own", given=parts)
    accelerator = new_accelerator(mixed_precision, unused) if given is None else given
    if accelerator.gradient_accumulation_steps > 1:
        raise SpecError(
            "fit",
            "accumulation belongs to fit",
            "give it there, and let the accelerator have `gradient_accumulation_steps=1` "
            "(ACCELERATE_GRADIENT_ACCUMULATION_STEPS unset)",
        )
    shares = accelerator.dataloader_config
    if accelerator.num_processes > 1 and (
        shares.split_batches or shares.dispatch_batches or not shares.even_batches
    ):
        raise SpecError(
            "fit",
            "with several processes, images are shared out by accelerate's defaults",
            "make it without split_batches, dispatch_batches and even_batches",
            given={"accelerator": ...},
        )
    return accelerator


def _check_batch(
    recipe: Recipe, loader: DataLoader[Any], accumulation: int, accelerator: Any
) -> None:
    """Raise unless a step is over as many images as the recipe says."""
    found = (loader.batch_size or 0) * accelerator.num_processes * accumulation
    if found != recipe.batch_size:
        raise SpecError(
            "fit",
            f"the loader's {loader.batch_size} images x {accelerator.num_processes} processes x "
            f"{accumulation} accumulated batches make a batch of {found}, the recipe says "
            f"{recipe.batch_size}, from which its learning rate follows",
            f"Use `loader_batch_size(recipe, {accumulation})` for the loader, or another "
            "batch_size in the recipe",
        )


def new_accelerator(mixed_precision: str | None, unused: bool = False) -> Any:
    """Return an accelerator of a precision; None: what `accelerate launch` says, else "no".

    Args:
        mixed_precision: "no", "bf16", "fp16" or None.
        unused: Whether parameters may train that the forward does not use: mask tokens, say.

    Raises:
        SpecError: The device has no such precision.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    wanted = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != wanted:
        # One per process, which would refuse a second run with another precision.
        AcceleratorState._reset_state()
    try:
        handlers: list[Any] = [DistributedDataParallelKwargs(find_unused_parameters=unused)]
        made = Accelerator(mixed_precision=wanted, kwargs_handlers=handlers)
        if wanted == "fp16" and made.scaler is None:
            # On a CPU it would train in single precision without a word.
            raise ValueError(f"the device ({made.device.type}) cannot scale losses; use 'bf16'")
        return made
    except ValueError as error:
        AcceleratorState._reset_state()
        given = {"mixed_precision": mixed_precision}
        raise SpecError("fit", str(error), given=given) from error


@contextmanager
def wrapped(model: nn.Module, accelerator: Any) -> Iterator[nn.Module]:
    """Put the model on its device, and inside DistributedDataParallel where there are several.

    The model itself is left unwrapped at the end.
    """
    if accelerator.num_processes == 1:
        model.to(accelerator.device)
        yield model
        return
    own = "forward" in vars(model)
    prepared = accelerator.prepare_model(model)
    try:
        yield prepared
    finally:
        accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        if not own:
            vars(model).pop("forward", None)


class Bars:
    """Progress bars on a terminal, in the main process, while `shown` is open; silent elsewhere.

    Args:
        accelerator: accelerate's.
        epochs: Of the run.
        wanted: Whether to show any.
    """

    def __init__(self, accelerator: Any, epochs: int, wanted: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        console = Console(stderr=True)
        wanted = wanted and accelerator.is_main_process and console.is_terminal
        columns = BarColumn(), MofNCompleteColumn(), Remaining(), TextColumn("{task.fields[note]}")
        about = TextColumn("{task.description}")
        self.shown = Progress(about, *columns, console=console, disable=not wanted)
        self._epochs = self.shown.add_task("epochs", total=epochs, note="")
        self._steps = self.shown.add_task("steps", total=None, note="")

    def show(self, step: int, steps: int, note: str) -> None:
        """Show how far a run has come, in steps, of which an epoch has a number."""
        self.shown.update(self._epochs, completed=step // steps)
        self.shown.update(self._steps, completed=(step - 1) % steps + 1, total=steps, note=note)

    def tell(self, note: str) -> None:
        """Show what an epoch came to."""
        self.shown.update(self._epochs, note=note)


@torch.no_grad()
def _all_finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether every value is finite."""
    floats = (t for t in tensors if t.is_floating_point() and t.numel())
    largest = [torch.linalg.vector_norm(tensor, math.inf) for tensor in floats]
    return not largest or bool(torch.stack(largest).isfinite().all())
