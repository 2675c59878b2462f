"""Training batches whose order and augmentation depend on seed and epoch alone."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..checks import integer
from ..data.drawing import EpochSampler, Key
from ..errors import SpecError, VPTError
from ..randomness import seeded
from .recipes import Recipe

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


def training_loader(loader: Any, seed: int) -> DataLoader[Any]:
    """Return a loader like the given one whose order and draws follow from seed and epoch.

    Datasets of this library know draws; any other is wrapped.

    Raises:
        SpecError: It has no map-style dataset, no batch size, or no images.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise SpecError(
            f"fit(train={type(loader).__name__}): must be a DataLoader over a dataset with "
            "indices, so that a run can be resumed in the middle of an epoch."
        )
    if loader.batch_size is None:
        raise SpecError("fit(train=...): the DataLoader has no batch_size; give it one.")
    if not len(loader):
        raise SpecError(
            f"fit(train=...): the DataLoader has {len(loader.sampler)} images and makes no batch"  # type: ignore[arg-type]
            f"{' of ' + str(loader.batch_size) if loader.drop_last else ''}; give it more images."
        )
    sampler: Any = loader.sampler
    own = isinstance(sampler, EpochSampler)
    return DataLoader(
        loader.dataset if own else Drawn(loader.dataset),
        batch_size=loader.batch_size,
        sampler=EpochSampler(sampler.inner if own else sampler, seed),
        **{name: getattr(loader, name) for name in _KEPT},
    )


def leaves_one(model: nn.Module, images: int, batch: int) -> bool:
    """Tell whether an epoch ends with a single image, of which batch norms cannot learn.

    Args:
        model: The model; its mode is put back.
        images: Of an epoch.
        batch: Images per batch.
    """
    return images % batch == 1 and bool(_training_norms(model, _BatchNorm))


def norms_over_one_value(model: nn.Module) -> bool:
    """Tell whether a single image gives a batch norm that trains one value per channel."""
    return bool(_training_norms(model, nn.BatchNorm1d))


def _training_norms(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    """Return the batch norms that train when the model does; its mode is put back."""
    was_training = model.training
    model.train()
    norms = [m for m in model.modules() if isinstance(m, kind) and m.training]
    model.train(was_training)
    return norms


class Padding:
    """Which images of a batch a process counts, so that several come to the result of one.

    accelerate gives all processes equally many full batches: it fills the last ones, from behind,
    with images from the start of the epoch. These are not counted.

    Args:
        images: Of an epoch.
        batch: Images of a full batch of one process.
        accelerator: accelerate's.
    """

    def __init__(self, images: int, batch: int, accelerator: Any) -> None:
        self._images, self._batch, self._accelerator = images, batch, accelerator

    def own(self, index: int, size: int) -> int:
        """Return how many of the `size` images of this process's batch `index` count."""
        count: int = self._accelerator.num_processes
        if count == 1:
            return size
        end: int = (index * count + self._accelerator.process_index + 1) * self._batch
        return max(size - max(end - self._images, 0), 0)

    def together(self, images: int) -> int:
        """Return the sum of a count over all processes."""
        if self._accelerator.num_processes == 1:
            return images
        counted = torch.tensor(images, device=self._accelerator.device)
        total: Tensor = self._accelerator.reduce(counted, "sum")
        return int(total)


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
            f"loader_batch_size: a batch of {recipe.batch_size} cannot be shared out among "
            f"{parts // accumulation} processes x {accumulation} accumulated batches; make "
            f"batch_size a multiple of {parts}."
        )
    return recipe.batch_size // parts


def seed_step(seed: int) -> None:
    """Seed every global generator, so that a step's dropout follows from its number."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


_NAMES = ("pixel_values", "labels")


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
    pair = [batch.get(name) for name in _NAMES] if named else batch
    plain = isinstance(pair, list | tuple) and len(pair) == 2
    if not plain or not all(isinstance(part, Tensor) for part in pair):
        raise VPTError(
            f"{call}: a batch is {_described(batch)}; it must be (pixels, labels), two tensors, or "
            f"a mapping with {' and '.join(_NAMES)}, as a DataLoader over (image, label) gives."
        )
    pixels, labels = pair
    if soft and labels.is_floating_point() and labels.dim() == 2 and len(labels) == len(pixels):
        return pixels, labels
    return pixels, whole_labels(labels, len(pixels), call)


def whole_labels(labels: Tensor, images: int, call: str) -> Tensor:
    """Return labels as int64.

    Raises:
        VPTError: They are no integers, or not one per image.
    """
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if tuple(labels.shape) != (images,) or not (whole or not images):
        raise VPTError(
            f"{call}: labels of shape {tuple(labels.shape)} and {labels.dtype} for {images} "
            "images; they must be class numbers, integers of shape (images,)."
        )
    return labels.long()


def _described(batch: Any) -> str:
    if isinstance(batch, Mapping):
        held = (f"{name!r}: {type(value).__name__}" for name, value in batch.items())
        return f"a mapping with {', '.join(held) or 'nothing'}"
    if isinstance(batch, list | tuple):
        return f"a {type(batch).__name__} of {', '.join(type(part).__name__ for part in batch)}"
    return f"a {type(batch).__name__}"
