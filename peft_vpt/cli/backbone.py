"""The backbone of a comparison: built at any size, and asked which rows it takes."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import complain
from .sources import build, preprocessing_of

if TYPE_CHECKING:
    from ..data import Task
    from ..experiments.ablations import Row
    from ..experiments.variants import Variant


class Backbone:
    """The backbone that was asked for, at any image size."""

    def __init__(
        self, model: str, weights: Path | None, size: int | None, offline: bool, pool: str | None
    ) -> None:
        from ..experiments.backbones import usual_pool

        self.model, self.weights, self.size, self.offline = model, weights, size, offline
        self.pool = pool or usual_pool(model)
        self.preprocessing: Any = None

    @cached_property
    def checksum(self) -> str:
        """What tells its weights from others of its name: of their file, or of the model."""
        from ..experiments.sums import file_sum, model_sum

        return model_sum(self.make()) if self.weights is None else file_sum(self.weights)

    @property
    def name(self) -> str:
        """Return its name in records."""
        return f"{self.model} ({self.pool})" if self.pool else self.model

    def make(self, edge: int | None = None) -> Any:
        """Build it, bare."""
        from ..experiments.backbones import pooled

        found = build(self.model, self.weights, edge or self.size, self.offline)
        if self.preprocessing is None:
            self.preprocessing = preprocessing_of(found, self.offline)
        return pooled(found, self.pool)

    def transform(self, edge: int | None) -> Any:
        """Return the transform of its images."""
        from ..data import eval_transform

        return eval_transform(self.preprocessing, edge)

    def at(self, edge: int) -> tuple[Any, Any]:
        """Return transform and builder for another size."""
        return self.transform(edge), lambda: self.make(edge)

    def describe(self) -> str:
        """Say what the head reads."""
        told = {"token": "the CLS token", "avg": "the mean of the patch tokens"}
        what = told.get(self.pool or "", "what the model gives it")
        return f"the head reads {what}" + (f" (--pool {self.pool})" if self.pool else "")


def taken(
    call: str, rows: list[Row], backbone: Backbone, task: Task, asked: str | None
) -> list[Row]:
    """Leave out the rows that a backbone refuses, and say so.

    Args:
        call: The command.
        rows: Of the comparison.
        backbone: Built anew for every row.
        task: What the rows train on.
        asked: Option by which the user has named the rows, of which none is left out then.

    Raises:
        VPTError: It refuses all of them, or one that was asked for.
    """
    from ..errors import VPTError
    from ..experiments.ablations import variants_of

    reasons = {v.label: _reason(v, backbone, task) for v in variants_of(rows)}
    told = [f"{label}: {reason}" for label, reason in reasons.items() if reason]
    if told and asked:
        raise VPTError(f"{call}: {asked}: {'; '.join(told)}")
    for line in told:
        complain(f"left out: {line}")
    if len(told) == len(reasons):
        raise VPTError(f"{call}: this backbone takes none of the rows.")
    return [row for row in rows if not reasons[row.variant.label]]


def as_tokens(
    call: str, rows: list[Row], backbone: Backbone, task: Task, *, asked: bool
) -> list[Row]:
    """Let prompts begin as tokens of training images in the rows that can, and say which cannot.

    Args:
        call: The command.
        rows: Of the comparison.
        backbone: Built anew for every row.
        task: Whose training images give the tokens.
        asked: Whether the user asked for it.

    Raises:
        VPTError: It was asked for, and a row cannot.
    """
    from ..errors import VPTError
    from ..experiments.variants import with_tokens

    changed = []
    for row in rows:
        variant = with_tokens(row.variant)
        reason = "" if variant is row.variant else _reason(variant, backbone, task)
        if reason and asked:
            raise VPTError(f"{call}: --init tokens: {variant.label}: {reason}")
        if reason:
            complain(f"{variant.label}: prompts begin at random: {reason}")
            variant = row.variant
        changed.append(row._replace(variant=variant))
    return changed


def _reason(variant: Variant, backbone: Backbone, task: Task) -> str:
    """Return why a backbone refuses a variant, "" where it takes it."""
    from ..backbones.image_model import says_its_size
    from ..experiments.backbones import refusal

    images = int(len(task.split("train")) * variant.fraction)
    size = backbone.transform(variant.size or backbone.size).preprocessing["size"]
    model = says_its_size(backbone.make(variant.size), size)
    return refusal(variant, model, len(task.classes), size, images)
