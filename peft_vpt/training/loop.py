"""`fit`: the training loop, on accelerate."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from ..errors import SpecError
from ..files import write_lines
from ..randomness import derive
from .batches import (
    Padding,
    leaves_one,
    norms_over_one_value,
    pair_of,
    seed_step,
    training_loader,
)
from .checkpoint import (
    Position,
    begin_folder,
    describe_run,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
    trained_tensors,
)
from .health import DivergedError, LossWatch, Shadow, warn
from .losses import Loss, check_known_labels, labels_checksum
from .metrics import evaluate, forward_logits, place
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
            where the datasets hold their labels beside the images, before the first step.
        DivergedError: A loss, what a step made of the weights, or a logit on val is not finite. The
            model has the last finite weights, the former checkpoint stays.

    Source: Jia et al. 2022, section A.1.
    """
    check_options(recipe, evaluate_every, checkpoint_every, accumulation, data)
    check_model_and_val(model, val)
    check_folder(folder)
    loader = training_loader(train, recipe.seed)
    accelerator = make_accelerator(
        accelerator,
        mixed_precision,
        recipe,
        loader,
        accumulation,
        unused=trains_backbone(model),
    )
    check_last_batch(model, loader, accelerator.num_processes)
    run = _Run(model, recipe, accelerator, accumulation)
    run.loss = Loss(recipe, labels, len(loader.dataset))  # type: ignore[arg-type]
    with wrapped(model, accelerator) as run.model, Bars(accelerator, progress) as run.bars:
        run.prepare(loader, val, data=data, folder=folder)
        run.begin(resume)
        run.train(evaluate_every, checkpoint_every)
    rows = [row for row in run.at.history if row["val"]]
    best = max(rows, key=lambda row: row["val"]["top1"], default=None)
    return Result(run.at.history, best, run.at.seconds, run.config)


