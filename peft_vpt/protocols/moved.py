"""Which weights of the backbone itself a protocol trains."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from ..backbones.anatomy import Encoder, ancestors, is_below
from ..backbones.projection import join
from ..backbones.weights import is_packed
from ..errors import SpecError
from ..rehearsal import rehearse_host
from .options import Protocol

_INSTEAD = "use 'bias', 'full' or prompts"
_LISTS = (nn.ModuleList, nn.Sequential)
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
    moves = protocol.row.moves
    if moves is None:
        return Moved([], [], ())
    # The one stands in for patches that pretraining hides; a classifier's images have none.
    idle = "mask_token" if encoder.head is not None else None
    parameters = {
        name: parameter
        for name, parameter in host.named_parameters()
        if not _apart(encoder, name) and name.rpartition(".")[2] != idle
    }
    names, paths = list(parameters), ("",)  # type: tuple[list[str], tuple[str, ...]]
    if moves.last:
        names, paths = _last(host, encoder, protocol, names)
    elif moves.chosen is not None:
        names, paths = [n for n in names if moves.chosen(n, parameters[n])], ()
    if not names:
        raise protocol.misfit(f"{type(host).__name__} has {moves.missing} that could train")
    _refuse_integers(host, protocol, names, paths)
    return Moved(names, _statistics(host, encoder, paths), paths)


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
        raise protocol.misfit(
            f"{wrong[0]} of {type(host).__name__} is quantized and cannot train",
            "Load the model in full or half precision, or choose a protocol that leaves such "
            "weights alone ('linear', 'bias', 'vpt-deep', ...)",
        )


def _last(
    host: nn.Module, encoder: Encoder, protocol: Protocol, names: list[str]
) -> tuple[list[str], tuple[str, ...]]:
    """Return what trains of the last k blocks and of norms and mergers between and behind them.

    Names of parameters, and paths of modules.
    """
    parts = [block.path for block in encoder.blocks] or _stages(host, encoder, protocol)
    if protocol.number > len(parts):
        raise SpecError(
            "apply_protocol",
            f"the model has {len(parts)} {'blocks' if encoder.blocks else 'stages'}",
            given={"name": protocol.name},
        )
    order = _order(host, encoder, protocol, parts)
    parts.sort(key=lambda path: order.get(path, -1))
    last, earlier = parts[-protocol.number :], parts[: -protocol.number]
    begin = order.get(last[0], 0)
    if earlier and not encoder.blocks:
        # It begins where the one before it ends: DenseNet's and others show only their last parts.
        begin = max((at for p, at in order.items() if is_below(p, earlier[-1])), default=0)
    around = {at for part in parts for at, _ in ancestors(host, part)}
    first = next((i for i, name in enumerate(names) if is_below(name, last[0])), len(names))

    def trains(index: int, name: str) -> bool:
        path = name.rpartition(".")[0]
        while path not in around:
            if path in parts:
                return path in last
            if path in order:
                return order[path] > begin
            path = path.rpartition(".")[0]
        # What no call shows is told by the order of registration.
        return index >= first and not _idle(host, order, name.rpartition(".")[0])

    names = [name for index, name in enumerate(names) if trains(index, name)]
    beside = {name.rpartition(".")[0] for name in names}
    return names, (*last, *sorted(path for path in beside if not is_below(path, *last)))


def _order(
    host: nn.Module, encoder: Encoder, protocol: Protocol, parts: list[str]
) -> dict[str, int]:
    """Return the order in which modules run, as far as it is known; {}: as they are registered."""
    shown = rehearse_host(host, encoder, [path for path, _ in host.named_modules()])
    order = {} if shown is None else shown.order
    if order and all(path in order for path in parts):
        return order
    # Nothing can train on `meta`, which is told elsewhere.
    meta = any(p.is_meta for p in host.parameters())
    if (encoder.blocks and encoder.plain) or meta:
        return {}
    raise protocol.misfit(
        f"it is not known in which order {type(host).__name__} runs its "
        f"{'blocks' if encoder.blocks else 'stages'}, since no image that was tried passes all of "
        "them",
        _INSTEAD,
    )


def _idle(host: nn.Module, order: dict[str, int], path: str) -> bool:
    """Tell whether the whole model never called a module: a pooling that its head leaves out.

    No where the encoder alone could be run. Lists of parameters are never called.
    """
    lists = (nn.ParameterList, nn.ParameterDict)
    return "" in order and path not in order and not isinstance(host.get_submodule(path), lists)


def _stages(host: nn.Module, encoder: Encoder, protocol: Protocol) -> list[str]:
    """Return the stages of a model without known blocks, of a ConvNet, that have parameters.

    Raises:
        UnsupportedArchitectureError: It does not show any.
    """
    model: Any = host.get_submodule(encoder.path)
    known = dict(model.named_modules())
    info = getattr(model, "feature_info", [])
    named = [i["module"] for i in getattr(info, "info", info) if "module" in i]
    if not named or not set(named) <= set(known):
        lists = [name for name in _STAGES if isinstance(known.get(name), _LISTS)]
        long = next((name for name in lists if len(known[name]) > 1), None)
        named = [f"{long}.{n}" for n, _ in known[long].named_children()] if long else []
    # timm counts the activation behind a ResNet's stem as a stage.
    found = [join(encoder.path, n) for n in named if any(True for _ in known[n].parameters())]
    if not found:
        raise protocol.misfit(f"{type(host).__name__} shows no blocks or stages", _INSTEAD)
    return found


def _apart(encoder: Encoder, name: str) -> bool:
    return is_below(name, "prompts", *encoder.head_paths)
