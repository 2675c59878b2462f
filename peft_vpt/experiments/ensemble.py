"""Ensembles of several prompt sets of one task in a single forward (paper, Figure 15)."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..adapter.verbs import load_task_adapter
from ..backbones.anatomy import first_floating, is_below
from ..checks import one_of
from ..data import loader
from ..errors import SpecError, VPTError
from ..forms.kv import KeyValueForm
from ..hosts import host_and_prompts
from ..preprocessing import output_logits
from ..prompts import Prompts
from ..training.metrics import classification_metrics
from .backbones import device
from .embeddings import features, tsne
from .plots import Figure, scatter
from .records import Record, adapter_of, figure_name, make_record
from .run import TEST_BATCH, Build, Pixels

# What one adapter brings, by its name in the host.
Member = dict[str, Tensor]
# Enough to see classes apart; t-SNE takes minutes from about ten thousand points on.
_MOST_POINTS = 2000


def member(model: nn.Module) -> Member:
    """Return copies of what an adapter of this model holds: prompts, head, what else trains.

    Raises:
        NotPromptedError: The model carries no prompts and no protocol.
    """
    host, prompts = host_and_prompts(model, "member")
    inside = ("prompts", *prompts.encoder.head_paths)
    moved = {place.name for place in prompts.delta.places.values()} if prompts.delta else set()
    return {
        name: tensor.detach().clone()
        for name, tensor in host.state_dict().items()
        if name in moved or is_below(name, *inside)
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
    tokens = bool(prompts.entries) and prompts.delta is None
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
            "ensemble_logits",
            f"location={prompts.spec.location!r}, the protocol or a sequence packed of several "
            "images does not allow it",
            "leave one_forward out",
            given={"one_forward": True},
        )
    pixels = pixels.to(first_floating(host))
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
    one_of("probabilities", "logits").check("combine", "how", how)
    if how == "logits":
        return logits.mean(dim=0).log_softmax(dim=-1)
    mean = logits.log_softmax(dim=-1).logsumexp(dim=0)
    return mean - torch.log(torch.tensor(float(len(logits)))).to(mean)


def _together(
    host: nn.Module, prompts: Prompts, members: Sequence[Mapping[str, Tensor]], pixels: Tensor
) -> Tensor:
    """Let each part of the batch meet its member's prompts and head, by hooks behind both."""
    stored = [_below("prompts", values) for values in members]
    tokens = {
        entry: torch.cat([functional_call(prompts, values, (entry, 1)) for values in stored])
        for entry in prompts.entries
    }
    # This form itself spreads keys and values over samples, so they are made once per member.
    spreading = {form.index for form in prompts.forms if type(form) is KeyValueForm}

    def own_prompts(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        entry, batch = args
        found = tokens[entry].to(output)
        each = 1 if entry in spreading else batch // len(found)
        return found.repeat_interleave(each, dim=0)

    def own_head(
        copies: list[nn.Module], module: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> Tensor:
        parts = args[0].chunk(len(copies))
        return torch.cat([copy(part) for copy, part in zip(copies, parts, strict=True)])

    handles = [prompts.register_forward_hook(own_prompts)]
    try:
        for path in prompts.encoder.head_paths:
            head = host.get_submodule(path)
            copies = [_head(head, _below(path, values)) for values in members]
            handles.append(head.register_forward_hook(partial(own_head, copies)))
        logits = output_logits(host(pixels.repeat(len(members), 1, 1, 1)), "ensemble")
    finally:
        for handle in handles:
            handle.remove()
    return logits.reshape(len(members), len(pixels), *logits.shape[1:])


def _below(path: str, values: Mapping[str, Tensor]) -> Member:
    """Return what of a member belongs to a module, by its name there."""
    start = f"{path}."
    return {n.removeprefix(start): t for n, t in values.items() if n.startswith(start)}


def _head(head: nn.Module, values: Member) -> nn.Module:
    """Return a copy of a head with a member's values, without the hooks around it."""
    single = copy.deepcopy(head)
    single._forward_hooks.clear()
    single._forward_pre_hooks.clear()
    single.load_state_dict(values)
    return single


def _check(members: Sequence[Mapping[str, Tensor]], host: nn.Module) -> None:
    if not members:
        raise SpecError("ensemble_logits", "there are no members")
    expected = {name: tensor.shape for name, tensor in member(host).items()}
    for index, values in enumerate(members):
        found = {name: tensor.shape for name, tensor in values.items()}
        wrong = sorted(n for n in set(found) | set(expected) if found.get(n) != expected.get(n))
        if wrong:
            raise SpecError(
                "ensemble_logits",
                f"member {index} differs from the model in {wrong[0]} "
                f"({len(wrong)} tensors in all)",
                "members need the same prompts and classes",
            )


def ensemble_record(final: Sequence[Record], pixels: Pixels, build: Build, folder: Path) -> Record:
    """Return the record of the adapters of several seeds together, judged on test.

    Probabilities are averaged. Prompts go through the model in one forward; protocols that change
    the backbone, one after the other.

    Args:
        final: Records of one row over its seeds.
        pixels: Images of the task.
        build: Makes the bare backbone.
        folder: Of all runs, below which the adapters lie.

    Raises:
        VPTError: An adapter is not there, or is of another run than its record.

    Source: Jia et al. 2022, appendix, Figure 15.
    """
    members: list[Member] = []
    for record in final:
        model = adapted(record, build, folder)
        members.append(member(model))
    logits, labels = [], []
    for images, target in loader(pixels.split("test"), None, batch_size=TEST_BATCH):
        logits.append(combine(ensemble_logits(model, members, images)).cpu())
        labels.append(target)
    metrics = classification_metrics(torch.cat(logits), torch.cat(labels))
    alone = [record["metrics"]["top1"] for record in final]
    together = {"members_mean_top1": sum(alone) / len(alone), "members_best_top1": max(alone)}
    return ensemble_stub(final) | {"metrics": metrics | together}


def ensemble_stub(final: Sequence[Record]) -> Record:
    """Return the record of an ensemble without its results."""
    first = final[0]
    recipe = {k: v for k, v in first["config"]["recipe"].items() if k != "seed"}
    shared = ("task", "group", "backbone", "seed", "split", "preset", "total", "versions")
    return make_record(
        **{name: first.get(name) for name in shared},
        protocol=f"{first['protocol']} ensemble",
        metrics={},
        trainable=sum(record["trainable"] or 0 for record in final),
        stored_bytes=sum(record["stored_bytes"] or 0 for record in final),
        config=first["config"] | {"recipe": recipe, "members": [r["seed"] for r in final]},
    )


def adapted(record: Record, build: Build, folder: Path) -> nn.Module:
    """Return a new model with the adapter that a record is about.

    Args:
        record: Of a final run.
        build: Makes the bare backbone.
        folder: Of all runs.

    Raises:
        VPTError: The adapter is not there, or is of another run.
    """
    path = adapter_of(record, folder)
    what = f"the adapter of {record['protocol']!r}, seed {record['seed']}"
    advice = "Take its line out of the records, and run the comparison again"
    if not path.exists():
        raise VPTError("compare", f"{what} is not at {path}", advice)
    model = load_task_adapter(build(), path).to(device())
    found = host_and_prompts(model, "compare")[1].info["metrics"] or {}
    same = all(
        math.isclose(found.get(name, math.nan), record["metrics"][name], rel_tol=1e-9)
        for name in ("top1", "loss")
    )
    if not same:
        raise VPTError("compare", f"{path} is of another run than {what}", advice)
    return model


def draw_embeddings(record: Record, pixels: Pixels, build: Build, folder: Path) -> Figure:
    """Draw what the head of one final run receives for test images, in the plane.

    Args:
        record: Of the run.
        pixels: Images of the task.
        build: Makes the bare backbone.
        folder: Of all runs, where the figure goes too.

    Raises:
        VPTError: As `adapted`.

    Source: Jia et al. 2022, Figures 9 and 21.
    """
    model = adapted(record, build, folder)
    split = pixels.split("test")
    if len(split) > _MOST_POINTS:
        split = split.subset(sorted(random.Random(0).sample(range(len(split)), _MOST_POINTS)))
    found, labels = features(model, loader(split, None, batch_size=TEST_BATCH))
    points: Any = tsne(found)
    return scatter(
        points,
        labels.tolist(),
        folder / figure_name(record),
        names=pixels.task.classes,
        title=f"{record['protocol']}, {record['task']}",
    )
