"""`model.prompts`: the parameters, how they become tokens, training mode, and what is undone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from .backbones.anatomy import Encoder, first_argument, is_kind
from .backbones.checkpointing import (
    is_checkpointing,
    is_reentrant,
    keeps_training_flag,
    refuse_cut_off,
)
from .backbones.paths import module_at
from .errors import VPTError
from .pixels import PixelPlace, PixelPrompts, pixel_shapes
from .spec import NOWHERE, PromptSpec

_DISABLED: ContextVar[frozenset[int]] = ContextVar("peft_vpt_disabled", default=frozenset())


class SharedPrompts(nn.Module):
    """One parameter per stage, for prompts that the layers of a stage share."""

    def forward(self, stage: int) -> Tensor:
        """Return the parameter of a stage: `(length or 1, dim or project)`."""
        parameter: Tensor = getattr(self, str(stage))
        return parameter


class Prompts(nn.Module):
    """All state that injection adds to a model.

    Parameters are named as in an adapter file: `<block>` `(length, dim)` per entry block, or
    `shared.<stage>`; `project.<width>` where prompts are projected; `pixel.<name>` where they are
    pixels. `length` is 1 where one vector is repeated.

    Args:
        spec: Resolved options.
        encoder: Anatomy of the backbone.
        host: The model, kept outside the module tree.
        place: Where pixel prompts meet the model; None for other locations.

    Source: Jia et al. 2022, sections 3.2, 4.3 and A.
    """

    shared: SharedPrompts | None
    project: nn.ModuleDict | None
    pixel: PixelPrompts | None

    def __init__(
        self,
        spec: PromptSpec,
        encoder: Encoder,
        host: nn.Module,
        place: PixelPlace | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.place = place
        self.encoder = encoder
        self.info: dict[str, Any] = {}
        self.undo: dict[str, Any] = {}
        # Whether the self-check has been made, or waits for the first real forward.
        self.checked = True
        self._host = (host,)
        self.entries = [enter for enter, _ in spec.spans(encoder.depth)]
        self.shared = SharedPrompts() if spec.sharing in ("inter", "all") else None
        self.project = nn.ModuleDict() if spec.project else None
        self.pixel = PixelPrompts() if place is not None else None
        for name, shape in prompt_shapes(spec, encoder, place).items():
            self._register(name, torch.empty(shape))
        for width in encoder.widths_at(self.entries) if spec.project else ():
            assert self.project is not None
            assert spec.project is not None
            self.project[str(width)] = skip_init(  # type: ignore[no-untyped-call]
                nn.Linear, spec.project, width
            )
        self.forms = nn.ModuleList()
        # What a protocol adds to prompts or puts in their place; `protocols.Delta`.
        self.delta: Any = None
        # The first block in which something trains, for reentrant checkpointing.
        self.first_block = self.entries[0] if self.entries else None

    def _register(self, name: str, values: Tensor) -> None:
        owner, _, last = name.rpartition(".")
        parameter = nn.Parameter(values, requires_grad=self.spec.train_prompts)
        module_at(self, owner).register_parameter(last, parameter)

    def stored(self, entry: int) -> Tensor:
        """Return the parameter behind an entry block: `(length or 1, dim or project)`."""
        if self.shared is not None:
            shared: Tensor = self.shared(self.encoder.blocks[entry].stage)
            return shared
        parameter: Tensor = getattr(self, str(entry))
        return parameter

    def sources(self, entry: int) -> list[Tensor]:
        """Return every tensor that an entry's tokens are made from."""
        project = [] if self.project is None else [*self._projection(entry).parameters()]
        return [self.stored(entry), *project]

    def forward(self, entry: int, batch: int) -> Tensor:
        """Return an entry's prompts, `(1, length, dim)`; `(batch, length, dim)` under dropout.

        A call of the module, so that whatever offloads or shards its parameters brings them.

        Order: projection, expansion to the batch, dropout with one mask per sample.

        Source: Jia et al. 2022, section 3.2; dropout of Table 6.
        """
        tokens = self.stored(entry) if self.pixel is None else self._projected_patches()
        if not torch.is_grad_enabled():
            # A view of a parameter says requires_grad even now, which trips module trackers.
            tokens = tokens.detach()
        if self.project is not None:
            tokens = self._projection(entry)(tokens)
        tokens = tokens.expand(self.spec.length, -1).unsqueeze(0)
        if self.training and self.spec.dropout:
            tokens = F.dropout(tokens.expand(batch, -1, -1), self.spec.dropout, training=True)
        return tokens

    def _projected_patches(self) -> Tensor:
        """Put patches of pixels through the frozen patch projection: `(length, dim)`."""
        assert self.pixel is not None
        assert self.place is not None
        conv: Any = module_at(self._host[0], self.place.conv)
        tokens: Tensor = conv(self.pixel("patches").to(conv.weight.dtype)).flatten(1)
        return tokens

    def _projection(self, entry: int) -> nn.Module:
        assert self.project is not None
        return self.project[str(self.encoder.blocks[entry].width)]

    def disabled(self) -> bool:
        """Tell whether `disable_prompts` is in force here, in this thread or task."""
        return id(self) in _DISABLED.get()

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Let the model run without prompts inside the `with` block."""
        token = _DISABLED.set(_DISABLED.get() | {id(self)})
        try:
            yield
        finally:
            _DISABLED.reset(token)

    def sharded(self) -> bool:
        """Tell whether FSDP brings and takes the host's weights, unseen by version counters."""
        parts = (self._host[0], module_at(self._host[0], self.encoder.start))
        names = ("FSDPModule", "FullyShardedDataParallel")
        return any(is_kind(part, name) for part in parts for name in names)

    def clear_cache(self) -> None:
        """Forget cached keys and values; needed only after an edit through `.data`."""
        for form in self.forms:
            clear = getattr(form, "clear_cache", None)
            if clear is not None:
                clear()

    def train(self, mode: bool = True) -> Prompts:
        """Set the mode, and put every module of the host that trains nothing of its own into eval.

        Runs last in the host's own `train()`, so a plain `model.train()` in any loop leaves the
        frozen backbone without dropout and with fixed statistics. The host itself keeps the mode
        it was given, and so does a layer that is checkpointing, or it would stop recomputing.
        """
        super().train(mode)
        self.clear_cache()
        if not mode:
            return self
        host = self._host[0]
        own = {id(module) for module in (host, *self.modules(), *self._head_modules())}
        for path, module in host.named_modules():
            if id(module) in own or keeps_training_flag(module) or self._trains(path, module):
                continue
            module.training = False
        return self

    def _trains(self, path: str, module: nn.Module) -> bool:
        """Tell whether a module of the backbone follows the host into train mode."""
        if self.delta is not None and self.delta.protocol.moves:
            return bool(self.delta.keeps_mode(path))
        return any(p.requires_grad for p in module.parameters(recurse=False))

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Return the prompts and their projection by name, without what a protocol adds."""
        return {n: p for n, p in self.named_parameters() if not n.startswith("delta.")}

    def _head_modules(self) -> Iterator[nn.Module]:
        for path in self.encoder.head.paths if self.encoder.head else ():
            yield from module_at(self._host[0], path).modules()
        # A decoder that trains whole does so with its dropout and statistics.
        inside = (self.encoder.path, "prompts")
        for path, module in self._host[0].named_modules() if "decoder" in self.undo else ():
            if path and not any(path == p or path.startswith(f"{p}.") for p in inside):
                yield module

    def _apply(self, *args: Any, **kwargs: Any) -> Prompts:
        self.clear_cache()
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.clear_cache()
        super()._load_from_state_dict(*args, **kwargs)

    def check_forward(self, host: nn.Module, args: Any) -> None:
        """Forward pre-hook of the host: raise where prompts would silently go wrong.

        Raises:
            VPTError: In a `DataParallel` replica, whose modules still point to the original's
                prompts, so that gradients would be lost; under reentrant checkpointing that would
                lose them; or where prompts are disabled and a recomputation in backward might find
                them enabled.
        """
        if getattr(host, "_is_replica", False):
            raise VPTError(
                "a prompted model cannot run under torch.nn.DataParallel: its replicas lose the "
                "gradients of the prompts. Use DistributedDataParallel with torchrun."
            )
        self._keep_checkpointing(host)
        if self.first_block is None:
            # In front of all blocks, where nothing is recomputed.
            return
        checkpointing = is_checkpointing(host, self.encoder, self.first_block)
        if checkpointing and torch.is_grad_enabled():
            refuse_cut_off(host, self.encoder, self.first_block)
        if checkpointing and torch.is_grad_enabled() and self.disabled():
            raise VPTError(
                "disable_prompts: gradient checkpointing recomputes blocks in backward, where "
                "prompts may be enabled again. Run the bare backbone under torch.no_grad(), or "
                "without checkpointing."
            )

    def _keep_checkpointing(self, host: nn.Module) -> None:
        """Let layers whose checkpointing was enabled after `train()` recompute."""
        if not host.training:
            return
        blocks = [module_at(host, block.path) for block in self.encoder.blocks]
        for module in blocks or host.modules():
            if keeps_training_flag(module) and not module.training:
                module.training = True

    def require_input_grad(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook in front of the first prompted block, for reentrant checkpointing.

        A reentrant checkpoint whose inputs need no gradient cuts the graph, and prompts inside it
        would get no gradient and no error.
        """
        hidden = first_argument(args, kwargs)
        if not torch.is_grad_enabled() or hidden.requires_grad:
            return None
        if not is_reentrant(self._host[0], self.encoder, self.first_block or 0):
            return None
        hidden = hidden.detach().requires_grad_()
        if args:
            return (hidden, *args[1:]), kwargs
        return args, kwargs | {next(iter(kwargs)): hidden}

    def extra_repr(self) -> str:
        """Say how many prompts enter where, and how many parameters that makes."""
        spec, count = self.spec, sum(p.numel() for p in self.parameters())
        if spec.location == NOWHERE:
            return "no prompts"
        kind = "deep" if spec.deep else "shallow"
        if spec.location != "prepend":
            kind += f", location={spec.location}"
        if self.place is not None and not self.entries:
            _, height, width = self.place.image
            where = f"{kind}, length={spec.length}, images {height} x {width}"
            return f"{where}, parameters={count:,}"
        return f"{kind}, length={spec.length}, entries={self.entries}, parameters={count:,}"


def prompt_shapes(
    spec: PromptSpec, encoder: Encoder, place: PixelPlace | None
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every stored prompt by its name.

    That is `(length or 1, dim or project)` but for pixels.
    """
    if place is not None:
        return pixel_shapes(spec, place)
    length = 1 if spec.sharing in ("intra", "all") else spec.length
    entries = [enter for enter, _ in spec.spans(encoder.depth)]
    if spec.sharing in ("inter", "all"):
        stages = sorted({encoder.blocks[entry].stage for entry in entries})
        return {f"shared.{s}": (length, spec.project or encoder.widths[s]) for s in stages}
    return {str(e): (length, spec.project or encoder.blocks[e].width) for e in entries}