class _Run:
    """The state of one call of `fit`."""

    config: dict[str, Any]
    bars: Any
    loss: Loss

    def __init__(
        self, model: nn.Module, recipe: Recipe, accelerator: Any, accumulation: int
    ) -> None:
        self.host = self.model = model
        self.recipe, self.accelerator, self.accumulation = recipe, accelerator, accumulation
        self.folder: Path | None = None
        self.at = Position()

    def prepare(self, loader: Any, val: Any, *, data: Any, folder: str | Path | None) -> None:
        """Make everything that training needs; nothing is written."""
        self.unchecked = {"train": loader, "val": val}
        self.padding = Padding(len(loader.sampler), loader.batch_size, self.accelerator)
        self.loader = self.accelerator.prepare_data_loader(loader)
        parallel = self.accelerator.num_processes > 1 and hasattr(val, "dataset")
        self.val = self.accelerator.prepare_data_loader(val) if parallel else val
        self.optimizer = self.accelerator.prepare_optimizer(make_optimizer(self.host, self.recipe))
        self.steps = -(-len(self.loader) // self.accumulation)
        was_training = self.host.training
        self.tensors = trained_tensors(self.host.train())
        self.host.train(was_training)
        self.shadow = Shadow(self.tensors)
        sums = {"labels": self.loss.checksum, "dataset_labels": labels_checksum(loader.dataset)}
        counted = {name: value for name, value in sums.items() if value is not None}
        self.config = describe_run(
            self.host,
            self.recipe,
            self.accelerator,
            trained=self.tensors,
            loader={
                "images": len(loader.dataset),
                "sampler": type(loader.sampler.inner).__name__,
                "steps_per_epoch": self.steps,
                "accumulation": self.accumulation,
                **counted,
            },
            data=data,
            weights=folder is not None,
        )
        self.folder = None if folder is None else Path(folder)

    def begin(self, resume: bool) -> None:
        """Take up the checkpoint, if there is one; nothing is written."""
        if self.folder is not None:
            content = read_checkpoint(self.folder, self.config) if resume else None
            if content is not None:
                scaler = self.accelerator.scaler
                self.at = load_checkpoint(content, self.tensors, self.optimizer, scaler)
            self.resumed = content is not None
            # Nobody may write before everybody has read.
            self.accelerator.wait_for_everyone()
        self.first = self.at.step + 1
        total = self.steps * self.recipe.epochs
        self.watch = LossWatch(self.steps, self.at.watch, total=total)
        self.began = time.perf_counter() - self.at.seconds

    def train(self, evaluate_every: int, checkpoint_every: int | None) -> None:
        """Run what is left of the epochs."""
        epochs, main = self.recipe.epochs, self.accelerator.is_main_process
        for epoch in range(len(self.at.history), epochs):
            self.host.train()
            self.model.train()
            self.bars.epoch(epoch, epochs, self.steps, self.at.step - epoch * self.steps)
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
        at, accelerator = self.at.step, self.accelerator
        seed_step(derive(self.recipe.seed, "step", at, accelerator.process_index))
        set_rate(self.optimizer, lr_factor(at, self.steps, self.recipe))
        self.shadow.keep()
        self.optimizer.zero_grad()
        first = at % self.steps * self.accumulation
        counts = [self.padding.own(first + i, len(labels)) for i, (_, labels) in enumerate(batches)]
        images, parts = self.padding.together(sum(counts)), []
        for index, (pixels, labels) in enumerate(batches):
            with self._sync(index + 1 == len(batches)):
                # DistributedDataParallel takes the mean over processes, not the sum.
                total = self._loss(pixels, labels, counts[index]) * accelerator.num_processes
                parts.append(total / images)
                accelerator.backward(parts[-1])
        loss = accelerator.reduce(torch.stack(parts).detach().sum(), "mean").item()
        if not torch.isfinite(torch.tensor(loss)):
            self._diverge(f"the loss is {loss}")
        if self.recipe.clip_norm is not None:
            accelerator.clip_grad_norm_(self.host.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        if not self.shadow.finite():
            self._diverge(f"the update after a loss of {loss:.4g} made weights that are not finite")
        return float(loss)

    def _sync(self, last: bool) -> AbstractContextManager[Any]:
        """Leave the exchange of gradients between processes to a step's last batch."""
        if last:
            return nullcontext()
        waiting: AbstractContextManager[Any] = self.accelerator.no_sync(self.model)
        return waiting

    def _loss(self, pixels: Tensor, labels: Tensor, count: int) -> Tensor:
        """Return the sum of the losses of the first `count` images of a batch."""
        device, dtype = place(self.host)
        logits = forward_logits(self.model, pixels.to(device, dtype), self.accelerator, call="fit")
        check_known_labels(self.unchecked, logits.shape[1])
        self.unchecked = {}
        return self.loss(logits, labels.to(device), count)

    def _diverge(self, what: str) -> None:
        self.shadow.restore()
        self.optimizer.zero_grad()
        step, steps = self.at.step, self.steps
        kept = "" if self.folder is None else " The checkpoint is that of before."
        raise DivergedError(
            f"fit: epoch {step // steps + 1}, step {step % steps + 1} of {steps}: {what}. The "
            f"model has the weights of before this step.{kept} Lower base_lr "
            f"({self.recipe.base_lr:g}), set clip_norm, or look for images that are not finite."
        )

    def _note(self, loss: float) -> None:
        self.at.step += 1
        self.at.loss_sum += loss
        message = self.watch.see(loss)
        self.at.watch = self.watch.state
        self.bars.step(loss)
        if message and self.accelerator.is_main_process:
            warn(message)

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
        self.bars.finish_epoch(row)
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


_PRECISIONS = (None, "no", "bf16", "fp16")


def check_options(
    recipe: Any,
    evaluate_every: Any,
    checkpoint_every: Any,
    accumulation: Any,
    data: Mapping[str, Any] | None,
) -> None:
    """Check the plain options of `fit`.

    Raises:
        SpecError: One is wrong.
    """
    if not isinstance(recipe, Recipe):
        raise SpecError(f"fit(recipe={recipe!r}): must be a Recipe, as preset(protocol) gives.")
    counts = {
        "evaluate_every": evaluate_every,
        "checkpoint_every": 1 if checkpoint_every is None else checkpoint_every,
        "accumulation": accumulation,
    }
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SpecError(f"fit({name}={value!r}): must be an integer >= 1.")
    try:
        json.dumps(data, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SpecError(f"fit(data=...): must be plain, finite JSON values: {error}.") from error


def check_model_and_val(model: Any, val: Any) -> None:
    """Check what is trained, and what it is evaluated on.

    Raises:
        SpecError: No model, or no batches that can be gone through again and again.
    """
    if not isinstance(model, nn.Module):
        raise SpecError(f"fit(model={type(model).__name__}): must be a model, an nn.Module.")
    reason = "" if val is None else _unfit(val)
    if reason:
        raise SpecError(
            f"fit(val={type(val).__name__}): {reason}; give a DataLoader or a list of batches, or "
            "None."
        )


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


def check_folder(folder: str | Path | None) -> None:
    """Raise where there is something else in place of a folder.

    Raises:
        SpecError: There is.
    """
    if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
        raise SpecError(f"fit(folder={str(folder)!r}): is no folder; give another.")


def check_last_batch(model: nn.Module, loader: Any, processes: int) -> None:
    """Raise where a batch is one image, of which batch norms that train cannot learn.

    Args:
        model: The model.
        loader: Over the training images.
        processes: Among which batches are shared out; several fill the last one up.

    Raises:
        SpecError: It does.
    """
    images, batch = len(loader.sampler), loader.batch_size
    if batch == 1 and norms_over_one_value(model):
        raise SpecError(
            "fit(train=...): batches of one image, of which the batch norm in the model's head "
            "cannot learn; give larger ones, by lower accumulation or a larger "
            "recipe.batch_size."
        )
    if processes == 1 and not loader.drop_last and leaves_one(model, images, batch):
        raise SpecError(
            f"fit(train=...): {images} images in batches of {batch} leave one image for the last "
            "batch, of which the model's batch norms cannot learn; give the DataLoader "
            "drop_last=True, or another batch size."
        )


def make_accelerator(
    given: Any,
    mixed_precision: str | None,
    recipe: Recipe,
    loader: Any,
    accumulation: int,
    *,
    unused: bool = False,
) -> Any:
    """Return the accelerator of a run, given or new, and check the batch against the recipe.

    Args:
        given: The caller's, or None.
        mixed_precision: As in `fit`.
        recipe: As in `fit`.
        loader: Over the training images.
        accumulation: As in `fit`.
        unused: Whether parameters may train that the forward does not use: mask tokens, say.

    Raises:
        SpecError: An unknown or impossible precision, or another batch than the recipe's.
    """
    if mixed_precision not in _PRECISIONS:
        raise SpecError(
            f"fit(mixed_precision={mixed_precision!r}): must be 'no', 'bf16', 'fp16' or None."
        )
    if given is not None and mixed_precision is not None:
        raise SpecError("fit(accelerator=..., mixed_precision=...): it is the accelerator's own.")
    accelerator = new_accelerator(mixed_precision, unused) if given is None else given
    if accelerator.gradient_accumulation_steps > 1:
        raise SpecError(
            "fit: accumulation belongs to fit; give it there, and let the accelerator have "
            "gradient_accumulation_steps=1 (ACCELERATE_GRADIENT_ACCUMULATION_STEPS unset)."
        )
    shares = accelerator.dataloader_config
    if accelerator.num_processes > 1 and (
        shares.split_batches or shares.dispatch_batches or not shares.even_batches
    ):
        raise SpecError(
            "fit(accelerator=...): with several processes, images are shared out by accelerate's "
            "defaults; make it without split_batches, dispatch_batches and even_batches."
        )
    parts = accelerator.num_processes * accumulation
    if loader.batch_size * parts != recipe.batch_size:
        raise SpecError(
            f"fit: the loader's {loader.batch_size} images x {accelerator.num_processes} processes "
            f"x {accumulation} accumulated batches make a batch of {loader.batch_size * parts}, "
            f"the recipe says {recipe.batch_size}, from which its learning rate follows. Use "
            f"loader_batch_size(recipe, {accumulation}) for the loader, or another batch_size in "
            "the recipe."
        )
    return accelerator


def new_accelerator(mixed_precision: str | None, unused: bool = False) -> Any:
    """Return an accelerator of a precision; None: what `accelerate launch` says, else "no".

    Args:
        mixed_precision: "no", "bf16", "fp16" or None.
        unused: As in `make_accelerator`.

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
        raise SpecError(f"fit(mixed_precision={mixed_precision!r}): {error}") from error


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
    """Progress bars on a terminal, in the main process; silent elsewhere.

    Args:
        accelerator: accelerate's.
        wanted: Whether to show any.
    """

    def __init__(self, accelerator: Any, wanted: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        console = Console(stderr=True)
        shown = wanted and accelerator.is_main_process and console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            Remaining(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not shown,
        )
        self._epochs = self._progress.add_task("epochs", total=None, note="")
        self._steps = self._progress.add_task("steps", total=None, note="")

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def epoch(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        """Begin an epoch."""
        self._progress.update(self._epochs, completed=epoch, total=epochs)
        self._progress.reset(self._steps, total=steps, completed=done)

    def step(self, loss: float) -> None:
        """Show a step."""
        self._progress.update(self._steps, advance=1, note=f"loss {loss:.4f}")

    def finish_epoch(self, row: Mapping[str, Any]) -> None:
        """Show what an epoch came to."""
        note = f"train loss {row['train_loss']:.4f}"
        if row["val"]:
            note += f", val top1 {row['val']['top1']:.4f}"
        self._progress.update(self._epochs, completed=row["epoch"], note=note)
