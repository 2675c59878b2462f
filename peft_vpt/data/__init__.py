"""Data: tasks from folders, lists, json splits and Hugging Face datasets; transforms; loaders."""

from __future__ import annotations

from .loading import check_images, decode, loader
from .masks import (
    SegmentationSplit,
    SegmentationTask,
    check_masks,
    open_segmentation,
    segmentation_loader,
)
from .open import open_task
from .splits import Split, Task
from .tasks import TASKS, PaperTask, paper_task
from .transforms import (
    SegmentationTransform,
    Transform,
    eval_transform,
    preprocessing_for,
    segmentation_transform,
    train_transform,
)

__all__ = [
    "TASKS",
    "PaperTask",
    "SegmentationSplit",
    "SegmentationTask",
    "SegmentationTransform",
    "Split",
    "Task",
    "Transform",
    "check_images",
    "check_masks",
    "decode",
    "eval_transform",
    "loader",
    "open_segmentation",
    "open_task",
    "paper_task",
    "preprocessing_for",
    "segmentation_loader",
    "segmentation_transform",
    "train_transform",
]
