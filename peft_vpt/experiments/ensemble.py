"""Ensembles of several prompt sets of one task in a single forward (paper, Figure 15)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..adapters import load_task_adapter
from ..backbones.paths import module_at
from ..errors import SpecError
from ..forms.kv import KeyValueForm
from ..hosts import host_and_prompts
from ..preprocessing import output_logits
from ..prompts import Prompts
from ..training.metrics import place

# What one adapter brings, by its name in the host.
Member = dict[str, Tensor]
_TOKENS = ("prepend", "prepend-pixel", "add")


def member(model: nn.Module) -> Member:
    """Return copies of what an adapter of this model holds: prompts, head, what else trains.

    Raises:
        NotPromptedError: The model carries no prompts and no protocol.
    """
    host, prompts = host_and_prompts(model, "member")
    heads = prompts.encoder.head.paths if prompts.encoder.head else ()
    moved = {place.name for place in prompts.delta.places.values()} if prompts.delta else set()
    return {
        name: tensor.detach().clone()
        for name, tensor in host.state_dict().items()
        if name.startswith("prompts.") or name in moved or _below(name, heads)
    }


def load_members(model: nn.Module, sources: Sequence[str | Path]) -> list[Member]:
    """Load adapters one after the other; the model carries the last one then.

    Args:
        model: A bare or prompted model.
        sources: As for `load_task_adapter`.

    Raises:
        AdapterError: One cannot be read or does not fit.
    """
    return [member(load_task_adapter(model, source)) for source in sources]


def can_batch(model: nn.Module) -> bool:
    """Tell whether several prompt sets can go through a model in one forward.

    They can where prompts are tokens and nothing else of the backbone differs; otherwise there is
    one forward per member.
    """
    prompts = host_and_prompts(model, "can_batch")[1]
    tokens = prompts.spec.location in _TOKENS and prompts.delta is None
    many = any(a.many for block in prompts.encoder.blocks for a in block.attentions)
    return tokens and not many


@torch.no_grad()
def ensemble_logits(
    model: nn.Module,
    members: Sequence[Mapping[str, Tensor]],
    pixels: Tensor,
    *,
    one_forward: bool | None = None,
) -> Tensor:
    """Return every member's logits, in eval mode: `(members, batch, classes)`.

    In one forward the batch stands once per member behind one another, and each copy meets its
    own prompts and head. Values in the model stay as they are. Not for several threads on one
    model at once.

    Args:
        model: A prompted model, of which `member` was taken.
        members: Of `member` or `load_members`.
        pixels: `(batch, 3, height, width)`.
        one_forward: None: where it can be done (`can_batch`). False: one forward per member.

    Raises:
        SpecError: No members, members of another structure, or `one_forward=True` where it
            cannot be done.

    Source: Jia et al. 2022, appendix, Figure 15.
    """
    host, prompts = host_and_prompts(model, "ensemble_logits")
    _check(members, host)
    possible = can_batch(host)
    if one_forward and not possible:
        raise SpecError(
            f"ensemble_logits(one_forward=True): location={prompts.spec.location!r} or the "
            "protocol changes more than tokens; leave one_forward out."
        )
    device, dtype = place(host)
    pixels = pixels.to(device, dtype)
    was_training = host.training
    # This and `train()` below also drop cached keys and values, which are of one prompt set.
    host.eval()
    try:
        if possible and one_forward is not False:
            return _together(host, prompts, members, pixels)
        logits = [
            output_logits(functional_call(host, dict(m), (pixels,)), "ensemble") for m in members
        ]
        return torch.stack(logits)
    finally:
        host.train(was_training)


def combine(logits: Tensor, how: str = "probabilities") -> Tensor:
    """Return one prediction per image from members' logits: `(batch, classes)` log-probabilities.

    Args:
        logits: `(members, batch, classes)`.
        how: "probabilities" (the mean of the softmax) or "logits" (the softmax of the mean).

    Raises:
        SpecError: Another way.
    """
    if how == "logits":
        return logits.mean(dim=0).log_softmax(dim=-1)
    if how == "probabilities":
        mean = logits.log_softmax(dim=-1).logsumexp(dim=0)
        return mean - torch.log(torch.tensor(float(len(logits)))).to(mean)
    raise SpecError(f"combine(how={how!r}): must be 'probabilities' or 'logits'.")


def _together(
    host: nn.Module, prompts: Prompts, members: Sequence[Mapping[str, Tensor]], pixels: Tensor
) -> Tensor:
    tokens = _tokens(prompts, members)
    with _each_its_prompts(prompts, tokens), _each_its_head(host, prompts, members):
        logits = output_logits(host(pixels.repeat(len(members), 1, 1, 1)), "ensemble")
    return logits.reshape(len(members), len(pixels), *logits.shape[1:])


def _tokens(prompts: Prompts, members: Sequence[Mapping[str, Tensor]]) -> dict[int, Tensor]:
    """Return every entry's prompts: `(members, length, dim)`."""
    own = [
        {n.removeprefix("prompts."): t for n, t in m.items() if n.startswith("prompts.")}
        for m in members
    ]
    return {
        entry: torch.cat([functional_call(prompts, values, (entry, 1)) for values in own])
        for entry in prompts.entries
    }


@contextmanager
def _each_its_prompts(prompts: Prompts, tokens: Mapping[int, Tensor]) -> Iterator[None]:
    """Let `prompts(entry, batch)` give each part of the batch its member's prompts."""
    # This form itself spreads keys and values over samples, so they are made once per member.
    spreading = {form.index for form in prompts.forms if type(form) is KeyValueForm}

    def swap(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        entry, batch = args
        found = tokens[entry].to(output)
        if entry in spreading:
            return found
        return found.repeat_interleave(batch // len(found), dim=0)

    handle = prompts.register_forward_hook(swap)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _each_its_head(
    host: nn.Module, prompts: Prompts, members: Sequence[Mapping[str, Tensor]]
) -> Iterator[None]:
    """Let each part of the batch go through its member's head."""
    paths = prompts.encoder.head.paths if prompts.encoder.head else ()
    handles = []
    for path in paths:
        head = module_at(host, path)
        copies = [_head(head, path, values) for values in members]

        def swap(
            module: nn.Module, args: tuple[Any, ...], output: Tensor, copies: Any = copies
        ) -> Tensor:
            parts = args[0].chunk(len(copies))
            return torch.cat([copy(part) for copy, part in zip(copies, parts, strict=True)])

        handles.append(head.register_forward_hook(swap))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _head(head: nn.Module, path: str, values: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a head with a member's values, without the hooks around it."""
    single = copy.deepcopy(head)
    single._forward_hooks.clear()
    single._forward_pre_hooks.clear()
    own = {n.removeprefix(f"{path}."): t for n, t in values.items() if _below(n, (path,))}
    single.load_state_dict(own)
    return single


def _check(members: Sequence[Mapping[str, Tensor]], host: nn.Module) -> None:
    if not members:
        raise SpecError("ensemble_logits: there are no members.")
    expected = {name: tensor.shape for name, tensor in member(host).items()}
    for index, values in enumerate(members):
        found = {name: tensor.shape for name, tensor in values.items()}
        wrong = sorted(n for n in set(found) | set(expected) if found.get(n) != expected.get(n))
        if wrong:
            raise SpecError(
                f"ensemble_logits: member {index} differs from the model in {wrong[0]} "
                f"({len(wrong)} tensors in all); members need the same prompts and classes."
            )


def _below(name: str, paths: Sequence[str]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in paths)
