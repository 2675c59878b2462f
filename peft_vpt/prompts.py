"""`model.prompts`: the parameters, how they become tokens, training mode, and what is undone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
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
from .errors import SpecError, VPTError
from .spec import NOWHERE, PromptSpec, xavier_bound

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
        self.get_submodule(owner).register_parameter(last, parameter)

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
        conv: Any = self._host[0].get_submodule(self.place.conv)
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
        parts = (self._host[0], self._host[0].get_submodule(self.encoder.start))
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
        for path in self.encoder.head_paths:
            yield from self._host[0].get_submodule(path).modules()
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


@torch.no_grad()
def initialise(
    prompts: Prompts,
    patch: tuple[int, int],
    values: Tensor | list[Tensor] | None,
    generator: torch.Generator | None,
) -> None:
    """Fill prompts and projection with their first values.

    Draws are made on the generator's device (the CPU without one) in float32, so a seed gives the
    same values on every device.

    Args:
        prompts: On any device.
        patch: Kernel of the patch or stem convolution, for the xavier bound.
        values: One tensor per stored prompt, or a stacked one, for init="tensor".
        generator: Source of randomness; None: torch's global one.

    Source: bound of Jia et al. 2022, section A.1; projection kaiming normal, fan out.
    """
    if prompts.pixel is not None and prompts.place is not None:
        initialise_pixels(prompts.pixel, prompts.spec, prompts.place, values, generator)
        return
    stored = [p for n, p in prompts.own_parameters().items() if not n.startswith("project.")]
    if not stored:
        return
    device = generator.device if generator is not None else torch.device("cpu")
    first_width = prompts.encoder.blocks[0].width
    bound = xavier_bound(patch, prompts.spec.project or first_width)
    for i, parameter in enumerate(stored):
        drawn = torch.zeros(parameter.shape, dtype=torch.float32, device=device)
        if values is not None:
            drawn = values[i].float() if parameter.dtype != torch.float64 else values[i]
        elif prompts.spec.init == "xavier":
            drawn.uniform_(-bound, bound, generator=generator)
        elif prompts.spec.init == "normal":
            drawn.normal_(0.0, 0.02, generator=generator)
        parameter.copy_(drawn)
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
            f"inject_prompts(init=...): needs {len(shapes)} floating point tensors of the shapes "
            f"{list(shapes.values())} (or one tensor that stacks them), got {got}."
        )
    if not all(bool(torch.isfinite(v).all()) for v in given):
        raise SpecError("inject_prompts(init=...): holds values that are not finite.")
    return given


@dataclass(frozen=True)
class PixelPlace:
    """Where pixel prompts meet a model.

    Args:
        image: `(channels, height, width)` of the images that the user gives.
        sees: `(height, width)` that the model works on; larger than `image` under "pad".
        mean: Of the model's normalisation, per channel.
        std: Likewise.
        conv: Path in the host of the convolution that meets the image; "" where none is needed.
        kernel: Of that convolution.
        width: Its output channels.
        module: Path in the host of the module that takes the image.
        entrances: Methods of it that take an image.
    """

    image: tuple[int, int, int]
    sees: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    conv: str = ""
    kernel: tuple[int, int] = (1, 1)
    width: int = 0
    module: str = ""
    entrances: tuple[str, ...] = ()


class PixelPrompts(nn.Module):
    """The tensors of a pixel location, under their names in an adapter file."""

    def forward(self, name: str) -> Tensor:
        """Return one of them; a call, so that whatever offloads parameters brings it."""
        parameter: Tensor = getattr(self, name)
        # A view of a parameter says requires_grad even now, which trips module trackers.
        return parameter if torch.is_grad_enabled() else parameter.detach()


def pixel_shapes(spec: PromptSpec, place: PixelPlace) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a pixel location by its name.

    Source: Jia et al. 2022, section 4.3 (prompt location) and Table 5 (pad).
    """
    p, (channels, height, width) = spec.length, place.image
    if spec.location == "prepend-pixel":
        return {"pixel.patches": (p, channels, *place.kernel)}
    if spec.location == "concat-channel":
        return {
            "pixel.channels": (p, height, width),
            "pixel.weight": (place.width, p, *place.kernel),
        }
    return {
        "pixel.tb": (channels, 2 * p, width + 2 * p),
        "pixel.lr": (channels, height, 2 * p),
    }


@torch.no_grad()
def initialise_pixels(
    pixel: PixelPrompts,
    spec: PromptSpec,
    place: PixelPlace,
    values: Any,
    generator: torch.Generator | None,
) -> None:
    """Fill pixel prompts with their first values.

    "xavier" is U(0, 1) normalised as the model's images; channels beyond the image's take the
    average normalisation. "normal" is N(0, 1). The new convolution of concat-channel is uniform
    within `xavier_bound` under every name.

    Args:
        pixel: The prompts, on any device.
        spec: Resolved options.
        place: Of these prompts.
        values: One tensor per stored one, for init="tensor".
        generator: Source of randomness; None: torch's global one.
    """
    device = generator.device if generator is not None else torch.device("cpu")
    for i, (name, parameter) in enumerate(pixel.named_parameters()):
        drawn = torch.zeros(parameter.shape, dtype=torch.float32, device=device)
        if values is not None:
            drawn = values[i]
        elif name == "weight":
            bound = xavier_bound(place.kernel, place.width)
            drawn.uniform_(-bound, bound, generator=generator)
        elif spec.init == "xavier":
            drawn = _normalised(drawn.uniform_(generator=generator), name, place)
        elif spec.init == "normal":
            drawn.normal_(generator=generator)
        parameter.copy_(drawn)


def _normalised(values: Tensor, name: str, place: PixelPlace) -> Tensor:
    mean, std = (torch.tensor(x, device=values.device) for x in (place.mean, place.std))
    if name == "channels":
        return (values - mean.mean()) / std.mean()
    # Channels come first in borders, second in patches; two spatial dimensions follow.
    return (values - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
