"""What trains at which rate: parameter groups, the schedule, the optimizer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..backbones.anatomy import is_below
from ..errors import SpecError
from ..hosts import unwrap
from ..inject import trainable_parameters
from .recipes import Recipe

_GROUPS = ("prompts", "prompts-bias", "head", "head-bias", "backbone", "backbone-bias")
# Heads of models that carry no `prompts`, which would know.
_HEADS = ("head", "head_dist", "fc", "classifier")


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Return the optimizer's groups over everything that trains.

    | group | parameters | learning rate | weight decay |
    |---|---|---|---|
    | `prompts` | prompts, and matrices that a protocol adds | x `prompt_lr_scale` | yes |
    | `prompts-bias` | vectors that a protocol or projection adds | x `prompt_lr_scale` | SGD only |
    | `head` | weights of the head | x 1 | yes |
    | `head-bias` | biases of the head | x 1 | no |
    | `backbone` | matrices of the backbone that train | x 1 | yes |
    | `backbone-bias` | biases and norms of the backbone that train | x 1 | SGD only |

    Empty groups are left out. `lr` is the peak rate.

    Args:
        model: With what shall train requiring gradients.
        recipe: The recipe.

    Raises:
        SpecError: Nothing trains.

    Source: Jia et al. 2022, section A.1.
    """
    found: dict[str, list[nn.Parameter]] = {name: [] for name in _GROUPS}
    for name, parameter in trainable_parameters(model).items():
        bias = parameter.ndim <= 1 or name.endswith(".bias")
        owner = owner_of(unwrap(model), name)
        found[f"{owner}-bias" if bias else owner].append(parameter)
    if not any(found.values()):
        problem = "no parameter of the model requires gradients"
        advice = "call inject_prompts or apply_protocol first"
        raise SpecError("parameter_groups", problem, advice)
    return [
        {"name": name, "params": members, "lr": _rate(name, recipe), "weight_decay": decay}
        for name, members in found.items()
        if members
        for decay in [_decay(name, recipe)]
    ]


def trains_backbone(model: nn.Module) -> bool:
    """Tell whether parameters outside prompts and head train."""
    return any(owner_of(unwrap(model), name) == "backbone" for name in trainable_parameters(model))


def lr_factor(step: int, steps_per_epoch: int, recipe: Recipe) -> float:
    """Return the share of its peak that the learning rate has at an optimizer step.

    Linear warm-up per step, `(step + 1) / warm-up steps`, so that the first step trains; then a
    cosine from 1 to 0, which it would reach one step after the last one.

    Args:
        step: From 0 on, over all epochs.
        steps_per_epoch: Optimizer steps in an epoch.
        recipe: The recipe.

    Source: Jia et al. 2022, section A.1.
    """
    warm = round(recipe.warmup_epochs * steps_per_epoch)
    if step < warm:
        return (step + 1) / warm
    rest = recipe.epochs * steps_per_epoch - warm
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - warm) / rest)))


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the optimizer over `parameter_groups`."""
    groups = parameter_groups(model, recipe)
    for group in groups:
        group["initial_lr"] = group["lr"]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=recipe.momentum)
    return torch.optim.AdamW(groups, betas=recipe.betas, eps=recipe.eps)


def set_rate(optimizer: Any, factor: float) -> None:
    """Set every group to a share of its peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def owner_of(model: nn.Module, name: str) -> str:
    """Return what a tensor of a model, not wrapped, belongs to: "prompts", "head", "backbone".

    A decoder that trains whole counts as head.
    """
    if name.startswith(("prompts.", "delta.")):
        return "prompts"
    decoder = getattr(getattr(model, "prompts", None), "undo", {}).get("decoder", {})
    encoder = getattr(getattr(model, "prompts", None), "encoder", None)
    inside = is_below(name, *(_HEADS if encoder is None else encoder.head_paths))
    return "head" if inside or name in decoder else "backbone"


def _rate(group: str, recipe: Recipe) -> float:
    return recipe.peak_lr * (recipe.prompt_lr_scale if group.startswith("prompts") else 1.0)


def _decay(group: str, recipe: Recipe) -> float:
    spared = group == "head-bias" or (group.endswith("-bias") and recipe.optimizer == "adamw")
    return 0.0 if spared else recipe.weight_decay
