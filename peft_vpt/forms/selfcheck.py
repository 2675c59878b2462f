"""The self-check: do our keys and values equal what the model's softmax really received?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..backbones.anatomy import Encoder, module_at
from ..errors import UnsupportedArchitectureError
from .softmax import Met, SoftmaxOverride

if TYPE_CHECKING:
    from .kv import KeyValueForm

# Both sides run the same kernels on the same numbers, but on another number of rows; what is left
# is the order of summation, a few rounding steps of the dtype they were computed in.
_ROUNDINGS = 64


def self_check(host: nn.Module, encoder: Encoder, forms: Sequence[KeyValueForm]) -> None:
    """Run one dummy forward of the bare encoder and compare every attention position by position.

    Batch 2, eval mode, no gradients, random state and user hooks left alone. The host must not
    carry the forms yet.

    Raises:
        UnsupportedArchitectureError: The forward fails, an attention meets no softmax or several,
            or keys and values differ.
    """
    from .kv import check_form

    module = module_at(host, encoder.path)
    inputs: dict[int, Tensor] = {}
    met: dict[int, list[Met]] = {id(form): [] for form in forms}
    with _undisturbed(module), ExitStack() as stack:
        for form in forms:
            stack.enter_context(_recording(form, inputs, met[id(form)]))
        try:
            module(_dummy_image(module, encoder))
        except Exception as error:
            raise UnsupportedArchitectureError(
                f"inject_prompts: the self-check's forward of {type(module).__name__} on an image "
                f"of size {encoder.input_size} failed: {error}"
            ) from error
    for form in forms:
        seen = met[id(form)]
        if len(seen) != 1 or id(form) not in inputs:
            raise UnsupportedArchitectureError(
                f"inject_prompts: block {form.index} ({form.path}) met {len(seen)} softmaxes in "
                "its attention, where exactly one is needed for extra keys and values to be exact. "
                "Ordinary attention: set it to SDPA or eager (transformers: "
                "model.set_attn_implementation('sdpa')). Differential or linear attention cannot "
                "take prompts this way."
            )
        with _undisturbed(module):
            check_form(form, inputs[id(form)], seen[0])


def check_met(where: str, keys: Tensor, values: Tensor, met: Met) -> None:
    """Raise unless projected keys and values equal what a softmax received, in every position."""
    for name, ours, theirs in (("keys", keys, met.keys), ("values", values, met.values)):
        if theirs is None or ours.shape != theirs.shape:
            shape = None if theirs is None else tuple(theirs.shape)
            problem = f"shape {tuple(ours.shape)} against {shape}"
        else:
            theirs = theirs.detach().to(ours.dtype)
            error = float((ours - theirs).abs().max())
            scale = float(theirs.abs().max())
            if error <= _ROUNDINGS * torch.finfo(ours.dtype).eps * max(scale, 1e-30):
                continue
            problem = f"largest difference {error:.3g} at a scale of {scale:.3g}"
        raise UnsupportedArchitectureError(
            f"self-check of {where}: the {name} that norm and projections give are not those that "
            f"the softmax receives ({problem}), so prompts as keys and values would be wrong. "
            "The block does something to them that this family does not know."
        )


@contextmanager
def _recording(form: KeyValueForm, inputs: dict[int, Tensor], met: list[Met]) -> Iterator[None]:
    block, target = form.block, form.target
    before = {module: vars(module).get("forward") for module in {block, target}}

    def keep_input(*args: object, **kwargs: object) -> object:
        inputs[id(form)] = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        return (before[block] or type(block).forward.__get__(block))(*args, **kwargs)

    def record(*args: object, **kwargs: object) -> object:
        call = (
            keep_input
            if block is target
            else before[target] or type(target).forward.__get__(target)
        )
        with SoftmaxOverride(None, None, met):
            return call(*args, **kwargs)

    try:
        block.forward = keep_input
        target.forward = record
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no hooks of others, and the random state as it was."""
    parts = list(module.modules())
    state = [(m, m.training, m._forward_hooks, m._forward_pre_hooks) for m in parts]
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    try:
        for part in parts:
            part.training = False
            part._forward_hooks, part._forward_pre_hooks = (
                type(part._forward_hooks)(),
                type(part._forward_pre_hooks)(),
            )
        with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
            yield
    finally:
        for part, training, hooks, pre_hooks in state:
            part.training = training
            part._forward_hooks, part._forward_pre_hooks = hooks, pre_hooks


def _dummy_image(module: nn.Module, encoder: Encoder) -> Tensor:
    like = next(p for p in module.parameters() if p.is_floating_point())
    image = torch.rand(2, *encoder.input_size, generator=torch.Generator().manual_seed(0))
    return image.to(device=like.device, dtype=like.dtype)
