"""Batches: what they hold, and how a training loader makes them from seed and epoch alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from ..checks import integer
from ..data.drawing import EpochSampler, Key
from ..errors import SpecError, VPTError
from ..randomness import seeded
from .recipes import Recipe

_NAMES = ("pixel_values", "labels")
_KEPT = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "drop_last",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
)


def training_loader(loader: Any, seed: int) -> DataLoader[Any]:
    """Return a loader like the given one whose order and draws follow from seed and epoch.

    Datasets of this library know draws; any other is wrapped.

    Raises:
        SpecError: It has no map-style dataset, no batch size, or no images.
    """
    given = {"train": loader}
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        problem = "must be a DataLoader over a dataset with indices"
        advice = "Otherwise a run could not be resumed in the middle of an epoch"
        raise SpecError("fit", problem, advice, given=given)
    if loader.batch_size is None:
        raise SpecError("fit", "the DataLoader has no batch_size", "give it one", given=given)
    sampler: Any = loader.sampler
    if not len(loader):
        size = f" of {loader.batch_size}" if loader.drop_last else ""
        problem = f"the DataLoader has {len(sampler)} images and makes no batch{size}"
        raise SpecError("fit", problem, "give it more images", given=given)
    own = isinstance(sampler, EpochSampler)
    return DataLoader(
        loader.dataset if own else Drawn(loader.dataset),
        batch_size=loader.batch_size,
        sampler=EpochSampler(sampler.inner if own else sampler, seed),
        **{name: getattr(loader, name) for name in _KEPT},
    )


class Drawn(Dataset[Any]):
    """A dataset whose random transforms follow from the draw in an `EpochSampler`'s key."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> Any:
        index, draw = key
        with seeded(draw):
            return self.dataset[index]


