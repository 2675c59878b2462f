"""Presets: the paper's recipe per protocol and backbone, and one that needs no luck."""

from __future__ import annotations

import re
from typing import Any

from ..errors import SpecError
from ..protocols.options import NAMES, Protocol
from .recipes import Recipe, check_fields

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
_DEFAULTS: dict[str, dict[str, Any]] = {
    "linear": {},
    "mlp": {"base_lr": 8e-3},
    "sidetune": {"base_lr": 8e-3},
    "full": {"base_lr": 1e-3},
    "partial": {"base_lr": 1e-3},
    "bias": {},
    "adapter": {},
    "cls": {},
    "prompt-fixed": {},
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
    group = _kind(protocol, "preset")
    if kind not in ("default", "paper"):
        raise SpecError(f"preset(kind={kind!r}): must be 'default' or 'paper'.")
    check_fields(f"preset({protocol!r})", changes)
    values = _paper(group, backbone, length) if kind == "paper" else _COMMON | _DEFAULTS[group]
    if "epochs" in changes and "warmup_epochs" not in changes:
        Recipe.from_dict(values | {"epochs": changes["epochs"], "warmup_epochs": 0.0})
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
    group = _kind(protocol, "paper_grid")
    if wide and group != "vpt-shallow":
        raise SpecError(f"paper_grid({protocol!r}, wide=True): only vpt-shallow has a wide grid.")
    rates = _ADAMW_RATES if group in _ADAMW else _SGD_RATES
    return {
        "base_lr": [*(_SHALLOW_RATES if wide else ()), *rates],
        "weight_decay": list(_DECAYS),
    }


def _kind(protocol: str, call: str) -> str:
    try:
        return Protocol(protocol).kind
    except SpecError as error:
        raise SpecError(
            f"{call}(protocol={protocol!r}): must be one of {', '.join(NAMES)}."
        ) from error


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
