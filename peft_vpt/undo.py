"""What injection changes beside the forms, and how removal puts it back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from .backbones.anatomy import Encoder, is_kind
from .backbones.heads import FormerHead, restore_head
from .prompts import Prompts

_IGNORED = "_keys_to_ignore_on_save"
_RENAMED = "_weight_conversions"


def remember(prompts: Prompts, model: nn.Module) -> None:
    """Note what `remove_prompts` puts back."""
    states = {p: model.get_submodule(p).state_dict() for p in prompts.encoder.head_paths}
    prompts.undo |= {
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "training": {n: m.training != model.training for n, m in model.named_modules()},
        "head": None,
        # An attribute that is absent is absent here too.
        "checkpoint": {n: v for n, v in vars(model).items() if n in (_IGNORED, _RENAMED)},
        "head_state": {p: {n: _kept(v) for n, v in s.items()} for p, s in states.items()},
    }


def _kept(value: Any) -> Any:
    """Return a copy of an entry of a `state_dict`: quantized layers have others than tensors."""
    return kept(value) if isinstance(value, Tensor) else deepcopy(value)


def restore(host: nn.Module, prompts: Prompts) -> None:
    """Put head, gradient flags, training flags and checkpoint keys back."""
    undo = prompts.undo
    _restore_head(host, prompts)
    restore_decoder(host, prompts)
    for name, parameter in host.named_parameters():
        parameter.requires_grad_(undo["requires_grad"].get(name, parameter.requires_grad))
    for name in (_IGNORED, _RENAMED):
        vars(host).pop(name, None)
    for name, value in undo["checkpoint"].items():
        setattr(host, name, value)
    host.train(host.training)
    for name, module in host.named_modules():
        module.training ^= undo["training"].get(name, False)


def _restore_head(host: nn.Module, prompts: Prompts) -> None:
    """Put the former head back, or the former values into a head that trained in place."""
    undo = prompts.undo
    if isinstance(undo["head"], FormerHead):
        restore_head(host, undo["head"])
        return
    for path in prompts.encoder.head_paths:
        module = host.get_submodule(path)
        if undo["head_state"][path].keys() == module.state_dict().keys():
            module.load_state_dict(undo["head_state"][path])
        for parameter in module.parameters():
            parameter.grad = None


def checkpoint_what_moves(prompts: Prompts, model: nn.Module) -> None:
    """Let transformers checkpoints hold what moves, under the names that it has in the model.

    That is what trains, and the statistics and counters of what trains as a whole.
    """
    if not is_kind(model, "PreTrainedModel", "transformers"):
        return
    task = ("prompts.", *(f"{path}." for path in prompts.encoder.head_paths))
    decoder = prompts.undo.get("decoder", ())
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    frozen |= {n for n, _ in model.named_buffers() if n not in decoder and not _moves(prompts, n)}
    own = prompts.undo["checkpoint"].get(_IGNORED, getattr(type(model), _IGNORED, None))
    setattr(model, _IGNORED, {n for n in frozen if not n.startswith(task)} | set(own or ()))
    # transformers 5 writes some classes under their older names, and Trainer, which loads a state
    # dict as it is, finds none of them again.
    setattr(model, _RENAMED, [])


def _moves(prompts: Prompts, buffer: str) -> bool:
    return prompts.delta is not None and prompts.delta.keeps_mode(buffer.rpartition(".")[0])


class Snapshot:
    """The attributes of a model's modules, and what containers among them hold.

    `put_back` gives the same objects the same contents in the same order. No container is emptied
    meanwhile, so that another thread, or an interruption, never meets a module without attributes.
    """

    def __init__(self, model: nn.Module) -> None:
        spaces = [space for module in model.modules() for space in _namespaces(module)]
        self._spaces = [(space, dict(space)) for space in spaces]
        self._containers = [
            (value, value.copy())
            for _, attributes in self._spaces
            for value in attributes.values()
            if isinstance(value, dict | list | set)
        ]

    def put_back(self) -> None:
        """Undo every change since."""
        for space, attributes in self._spaces:
            for name in space.keys() - attributes.keys():
                del space[name]
            space.update(attributes)
        for container, contents in self._containers:
            _refill(container, contents)


def _namespaces(module: nn.Module) -> list[dict[str, Any]]:
    """Return the attributes of a module, and those of its transformers config."""
    config = vars(module).get("config")
    return [vars(module), *([vars(config)] if hasattr(config, "__dict__") else [])]


def _refill(container: Any, contents: Any) -> None:
    """Give a dict, list or set its former contents and order."""
    if isinstance(container, list):
        container[:] = contents
        return
    for item in set(container) - set(contents):
        container.remove(item) if isinstance(container, set) else container.pop(item)
    container.update(contents)
    if isinstance(container, dict) and list(container) != list(contents):
        for key in contents:
            container[key] = container.pop(key)


@contextmanager
def unchanged_on_error(host: nn.Module, changing: Iterable[Tensor]) -> Iterator[None]:
    """Put a model back if the body raises: the same objects, hooks, flags, gradients and values.

    Args:
        host: The model.
        changing: Tensors into which the body may write.
    """
    before = Snapshot(host)
    values = [(tensor, tensor.detach().clone()) for tensor in changing]
    flags = [(p, p.requires_grad, p.grad) for p in host.parameters()]
    try:
        yield
    except BaseException:
        before.put_back()
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        for parameter, requires_grad, grad in flags:
            parameter.requires_grad_(requires_grad).grad = grad
        raise


def decoder_names(host: nn.Module, encoder: Encoder) -> list[str]:
    """Return parameters and buffers outside the encoder and its classifier."""
    if not encoder.path:
        return []
    heads = encoder.head_paths
    apart = ("prompts.", f"{encoder.path}.", *(f"{path}." for path in heads))
    return [name for name in _state(host) if not name.startswith(apart)]


def claim_decoder(host: nn.Module, prompts: Prompts) -> None:
    """Note that the decoder trains whole, and keep what it is now; `freeze` lets it train."""
    names, state = decoder_names(host, prompts.encoder), _state(host)
    if not names:
        return
    prompts.undo["decoder"] = {name: kept(state[name]) for name in names}
    if prompts.delta is not None:
        prompts.delta.leave(names)


def kept(tensor: Tensor) -> Tensor:
    """Return a copy to put back later, on the CPU; on `meta` there is nothing to bring there."""
    tensor = tensor.detach()
    return tensor.clone() if tensor.is_meta else tensor.to("cpu", copy=True)


def has_decoder(prompts: Prompts) -> bool:
    """Tell whether a decoder trains beside the prompts."""
    return "decoder" in prompts.undo


@torch.no_grad()
def restore_decoder(host: nn.Module, prompts: Prompts) -> None:
    """Put back the values from before training."""
    state = _state(host)
    for name, value in prompts.undo.get("decoder", {}).items():
        state[name].copy_(value)
        state[name].grad = None


def _state(host: nn.Module) -> dict[str, Tensor]:
    state = host.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
