"""What some protocols add to a model: bottlenecks, a side network, a head of several layers."""

from __future__ import annotations

import math
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import SpecError, VPTError

if TYPE_CHECKING:
    from ..prompts import Prompts
from inspect import signature
from typing import NamedTuple

from ..backbones.anatomy import Block, Encoder
from ..backbones.projection import join
from ..errors import UnsupportedArchitectureError
from ..rehearsal import Rehearsal, Shape, rehearse_host

_SIDE_SIZE = 256 * 6 * 6
_MLP_DROPOUT = 0.1
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
        bound = 1 / math.sqrt(self.down.in_features)
        self.down.weight.copy_(_uniform(self.down.weight, bound, generator))
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            parameter.zero_()

    def serve(self, prompts: Prompts) -> None:
        """Look to these prompts, outside the module tree, for whether they are disabled."""
        self._prompts = (prompts,)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map tokens `(..., width)` to tokens, or maps `(batch, width, h, w)` to maps.

        Raises:
            VPTError: They are of another width.
        """
        if hidden.shape[self.axis] != self.down.in_features:
            raise VPTError(
                f"adapter: a feed-forward layer gave {tuple(hidden.shape)}, where axis {self.axis} "
                f"must be {self.down.in_features} wide; this model cannot take adapters."
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

    def __init__(self, width: int, features: nn.Module | None = None) -> None:
        super().__init__()
        if not isinstance(features, nn.Module | None):
            raise SpecError(
                f"apply_protocol('sidetune', features={features!r}): must be a torch.nn.Module "
                "from pixels (batch, 3, H, W) to maps (batch, 256, h, w)."
            )
        self.given = features is not None
        self.features = _alexnet() if features is None else features
        self.project = nn.Linear(_SIDE_SIZE, width, bias=False)
        self.alpha = nn.Parameter(torch.zeros(()))
        self._prompts: tuple[Prompts, ...] = ()

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None) -> None:
        """Draw every matrix on the generator's device; biases are zero, given features stay."""
        given = {id(p) for p in self.features.parameters()} if self.given else set()
        for parameter in self.parameters():
            if id(parameter) in given:
                continue
            if parameter.dim() < 2:
                parameter.zero_()
                continue
            bound = 1 / math.sqrt(parameter[0].numel())
            parameter.copy_(_uniform(parameter, bound, generator))

    def serve(self, prompts: Prompts) -> None:
        """Look to these prompts, outside the module tree, for whether they are disabled."""
        self._prompts = (prompts,)

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
        _PIXELS.set(_PIXELS.get() | {id(self): seen})

    def forget(self, host: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the host: let the pixels of this call go."""
        _PIXELS.set({key: seen for key, seen in _PIXELS.get().items() if key != id(self)})

    def blend(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Forward pre-hook of the head: blend the side network into its input."""
        if any(prompts.disabled() for prompts in self._prompts):
            return None
        pixels = _PIXELS.get().get(id(self))
        if not isinstance(pixels, Tensor):
            raise VPTError("sidetune: call the whole model with an image, not its head alone.")
        base, share = args[0], torch.sigmoid(self.alpha)
        side = self(pixels).to(base.dtype).reshape(base.shape)
        return (share * base + (1 - share) * side, *args[1:])


# Per thread or task, so that a model may serve several at once.
_PIXELS: ContextVar[dict[int, Any]] = ContextVar("peft_vpt_side_pixels", default={})  # noqa: B039


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
            std = 0.02 if layer is linear[-1] else math.sqrt(2 / layer.out_features)
            source = generator.device if generator is not None else torch.device("cpu")
            drawn = torch.empty(layer.weight.shape, device=source)
            layer.weight.copy_(drawn.normal_(0.0, std, generator=generator))
            layer.bias.zero_()


def fill(
    part: Bottleneck | SideNetwork | MlpHead,
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


def _uniform(like: Tensor, bound: float, generator: torch.Generator | None) -> Tensor:
    source = generator.device if generator is not None else torch.device("cpu")
    return torch.empty(like.shape, device=source).uniform_(-bound, bound, generator=generator)


def _check_pixels(pixels: Tensor) -> None:
    shape = tuple(pixels.shape)
    if len(shape) != 4 or shape[1] != 3 or min(shape[2:]) < _SMALLEST:
        raise VPTError(
            f"sidetune: AlexNet's features take images (batch, 3, H, W) of {_SMALLEST} pixels or "
            f"more, got {shape}; give larger ones, or apply_protocol(model, 'sidetune', "
            "features=...) a module of your own for these."
        )


def _alexnet() -> nn.Module:
    try:
        from torchvision.models import alexnet
    except ImportError as error:
        raise VPTError(
            "apply_protocol('sidetune'): the features of AlexNet come from torchvision, which is "
            "not installed; install torchvision, or give features=..., a module from pixels "
            "(batch, 3, H, W) to maps (batch, 256, h, w)."
        ) from error

    features: nn.Module = alexnet(weights=None).features
    return features


_NAMES = ("mlp", "ffn", "feed_forward", "mlp_channels", "output")
# Of a map `(batch, channels, height, width)` and of tokens `(..., channels)`.
_MAPS, _TOKENS = 1, -1


class FeedForward(NamedTuple):
    """The feed-forward layer of a block.

    Args:
        path: In the host, in front of the residual sum.
        width: Of what comes out of it.
        axis: Of the channels there.
    """

    path: str
    width: int
    axis: int


def feed_forwards(host: nn.Module, encoder: Encoder) -> list[FeedForward]:
    """Return the feed-forward layers of all blocks, in their order.

    Raises:
        UnsupportedArchitectureError: A block shows none, a model has more of them than those of
            known blocks, or one is called in another way than known.
    """
    name = type(host).__name__
    if not encoder.blocks:
        raise UnsupportedArchitectureError(
            f"apply_protocol('adapter'): {name} has no transformer blocks."
        )
    paths = []
    for index, block in enumerate(encoder.blocks):
        inside = _inside(host.get_submodule(block.path))
        if inside is None:
            raise UnsupportedArchitectureError(
                f"apply_protocol('adapter'): block {index} ({block.path}) of "
                f"{name} shows no feed-forward layer called {' or '.join(_NAMES)}."
            )
        paths.append(join(block.path, inside))
    _refuse_others(host, encoder)
    shown = rehearse_host(host, encoder, paths)
    pairs = zip(paths, encoder.blocks, strict=True)
    return [_described(host, path, block, shown) for path, block in pairs]


def _inside(block: nn.Module) -> str | None:
    """Return the path of the block's feed-forward layer, in front of the residual sum."""
    children = dict(block.named_children())
    name = next((name for name in _NAMES if name in children), None)
    # DPT's, VideoMAE's and others' `output` takes the residual too, and adds it behind `dense`.
    if name != "output" or len(signature(children[name].forward).parameters) == 1:
        return name
    return "output.dense" if hasattr(children[name], "dense") else None


def _refuse_others(host: nn.Module, encoder: Encoder) -> None:
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
            raise UnsupportedArchitectureError(
                f"apply_protocol('adapter'): {type(host).__name__} has feed-forward layers in "
                f"other blocks than those with attention ({owner}), so adapters behind all of them "
                "are not possible. Use prompts, 'bias' or 'partial-k'."
            )


def _described(host: nn.Module, path: str, block: Block, shown: Rehearsal | None) -> FeedForward:
    """Return what is behind a layer: as its dummy call showed, or else as its parts say."""
    width, axis = _last_layer(host.get_submodule(path), block.width)
    if shown is None:
        return FeedForward(path, width, axis)
    call = shown.first(path)
    shape = () if call is None else call.gave
    for at in dict.fromkeys((axis, _TOKENS)):
        if _fits(shape, at) and shape[at] in (width, block.width):
            return FeedForward(path, shape[at], at)
    what = "is not called as such" if call is None else f"gives something of shape {shape}"
    raise UnsupportedArchitectureError(
        f"apply_protocol('adapter'): the feed-forward layer {path} of {type(host).__name__} "
        f"{what}, where tokens or maps of {width} channels were expected. Use prompts, 'bias' or "
        "'partial-k'."
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
