"""What some protocols add to a model: bottlenecks, a side network, a head of several layers.

A class that a row of `options.KINDS` names in `adds` has what `Bottlenecks` has: `build`,
`initialise`, `attach` and `stored`.
"""

from __future__ import annotations

import math
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones.anatomy import Block, Encoder
from ..backbones.heads import HEAD_STD, draw
from ..backbones.projection import join
from ..checks import instance, or_none
from ..errors import VPTError
from ..prompts import Prompts, Slot
from ..rehearsal import Rehearsal, Shape, rehearse_host
from .options import Protocol

_SIDE_SIZE = 256 * 6 * 6
_MLP_DROPOUT = 0.1
_FEATURES = "from pixels (batch, 3, H, W) to maps (batch, 256, h, w)"
# Below this, a pooling of AlexNet has nothing left to pool.
_SMALLEST = 63


class Bottleneck(nn.Module):
    """A bottleneck with a residual connection behind the feed-forward layer of a block.

    `y + up(GELU(down(y)))`, inside the block's own residual branch. `up` is zero at first, so the
    model starts as it was; `down` is not, or neither would ever learn.

    Args:
        width: Of the tokens.
        hidden: Of the bottleneck.
        axis: Where the channels stand: -1 of tokens, 1 of maps.

    Source: Jia et al. 2022, section 4.1 (Adapter, in the form of Pfeiffer et al. 2020).
    """

    def __init__(self, width: int, hidden: int, axis: int = -1) -> None:
        super().__init__()
        self.axis = axis
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)
        self._prompts: tuple[Prompts, ...] = ()

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None) -> None:
        """Draw `down` on the generator's device, and let the rest be zero."""
        for parameter in self.parameters():
            parameter.zero_()
        draw(self.down.weight, generator)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map tokens `(..., width)` to tokens, or maps `(batch, width, h, w)` to maps.

        Raises:
            VPTError: They are of another width.
        """
        if hidden.shape[self.axis] != self.down.in_features:
            raise VPTError(
                "adapter",
                f"a feed-forward layer gave {tuple(hidden.shape)}, where axis {self.axis} must be "
                f"{self.down.in_features} wide",
                "this model cannot take adapters",
            )
        tokens = hidden.movedim(self.axis, -1).to(self.down.weight.dtype)
        change: Tensor = self.up(F.gelu(self.down(tokens)))
        return hidden + change.movedim(-1, self.axis).to(hidden.dtype)

    def behind(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of a feed-forward layer."""
        if any(prompts.disabled() for prompts in self._prompts):
            return output
        if isinstance(output, tuple):
            return (self(output[0]), *output[1:])
        return self(output)


