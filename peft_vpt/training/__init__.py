"""Training: recipes, the loop, metrics, sweeps."""

from __future__ import annotations

from .batches import loader_batch_size
from .from_tokens import prompts_from_tokens
from .health import DivergedError
from .loop import Result, fit
from .losses import class_weights
from .metrics import classification_metrics, evaluate
from .optim import lr_factor, make_optimizer, parameter_groups
from .recipes import Recipe, paper_grid, preset
from .sweeps import SweepResult, SweepTrial, sweep

__all__ = [
    "DivergedError",
    "Recipe",
    "Result",
    "SweepResult",
    "SweepTrial",
    "class_weights",
    "classification_metrics",
    "evaluate",
    "fit",
    "loader_batch_size",
    "lr_factor",
    "make_optimizer",
    "paper_grid",
    "parameter_groups",
    "preset",
    "prompts_from_tokens",
    "sweep",
]
