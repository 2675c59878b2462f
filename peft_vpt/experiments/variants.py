"""What a comparison trains: variants of protocols."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..data import Task
from ..data.drawing import stratified
from ..errors import SpecError
from ..protocols.options import PROMPTED, Protocol
from .records import config_hash

Options = Mapping[str, Any]
FINAL = ("trainval", "train")
# First values of prompts that take images to make.
FROM_IMAGES = ("prototypes", "tokens")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of a comparison: a protocol with its settings.

    Args:
        label: Its name, the `protocol` of its records.
        protocol: As in `apply_protocol`.
        options: Of the protocol, plain values. `init` of prompts may be "prototypes": the mean
            features of each class (paper, Figure 13), or "tokens": `prompts_from_tokens`.
        changes: Fields of the recipe to set.
        choices: Further options, one mapping each, among which val chooses.
        fraction: Share of the training images.
        size: Edge of the images; None: the comparison's.
        final: What the final runs train on: "trainval", or "train", as the paper does on FGVC.

    Raises:
        SpecError: An unknown protocol, or a value out of range.
    """

    label: str
    protocol: str
    options: Options = dataclasses.field(default_factory=dict)
    changes: Options = dataclasses.field(default_factory=dict)
    choices: Sequence[Options] = ({},)
    fraction: float = 1.0
    size: int | None = None
    final: str = "trainval"

    def __post_init__(self) -> None:
        Protocol(self.protocol)
        if not self.label or not self.choices:
            raise SpecError(f"Variant({self.label!r}): needs a label, and a choice at least.")
        if not 0 < self.fraction <= 1:
            raise SpecError(
                f"Variant({self.label!r}, fraction={self.fraction!r}): must be above 0, at most 1."
            )
        if self.final not in FINAL:
            raise SpecError(f"Variant(final={self.final!r}): must be one of {', '.join(FINAL)}.")

    @property
    def prompted(self) -> bool:
        """Whether the protocol has prompts."""
        return Protocol(self.protocol).kind in PROMPTED


def plain(protocols: Iterable[str], options: Mapping[str, Options]) -> tuple[Variant, ...]:
    """Return protocols as they are, each under its own name."""
    return tuple(Variant(name, name, options.get(name, {})) for name in protocols)


def is_name(label: str) -> bool:
    """Tell whether a label is the name of a protocol, as `plain` gives it."""
    try:
        return bool(Protocol(label))
    except SpecError:
        return False


def with_tokens(variant: Variant) -> Variant:
    """Let prompts that train, and have no first values of their own, begin as tokens."""
    if not Protocol(variant.protocol).trains_prompts or "init" in variant.options:
        return variant
    return dataclasses.replace(variant, options={**variant.options, "init": "tokens"})


def with_lengths(variants: Iterable[Variant], lengths: Sequence[int]) -> tuple[Variant, ...]:
    """Give prompts that have no length one; of several, val chooses.

    Raises:
        SpecError: No lengths.
    """
    if not lengths:
        raise SpecError("with_lengths: there are no lengths; give one at least.")
    return tuple(_with_length(variant, lengths) for variant in variants)


def _with_length(variant: Variant, lengths: Sequence[int]) -> Variant:
    if not variant.prompted or "length" in variant.options:
        return variant
    if len(lengths) == 1:
        options = {**variant.options, "length": lengths[0]}
        return dataclasses.replace(variant, options=options)
    choices = [{**c, "length": n} for c in variant.choices for n in lengths]
    return dataclasses.replace(variant, choices=tuple(choices))


def with_fraction(variants: Iterable[Variant], fraction: float) -> tuple[Variant, ...]:
    """Let variants train on a share of the training images, and their labels say so.

    Final runs train on the share of `train` alone: `val` would outweigh it, and the paper does so.
    """
    if fraction == 1:
        return tuple(variants)
    return tuple(
        dataclasses.replace(
            v, label=f"{v.label} {percent(fraction)}", fraction=fraction, final="train"
        )
        for v in variants
    )


def percent(fraction: float) -> str:
    """Return a share in words, "10 %"."""
    return f"{100 * fraction:g} %"


def reduced(task: Task, fraction: float, seed: int = 0) -> Task:
    """Return a task with a stratified share of its training images, as `open_task` draws it."""
    if fraction == 1:
        return task
    drawn, _ = stratified(task.split("train").labels, fraction, seed, least=1)
    splits = {**task.splits, "train": task.split("train").subset(drawn)}
    return dataclasses.replace(task, splits=splits)


def file_name(text: str) -> str:
    """Return a text as the name of a file or folder."""
    return re.sub(r"[^A-Za-z0-9.+_=-]+", "-", text).strip("-")


def adapter_folder(task: str, label: str, backbone: str, seed: int, config: Options) -> str:
    """Return the folder of a run's adapter, below that of all runs; every run has another one."""
    told = config_hash({**config, "backbone": backbone})
    return f"{file_name(task)}/{file_name(label)}-{seed}-{told}"
