"""Replacing a model's classifier in place, and putting the former one back."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .anatomy import Head, ancestors, first_floating
from .weights import is_packed

# Deviation of a new classifier's weights.
HEAD_STD = 0.02
_COUNTS = ("num_classes", "num_labels")


@dataclass
class FormerHead:
    """What a model had before its head was replaced; kept outside the module tree."""

    dtype: torch.dtype
    modules: dict[str, nn.Module] = field(default_factory=dict)
    owner: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)
    config: Any = None

    @property
    def classes(self) -> int:
        """Number of classes; 0 where it is an identity."""
        return _classes(next(iter(self.modules.values())))


def class_count(host: nn.Module, head: Head) -> int:
    """Return the number of classes of the head that the model has (0 where it is an identity)."""
    return _classes(host.get_submodule(head.paths[0]))


def _classes(head: nn.Module) -> int:
    counts = [
        getattr(module, "out_features", getattr(module, "out_channels", None))
        for module in head.modules()
    ]
    return int(next((count for count in reversed(counts) if count is not None), 0))


def replace_head(
    host: nn.Module,
    head: Head,
    classes: int,
    *,
    width: int,
    device: torch.device,
    generator: torch.Generator | None,
    bias: bool = True,
) -> FormerHead:
    """Put a new linear head of `classes` outputs into the model; 0 puts an identity there.

    Bias zero, weights normal with standard deviation 0.02, drawn on the generator's device.
    A transformers host gets its own copy of `config`, since models may share one.

    Args:
        host: The model.
        head: Where its head is.
        classes: Number of outputs.
        width: Number of input features.
        device: Where the new head goes.
        bias: Whether the new head has a bias.
        generator: Source of randomness; None: torch's global one.

    Returns:
        What `restore_head` needs.
    """
    dtype = first_floating(host).dtype
    former = FormerHead(dtype)
    for path in head.paths:
        old = host.get_submodule(path)
        former.modules[path] = old
        new: nn.Module = nn.Identity()
        if classes:
            kind = MapLinear if isinstance(old, nn.Conv2d) else nn.Linear
            own = next((p.dtype for p in old.parameters()), dtype)
            new = layer = kind(width, classes, bias, device="meta", dtype=own)
            layer.to_empty(device=device)
            draw(layer.weight, generator, HEAD_STD)
            if bias:
                nn.init.zeros_(layer.bias)
        host.set_submodule(path, new.train(host.training))
    former.owner = head_owner(host, head.paths[0])
    owner: Any = host.get_submodule(former.owner)
    for name in _COUNTS:
        if isinstance(vars(owner).get(name), int):
            former.attributes[name] = vars(owner)[name]
            setattr(owner, name, classes)
    config = vars(owner).get("config")
    if config is not None and hasattr(config, "num_labels"):
        former.config = config
        owner.config = copy.deepcopy(config)
        set_labels(owner.config, [f"LABEL_{i}" for i in range(classes)])
        owner.config.problem_type = None
    return former


def restore_head(host: nn.Module, former: FormerHead) -> None:
    """Undo `replace_head`; the former head follows the model's device and dtype."""
    like = first_floating(host)
    owner: Any = host.get_submodule(former.owner)
    for path, module in former.modules.items():
        module.to(like.device, None if like.dtype == former.dtype else like.dtype)
        host.set_submodule(path, module)
    for name, value in former.attributes.items():
        setattr(owner, name, value)
    if former.config is not None:
        owner.config = former.config


def set_labels(config: Any, labels: list[str]) -> None:
    """Write label names into a transformers config."""
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}


class MapLinear(nn.Linear):
    """A linear classifier in the place of one that was a convolution of a pooled 1 x 1 map."""

    def forward(self, input: Tensor) -> Tensor:
        """Flatten the map and classify it: `(batch, classes)`."""
        return super().forward(input.flatten(1))


def can_replace(layer: nn.Module) -> bool:
    """Tell whether a linear layer can stand in for a classifier."""
    if isinstance(layer, nn.Conv2d):
        return layer.kernel_size == (1, 1) and layer.groups == 1
    return isinstance(layer, nn.Linear | nn.Identity) or is_packed(layer)


@torch.no_grad()
def draw(weight: Tensor, generator: torch.Generator | None, std: float | None = None) -> None:
    """Fill a weight `(out, in, ...)` on the generator's device: U(+-1 / sqrt(in)), or normal."""
    drawn = torch.empty(weight.shape, device="cpu" if generator is None else generator.device)
    if std is None:
        bound = 1 / math.sqrt(weight[0].numel())
        weight.copy_(drawn.uniform_(-bound, bound, generator=generator))
    else:
        weight.copy_(drawn.normal_(0.0, std, generator=generator))


def head_owner(host: nn.Module, path: str) -> str:
    """Return the path of the module that counts a head's classes: the nearest one around it.

    The head's parent where nothing around it counts.
    """
    for around, module in ancestors(host, path):
        attributes = vars(module)
        counts = any(isinstance(attributes.get(name), int) for name in _COUNTS)
        if counts or hasattr(attributes.get("config"), "num_labels"):
            return around
    return path.rpartition(".")[0]
