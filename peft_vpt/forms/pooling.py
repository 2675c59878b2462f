"""Pooling: replace what the head receives, and nothing else (paper, section 4.3 "final output")."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..backbones.anatomy import Encoder
from ..errors import VPTError
from ..prompts import Prompts, Slot
from .attach import ForwardPatch


class Pooling(ForwardPatch):
    """Keep the final tokens where the sequence is last seen whole; pool them for the head.

    Stands in front of the final norm, so that prompts that the last span leaves in the sequence
    are normed with the rest and then cut off. Where a model norms no sequence (CLIP), it stands
    in front of the last block instead. Tokens are kept from the host's forward to its head only.
    """

    def __init__(self, prompts: Prompts, host: nn.Module, encoder: Encoder) -> None:
        last = encoder.blocks[-1].path
        super().__init__(host.get_submodule(encoder.final_norm or last))
        self._links = (prompts, host)
        self._prefix = encoder.prefix_tokens
        self._after = encoder.norm_after_pool
        self._head = encoder.head.paths[0] if encoder.head else ""
        self._handles: list[Any] = []
        self._hooked: tuple[nn.Module, ...] = ()
        self._kept = Slot()
        self.with_prompts = prompts.spec.pooling in ("prompt", "global")

    def extra_repr(self) -> str:
        """Name the pooling."""
        return f"pooling={self._links[0].spec.pooling}"

    def attach(self) -> None:
        """Stand in front of the norm and of the head."""
        super().attach()
        host = self._links[1]
        self._hooked = (host.get_submodule(self._head),)
        self._handles = [
            self._hooked[0].register_forward_pre_hook(self.pool),
            host.register_forward_pre_hook(self.begin),
            host.register_forward_hook(self.end),
        ]

    def detach(self) -> None:
        """Take all of it off."""
        super().detach()
        for handle in self._handles:
            handle.remove()

    def begin(self, host: nn.Module, args: Any) -> None:
        """Forward pre-hook of the host: from here on tokens are kept."""
        head = host.get_submodule(self._head)
        if head is not self._hooked[0]:
            # Somebody has put another head there, timm's reset_classifier say.
            self._handles[0].remove()
            self._handles[0] = head.register_forward_pre_hook(self.pool)
            self._hooked = (head,)
        self._kept.set([])

    def end(self, host: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the host: nothing outlives the forward."""
        self._kept.set(None)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the norm's (or last block's) `forward`."""
        out = self.original(*args, **kwargs)
        prompts = self._links[0]
        if prompts.disabled():
            return out
        tokens = out[0] if isinstance(out, tuple) else out
        kept = self._kept.get()
        if kept is not None:
            kept.append(tokens)
        own = prompts.own_tokens.get() if self.with_prompts else None
        if own is None or tokens.shape[1] != own + prompts.spec.length:
            return out
        return (tokens[:, :own], *out[1:]) if isinstance(out, tuple) else tokens[:, :own]

    def pool(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Forward pre-hook of the head: `(batch, features)` becomes the pooled tokens."""
        prompts, host = self._links
        if prompts.disabled():
            return None
        kept = self._kept.get()
        if not kept:
            raise VPTError(
                "",
                f"`pooling={prompts.spec.pooling!r}`: the head was called outside the model's own "
                "forward, so there are no tokens to pool",
                "Call the whole model, or pool yourself",
            )
        pooled = self._pooled(kept[-1]).mean(dim=1)
        if self._after is not None:
            pooled = host.get_submodule(self._after)(pooled)
        return (pooled, *args[1:])

    def _pooled(self, tokens: Tensor) -> Tensor:
        pooling = self._links[0].spec.pooling
        own = tokens.shape[1] - (self._links[0].spec.length if self.with_prompts else 0)
        if pooling == "cls":
            return tokens[:, :1]
        if pooling == "image":
            return tokens[:, self._prefix : own]
        return tokens[:, own:] if pooling == "prompt" else tokens[:, self._prefix :]
