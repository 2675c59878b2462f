"""The paper's printed results, and closed formulas of what each protocol trains.

Source: Jia et al. 2022, Tables 1, 10, 13 and 14, in `paper.csv`, a column per method. Its rows:
where accuracies are from ("exact": reprinted by later publications; "checked": from reading notes,
where group means and win counts agree); accuracy by task, in percent; Table 1, as printed: group
means, tasks on which a method beats full fine-tuning, total parameters of 24 tasks over one
backbone; Table 10: p-values of VPT-deep against each, from means of five runs that are not printed.
Table 1's Adapter is the one with reduction 64 on FGVC; on VTAB the notes print group means that no
one row gives.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import integer
from ..data.tasks import TASKS
from ..errors import SpecError
from ..protocols.options import Protocol

# In the order of the columns of Tables 14 and 13.
GROUPS: dict[str, tuple[str, ...]] = {
    group: tuple(task.name for task in TASKS if task.group == group)
    for group in ("FGVC", "Natural", "Specialized", "Structured")
}
VTAB_GROUPS = ("Natural", "Specialized", "Structured")
CLASSES = {task.name: task.classes for task in TASKS}
# Trainable parameters of ViT-B/16 in the reference's notebook, by (classes, length); deep.
NOTEBOOK = {(6, 100): 926_214, (397, 5): 351_373}


def _printed() -> dict[tuple[str, str], dict[str, Any]]:
    with Path(__file__).with_name("paper.csv").open(newline="") as file:
        return {
            (row.pop("what"), row.pop("of")): {
                method: float(cell) if cell[0].isdigit() else cell
                for method, cell in row.items()
                if cell
            }
            for row in csv.DictReader(file)
        }


# By row of the file, what it is and of which task or group, then by method.
PRINTED = _printed()


def results(method: str, group: str) -> dict[str, float]:
    """Return the printed accuracies of a method on the tasks of a group, in percent.

    Raises:
        KeyError: No such method or group.
    """
    return {task: PRINTED["accuracy", task][method] for task in GROUPS[group]}


def vtab_results(method: str) -> dict[str, float]:
    """Return the printed accuracies of a method on the 19 tasks of VTAB-1k."""
    return {task: x for group in VTAB_GROUPS for task, x in results(method, group).items()}


def lengths(protocol: str) -> dict[str, int]:
    """Return the paper's best prompt length of each of the 24 tasks, for ViT-B/16.

    Raises:
        KeyError: Neither "vpt-deep" nor "vpt-shallow".
    """
    attribute = {"vpt-deep": "deep", "vpt-shallow": "shallow"}[protocol]
    return {task.name: getattr(task, attribute) for task in TASKS}


def total(protocol: str) -> float:
    """Return the parameters of all 24 tasks over one ViT-B/16, from the closed formulas."""
    per_task = lengths(protocol) if protocol in ("vpt-deep", "vpt-shallow") else None
    return total_ratio(VIT_B16, protocol, CLASSES, per_task=per_task)


@dataclass(frozen=True)
class Stage:
    """Blocks of one width; `heads` matters only where a block has a table of positions."""

    width: int
    depth: int
    heads: int = 0


@dataclass(frozen=True)
class Shape:
    """The sizes of a backbone that its parameter counts follow from.

    Args:
        name: For messages.
        stages: From the image on.
        patch: Edge of a patch in pixels.
        positions: Number of position embeddings, the CLS token's included.
        window: Edge of a window; 0 for models without.
    """

    name: str
    stages: tuple[Stage, ...]
    patch: int
    positions: int = 0
    window: int = 0

    @property
    def features(self) -> int:
        """Width of what the head receives."""
        return self.stages[-1].width

    def over(self, per_block: Callable[[Stage], int]) -> int:
        """Return the sum of something over all blocks."""
        return sum(stage.depth * per_block(stage) for stage in self.stages)

    def table(self, stage: Stage) -> int:
        """Return the size of a block's table of relative positions."""
        return (2 * self.window - 1) ** 2 * stage.heads if self.window else 0

    def block(self, stage: Stage) -> int:
        """Return the parameters of a block: four matrices and an MLP four times as wide."""
        return 12 * stage.width**2 + 13 * stage.width + self.table(stage)


