"""`fit`: the training loop, on accelerate."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Padding, derive, seed_step, training_loader
from .checkpoint import (
    Position,
    begin_folder,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
    trained_tensors,
)
from .describe import describe_run
from .files import write_lines
from .groups import lr_factor, make_optimizer, set_rate, trains_backbone
from .health import DivergedError, LossWatch, Shadow, warn
from .labels import check_known_labels, labels_checksum
from .losses import Loss
from .metrics import evaluate, forward_logits, place
from .pairs import pair_of
from .prepare import (
    Bars,
    check_folder,
    check_last_batch,
    check_model_and_val,
    check_options,
    make_accelerator,
    wrapped,
)
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
    loader, order = training_loader(train, recipe.seed)
    accelerator = make_accelerator(
        accelerator,
        mixed_precision,
        recipe,
        loader,
        accumulation,
        unused=trains_backbone(model),
    )
    check_last_batch(model, loader, accelerator.num_processes)
    run = _Run(model, recipe, accelerator, order, accumulation)
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
        self, model: nn.Module, recipe: Recipe, accelerator: Any, order: Any, accumulation: int
    ) -> None:
        self.host = self.model = model
        self.recipe, self.accelerator, self.order = recipe, accelerator, order
        self.accumulation = accumulation
        self.folder: Path | None = None
        self.at = Position()

    def prepare(self, loader: Any, val: Any, *, data: Any, folder: str | Path | None) -> None:
        """Make everything that training needs; nothing is written."""
        self.unchecked = {"train": loader, "val": val}
        self.padding = Padding(len(self.order), loader.batch_size, self.accelerator)
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
                "sampler": type(self.order.sampler).__name__,
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

        self.order.epoch = epoch
        done = self.at.step - epoch * self.steps
        loader = skip_first_batches(self.loader, done * self.accumulation) if done else self.loader
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