class Bottlenecks(nn.ModuleDict):
    """A bottleneck for every block, under its number: what "adapter" adds."""

    slot = "adapters"
    paths: list[str]

    @classmethod
    def build(
        cls, host: nn.Module, encoder: Encoder, protocol: Protocol, features: nn.Module | None
    ) -> Bottlenecks:
        """Make the module for a model, on `meta`: a check of what fits draws no random numbers.

        Raises:
            UnsupportedArchitectureError: The protocol has no place in this model.
        """
        layers, reduction = feed_forwards(host, encoder, protocol), cast(int, protocol.reduction)
        found = cls()
        for index, (width, axis) in enumerate(layers.values()):
            with torch.device("meta"):
                found[str(index)] = Bottleneck(width, max(1, width // reduction), axis)
        found.paths = list(layers)
        return found

    def initialise(self, generator: torch.Generator | None) -> None:
        """Give all of them their first values, in the order of the blocks."""
        for part in self._each():
            part.initialise(generator)

    def attach(self, host: nn.Module, prompts: Prompts) -> list[Any]:
        """Hook them into the model that carries these prompts; return the handles."""
        handles = []
        for path, part in zip(self.paths, self._each(), strict=True):
            # Outside the module tree: whether what was added is disabled.
            part._prompts = (prompts,)
            handles.append(host.get_submodule(path).register_forward_hook(part.behind))
        return handles

    def stored(self) -> dict[str, Tensor]:
        """Return what an adapter file holds, under its names there but for the `delta.`."""
        found = {name.partition("."): p for name, p in self.named_parameters()}
        return {f"{index}.adapter.{name}": p for (index, _, name), p in found.items()}

    def _each(self) -> list[Bottleneck]:
        return cast("list[Bottleneck]", list(self.values()))


class SideNetwork(nn.Module):
    """A small network beside the backbone, blended into what the head receives.

    `sigmoid(alpha) * base + (1 - sigmoid(alpha)) * side`, with the features of an AlexNet and a
    linear map to the head's width. It sees the pixels that the backbone sees.

    Args:
        width: Number of features that the head takes.
        features: Module from pixels `(batch, 3, H, W)` to maps `(batch, 256, h, w)`. None:
            torchvision's AlexNet features, with random weights.

    Source: Jia et al. 2022, section 4.1 (Sidetune, after Zhang et al. 2020).
    """

    slot = "side"

    def __init__(self, width: int, features: nn.Module | None = None) -> None:
        super().__init__()
        or_none(instance(nn.Module, f"a torch.nn.Module {_FEATURES}")).check(
            "apply_protocol", "features", features
        )
        self.given = features is not None
        self.features = _alexnet() if features is None else features
        self.project = nn.Linear(_SIDE_SIZE, width, bias=False)
        self.alpha = nn.Parameter(torch.zeros(()))
        self._pixels = Slot()
        self._prompts: tuple[Prompts, ...] = ()

    @classmethod
    def build(
        cls, host: nn.Module, encoder: Encoder, protocol: Protocol, features: nn.Module | None
    ) -> SideNetwork:
        """Make the module for a model, as `Bottlenecks.build`."""
        name = type(host).__name__
        if encoder.head is None or encoder.headless:
            raise protocol.misfit(
                f"{name} has {encoder.headless}, so there is no one place where a side network "
                "could be blended in"
            )
        with torch.device("meta"):
            found = cls(encoder.head.width, features)
        images = encoder.inputs not in ("video", "patches")
        if not found.given and not (images and encoder.input_size[0] == 3):
            what = "videos or patches" if encoder.input_size[0] == 3 else "images of other channels"
            raise protocol.misfit(
                f"{name} takes {what}, and AlexNet's features (batch, 3, H, W)",
                "give `features=...`, a module from its pixels to maps (batch, 256, h, w)",
            )
        return found

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None) -> None:
        """Draw every matrix on the generator's device; biases are zero, given features stay."""
        given = {id(p) for p in self.features.parameters()} if self.given else set()
        for parameter in self.parameters():
            if id(parameter) not in given and parameter.dim() < 2:
                parameter.zero_()
            elif id(parameter) not in given:
                draw(parameter, generator)

    def attach(self, host: nn.Module, prompts: Prompts) -> list[Any]:
        """Hook it into the model that carries these prompts; return the handles."""
        self._prompts = (prompts,)
        head = host.get_submodule(prompts.encoder.head_paths[0])
        return [
            host.register_forward_pre_hook(self.see, with_kwargs=True),
            head.register_forward_pre_hook(self.blend),
            host.register_forward_hook(self.forget, always_call=True),
        ]

    def stored(self) -> dict[str, Tensor]:
        """Return what an adapter file holds, under its names there but for the `delta.`."""
        found: list[tuple[str, Tensor]] = [*self.named_parameters(), *self.named_buffers()]
        return {f"side.{n}": t for n, t in found if t.is_floating_point()}

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels `(batch, 3, H, W)` to features `(batch, width)`.

        Raises:
            VPTError: AlexNet cannot take such images.
        """
        if not self.given:
            _check_pixels(pixels)
        maps = F.adaptive_avg_pool2d(self.features(pixels.to(self.project.weight.dtype)), 6)
        return cast(Tensor, self.project(maps.flatten(1)))

    def see(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the host: keep the pixels of this call."""
        seen = args[0] if args else kwargs.get("pixel_values", next(iter(kwargs.values()), None))
        self._pixels.set(seen)

    def forget(self, host: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the host: let the pixels of this call go."""
        self._pixels.set(None)

    def blend(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Forward pre-hook of the head: blend the side network into its input."""
        if any(prompts.disabled() for prompts in self._prompts):
            return None
        pixels = self._pixels.get()
        if not isinstance(pixels, Tensor):
            raise VPTError("sidetune", "call the whole model with an image, not its head alone")
        base, share = args[0], torch.sigmoid(self.alpha)
        side = self(pixels).to(base.dtype).reshape(base.shape)
        return (share * base + (1 - share) * side, *args[1:])


class MlpHead(nn.Sequential):
    """A head of several layers: `layers - 1` hidden ones of the input's width, then a linear one.

    Args:
        width: Number of input features.
        classes: Number of outputs.
        layers: Number of linear layers, the k of Mlp-k.

    Source: Jia et al. 2022, section 4.1 (Mlp-k).
    """

    def __init__(self, width: int, classes: int, layers: int) -> None:
        hidden: list[nn.Module] = []
        for _ in range(layers - 1):
            hidden += [nn.Linear(width, width), nn.ReLU(), nn.BatchNorm1d(width)]
            hidden.append(nn.Dropout(_MLP_DROPOUT))
        super().__init__(*hidden, nn.Linear(width, classes))
        self.in_features, self.out_features = width, classes

    def forward(self, input: Tensor) -> Tensor:
        """Map features `(batch, width)`, or a pooled map of one pixel, to `(batch, classes)`."""
        for layer in self:
            input = layer(input.flatten(1) if input.dim() == 4 else input)
        return input

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None) -> None:
        """Draw hidden layers kaiming normal (fan out), the last one with deviation 0.02."""
        for layer in self:
            if isinstance(layer, nn.BatchNorm1d):
                layer.reset_parameters()
        linear = [layer for layer in self if isinstance(layer, nn.Linear)]
        for layer in linear:
            std = HEAD_STD if layer is linear[-1] else math.sqrt(2 / layer.out_features)
            draw(layer.weight, generator, std)
            layer.bias.zero_()


def fill(
    part: Bottlenecks | SideNetwork | MlpHead,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator | None,
) -> None:
    """Bring a module made on `meta` to a device, with its first values."""
    for module in part.modules():
        if any(p.is_meta for p in module.parameters(recurse=False)):
            module.to_empty(device=device, recurse=False)
    part.to(device=device, dtype=dtype)
    part.initialise(generator)


def _check_pixels(pixels: Tensor) -> None:
    shape = tuple(pixels.shape)
    if len(shape) != 4 or shape[1] != 3 or min(shape[2:]) < _SMALLEST:
        raise VPTError(
            "sidetune",
            f"AlexNet's features take images (batch, 3, H, W) of {_SMALLEST} pixels or more, got "
            f"{shape}",
            "give larger ones, or `apply_protocol(model, 'sidetune', features=...)` a module of "
            "your own for these",
        )


def _alexnet() -> nn.Module:
    try:
        from torchvision.models import alexnet
    except ImportError as error:
        raise VPTError(
            "apply_protocol",
            "the features of AlexNet come from torchvision, which is not installed",
            f"install torchvision, or give `features=...`, a module {_FEATURES}",
            given={"name": "sidetune"},
        ) from error
    features: nn.Module = alexnet(weights=None).features
    return features


_INSTEAD = "Use prompts, 'bias' or 'partial-k'"
_NAMES = ("mlp", "ffn", "feed_forward", "mlp_channels", "output")
# Of a map `(batch, channels, height, width)` and of tokens `(..., channels)`.
_MAPS, _TOKENS = 1, -1


def feed_forwards(
    host: nn.Module, encoder: Encoder, protocol: Protocol
) -> dict[str, tuple[int, int]]:
    """Return the feed-forward layers of all blocks, in their order.

    By their paths in the host, in front of the residual sum: the width of what comes out, and the
    axis of the channels there.

    Raises:
        UnsupportedArchitectureError: A block shows none, a model has more of them than those of
            known blocks, or one is called in another way than known.
    """
    name = type(host).__name__
    if not encoder.blocks:
        raise protocol.misfit(f"{name} has no transformer blocks")
    paths = []
    for index, block in enumerate(encoder.blocks):
        inside = _inside(host.get_submodule(block.path))
        if inside is None:
            raise protocol.misfit(
                f"block {index} ({block.path}) of {name} shows no feed-forward layer called "
                f"{' or '.join(_NAMES)}"
            )
        paths.append(join(block.path, inside))
    _refuse_others(host, encoder, protocol)
    shown = rehearse_host(host, encoder, paths)
    pairs = zip(paths, encoder.blocks, strict=True)
    return {path: _described(host, path, block, shown, protocol) for path, block in pairs}


def _inside(block: nn.Module) -> str | None:
    """Return the path of the block's feed-forward layer, in front of the residual sum."""
    children = dict(block.named_children())
    name = next((name for name in _NAMES if name in children), None)
    # DPT's, VideoMAE's and others' `output` takes the residual too, and adds it behind `dense`.
    if name != "output" or len(signature(children[name].forward).parameters) == 1:
        return name
    return "output.dense" if hasattr(children[name], "dense") else None


def _refuse_others(host: nn.Module, encoder: Encoder, protocol: Protocol) -> None:
    """Raise where blocks without known attention have feed-forward layers too.

    Such layers stand among the known blocks; what pools behind the last one is no block.
    """
    blocks = tuple(f"{block.path}." for block in encoder.blocks)
    paths = [path for path, _ in host.get_submodule(encoder.path).named_modules()]
    paths = [join(encoder.path, path) for path in paths]
    last = max(i for i, path in enumerate(paths) if f"{path}." in blocks)
    for path in paths[:last]:
        owner, _, name = path.rpartition(".")
        if name in _NAMES[:-1] and not f"{path}.".startswith(blocks):
            raise protocol.misfit(
                f"{type(host).__name__} has feed-forward layers in other blocks than those with "
                f"attention ({owner}), so adapters behind all of them are not possible",
                _INSTEAD,
            )


def _described(
    host: nn.Module, path: str, block: Block, shown: Rehearsal | None, protocol: Protocol
) -> tuple[int, int]:
    """Return width and axis behind a layer: as its dummy call showed, or else its parts say."""
    width, axis = _last_layer(host.get_submodule(path), block.width)
    if shown is None:
        return width, axis
    call = shown.first(path)
    shape = () if call is None else call.gave
    for at in dict.fromkeys((axis, _TOKENS)):
        if _fits(shape, at) and shape[at] in (width, block.width):
            return shape[at], at
    what = "is not called as such" if call is None else f"gives something of shape {shape}"
    raise protocol.misfit(
        f"the feed-forward layer {path} of {type(host).__name__} {what}, where tokens or maps of "
        f"{width} channels were expected",
        _INSTEAD,
    )


def _fits(shape: Shape, axis: int) -> bool:
    return len(shape) == 4 if axis == _MAPS else len(shape) > 1


def _last_layer(layer: nn.Module, width: int) -> tuple[int, int]:
    """Return the outputs of the last layer with weights inside, and where they stand."""
    axis = _TOKENS
    for module in layer.modules():
        part: Any = module
        if isinstance(part, nn.Conv2d) and part.groups == 1:
            width, axis = part.out_channels, _MAPS
        elif isinstance(getattr(part, "out_features", None), int):
            width, axis = part.out_features, _TOKENS
    return width, axis
