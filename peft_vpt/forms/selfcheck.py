"""The self-check: do our keys and values equal what the model's softmax really received?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..backbones.anatomy import Encoder
from ..backbones.inputs import call, dummy_inputs
from ..backbones.paths import join, module_at
from ..backbones.projection import in_width
from ..errors import UnsupportedArchitectureError
from .compare import Rows, as_tokens, equal_rows, same_keys
from .softmax import Met

if TYPE_CHECKING:
    from .kv import KeyValueForm


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
    module = module_at(host, encoder.path)
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


class Watch:
    """Keep what the modules around one attention are called with, and check it.

    Args:
        form: Of the attention.
    """

    def __init__(self, form: KeyValueForm) -> None:
        self.form = form
        self.seen: dict[str, Tensor] = {}
        self._muted = False
        self._modules = {"block": form.block, "attention": form.owner}
        if form.attention.norm is not None:
            self._modules["norm"] = module_at(form.block, form.attention.norm)
        if form.attention.reduces == "input":
            self._modules["layer"] = form.attention.projection.modules(form.owner)[0]
        self._handles = [
            module.register_forward_pre_hook(self._keep, with_kwargs=True)
            for module in self._modules.values()
        ]

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if self._muted:
            return
        for name, watched in self._modules.items():
            if watched is module and value is not None:
                self.seen[name] = value

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Take no notice of calls made for prompts."""
        self._muted = True
        try:
            yield
        finally:
            self._muted = False

    def complete(self) -> bool:
        """Tell whether every module has been called."""
        return set(self.seen) == set(self._modules)

    @torch.no_grad()
    def check(self, met: list[Met]) -> None:
        """Raise unless norm and projections give, for real hidden states, what softmaxes received.

        Raises:
            UnsupportedArchitectureError: They do not, or the block changes its input in front of
                its norm in a way that the family does not know.
        """
        form, attention = self.form, self.form.attention
        where = f"block {form.index} ({join(form.path, attention.path)})"
        hidden = as_tokens(self.seen.get("norm", self.seen["attention"]), form.width)
        if not attention.behind:
            block = as_tokens(self.seen["block"], form.width)
            _require(equal_rows(hidden, block), where, "its norm does not see the block's input")
        if attention.reduces == "output":
            _require(_same_heads(form.project(hidden), met), where, "its heads are not as known")
            return
        keys, values = form.project(hidden)
        if attention.reduces == "input":
            projection, owner = attention.projection, form.owner
            layer = self._modules["layer"]
            seen = as_tokens(self.seen["layer"], in_width(layer))
            keys, values = projection.keys_values(owner, seen)
        blank = form.project_blank(hidden)
        found = Rows.match(met, keys, values, blank, attention.heads_axis)
        problem = "" if found.values_equal() else found.report
        _require(not problem, where, _unequal("values", problem))
        problem = same_keys(found, attention.rotates)
        _require(not problem, where, _unequal("keys", problem))


def _same_heads(ours: tuple[Tensor, Tensor], met: list[Met]) -> bool:
    keys, values = met[0].keys, met[0].values
    assert values is not None
    sizes = (keys.shape[-1], values.shape[-1])
    heads = keys.dim() < 4 or keys.shape[1] % ours[0].shape[1] == 0
    return heads and sizes == (ours[0].shape[-1], ours[1].shape[-1])


def _unequal(name: str, problem: str) -> str:
    return (
        f"the {name} that norm and projections give are not those that the softmax receives "
        f"({problem})"
    )


def _require(true: bool, where: str, problem: str) -> None:
    if not true:
        raise UnsupportedArchitectureError(
            f"self-check of {where}: {problem}, so prompts as extra keys and values would be "
            "wrong. The block does something that this family does not know."
        )


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


@contextmanager
def record(form: KeyValueForm, met: list[Met]) -> Iterator[None]:
    """Write down the softmaxes that an attention meets, for as long as the `with` block lasts."""
    target = form.target
    before = vars(target).get("forward")

    def recorded(*args: object, **kwargs: object) -> object:
        with form.override(None, met):
            return (before or type(target).forward.__get__(target))(*args, **kwargs)

    try:
        target.forward = recorded
        yield
    finally:
        if before is None:
            del target.forward
        else:
            target.forward = before


# transformers hooks its layers when states are first recorded, and notes here that it has.
_HOOKED = "_output_capturing_hooks_installed"


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no hooks of others; afterwards everything is as it was.

    Models write down what they see (a window size clamped to a small image, a table of biases), so
    the attributes of all modules are put back, and the random state.
    """
    parts = list(module.modules())
    saved = [_Saved(part) for part in parts]
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    try:
        for part in parts:
            part.training = False
            vars(part).pop(_HOOKED, None)
            part._forward_hooks, part._forward_pre_hooks = (
                type(part._forward_hooks)(),
                type(part._forward_pre_hooks)(),
            )
        with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
            yield
    finally:
        for state in saved:
            state.restore()


class _Saved:
    """The attributes of a module, with the contents of its dictionaries."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = dict(vars(module))
        self.contents = {k: dict(v) for k, v in vars(module).items() if type(v) is dict}

    def restore(self) -> None:
        """Put them back, in the same dictionary objects."""
        own = vars(self.module)
        own.clear()
        own.update(self.attributes)
        for name, content in self.contents.items():
            own[name].clear()
            own[name].update(content)
