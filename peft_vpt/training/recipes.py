"""`Recipe`: how a model is trained, as a plain value."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checks import Rule, integer, number, one_of, or_none
from ..errors import SpecError
from ..protocols.options import NAMES, Protocol

# Of the numbers that optimizers hold beside the weights.
_FLOAT32 = 3.4e38
# Of torch's generators.
_LARGEST_SEED = 2**63 - 1
_COUNT, _POSITIVE, _NOT_NEGATIVE = integer(1), number(0, above=True), number(0)
_SHARE = number(0, 1, below=True)
_RULES = {
    "optimizer": one_of("sgd", "adamw"),
    "base_lr": _POSITIVE,
    "prompt_lr_scale": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "epochs": _COUNT,
    "warmup_epochs": _NOT_NEGATIVE,
    "batch_size": _COUNT,
    "reference_batch": _COUNT,
    "momentum": _SHARE,
    "betas": Rule(
        "a pair of numbers >= 0 and < 1",
        lambda betas: isinstance(betas, tuple) and len(betas) == 2 and all(map(_SHARE.fits, betas)),
    ),
    "eps": _POSITIVE,
    "clip_norm": or_none(_POSITIVE),
    "label_smoothing": _SHARE,
    "class_weights": one_of("none", "inv", "inv_sqrt"),
    "seed": integer(0, _LARGEST_SEED),
}


@dataclass(frozen=True)
class Recipe:
    """Optimizer, schedule and loss of one training run.

    Args:
        optimizer: "sgd" or "adamw".
        base_lr: Peak learning rate for a batch of `reference_batch`; it scales with the batch.
        prompt_lr_scale: What the peak rate of prompts and of what a protocol adds is multiplied by.
        weight_decay: L2 penalty under SGD, decoupled under AdamW.
        epochs: Passes over the training images.
        warmup_epochs: Epochs of linear warm-up, also a fraction; the rest is cosine decay to 0.
        batch_size: Images per optimizer step, over all processes and accumulated batches.
        reference_batch: Batch that `base_lr` is meant for.
        momentum: Of SGD.
        betas: Of AdamW.
        eps: Of AdamW.
        clip_norm: Largest norm of the gradient; None: as it comes.
        label_smoothing: Share of a label that is spread over all classes.
        class_weights: "none"; "inv" or "inv_sqrt": weights by the (root of the) inverse number of
            training images of a class, 1 in the mean over the images.
        seed: Of the order of images, augmentation and dropout.

    Source: Jia et al. 2022, section A.1 and Table 6.
    """

    optimizer: str = "adamw"
    base_lr: float = 8e-3
    prompt_lr_scale: float = 1.0
    weight_decay: float = 1e-4
    epochs: int = 100
    warmup_epochs: float = 10.0
    batch_size: int = 64
    reference_batch: int = 256
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    class_weights: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            SpecError: A wrong value, or a warm-up that leaves no epoch to the rest.
        """
        for name, rule in _RULES.items():
            value = getattr(self, name)
            rule.check("Recipe", name, value)
            if hasattr(value, "item"):
                # A number of numpy, which JSON does not know.
                object.__setattr__(self, name, value.item())
        largest = self.peak_lr * max(self.prompt_lr_scale, 1.0)
        if largest > _FLOAT32:
            problem = f"makes a learning rate of {largest:g}, more than float32 holds"
            raise SpecError("Recipe", problem, "lower it", given={"base_lr": self.base_lr})
        if self.warmup_epochs >= self.epochs:
            given = {"epochs": self.epochs, "warmup_epochs": self.warmup_epochs}
            problem = "the warm-up must end before training does"
            raise SpecError("Recipe", problem, "10 of 100 epochs is usual", given=given)

    @property
    def peak_lr(self) -> float:
        """Learning rate at the end of the warm-up, before any scale of a group."""
        return self.base_lr * self.batch_size / self.reference_batch

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain JSON values."""
        return dataclasses.asdict(self) | {"betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Build a recipe from `to_dict` values; fields that are absent have their defaults.

        Raises:
            SpecError: An unknown field or a wrong value.
        """
        _need_fields("Recipe.from_dict", values)
        values = dict(values)
        if isinstance(values.get("betas"), list):
            values["betas"] = tuple(values["betas"])
        return cls(**values)


_FIELDS = tuple(field.name for field in dataclasses.fields(Recipe))


def _need_fields(call: str, values: Any, **given: Any) -> None:
    """Raise unless every key is a field of `Recipe`."""
    unknown = sorted(set(values) - set(_FIELDS)) if isinstance(values, Mapping) else [values]
    if unknown:
        problem = f"unknown {unknown}"
        raise SpecError(call, problem, f"a recipe has the fields {', '.join(_FIELDS)}", given=given)


