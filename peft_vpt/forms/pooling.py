"""Pooling: replace what the head receives, and nothing else (paper, section 4.3 "final output")."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..backbones.anatomy import Encoder, module_at
from .attach import ForwardPatch

if TYPE_CHECKING:
    from ..prompts import Prompts

_TOKENS: ContextVar[tuple[int, Tensor] | None] = ContextVar("peft_vpt_final_tokens", default=None)


class Pooling(ForwardPatch):
    """Keep the final tokens where the sequence is last seen whole; pool them for the head.

    Stands in front of the final norm, so that prompts that the last span leaves in the sequence
    are normed with the rest and then cut off. Where a model norms no sequence (CLIP), it stands
    in front of the last block instead.
    """

    def __init__(self, prompts: Prompts, host: nn.Module, encoder: Encoder) -> None:
        last = encoder.blocks[-1].path
        super().__init__(module_at(host, encoder.final_norm or last))
        self._links = (prompts, host)
        self._prefix = encoder.prefix_tokens
        self._after = encoder.norm_after_pool
        self._head = encoder.head.paths[0] if encoder.head else None
        self._handle: Any = None
        self._traced: Tensor | None = None
        self.with_prompts = prompts.spec.pooling in ("prompt", "global")

    def extra_repr(self) -> str:
        """Name the pooling."""
        return f"pooling={self._links[0].spec.pooling}"

    def attach(self) -> None:
        """Stand in front of the norm and of the head."""
        super().attach()
        head = module_at(self._links[1], self._head or "")
        self._handle = head.register_forward_pre_hook(self.pool)

    def detach(self) -> None:
        """Take both off."""
        super().detach()
        self._handle.remove()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the norm's (or last block's) `forward`."""
        out = self.original(*args, **kwargs)
        prompts = self._links[0]
        if prompts.disabled():
            return out
        tokens = out[0] if isinstance(out, tuple) else out
        self._keep(tokens)
        if not self.with_prompts:
            return out
        own = tokens[:, : tokens.shape[1] - prompts.spec.length]
        return (own, *out[1:]) if isinstance(out, tuple) else own

    def pool(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Forward pre-hook of the head: `(batch, features)` becomes the pooled tokens."""
        prompts, host = self._links
        tokens = self._take()
        if tokens is None or prompts.disabled():
            return None
        own = tokens.shape[1] - (prompts.spec.length if self.with_prompts else 0)
        parts = {
            "cls": tokens[:, :1],
            "image": tokens[:, self._prefix : own],
            "prompt": tokens[:, own:],
            "global": tokens[:, self._prefix :],
        }
        pooled = parts[prompts.spec.pooling].mean(dim=1)
        if self._after is not None:
            pooled = module_at(host, self._after)(pooled)
        return (pooled, *args[1:])

    def _keep(self, tokens: Tensor) -> None:
        # A context variable keeps threads that share the model apart; dynamo cannot write one.
        if torch.compiler.is_compiling():
            self._traced = tokens
        else:
            _TOKENS.set((id(self), tokens))

    def _take(self) -> Tensor | None:
        if torch.compiler.is_compiling():
            tokens, self._traced = self._traced, None
            return tokens
        kept = _TOKENS.get()
        _TOKENS.set(None)
        return kept[1] if kept and kept[0] == id(self) else None
