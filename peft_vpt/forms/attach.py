"""Replacing a module's `forward` on the instance, reversibly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from ..backbones.anatomy import is_kind
from ..backbones.checkpointing import keeps_training_flag
from ..errors import VPTError


class Form(nn.Module):
    """A child of `model.prompts` that attaches to modules of the host and comes off again."""

    is_prompt_form = True

    def attach(self) -> None:
        """Attach; nothing may fail here."""
        raise NotImplementedError

    def detach(self) -> None:
        """Leave no trace."""
        raise NotImplementedError

    def clear_cache(self) -> None:
        """Forget what was computed from the prompts; most forms keep nothing."""


class ForwardPatch(Form):
    """Base of the forms: a child of `model.prompts` that stands in front of a module's `forward`.

    The bound method that is put on the instance belongs to a registered module, so a deepcopy or
    an unpickled model gets its own. What was there before, the class's `forward` or a wrapper that
    another library put on the instance, is called and, on removal, put back. `method` names
    another method where a model has further ones that do the same work.
    """

    method = "forward"

    def __init__(self, target: nn.Module) -> None:
        super().__init__()
        # In a tuple, so that torch does not register the host's module a second time.
        self._target = (target,)
        self._found: Callable[..., Any] | None = None

    @property
    def target(self) -> nn.Module:
        """The module whose `forward` this form stands in front of."""
        return self._target[0]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the target's `forward`."""
        raise NotImplementedError

    def attach(self) -> None:
        """Put `run` in front of the target's `forward`."""
        self._found = vars(self.target).get(self.method)
        setattr(self.target, self.method, self.run)

    def check_on_top(self) -> None:
        """Raise unless the target's `forward` is still ours, so that it can be taken off."""
        if vars(self.target).get(self.method) != self.run:
            raise VPTError(
                "remove_prompts",
                f"another library has wrapped {type(self.target).__name__}.{self.method} after "
                "inject_prompts",
                "take that wrapper off first",
            )

    def detach(self) -> None:
        """Put back what `attach` found."""
        if self._found is None:
            delattr(self.target, self.method)
        else:
            setattr(self.target, self.method, self._found)

    def recomputed(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `inner` inside the checkpoint that the target's own `forward` would make.

        A transformers layer checkpoints within its `forward`; what stands in front of it would not
        be there when the layer is run again. `inner` must call `uncheckpointed`.
        """
        target: Any = self.target
        if not self._checkpoints(target):
            return inner(*args, **kwargs)
        return target._gradient_checkpointing_func(partial(inner, **kwargs), *args)

    def uncheckpointed(self, *args: Any, **kwargs: Any) -> Any:
        """Call the `forward` that was there before, without its own checkpoint."""
        target: Any = self.target
        if not self._checkpoints(target):
            return self.original(*args, **kwargs)
        target.gradient_checkpointing = False
        try:
            return self.original(*args, **kwargs)
        finally:
            target.gradient_checkpointing = True

    @staticmethod
    def _checkpoints(target: nn.Module) -> bool:
        within = hasattr(type(target).forward, "__wrapped__")
        layer = is_kind(target, "GradientCheckpointingLayer", "transformers")
        return layer and within and target.training and keeps_training_flag(target)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Call the `forward` that was there before."""
        target = self.target
        if self._found is None:
            return getattr(type(target), self.method)(target, *args, **kwargs)
        return self._found(*args, **kwargs)


@contextmanager
def attached(forms: Iterable[Form]) -> Iterator[None]:
    """Attach forms for as long as the `with` block lasts."""
    with ExitStack() as stack:
        for form in forms:
            form.attach()
            stack.callback(form.detach)
        yield
