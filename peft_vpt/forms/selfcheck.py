"""The self-check: do our keys and values equal what the model's softmax really received?"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..backbones.anatomy import Encoder
from ..errors import UnsupportedArchitectureError
from ..rehearsal import call, dummy_inputs
from .softmax import Met

if TYPE_CHECKING:
    from .kv import KeyValueForm

from ..prompts import Prompts
from ..rehearsal import undisturbed
from .kv import KeyValueForm, Watch, record
from .token import TokenForm
from .window import WindowForm


def self_check(host: nn.Module, encoder: Encoder, forms: Sequence[KeyValueForm]) -> bool:
    """Run one dummy forward of the bare encoder and compare every attention position by position.

    Batch 2, eval mode, no gradients, random state and user hooks left alone. The host must not
    carry the forms yet.

    Returns:
        False where no dummy input is known, so that the check has to wait for a real one.

    Raises:
        UnsupportedArchitectureError: The forward fails, an attention meets no softmax or several,
            or keys and values differ.
    """
    module = host.get_submodule(encoder.path)
    met: dict[int, list[Met]] = {id(form): [] for form in forms}
    with undisturbed(module), ExitStack() as stack:
        watches = [Watch(form) for form in forms]
        for form, watch in zip(forms, watches, strict=True):
            stack.callback(watch.close)
            stack.enter_context(record(form, met[id(form)]))
        if not _run(module, encoder, met):
            return False
    with undisturbed(module):
        for form, watch in zip(forms, watches, strict=True):
            _check_count(form, watch, met[id(form)])
            watch.check(met[id(form)])
    return True


def _run(module: nn.Module, encoder: Encoder, met: dict[int, list[Met]]) -> bool:
    """Call the encoder with the first dummy input that it takes; tell whether there was one."""
    error: Exception | None = None
    for image in dummy_inputs(module, encoder):
        for seen in met.values():
            seen.clear()
        try:
            call(module, image)
        except Exception as problem:
            error = error or problem
        else:
            return True
    if error is not None and encoder.inputs == "image":
        raise UnsupportedArchitectureError(
            f"inject_prompts: the self-check's forward of {type(module).__name__} on an image of "
            f"size {encoder.input_size} failed: {error}"
        ) from error
    return False


def _check_count(form: KeyValueForm, watch: Watch, met: list[Met]) -> None:
    if form.all_met(met) and watch.complete():
        return
    raise UnsupportedArchitectureError(
        f"inject_prompts: block {form.index} ({form.path}) met {len(met)} softmaxes in "
        f"its attention ({type(form.owner).__name__}), where exactly one is needed for extra keys "
        "and values to be exact. Ordinary attention: set it to SDPA or eager (transformers: "
        "model.set_attn_implementation('sdpa')). Differential or linear attention cannot take "
        "prompts this way."
    )


class _Run:
    """One dummy forward: what norms were called with and what softmaxes received."""

    def __init__(self, attentions: Sequence[KeyValueForm]) -> None:
        self.attentions = attentions
        self.met: list[list[Met]] = [[] for _ in attentions]
        self.seen: list[dict[str, Tensor]] = []

    def go(self, module: nn.Module, image: Any, forms: Sequence[TokenForm]) -> None:
        with undisturbed(module), ExitStack() as stack:
            watches = [Watch(form) for form in self.attentions]
            for form, watch, met in zip(self.attentions, watches, self.met, strict=True):
                stack.callback(watch.close)
                stack.enter_context(record(form, met))
            for token_form in forms:
                token_form.attach()
                stack.callback(token_form.detach)
            call(module, image)
        self.seen = [watch.seen for watch in watches]


def check_carried(
    prompts: Prompts, host: nn.Module, encoder: Encoder, attentions: Sequence[KeyValueForm]
) -> None:
    """Run the bare encoder and one with token forms; compare what their softmaxes receive.

    In the first block of the first span the model's own keys must be those of the bare model; in
    every block the prompts' keys and values must be what norm and projections give for them, no
    rotation, no position. Prompts hold any values; the host does not carry the forms yet.

    Raises:
        UnsupportedArchitectureError: They are not, or the forward with more tokens fails.
    """
    forms = [form for form in prompts.forms if isinstance(form, TokenForm)]
    met_by = [a for a in attentions if any(form.index == a.index for form in forms)]
    module = host.get_submodule(encoder.path)
    windowed = any(isinstance(form, WindowForm) for form in prompts.forms)
    if not prompts.checked and (forms or windowed):
        raise _refusal(encoder, "no dummy input is known that could show it")
    if not forms:
        return
    values = [parameter.detach().clone() for parameter in prompts.parameters()]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in prompts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    try:
        _compare(prompts, module, encoder, forms, met_by)
    finally:
        with torch.no_grad():
            for parameter, value in zip(prompts.parameters(), values, strict=True):
                parameter.copy_(value)


def _compare(
    prompts: Prompts,
    module: nn.Module,
    encoder: Encoder,
    forms: list[TokenForm],
    attentions: list[KeyValueForm],
) -> None:
    for image in dummy_inputs(module, encoder):
        bare, carried = _Run(attentions), _Run(attentions)
        try:
            bare.go(module, image, ())
        except Exception:
            continue
        try:
            carried.go(module, image, forms)
        except Exception as error:
            raise _refusal(encoder, f"the forward with more tokens fails: {error}") from error
        problem = _difference(prompts, bare, carried, samples=2)
        if problem:
            raise _refusal(encoder, problem)
        return


@torch.no_grad()
def _difference(prompts: Prompts, bare: _Run, carried: _Run, samples: int) -> str:
    length = prompts.spec.length
    for index, form in enumerate(carried.attentions):
        met, hidden = carried.met[index], carried.seen[index].get("norm")
        hidden = carried.seen[index]["attention"] if hidden is None else hidden
        if hidden.shape[0] != samples:
            return "it packs several images into one sequence, where carried prompts would mix them"
        if len(met) != 1 or hidden.dim() != 3 or met[0].values is None:
            return f"block {form.index} does not work on one sequence of tokens"
        keys, values = form.project(hidden[:, -length:])
        for ours, theirs in ((keys, met[0].keys), (values, met[0].values)):
            ours = ours.repeat_interleave(theirs.shape[1] // ours.shape[1], dim=1)
            if not torch.allclose(ours, theirs[..., -length:, :].to(ours.dtype), 1e-4, 1e-4):
                return f"block {form.index} rotates or moves the prompts"
    first = bare.met[0][0].keys
    own = carried.met[0][0].keys[..., : first.shape[-2], :]
    if own.shape != first.shape or not torch.allclose(own, first, 1e-4, 1e-4):
        return "its own tokens change their position"
    return ""


def _refusal(encoder: Encoder, problem: str) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(
        f"inject_prompts: {encoder.family} cannot carry prompts through several blocks as tokens "
        f"({problem}). Use deep=True with form='auto', where prompts stay in their block."
    )
