"""Location "add": prompts are added to the tokens at each entry's block input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..backbones.anatomy import Block
from ..errors import SpecError, UnsupportedArchitectureError
from .attach import ForwardPatch

if TYPE_CHECKING:
    from ..prompts import Prompts


class AddForm(ForwardPatch):
    """One vector on all tokens, prefix tokens included, or one per token, in front of a block.

    Source: Jia et al. 2022, section 4.3, prompt location "Add".
    """

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
        check_addable(hidden, prompts.spec.length, prompts.encoder.blocks[self.index], self.index)
        tokens = prompts(self.index, hidden.shape[0]).to(hidden)
        if hidden.dim() == 4:
            tokens = tokens.unsqueeze(1)
        hidden = hidden + tokens
        if name is None:
            return self.original(hidden, *args[1:], **kwargs)
        return self.original(**(kwargs | {name: hidden}))


def check_addable(hidden: Tensor, length: int, block: Block, index: int) -> None:
    """Raise unless `length` prompts can be added to a block's hidden states.

    Raises:
        UnsupportedArchitectureError: The block takes neither `(batch, tokens, dim)` nor a map
            `(batch, height, width, dim)`.
        SpecError: A length that is neither 1 nor the number of tokens.
    """
    call, shape = f"inject_prompts(location='add', length={length})", tuple(hidden.shape)
    width = block.width
    channels_first = len(shape) == 4 and shape[1] == width
    if len(shape) not in (3, 4) or shape[-1] != width or channels_first:
        raise UnsupportedArchitectureError(
            f"{call}: block {index} ({block.path}) takes hidden states of the shape {shape}, where "
            f"(batch, tokens, {width}) is needed; use location='prepend'."
        )
    if length == 1 or (len(shape) == 3 and length == shape[1]):
        return
    valid = "1 (one vector on all tokens)"
    if len(shape) == 3:
        valid += f" or {shape[1]} (one per token of block {index}, prefix tokens included)"
    raise SpecError(f"{call}: length must be {valid}.")
