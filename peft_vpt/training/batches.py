"""Training batches whose order and augmentation depend on seed and epoch alone."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ..data.drawing import check_counts
from ..errors import SpecError, VPTError
from ..randomness import seeded
from .recipes import Recipe

Key = tuple[int, int]
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


class Order(Sampler[Key]):
    """Keys `(epoch, index)` in the order of an epoch, the same whenever the epoch is begun.

    Args:
        sampler: The caller's; a random one is drawn anew from seed and epoch.
        seed: The recipe's.
    """

    def __init__(self, sampler: Sampler[int], seed: int) -> None:
        self.sampler, self._seed = sampler, seed
        self.epoch = 0

    def __len__(self) -> int:
        assert isinstance(self.sampler, Sized)
        return len(self.sampler)

    def __iter__(self) -> Iterator[Key]:
        drawn = derive(self._seed, "order", self.epoch)
        own = getattr(self.sampler, "generator", None)
        with seeded(drawn):
            if isinstance(own, torch.Generator):
                own.manual_seed(drawn)
            indices = list(self.sampler)
        return iter([(self.epoch, index) for index in indices])


class Drawn(Dataset[Any]):
    """A dataset whose random transforms depend on seed, epoch and index alone.

    So they are the same with any number of workers and processes, and after a resume.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self._seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> Any:
        epoch, index = key
        with seeded(derive(self._seed, "image", epoch, index)):
            return self.dataset[index]


def training_loader(loader: Any, seed: int) -> tuple[DataLoader[Any], Order]:
    """Return a loader like the given one with `Order` and `Drawn` in it.

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
    order = Order(loader.sampler, seed)  # type: ignore[arg-type]
    return DataLoader(
        Drawn(loader.dataset, seed),
        batch_size=loader.batch_size,
        sampler=order,
        **{name: getattr(loader, name) for name in _KEPT},
    ), order


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

    check_counts("loader_batch_size", accumulation=(accumulation, 1))
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


def derive(*parts: Any) -> int:
    """Return a seed below 2**32 that follows from the parts."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


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
