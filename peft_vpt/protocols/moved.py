"""Which weights of the backbone itself a protocol trains."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from ..backbones.anatomy import Encoder, module_at
from ..errors import SpecError, UnsupportedArchitectureError
from .options import Protocol

# A table of relative positions carries "bias" in its name and is none.
_BIAS = re.compile(r"(.*\.)?(bias|[a-z_]*_bias)")
_CLS = re.compile(r"(.*\.)?(cls_token|class_token|class_embedding)")
_STAGES = ("stages", "encoder.stages", "layers", "encoder.layers", "features", "blocks")


def moved_names(host: nn.Module, encoder: Encoder, protocol: Protocol) -> list[str]:
    """Return the parameters of the backbone that train, in the order of `named_parameters`.

    Raises:
        SpecError: More blocks than there are.
        UnsupportedArchitectureError: The model has no such weights.
    """
    if not protocol.moves:
        return []
    names = [name for name, _ in host.named_parameters() if not _apart(encoder, name)]
    if protocol.kind == "partial":
        return names[_first_of_last(host, encoder, protocol, names) :]
    if protocol.kind in ("bias", "vpt+bias"):
        shapes = dict(host.named_parameters())
        names = [n for n in names if _BIAS.fullmatch(n) and shapes[n].dim() == 1]
    elif protocol.kind == "cls":
        names = [n for n in names if _CLS.fullmatch(n)]
    if not names:
        raise UnsupportedArchitectureError(
            f"apply_protocol({protocol.name!r}): {type(host).__name__} has "
            f"{'no CLS token' if protocol.kind == 'cls' else 'no bias terms'} that could train."
        )
    return names


def moved_buffers(host: nn.Module, encoder: Encoder, protocol: Protocol) -> list[str]:
    """Return the statistics (of batch norms) that move with the weights around them."""
    paths = trained_paths(host, encoder, protocol)
    return [
        name
        for name, buffer in host.named_buffers()
        if "running_" in name and buffer.is_floating_point() and not _apart(encoder, name)
        if any(_below(name, path) for path in paths)
    ]


def trained_paths(host: nn.Module, encoder: Encoder, protocol: Protocol) -> tuple[str, ...]:
    """Return the modules that follow the model into train mode: what trains as a whole.

    Dropout and batch statistics of the others stay as at inference. So it is for biases: a batch
    norm whose bias alone trains keeps its statistics.
    """
    if protocol.kind == "full":
        return ("",)
    if protocol.kind != "partial":
        return ()
    names = moved_names(host, encoder, protocol)
    blocks = [block.path for block in encoder.blocks[len(encoder.blocks) - protocol.number :]]
    if not encoder.blocks:
        blocks = [path for path, _ in _stages(host, encoder)[-protocol.number :]]
    beside = {name.rpartition(".")[0] for name in names}
    return (*blocks, *sorted(p for p in beside if not any(_below(p, b) for b in blocks)))


def _first_of_last(host: nn.Module, encoder: Encoder, protocol: Protocol, names: list[str]) -> int:
    """Return where the last k blocks begin; norms and mergers between and behind them train too."""
    parts = [block.path for block in encoder.blocks] or [p for p, _ in _stages(host, encoder)]
    if protocol.number > len(parts):
        raise SpecError(
            f"apply_protocol({protocol.name!r}): the model has {len(parts)} "
            f"{'blocks' if encoder.blocks else 'stages'}."
        )
    first = parts[-protocol.number]
    return next(i for i, name in enumerate(names) if _below(name, first))


def _stages(host: nn.Module, encoder: Encoder) -> list[tuple[str, nn.Module]]:
    """Return the stages of a model without known blocks, of a ConvNet, that have parameters.

    Raises:
        UnsupportedArchitectureError: It does not show any.
    """
    found = _shown_stages(host, encoder)
    # timm counts the activation behind a ResNet's stem as a stage.
    return [(path, stage) for path, stage in found if next(stage.parameters(), None) is not None]


def _shown_stages(host: nn.Module, encoder: Encoder) -> list[tuple[str, nn.Module]]:
    model: Any = module_at(host, encoder.path)
    prefix = f"{encoder.path}." if encoder.path else ""
    info = getattr(getattr(model, "feature_info", None), "info", None) or getattr(
        model, "feature_info", None
    )
    named = [i["module"] for i in info if "module" in i] if isinstance(info, list) else []
    known = dict(model.named_modules())
    if named and all(name in known for name in named):
        return [(prefix + name, known[name]) for name in named]
    for name in _STAGES:
        stages = known.get(name)
        if isinstance(stages, nn.ModuleList | nn.Sequential) and len(stages) > 1:
            return [(f"{prefix}{name}.{i}", stage) for i, stage in enumerate(stages)]
    raise UnsupportedArchitectureError(
        f"apply_protocol('partial-k'): {type(model).__name__} shows no blocks or stages."
    )


def _apart(encoder: Encoder, name: str) -> bool:
    head = encoder.head.paths if encoder.head else ()
    return any(_below(name, path) for path in ("prompts", *head))


def _below(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(f"{path}.")
