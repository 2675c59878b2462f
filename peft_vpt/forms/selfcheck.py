"""The self-check: do our keys and values equal what the model's softmax really received?"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from ..backbones.anatomy import Encoder
from ..errors import UnsupportedArchitectureError
from ..prompts import Prompts
from ..rehearsal import dummy_inputs, rehearse, undisturbed
from .attach import attached
from .kv import KeyValueForm, Recorder
from .token import TokenForm
from .window import WindowForm


def _recorders(prompts: Prompts, host: nn.Module) -> list[Recorder]:
    """Return a recorder for every attention that prompts meet, in whatever form they meet it."""
    blocks = prompts.encoder.blocks
    spans = prompts.spec.spans(len(blocks))
    met = {i for enter, leave in spans for i in range(enter, leave + 1)}
    return [
        Recorder(KeyValueForm(prompts, host, blocks[i], attention, index=i))
        for i in sorted(met)
        for attention in blocks[i].attentions
    ]


def self_check(prompts: Prompts, host: nn.Module) -> bool:
    """Run one dummy forward of the bare encoder and compare every attention position by position.

    The host must not carry the forms yet; it is left as it was.

    Returns:
        False where no dummy input is known, so that the check has to wait for a real one.

    Raises:
        UnsupportedArchitectureError: The forward fails, an attention meets no softmax or several,
            or keys and values differ.
    """
    encoder, recorders = prompts.encoder, _recorders(prompts, host)
    module = host.get_submodule(encoder.path)
    shown = rehearse(module, dummy_inputs(module, encoder), within=partial(attached, recorders))
    if shown.error is not None and encoder.inputs == "image":
        raise UnsupportedArchitectureError(
            "inject_prompts",
            f"the self-check's forward of {type(module).__name__} on an image of size "
            f"{encoder.input_size} failed: {shown.error}",
        ) from shown.error
    if not shown.passed:
        return False
    with undisturbed(module):
        for recorder in recorders:
            _check(recorder)
    return True


def _check(recorder: Recorder) -> None:
    form, watch, met = recorder.form, recorder.watch, recorder.met
    if watch is not None and form.all_met(met) and watch.complete():
        watch.check(met)
        return
    raise UnsupportedArchitectureError(
        "inject_prompts",
        f"block {form.index} ({form.path}) met {len(met)} softmaxes in its attention "
        f"({type(form.owner).__name__}), where exactly one is needed for extra keys and values to "
        "be exact",
        "Ordinary attention: set it to SDPA or eager (transformers: "
        "`model.set_attn_implementation('sdpa')`). Differential or linear attention cannot take "
        "prompts this way",
    )


def check_carried(prompts: Prompts, host: nn.Module) -> None:
    """Run the bare encoder and one with token forms; compare what their softmaxes receive.

    In the first block of the first span the model's own keys must be those of the bare model; in
    every block the prompts' keys and values must be what norm and projections give for them, no
    rotation, no position. The host does not carry the forms yet; prompts are left with any values.

    Raises:
        UnsupportedArchitectureError: They are not, or the forward with more tokens fails.
    """
    encoder = prompts.encoder
    forms = [form for form in prompts.forms if isinstance(form, TokenForm)]
    windowed = any(isinstance(form, WindowForm) for form in prompts.forms)
    if not prompts.checked and (forms or windowed):
        raise _refusal(encoder, "no dummy input is known that could show it")
    if not forms:
        return
    generator, indices = torch.Generator().manual_seed(0), {form.index for form in forms}
    with torch.no_grad():
        for parameter in prompts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    bare, carried = (
        [r for r in _recorders(prompts, host) if r.form.index in indices] for _ in range(2)
    )
    module = host.get_submodule(encoder.path)
    shown = rehearse(module, dummy_inputs(module, encoder), within=partial(attached, bare))
    if not shown.passed or shown.inputs is None:
        return
    both = partial(attached, [*carried, *forms])
    error = rehearse(module, [shown.inputs], within=both).error
    if error is not None:
        raise _refusal(encoder, f"the forward with more tokens fails: {error}") from error
    problem = _difference(prompts, bare[0], carried)
    if problem:
        raise _refusal(encoder, problem)


@torch.no_grad()
def _difference(prompts: Prompts, bare: Recorder, carried: list[Recorder]) -> str:
    """Say how two images, with and without prompts behind their tokens, are not as expected."""
    length = prompts.spec.length
    for recorder in carried:
        form, met = recorder.form, recorder.met
        assert recorder.watch is not None
        hidden = recorder.watch.hidden
        if hidden.shape[0] != 2:
            return "it packs several images into one sequence, where carried prompts would mix them"
        if len(met) != 1 or hidden.dim() != 3 or met[0].values is None:
            return f"block {form.index} does not work on one sequence of tokens"
        keys, values = form.project(hidden[:, -length:])
        for ours, theirs in ((keys, met[0].keys), (values, met[0].values)):
            ours = ours.repeat_interleave(theirs.shape[1] // ours.shape[1], dim=1)
            if not torch.allclose(ours, theirs[..., -length:, :].to(ours.dtype), 1e-4, 1e-4):
                return f"block {form.index} rotates or moves the prompts"
    first = bare.met[0].keys
    own = carried[0].met[0].keys[..., : first.shape[-2], :]
    if own.shape != first.shape or not torch.allclose(own, first, 1e-4, 1e-4):
        return "its own tokens change their position"
    return ""


def _refusal(encoder: Encoder, problem: str) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(
        "inject_prompts",
        f"{encoder.family} cannot carry prompts through several blocks as tokens ({problem})",
        "Use `deep=True` with `form='auto'`, where prompts stay in their block",
    )
