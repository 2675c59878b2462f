"""Location "add": prompts are added to the tokens at each entry's block input."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..backbones.anatomy import Block, Encoder
from ..errors import SpecError, UnsupportedArchitectureError
from ..prompts import Place, Prompts
from ..spec import PromptSpec
from .attach import ForwardPatch
from .trial import Trials


class Add(Place):
    """The location: one vector on all tokens, prefix tokens included, or one per token.

    Source: Jia et al. 2022, section 4.3, prompt location "Add".
    """

    @classmethod
    def survey(cls, host: nn.Module, encoder: Encoder, spec: PromptSpec, at: torch.device) -> Add:
        """Look at what each entry block takes in a dummy forward."""
        trials = Trials(host, encoder, spec, at)
        calls = trials.first(small=True).shown.calls
        for index in spec.layers or ():
            block = encoder.blocks[index]
            shapes = [call.given for call in calls if call.path == block.path]
            if len(shapes) != 1 or not shapes[0]:
                raise trials.refusal(
                    UnsupportedArchitectureError,
                    f"block {index} ({block.path}) was called {len(shapes)} times with hidden "
                    "states in one forward, where once is needed",
                )
            try:
                check_addable(shapes[0], spec.length, block, index)
            except SpecError:
                # Another image size means another number of tokens: the first forward will tell.
                if len(shapes[0]) == 4 or not trials.any_size():
                    raise
        return cls(spec, encoder)

    def forms(self, prompts: Prompts, host: nn.Module) -> list[Any]:
        """Return one form per entry block."""
        return [AddForm(prompts, host, self.encoder.blocks[i], index=i) for i in prompts.entries]


class AddForm(ForwardPatch):
    """Prompts that are added in front of a block."""

    def __init__(self, prompts: Prompts, host: nn.Module, block: Block, *, index: int) -> None:
        super().__init__(host.get_submodule(block.path))
        self._links = (prompts,)
        self.index = index

    def extra_repr(self) -> str:
        """Name the block and the form."""
        return f"block {self.index}, form=add"

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the block's `forward`; hidden states come first."""
        prompts = self._links[0]
        if prompts.disabled():
            return self.original(*args, **kwargs)
        name = None if args else next(iter(kwargs))
        hidden = args[0] if name is None else kwargs[name]
        block = prompts.encoder.blocks[self.index]
        check_addable(tuple(hidden.shape), prompts.spec.length, block, self.index)
        tokens = prompts(self.index, hidden.shape[0]).to(hidden)
        if hidden.dim() == 4:
            tokens = tokens.unsqueeze(1)
        hidden = hidden + tokens
        if name is None:
            return self.original(hidden, *args[1:], **kwargs)
        return self.original(**(kwargs | {name: hidden}))


def check_addable(shape: tuple[int, ...], length: int, block: Block, index: int) -> None:
    """Raise unless `length` prompts can be added to a block's hidden states.

    Raises:
        UnsupportedArchitectureError: The block takes neither `(batch, tokens, dim)` nor a map
            `(batch, height, width, dim)`.
        SpecError: A length that is neither 1 nor the number of tokens.
    """
    call, given = "inject_prompts", {"location": "add", "length": length}
    width = block.width
    channels_first = len(shape) == 4 and shape[1] == width
    if len(shape) not in (3, 4) or shape[-1] != width or channels_first:
        raise UnsupportedArchitectureError(
            call,
            f"block {index} ({block.path}) takes hidden states of the shape {shape}, where "
            f"(batch, tokens, {width}) is needed",
            "use `location='prepend'`",
            given=given,
        )
    if length == 1 or (len(shape) == 3 and length == shape[1]):
        return
    valid = "1 (one vector on all tokens)"
    if len(shape) == 3:
        valid += f" or {shape[1]} (one per token of block {index}, prefix tokens included)"
    raise SpecError(call, f"length must be {valid}", given=given)
