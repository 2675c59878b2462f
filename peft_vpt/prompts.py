"""`model.prompts`: the parameters, how they become tokens, and the training mode; their place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from .backbones.anatomy import Encoder, first_argument, first_conv_kernel, is_kind
from .backbones.checkpointing import (
    is_checkpointing,
    is_reentrant,
    keeps_training_flag,
    refuse_cut_off,
)
from .errors import SpecError, VPTError
from .spec import NOWHERE, PromptSpec, xavier_bound

_DISABLED: ContextVar[frozenset[int]] = ContextVar("peft_vpt_disabled", default=frozenset())
_VALUES: ContextVar[dict[int, Any]] = ContextVar("peft_vpt_slots", default={})  # noqa: B039


class Slot:
    """Hold a value per thread and task, so that threads may share a model.

    While a forward is traced (compile, export) the value is an attribute: dynamo cannot write
    context variables.
    """

    def __init__(self) -> None:
        self.traced: Any = None

    def set(self, value: Any) -> None:
        """Store a value; None empties the slot."""
        if torch.compiler.is_compiling():
            self.traced = value
            return
        others = {key: kept for key, kept in _VALUES.get().items() if key != id(self)}
        _VALUES.set(others if value is None else others | {id(self): value})

    def get(self) -> Any:
        """Return the value, or None."""
        return self.traced if torch.compiler.is_compiling() else _VALUES.get().get(id(self))

    def __getstate__(self) -> dict[str, Any]:
        """Leave the value out of copies and pickles."""
        return {"traced": None}


@dataclass(frozen=True)
class Place:
    """Where prompts meet one model. Every location has its own kind, named in `spec.LOCATIONS`.

    This base serves prompts that enter in front of blocks.

    Args:
        spec: Resolved options.
        encoder: Anatomy of the backbone.
        image: `(channels, height, width)` of the images it was made for; None: any the model takes.
    """

    spec: PromptSpec
    encoder: Encoder
    image: tuple[int, int, int] | None = field(default=None, kw_only=True)

    @classmethod
    def survey(cls, host: nn.Module, encoder: Encoder, spec: PromptSpec, at: torch.device) -> Place:
        """Find the place in a bare model, which is left as it was.

        Args:
            host: The model, or a prompted one while its prompts are disabled.
            encoder: Its anatomy.
            spec: Resolved options.
            at: Where its forward runs.

        Raises:
            SpecError: A length that the model cannot take at this location.
            UnsupportedArchitectureError: The model offers no place for it.
        """
        return cls(spec, encoder)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every stored prompt by its name: `(length or 1, dim or project)`."""
        spec, blocks = self.spec, self.encoder.blocks
        length = 1 if spec.sharing in ("intra", "all") else spec.length
        entries = [enter for enter, _ in spec.spans(self.encoder.depth)]
        if spec.sharing in ("inter", "all"):
            widths = {blocks[e].stage: self.encoder.widths[blocks[e].stage] for e in entries}
            return {f"shared.{s}": (length, spec.project or widths[s]) for s in sorted(widths)}
        return {str(e): (length, spec.project or blocks[e].width) for e in entries}

    def draw(
        self, name: str, blank: Tensor, patch: tuple[int, int], generator: torch.Generator | None
    ) -> Tensor:
        """Fill the zeros of a stored prompt with first values, in place.

        Args:
            name: Of the prompt.
            blank: To fill.
            patch: Kernel of the patch or stem convolution.
            generator: Source of randomness; None: torch's global one.

        Source: bound of Jia et al. 2022, section A.1.
        """
        if self.spec.init == "xavier":
            bound = xavier_bound(patch, self.spec.project or self.encoder.blocks[0].width)
            blank.uniform_(-bound, bound, generator=generator)
        elif self.spec.init == "normal":
            blank.normal_(0.0, 0.02, generator=generator)
        return blank

    def tokens(self, prompts: Prompts, entry: int) -> Tensor:
        """Return what enters a block, before projection: `(length or 1, dim or project)`."""
        return prompts.stored(entry)

    def forms(self, prompts: Prompts, host: nn.Module) -> list[Any]:
        """Return the pieces that bring the prompts into the model, not attached yet."""
        raise NotImplementedError

    def check_host(self, prompts: Prompts, host: nn.Module) -> None:
        """Raise where a host around the encoder cannot do with prompts that it has never met."""


