"""What stands around the loop: checks of options, the accelerator, progress bars."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn
from torch.utils.data import Dataset, IterableDataset

from ..errors import SpecError
from .batches import leaves_one, norms_over_one_value
from .recipes import Recipe

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
