"""Which weights of the backbone itself a protocol trains."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from ..backbones.anatomy import Encoder, is_below
from ..backbones.projection import join
from ..backbones.weights import is_packed
from ..errors import SpecError
from ..rehearsal import Rehearsal, rehearse_host
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
    parameters = {n: p for n, p in host.named_parameters() if not _apart(encoder, n)}
    if encoder.head is not None:
        # It stands in for patches that pretraining hides; a classifier's images have none.
        parameters = {n: p for n, p in parameters.items() if n.rpartition(".")[2] != "mask_token"}
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
    raise protocol.misfit(
        f"it is not known in which order {type(host).__name__} runs its "
        f"{'blocks' if encoder.blocks else 'stages'}, since no image that was tried passes all of "
        "them",
        _INSTEAD,
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


def _stages(host: nn.Module, encoder: Encoder, protocol: Protocol) -> list[str]:
    """Return the stages of a model without known blocks, of a ConvNet, that have parameters.

    Raises:
        UnsupportedArchitectureError: It does not show any.
    """
    model: Any = host.get_submodule(encoder.path)
    known = dict(model.named_modules())
    info = getattr(model, "feature_info", None)
    info = getattr(info, "info", None) or info
    named = [i["module"] for i in info if "module" in i] if isinstance(info, list) else []
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