class Stored(nn.Module):
    """Prompts that belong to no single block, under their names in an adapter file."""

    def forward(self, name: str) -> Tensor:
        """Return one of them; a call, so that whatever offloads parameters brings it."""
        parameter: Tensor = getattr(self, name)
        return parameter


class Prompts(nn.Module):
    """All state that injection adds to a model.

    Parameters are named as in an adapter file: `<block>` `(length, dim)` per entry block, or
    `shared.<stage>`; `project.<width>` where prompts are projected; `pixel.<name>` where they are
    pixels. `length` is 1 where one vector is repeated.

    Args:
        place: Where they meet the model, with their options.
        host: The model, kept outside the module tree.

    Source: Jia et al. 2022, sections 3.2, 4.3 and A.
    """

    shared: Stored | None
    project: nn.ModuleDict | None
    pixel: Stored | None

    def __init__(self, place: Place, host: nn.Module) -> None:
        super().__init__()
        self.place = place
        self.spec, self.encoder = spec, encoder = place.spec, place.encoder
        self.info: dict[str, Any] = {}
        self.undo: dict[str, Any] = {}
        # False where the self-check is needed and waits for the first real forward.
        self.checked = True
        self._host = (host,)
        self.entries = [enter for enter, _ in spec.spans(encoder.depth)]
        shapes = place.shapes()
        apart = {name.rpartition(".")[0] for name in shapes}
        self.shared, self.pixel = (Stored() if n in apart else None for n in ("shared", "pixel"))
        self.project = nn.ModuleDict() if spec.project else None
        for name, shape in shapes.items():
            self._register(name, torch.empty(shape))
        for width in encoder.widths_at(self.entries) if spec.project else ():
            assert self.project is not None
            assert spec.project is not None
            self.project[str(width)] = skip_init(  # type: ignore[no-untyped-call]
                nn.Linear, spec.project, width
            )
        self.forms = nn.ModuleList()
        # How many tokens the model itself has, while prompts stand behind them.
        self.own_tokens = Slot()
        # What a protocol adds to prompts or puts in their place; `protocols.Delta`.
        self.delta: Any = None
        # The first block in which something trains, for reentrant checkpointing.
        self.first_block = self.entries[0] if self.entries else None

    def _register(self, name: str, values: Tensor) -> None:
        owner, _, last = name.rpartition(".")
        parameter = nn.Parameter(values, requires_grad=self.spec.train_prompts)
        self.get_submodule(owner).register_parameter(last, parameter)

    @property
    def host(self) -> nn.Module:
        """The model that carries the prompts."""
        return self._host[0]

    def stored(self, entry: int) -> Tensor:
        """Return the parameter behind an entry block: `(length or 1, dim or project)`."""
        if self.shared is not None:
            shared: Tensor = self.shared(str(self.encoder.blocks[entry].stage))
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
        tokens = self.place.tokens(self, entry)
        if not torch.is_grad_enabled():
            # A view of a parameter says requires_grad even now, which trips module trackers.
            tokens = tokens.detach()
        if self.project is not None:
            tokens = self._projection(entry)(tokens)
        tokens = tokens.expand(self.spec.length, -1).unsqueeze(0)
        if self.training and self.spec.dropout:
            tokens = F.dropout(tokens.expand(batch, -1, -1), self.spec.dropout, training=True)
        return tokens

    def pixels(self, name: str) -> Tensor:
        """Return a stored prompt of pixels."""
        assert self.pixel is not None
        values: Tensor = self.pixel(name)
        # A view of a parameter says requires_grad even now, which trips module trackers.
        return values if torch.is_grad_enabled() else values.detach()

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
        parts = (self.host, self.host.get_submodule(self.encoder.start))
        names = ("FSDPModule", "FullyShardedDataParallel")
        return any(is_kind(part, name) for part in parts for name in names)

    def clear_cache(self) -> None:
        """Forget cached keys and values; needed only after an edit through `.data`."""
        for form in self.forms:
            form.clear_cache()  # type: ignore[operator]

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
        host = self.host
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
        for path in self.encoder.head_paths:
            yield from self.host.get_submodule(path).modules()
        # A decoder that trains whole does so with its dropout and statistics.
        inside = (self.encoder.path, "prompts")
        for path, module in self.host.named_modules() if "decoder" in self.undo else ():
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
                "",
                "a prompted model cannot run under torch.nn.DataParallel: its replicas lose the "
                "gradients of the prompts",
                "Use DistributedDataParallel with torchrun",
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
                "disable_prompts",
                "gradient checkpointing recomputes blocks in backward, where prompts may be "
                "enabled again",
                "Run the bare backbone under `torch.no_grad()`, or without checkpointing",
            )

    def _keep_checkpointing(self, host: nn.Module) -> None:
        """Let layers whose checkpointing was enabled after `train()` recompute."""
        if not host.training:
            return
        blocks = [host.get_submodule(block.path) for block in self.encoder.blocks]
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
        if not is_reentrant(self.host, self.encoder, self.first_block or 0):
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
        if spec.location != PromptSpec.location:
            kind += f", location={spec.location}"
        if self.place.image is not None and not self.entries:
            _, height, width = self.place.image
            where = f"{kind}, length={spec.length}, images {height} x {width}"
            return f"{where}, parameters={count:,}"
        return f"{kind}, length={spec.length}, entries={self.entries}, parameters={count:,}"


