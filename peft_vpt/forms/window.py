"""Prompts that flow through windowed blocks (Swin), attended in every window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.anatomy import Block, first_argument
from ..backbones.checkpointing import is_checkpointing, is_reentrant
from ..backbones.windows import WindowParts, finish, merge, scores
from ..errors import VPTError
from ..prompts import Prompts
from .attach import ForwardPatch
from .kv import KeyValueForm
from .softmax import Met, append

_TAG = "_peft_vpt_prompts"


class Stream:
    """Prompts on their way from one block to the next, beside the hidden states.

    They are tied to the tensor that a block returns, so that a checkpoint that runs a block again
    finds what it found before. While a forward is traced (compile, export) they are an attribute
    here, since a traced tensor carries none.
    """

    def __init__(self) -> None:
        self.traced: Tensor | None = None

    def put(self, hidden: Tensor, prompts: Tensor) -> None:
        """Send prompts along with hidden states."""
        if torch.compiler.is_compiling():
            self.traced = prompts
        else:
            setattr(hidden, _TAG, prompts)

    def take(self, hidden: Tensor) -> Tensor:
        """Return the prompts that came with hidden states.

        Raises:
            VPTError: None came: something between the blocks replaced the tensor.
        """
        if torch.compiler.is_compiling():
            prompts, self.traced = self.traced, None
        else:
            prompts = getattr(hidden, _TAG, None)
        if prompts is None:
            raise VPTError(
                "",
                "prompts were lost between two blocks: something replaced the hidden states "
                "(reentrant checkpointing does; use `use_reentrant=False`), blocks were called "
                "outside the model's forward, or some blocks are compiled and others are not",
                "Call or compile the whole model, or use `deep=True`",
            )
        return prompts

    def __getstate__(self) -> dict[str, Any]:
        """Leave prompts on their way out of copies and pickles."""
        return {"traced": None}


class WindowForm(KeyValueForm):
    """Prompts in one windowed block of a longer span.

    The windows' tokens meet them as in the kv form. The prompts themselves attend in every window
    to its tokens and to one another, without bias and mask, and are averaged over the windows of
    their own sample.

    Source: the Swin variant of Jia et al. 2022, per sample instead of across the batch.
    """

    def __init__(
        self,
        prompts: Prompts,
        host: nn.Module,
        block: Block,
        parts: WindowParts,
        *,
        entry: int,
        index: int,
        leaves: bool,
        stream: Stream,
    ) -> None:
        super().__init__(prompts, host, block, block.attentions[0], index=index)
        self.parts = parts
        self._place = (host, prompts.encoder, index)
        self.entry = entry
        self.leaves = leaves
        self.stream = stream

    def extra_repr(self) -> str:
        """Name the block and the form."""
        return f"block {self.index}, form=token (carried, averaged over windows)"

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the block's `forward`; arguments and result are its own."""
        if self.prompts.disabled():
            return self.original(*args, **kwargs)
        hidden = first_argument(args, kwargs)
        if self.index == self.entry:
            tokens = self.prompts(self.entry, hidden.shape[0]).to(hidden)
            tokens = tokens.expand(hidden.shape[0], -1, -1)
        else:
            tokens = self.stream.take(hidden)
        if torch.is_grad_enabled() and is_reentrant(*self._place):
            raise VPTError(
                "",
                "prompts that flow through windowed blocks need gradient checkpointing with "
                "`use_reentrant=False`: the reentrant kind would lose their gradients",
            )
        tracing = torch.compiler.is_compiling() and torch.is_grad_enabled()
        if tracing and is_checkpointing(*self._place):
            raise VPTError(
                "",
                "prompts that flow through windowed blocks cannot be compiled together with "
                "gradient checkpointing",
                "use one of the two, or `deep=True`",
            )
        out, carried = self.recomputed(self._attend_and_carry, tokens, *args, **kwargs)
        if carried is not None:
            self.stream.put(out[0] if isinstance(out, tuple) else out, carried)
        return out

    def _attend_and_carry(self, tokens: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        pair = self.project(tokens)
        met: list[Met] = []
        with self.override(lambda: pair, met):
            out = self.uncheckpointed(*args, **kwargs)
        if not self.all_met(met):
            self._missed(len(met))
        return out, None if self.leaves else self._carried(tokens, pair, met[0])

    def _carried(self, tokens: Tensor, pair: tuple[Tensor, Tensor], met: Met) -> Tensor:
        """Return what the block makes of its prompts, `(batch, length, dim)`."""
        assert met.values is not None
        query = self.query(tokens)
        windows = met.keys.shape[0] // tokens.shape[0]
        query = query.repeat_interleave(windows, dim=0)
        keys, values = append(met.keys, pair[0]), append(met.values, pair[1])
        weights = scores(self.owner, query, keys).softmax(dim=-1)
        attended = weights @ values
        attended = attended.reshape(-1, windows, *attended.shape[1:]).mean(dim=1)
        attended = attended.transpose(1, 2).flatten(2)
        return finish(self.block, self.parts, tokens, attended)

    def query(self, tokens: Tensor) -> Tensor:
        """Return the prompts' own queries `(batch, heads, length, head_dim)`."""
        if self.attention.norm is not None:
            tokens = self.block.get_submodule(self.attention.norm)(tokens)
        return self.attention.projection.queries(self.owner, tokens)


class MergeForm(ForwardPatch):
    """Prompts past a patch merging, in which they take no part."""

    def __init__(self, prompts: Prompts, module: nn.Module, stream: Stream) -> None:
        super().__init__(module)
        self._links = (prompts,)
        self.stream = stream

    def extra_repr(self) -> str:
        """Say what happens to prompts."""
        return "prompts repeated for the four patches of a merging"

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the merging's `forward`."""
        out = self.original(*args, **kwargs)
        if not self._links[0].disabled():
            prompts = self.stream.take(first_argument(args, kwargs))
            self.stream.put(out, merge(self.target, prompts))
        return out