# Jia et al. 2022, Table 6.
_SGD_RATES = (50.0, 25.0, 10.0, 5.0, 2.5, 1.0, 0.5, 0.25, 0.1, 0.05)
_SHALLOW_RATES = (1000.0, 500.0, 250.0, 100.0)
_ADAMW_RATES = (0.005, 0.001, 0.0005, 0.0001)
_DECAYS = (0.01, 0.001, 0.0001, 0.0)
_ADAMW = ("full", "partial", "bias", "adapter", "vpt+bias")
# Jia et al. 2022, Table 8: linear, partial, full and its kin, prompts, prompts from 100 on.
_BATCHES = {
    "vit-b": (2048, 1280, 128, 128, 64),
    "vit-l": (2048, 640, 64, 64, 32),
    "vit-h": (1024, 240, 28, 28, 14),
    "swin-b": (1024, 1024, 128, 80, 80),
    "convnext-b": (1024, 1024, 128, 128, 128),
    "resnet-50": (2048, 2048, 384, 256, 256),
}
# The paper gives no batch for mlp and sidetune: a head trains like a head, a network like one.
_COLUMNS = {"linear": 0, "mlp": 0, "partial": 1, "full": 2, "bias": 2, "adapter": 2, "sidetune": 2}
_LONG = 100
_BACKBONES = (
    ("swin", "swin-b"),
    ("convnext", "convnext-b"),
    ("resne", "resnet-50"),
    ("huge", "vit-h"),
    ("large", "vit-l"),
)
# One table for every number of the default preset, so that measurements have one place to change.
_COMMON: dict[str, Any] = {
    "optimizer": "adamw",
    "base_lr": 2.4e-2,
    "weight_decay": 1e-4,
    "epochs": 100,
    "warmup_epochs": 10.0,
    "batch_size": 64,
}
# Without the clipping and the longer warm-up, prompts can stay at chance from this rate on.
_PROMPTS = {"prompt_lr_scale": 2.5, "clip_norm": 1.0, "warmup_epochs": 20.0}
# Three times this rate, and a third of it, still work on every task that was measured.
_DEEP = {**_PROMPTS, "base_lr": 1.2e-2}
# Of those that need other values.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mlp": {"base_lr": 8e-3},
    "sidetune": {"base_lr": 8e-3},
    "full": {"base_lr": 1e-3},
    "partial": {"base_lr": 1e-3},
    "vpt-shallow": _PROMPTS,
    "vpt-deep": _DEEP,
    "vpt+bias": _DEEP,
}


def preset(
    protocol: str,
    *,
    backbone: str | None = None,
    kind: str = "default",
    length: int | None = None,
    **changes: Any,
) -> Recipe:
    """Return the recipe of a protocol.

    Args:
        protocol: As in `apply_protocol`.
        backbone: Name of the model, from which the paper's batch size and epochs follow; None and
            names that say nothing stand for ViT-B/16. The default preset is one for all.
        kind: "default": works unchanged over tasks and backbones. "paper": the values of Tables 6
            and 8, with learning rate and weight decay from the middle of `paper_grid` (of two in
            the middle the smaller one).
        length: Prompts per entry; the paper halves the batch from 100 on.
        changes: Fields of `Recipe` to set. With other epochs, the warm-up keeps its share of them.

    Raises:
        SpecError: An unknown protocol, kind or field, or a wrong value.

    Source: Jia et al. 2022, section A.1, Tables 6 and 8.
    """
    group = _kind_of(protocol, "preset")
    one_of("default", "paper").check("preset", "kind", kind)
    _need_fields("preset", changes, protocol=protocol)
    values = (
        _paper(group, backbone, length) if kind == "paper" else _COMMON | _DEFAULTS.get(group, {})
    )
    if "epochs" in changes and "warmup_epochs" not in changes:
        _RULES["epochs"].check("preset", "epochs", changes["epochs"])
        share = values["warmup_epochs"] / values["epochs"]
        values = values | {"warmup_epochs": share * changes["epochs"]}
    return Recipe.from_dict(values | changes)


def paper_grid(protocol: str, *, wide: bool = False) -> dict[str, list[float]]:
    """Return the learning rates and weight decays among which the paper selects on val.

    Args:
        protocol: As in `apply_protocol`.
        wide: For "vpt-shallow": also the four larger rates that it got on 6 of 24 tasks.

    Raises:
        SpecError: An unknown protocol, or `wide` for another one than "vpt-shallow".

    Source: Jia et al. 2022, Table 6.
    """
    group = _kind_of(protocol, "paper_grid")
    if wide and group != "vpt-shallow":
        given = {"protocol": protocol, "wide": True}
        raise SpecError("paper_grid", "only vpt-shallow has a wide grid", given=given)
    rates = _ADAMW_RATES if group in _ADAMW else _SGD_RATES
    return {
        "base_lr": [*(_SHALLOW_RATES if wide else ()), *rates],
        "weight_decay": list(_DECAYS),
    }


def _kind_of(protocol: str, call: str) -> str:
    try:
        return Protocol(protocol).kind
    except SpecError as error:
        problem = f"must be one of {', '.join(NAMES)}"
        raise SpecError(call, problem, given={"protocol": protocol}) from error


def _paper(group: str, backbone: str | None, length: int | None) -> dict[str, Any]:
    name = (backbone or "").lower()
    row = next((key for part, key in _BACKBONES if re.search(part, name)), "vit-b")
    column = _COLUMNS.get(group, 4 if length is not None and length >= _LONG else 3)
    adamw = group in _ADAMW
    epochs = 50 if row in ("vit-l", "vit-h") else 100
    return {
        "optimizer": "adamw" if adamw else "sgd",
        "base_lr": _middle(_ADAMW_RATES if adamw else _SGD_RATES),
        "weight_decay": _middle(_DECAYS),
        "epochs": epochs,
        "warmup_epochs": 10.0,
        "batch_size": _BATCHES[row][column],
    }


def _middle(values: tuple[float, ...]) -> float:
    return sorted(values)[(len(values) - 1) // 2]