@torch.no_grad()
def initialise(
    prompts: Prompts, values: list[Tensor] | None, generator: torch.Generator | None
) -> None:
    """Fill prompts and projection with their first values.

    Draws are made on the generator's device (the CPU without one) in float32, so a seed gives the
    same values on every device.

    Args:
        prompts: On any device.
        values: One tensor per stored prompt, for init="tensor".
        generator: Source of randomness; None: torch's global one.

    Source: projection of Jia et al. 2022: kaiming normal, fan out.
    """
    device = generator.device if generator is not None else torch.device("cpu")
    patch = first_conv_kernel(prompts.host.get_submodule(prompts.encoder.path))
    for i, name in enumerate(prompts.place.shapes()):
        parameter = prompts.get_parameter(name)
        blank = torch.zeros(parameter.shape, device=device, dtype=torch.float32)
        first = prompts.place.draw(name, blank, patch, generator) if values is None else values[i]
        parameter.copy_(first)
    for layer in prompts.project.values() if prompts.project is not None else ():
        assert isinstance(layer, nn.Linear)
        std = math.sqrt(2.0 / layer.weight.shape[0])
        drawn = torch.empty(layer.weight.shape, device=device).normal_(0, std, generator=generator)
        layer.weight.copy_(drawn)
        layer.bias.zero_()


def check_values(values: Tensor | list[Tensor], shapes: dict[str, tuple[int, ...]]) -> list[Tensor]:
    """Return initial values as one tensor per stored prompt.

    Raises:
        SpecError: Another number of tensors, a wrong shape or type, or a value that is not finite.
    """
    given = [values] if isinstance(values, Tensor) and not values.dim() else list(values)
    fits = len(given) == len(shapes) and all(
        isinstance(v, Tensor) and tuple(v.shape) == shape and v.is_floating_point()
        for v, shape in zip(given, shapes.values(), strict=False)
    )
    if not fits:
        got = [tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in given]
        raise SpecError(
            "inject_prompts",
            f"needs {len(shapes)} floating point tensors of the shapes {list(shapes.values())} "
            f"(or one tensor that stacks them), got {got}",
            given={"init": ...},
        )
    if not all(bool(torch.isfinite(v).all()) for v in given):
        raise SpecError("inject_prompts", "holds values that are not finite", given={"init": ...})
    return given
