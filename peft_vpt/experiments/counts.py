"""Closed formulas of what each protocol trains, for ViT and Swin, and totals over tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import SpecError
from ..protocols.options import PROMPTED, Protocol

_MLP_RATIO = 4
_ALEXNET_FEATURES = 2_469_696
_SIDE_SIZE = 9216


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
VIT_L16 = vit("ViT-L/16", 1024, 24)
VIT_H14 = vit("ViT-H/14", 1280, 32, patch=14)
VIT_TI16 = vit("ViT-Ti/16", 192, 12)
SWIN_B = swin("Swin-B", 128, (2, 2, 18, 2), (4, 8, 16, 32))


def backbone_count(shape: Shape) -> int:
    """Return the number of parameters of a backbone without its head."""
    first = shape.stages[0].width
    stem = 3 * shape.patch**2 * first + first
    if shape.window:
        stem += 2 * first
    else:
        stem += first + shape.positions * first
    blocks = sum(stage.depth * _block(shape, stage) for stage in shape.stages)
    mergers = sum(_merger(stage.width) for stage in shape.stages[1:])
    return stem + blocks + mergers + 2 * shape.features


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
    given = Protocol(protocol, reduction=reduction if protocol == "adapter" else None)
    kind, width = given.kind, shape.features
    head = (width + 1) * classes
    if kind == "mlp":
        # A batch norm behind each hidden layer.
        return head + (given.number - 1) * (width * width + 3 * width)
    if kind == "sidetune":
        return head + _ALEXNET_FEATURES + _SIDE_SIZE * width + 1
    if kind in PROMPTED:
        return head + _prompted(shape, kind, length)
    moved: dict[str, Callable[[], int]] = {
        "linear": lambda: 0,
        "full": lambda: backbone_count(shape),
        "bias": lambda: bias_count(shape),
        "cls": lambda: _cls(shape),
        "adapter": lambda: adapter_count(shape, reduction),
        "partial": lambda: _partial(shape, given.number),
    }
    return head + moved[kind]()


def bias_count(shape: Shape, *, tables: bool = False) -> int:
    """Return the number of bias terms of a backbone.

    Args:
        shape: Of the backbone.
        tables: Count tables of relative positions too, as the reference code trains them because
            their names contain "bias"; this library does not.
    """
    first = shape.stages[0].width
    blocks = sum(11 * stage.width * stage.depth for stage in shape.stages)
    mergers = sum(2 * stage.width for stage in shape.stages[1:])
    around = first + (first if shape.window else 0) + shape.features
    table = sum(stage.depth * _table(shape, stage) for stage in shape.stages)
    return blocks + mergers + around + (table if tables else 0)


def adapter_count(shape: Shape, reduction: int) -> int:
    """Return the number of parameters of a bottleneck in every block."""
    total = 0
    for stage in shape.stages:
        hidden = max(1, stage.width // reduction)
        total += stage.depth * (2 * stage.width * hidden + hidden + stage.width)
    return total


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
    numbers = per_task or {}
    needs = protocol == "adapter" or protocol in PROMPTED
    absent = sorted(set(classes) - set(numbers)) if needs else []
    if absent:
        raise SpecError(
            f"total_ratio({protocol!r}): per_task needs a number for {', '.join(absent)} too."
        )
    trained = 0
    for task, count in classes.items():
        number = numbers.get(task, 1)
        trained += trainable_count(shape, protocol, count, length=number, reduction=number)
    size = backbone_count(shape)
    return (trained + (0 if protocol == "full" else size)) / size


def _block(shape: Shape, stage: Stage) -> int:
    width = stage.width
    matrices = (4 + 2 * _MLP_RATIO) * width * width
    return matrices + (4 + _MLP_RATIO + 1 + 4) * width + _table(shape, stage)


def _table(shape: Shape, stage: Stage) -> int:
    """Return the size of a block's table of relative positions."""
    return (2 * shape.window - 1) ** 2 * stage.heads if shape.window else 0


def _merger(width: int) -> int:
    """Return the parameters of the patch merging in front of a stage: norm and reduction."""
    return 2 * (2 * width) + 2 * width * width


def _cls(shape: Shape) -> int:
    if shape.window:
        raise SpecError(f"trainable_count('cls'): {shape.name} has no CLS token.")
    return shape.features


def _prompted(shape: Shape, kind: str, length: int) -> int:
    if kind == "prompt-fixed":
        return 0
    if kind == "vpt-shallow":
        return length * shape.stages[0].width
    deep = length * sum(stage.width * stage.depth for stage in shape.stages)
    return deep + (bias_count(shape) if kind == "vpt+bias" else 0)


def _partial(shape: Shape, blocks: int) -> int:
    """Return the last blocks, the patch mergings between them, and the final norm."""
    depth = sum(stage.depth for stage in shape.stages)
    if blocks > depth:
        raise SpecError(f"trainable_count('partial-{blocks}'): {shape.name} has {depth} blocks.")
    total, left = 2 * shape.features, blocks
    for stage in reversed(shape.stages):
        taken = min(left, stage.depth)
        total += taken * _block(shape, stage)
        left -= taken
        if not left:
            return total
        total += _merger(stage.width)
    return total