def loader_batch_size(recipe: Recipe, accumulation: int = 1) -> int:
    """Return the batch size for a DataLoader, so that a step is over `recipe.batch_size` images.

    Args:
        recipe: The recipe.
        accumulation: Batches per optimizer step.

    Raises:
        SpecError: The batch cannot be shared out evenly.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    integer(1).check("loader_batch_size", "accumulation", accumulation)
    # The flag of `accelerate launch`, which an Accelerator reads and a PartialState does not.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    parts: int = state.num_processes * accumulation
    if recipe.batch_size % parts:
        raise SpecError(
            "loader_batch_size",
            f"a batch of {recipe.batch_size} cannot be shared out among {state.num_processes} "
            f"processes x {accumulation} accumulated batches",
            f"make batch_size a multiple of {parts}",
        )
    return recipe.batch_size // parts


def leaves_one(model: nn.Module, images: int, batch: int) -> bool:
    """Tell whether an epoch ends with a single image, of which batch norms cannot learn.

    Args:
        model: The model; its mode is put back.
        images: Of an epoch.
        batch: Images per batch.
    """
    return images % batch == 1 and _trains(model, _BatchNorm)


def check_last_batch(model: nn.Module, loader: DataLoader[Any], processes: int) -> None:
    """Raise where a batch is one image, of which batch norms that train cannot learn.

    Args:
        model: The model.
        loader: Over the training images.
        processes: Among which batches are shared out; several fill the last one up.

    Raises:
        SpecError: It does.
    """
    images, batch = len(loader.sampler), loader.batch_size or 1  # type: ignore[arg-type]
    if batch == 1 and _trains(model, nn.BatchNorm1d):
        raise SpecError(
            "fit",
            "batches of one image, of which the batch norm in the model's head cannot learn",
            "give larger ones, by lower accumulation or a larger `recipe.batch_size`",
            given={"train": ...},
        )
    if processes == 1 and not loader.drop_last and leaves_one(model, images, batch):
        raise SpecError(
            "fit",
            f"{images} images in batches of {batch} leave one image for the last batch, of which "
            "the model's batch norms cannot learn",
            "give the DataLoader `drop_last=True`, or another batch size",
            given={"train": ...},
        )


def _trains(model: nn.Module, norm: type[nn.Module]) -> bool:
    """Tell whether batch norms of a kind train when the model does; its mode is put back."""
    was_training = model.training
    model.train()
    found = any(isinstance(m, norm) and m.training for m in model.modules())
    model.train(was_training)
    return found


def pair_of(batch: Any, call: str, *, soft: bool = False) -> tuple[Tensor, Tensor]:
    """Return pixels and labels of a batch, class numbers as int64.

    Args:
        batch: `(pixels, labels)`, or a mapping of transformers with `pixel_values` and `labels`.
        call: For messages.
        soft: Whether labels may be shares of classes, `(images, classes)`.

    Raises:
        VPTError: It is neither, or its labels are no integers, one per image.
    """
    named = isinstance(batch, Mapping)
    pair: Any = [batch.get(name) for name in _NAMES] if named else batch
    plain = isinstance(pair, list | tuple) and len(pair) == 2
    if not plain or not all(isinstance(part, Tensor) for part in pair):
        raise VPTError(
            call,
            f"a batch is {_described(batch)}",
            f"it must be (pixels, labels), two tensors, or a mapping with {' and '.join(_NAMES)}, "
            "as a DataLoader over (image, label) gives",
        )
    pixels, labels = pair
    if soft and labels.is_floating_point() and labels.dim() == 2 and len(labels) == len(pixels):
        return pixels, labels
    return pixels, whole_labels(labels, len(pixels), call)


def _described(batch: Any) -> str:
    kind = type(batch).__name__
    if isinstance(batch, Mapping):
        held = (f"{name!r}: {type(value).__name__}" for name, value in batch.items())
        return f"a mapping with {', '.join(held) or 'nothing'}"
    if isinstance(batch, list | tuple):
        return f"a {kind} of {', '.join(type(part).__name__ for part in batch)}"
    return f"a {kind}"


def whole_labels(labels: Tensor, images: int, call: str) -> Tensor:
    """Return labels as int64.

    Raises:
        VPTError: They are no integers, or not one per image.
    """
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if tuple(labels.shape) != (images,) or not (whole or not images):
        raise VPTError(
            call,
            f"labels of shape {tuple(labels.shape)} and {labels.dtype} for {images} images",
            "they must be class numbers, integers of shape (images,)",
        )
    return labels.long()


def check_classes(labels: Tensor, classes: int, call: str) -> None:
    """Raise unless all labels are classes.

    Raises:
        VPTError: One is not.
    """
    low, high = (int(x) for x in labels.aminmax())
    if low < 0 or high >= classes:
        raise VPTError(
            call,
            f"a batch has the label {low if low < 0 else high}, but the model has {classes} "
            f"classes, 0 to {classes - 1}",
            "give num_classes when prompts are injected, or correct the labels",
        )


def shown_labels(dataset: Any) -> Tensor | None:
    """Return the labels that a dataset shows as `labels` or `targets`, as torchvision's do.

    None where it does not show a whole number for every image.
    """
    if isinstance(dataset, Drawn):
        return shown_labels(dataset.dataset)
    if isinstance(dataset, Subset):
        # As random_split makes them of a folder of images.
        whole = shown_labels(dataset.dataset)
        return None if whole is None else whole[list(dataset.indices)]
    try:
        labels = torch.as_tensor(getattr(dataset, "labels", getattr(dataset, "targets", None)))
        fits = labels.dim() == 1 and len(labels) == len(dataset)
    except (TypeError, ValueError, RuntimeError):
        return None
    return labels.cpu() if fits and not labels.is_floating_point() else None


def check_shown_labels(name: str, loader: Any, classes: int) -> None:
    """Raise where a label that a dataset shows without loading an image is no class of the model.

    Args:
        name: What the batches are for.
        loader: The batches; what is no DataLoader is passed over.
        classes: Number of outputs.

    Raises:
        VPTError: There is one.
    """
    dataset, sampler = (getattr(loader, part, None) for part in ("dataset", "sampler"))
    labels = shown_labels(dataset)
    # A sampler that leaves images out may do so for their labels.
    if labels is None or sampler is None or len(sampler) != len(labels):
        return
    wrong = ((labels < 0) | (labels >= classes)).nonzero().flatten().tolist()
    if wrong and not _is_class(dataset, wrong[0], classes):
        raise VPTError(
            "fit",
            f"{len(wrong)} of {len(labels)} labels are no classes of the model, the first at index "
            f"{wrong[0]}: {int(labels[wrong[0]])}. The model has {classes} classes, 0 to "
            f"{classes - 1}",
            "give num_classes when prompts are injected, or correct the labels",
            given={name: ...},
        )


def _is_class(dataset: Any, index: int, classes: int) -> bool:
    """Tell whether an item has another label than the dataset shows (by a transform of labels)."""
    try:
        item = dataset.dataset[index] if isinstance(dataset, Drawn) else dataset[index]
        return 0 <= int(item[1]) < classes
    except Exception:  # whatever reading an image raises; the label stands as it is
        return False