def vit(name: str, width: int, depth: int, *, patch: int = 16, image: int = 224) -> Shape:
    """Return the shape of a plain ViT with a CLS token."""
    return Shape(name, (Stage(width, depth),), patch, positions=(image // patch) ** 2 + 1)


def swin(
    name: str,
    width: int,
    depths: tuple[int, ...],
    heads: tuple[int, ...],
    *,
    patch: int = 4,
    window: int = 7,
) -> Shape:
    """Return the shape of a Swin transformer, whose width doubles from stage to stage."""
    pairs = enumerate(zip(depths, heads, strict=True))
    stages = tuple(Stage(width << index, depth, count) for index, (depth, count) in pairs)
    return Shape(name, stages, patch, window=window)


VIT_B16 = vit("ViT-B/16", 768, 12)
SWIN_B = swin("Swin-B", 128, (2, 2, 18, 2), (4, 8, 16, 32))


def backbone_count(shape: Shape) -> int:
    """Return the number of parameters of a backbone without its head."""
    first = shape.stages[0].width
    stem = 3 * shape.patch**2 * first + first
    # A norm, or the CLS token and positions.
    stem += 2 * first if shape.window else first + shape.positions * first
    mergers = sum(_merger(stage) for stage in shape.stages[1:])
    return stem + shape.over(shape.block) + mergers + 2 * shape.features


def trainable_count(
    shape: Shape, protocol: str, classes: int, *, length: int = 50, reduction: int = 8
) -> int:
    """Return how many parameters train under a protocol, the linear head included.

    Args:
        shape: Of the backbone.
        protocol: A name of `apply_protocol`.
        classes: Outputs of the head.
        length: Prompts per entry, the paper's p.
        reduction: Of "adapter".

    Raises:
        SpecError: An unknown protocol, or more blocks than there are.

    Source: Jia et al. 2022, sections 3.2, 4.1 and A.1.
    """
    integer(1).check("trainable_count", "reduction", reduction)
    given = Protocol(protocol)
    number = given.number or (reduction if given.reduction else length)
    return (shape.features + 1) * classes + _TRAINED[given.kind](shape, number)


def bias_count(shape: Shape, *, tables: bool = False) -> int:
    """Return the number of bias terms of a backbone.

    Args:
        shape: Of the backbone.
        tables: Count tables of relative positions too, as the reference code trains them because
            their names contain "bias"; this library does not.
    """
    first = shape.stages[0].width
    blocks = shape.over(lambda stage: 11 * stage.width + (shape.table(stage) if tables else 0))
    mergers = sum(2 * stage.width for stage in shape.stages[1:])
    return blocks + mergers + first + (first if shape.window else 0) + shape.features


def total_ratio(
    shape: Shape,
    protocol: str,
    classes: Mapping[str, int],
    *,
    per_task: Mapping[str, int] | None = None,
) -> float:
    """Return the parameters of all tasks together over those of one backbone.

    One backbone that the tasks share, and what each task trains; under "full" one backbone per
    task and nothing shared.

    Args:
        shape: Of the backbone.
        protocol: A name of `apply_protocol`.
        classes: Number of classes by task.
        per_task: Prompt length by task, where prompts are trained; for "adapter" the reduction.

    Raises:
        SpecError: A task without a length where the protocol needs one.

    Source: Jia et al. 2022, Table 1, column "total params".
    """
    numbers, given = per_task or {}, Protocol(protocol)
    needs = given.reduction is not None or given.prompted
    absent = sorted(set(classes) - set(numbers)) if needs else []
    if absent:
        told = f"per_task needs a number for {', '.join(absent)} too"
        raise SpecError("total_ratio", told, given={"protocol": protocol})
    trained = 0
    for task, count in classes.items():
        number = numbers.get(task, 1)
        trained += trainable_count(shape, protocol, count, length=number, reduction=number)
    size = backbone_count(shape)
    return (trained + (0 if protocol == "full" else size)) / size


def _merger(stage: Stage) -> int:
    """Return the parameters of the patch merging in front of a stage: norm and reduction."""
    return 4 * stage.width + 2 * stage.width**2


def _cls(shape: Shape) -> int:
    if shape.window:
        raise SpecError("trainable_count", f"{shape.name} has no CLS token")
    return shape.features


def _bottleneck(width: int, hidden: int) -> int:
    return 2 * width * hidden + hidden + width


def _partial(shape: Shape, blocks: int) -> int:
    """Return the last blocks, the patch mergings between them, and the final norm."""
    depth = shape.over(lambda stage: 1)
    if blocks > depth:
        given = {"protocol": f"partial-{blocks}"}
        raise SpecError("trainable_count", f"{shape.name} has {depth} blocks", given=given)
    total, left = 2 * shape.features, blocks
    for stage in reversed(shape.stages):
        taken = min(left, stage.depth)
        total += taken * shape.block(stage)
        left -= taken
        if not left:
            break
        total += _merger(stage)
    return total


def _deep(shape: Shape, length: int) -> int:
    return shape.over(lambda stage: length * stage.width)


# By kind of protocol, without the head; the number is the protocol's k, reduction or length.
_TRAINED: dict[str, Callable[[Shape, int], int]] = {
    "full": lambda shape, _: backbone_count(shape),
    "linear": lambda shape, _: 0,
    "partial": _partial,
    # A batch norm behind each hidden layer.
    "mlp": lambda shape, k: (k - 1) * (shape.features**2 + 3 * shape.features),
    # AlexNet's convolutions, its 9216 features onto the backbone's, and the blend.
    "sidetune": lambda shape, _: 2_469_696 + 9216 * shape.features + 1,
    "bias": lambda shape, _: bias_count(shape),
    "adapter": lambda shape, r: shape.over(
        lambda stage: _bottleneck(stage.width, max(1, stage.width // r))
    ),
    "cls": lambda shape, _: _cls(shape),
    "vpt-shallow": lambda shape, p: p * shape.stages[0].width,
    "vpt-deep": _deep,
    "vpt+bias": lambda shape, p: _deep(shape, p) + bias_count(shape),
    "prompt-fixed": lambda shape, _: 0,
}
