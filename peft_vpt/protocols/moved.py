"""Which weights of the backbone itself a protocol trains."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from torch import nn

from ..backbones.anatomy import Encoder, is_below
from ..backbones.weights import is_packed
from ..errors import SpecError, UnsupportedArchitectureError
from ..rehearsal import Rehearsal, rehearse_host
from .options import Protocol

# A table of relative positions carries "bias" in its name and is none.
_BIAS = re.compile(r"(.*\.)?(bias|[a-z_]*_bias)")
_CLS = re.compile(r"(.*\.)?(cls_token|class_token|class_embedding)")
_STAGES = ("stages", "encoder.stages", "layers", "encoder.layers", "features", "blocks")


class Moved(NamedTuple):
    """What a protocol changes in the backbone itself.

    Args:
        names: Of the parameters that train, in the order of `named_parameters`.
        buffers: Of the statistics (of batch norms) that move with the weights around them.
        paths: Of the modules that follow the model into train mode: what trains as a whole.
            Dropout and batch statistics of the others stay as at inference. So it is for biases:
            a batch norm whose bias alone trains keeps its statistics.
    """

    names: list[str]
    buffers: list[str]
    paths: tuple[str, ...]


def moved(host: nn.Module, encoder: Encoder, protocol: Protocol) -> Moved:
    """Return what of the backbone moves.

    Raises:
        SpecError: More blocks than there are.
        UnsupportedArchitectureError: The model has no such weights, they are integers, or which of
            its blocks are the last is not known.
    """
    if not protocol.moves:
        return Moved([], [], ())
    names = [name for name, _ in host.named_parameters() if not _apart(encoder, name)]
    if encoder.head is not None:
        # It stands in for patches that pretraining hides; a classifier's images have none.
        names = [name for name in names if name.rpartition(".")[2] != "mask_token"]
    paths: tuple[str, ...] = ()
    if protocol.kind == "full":
        paths = ("",)
    elif protocol.kind == "partial":
        names, paths = _last(host, encoder, protocol, names)
    elif protocol.kind == "cls":
        names = [n for n in names if _CLS.fullmatch(n)]
    else:
        shapes = dict(host.named_parameters())
        names = [n for n in names if _BIAS.fullmatch(n) and shapes[n].dim() == 1]
    if not names:
        raise UnsupportedArchitectureError(
            f"apply_protocol({protocol.name!r}): {type(host).__name__} has "
            f"{_NOTHING.get(protocol.kind, 'no bias terms')} that could train."
        )
    _refuse_integers(host, protocol, names, paths)
    return Moved(names, _statistics(host, encoder, paths), paths)


_NOTHING = {"cls": "no CLS token", "full": "no weights", "partial": "no weights"}


def _statistics(host: nn.Module, encoder: Encoder, paths: tuple[str, ...]) -> list[str]:
    return [
        name
        for name, buffer in host.named_buffers()
        if "running_" in name and buffer.is_floating_point() and not _apart(encoder, name)
        if is_below(name, *paths)
    ]


def _refuse_integers(
    host: nn.Module, protocol: Protocol, names: list[str], paths: tuple[str, ...]
) -> None:
    """Raise where weights that should train are quantized: they have no gradients."""
    parameters = dict(host.named_parameters())
    wrong = [n for n in names if not parameters[n].is_floating_point()]
    wrong += [
        path
        for path, module in host.named_modules()
        if is_packed(module) and is_below(path, *paths)
    ]
    if wrong:
        raise UnsupportedArchitectureError(
            f"apply_protocol({protocol.name!r}): {wrong[0]} of {type(host).__name__} is quantized "
            "and cannot train. Load the model in full or half precision, or choose a protocol "
            "that leaves such weights alone ('linear', 'bias', 'vpt-deep', ...)."
        )


def _last(
    host: nn.Module, encoder: Encoder, protocol: Protocol, names: list[str]
) -> tuple[list[str], tuple[str, ...]]:
    """Return what trains of the last k blocks and of norms and mergers between and behind them.

    Names of parameters, and paths of modules.
    """
    parts = [block.path for block in encoder.blocks] or [p for p, _ in _stages(host, encoder)]
    if protocol.number > len(parts):
        raise SpecError(
            f"apply_protocol({protocol.name!r}): the model has {len(parts)} "
            f"{'blocks' if encoder.blocks else 'stages'}."
        )
    shown = rehearse_host(host, encoder, [path for path, _ in host.named_modules()])
    order = _order(host, encoder, protocol, parts, shown)
    parts = sorted(parts, key=lambda path: order.get(path, -1))
    behind = _Behind(parts, protocol.number, order, stages=not encoder.blocks)
    idle = _idle(host, order)
    first = next((i for i, name in enumerate(names) if is_below(name, behind.first)), len(names))
    names = [
        name
        for i, name in enumerate(names)
        if behind(name, registered=i >= first and name.rpartition(".")[0] not in idle)
    ]
    beside = {name.rpartition(".")[0] for name in names}
    apart = sorted(p for p in beside if not is_below(p, *behind.last))
    return names, (*behind.last, *apart)


def _order(
    host: nn.Module,
    encoder: Encoder,
    protocol: Protocol,
    parts: list[str],
    shown: Rehearsal | None,
) -> dict[str, int]:
    """Return the order in which modules run, as far as it is known; {}: as they are registered."""
    order = {} if shown is None else shown.order
    if order and all(path in order for path in parts):
        return order
    # Nothing can train on `meta`, which is told elsewhere.
    meta = any(p.is_meta for p in host.parameters())
    if (encoder.blocks and encoder.plain) or meta:
        return {}
    raise UnsupportedArchitectureError(
        f"apply_protocol({protocol.name!r}): it is not known in which order "
        f"{type(host).__name__} runs its {'blocks' if encoder.blocks else 'stages'}, since no "
        "image that was tried passes all of them; use 'bias', 'full' or prompts."
    )


def _idle(host: nn.Module, order: dict[str, int]) -> set[str]:
    """Return the modules that the whole model never called: a pooling that its head leaves out.

    Nothing where the encoder alone could be run. Lists of parameters are never called.
    """
    lists = (nn.ParameterList, nn.ParameterDict)
    paths = {path for path, module in host.named_modules() if not isinstance(module, lists)}
    return paths - set(order) if "" in order else set()


class _Behind:
    """Tells which parameters belong to the last parts or run behind the first of those.

    A stage begins where the one before it ends: DenseNet's and others show only its last part.
    """

    def __init__(
        self, parts: list[str], number: int, order: dict[str, int], *, stages: bool
    ) -> None:
        self.last = parts[-number:]
        self.first = self.last[0]
        self._parts = set(parts)
        self._order = order
        self._begin = order.get(self.first, 0)
        if stages and number < len(parts):
            before = parts[-number - 1]
            self._begin = max((at for p, at in order.items() if is_below(p, before)), default=0)
        self._around = {part[:end] for part in parts for end in _ends(part)}

    def __call__(self, name: str, *, registered: bool) -> bool:
        """Tell it of one parameter.

        Args:
            name: Its name.
            registered: The answer by the order of registration, for what no module call shows.
        """
        path = name.rpartition(".")[0]
        while path and path not in self._around:
            if path in self._parts:
                return path in self.last
            if path in self._order:
                return self._order[path] > self._begin
            path = path.rpartition(".")[0]
        return registered


def _ends(path: str) -> list[int]:
    return [i for i, char in enumerate(path) if char == "."]


def _stages(host: nn.Module, encoder: Encoder) -> list[tuple[str, nn.Module]]:
    """Return the stages of a model without known blocks, of a ConvNet, that have parameters.

    Raises:
        UnsupportedArchitectureError: It does not show any.
    """
    found = _shown_stages(host, encoder)
    # timm counts the activation behind a ResNet's stem as a stage.
    found = [(path, stage) for path, stage in found if next(stage.parameters(), None) is not None]
    if not found:
        raise _no_stages(host)
    return found


def _shown_stages(host: nn.Module, encoder: Encoder) -> list[tuple[str, nn.Module]]:
    model: Any = host.get_submodule(encoder.path)
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
    raise _no_stages(host)


def _no_stages(host: nn.Module) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(
        f"apply_protocol('partial-k'): {type(host).__name__} shows no blocks or stages; use "
        "'bias', 'full' or prompts."
    )


def _apart(encoder: Encoder, name: str) -> bool:
    return is_below(name, "prompts", *encoder.head_paths)
