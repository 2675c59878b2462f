"""Locations in the space of the image: "pad", "concat-channel", "prepend-pixel"."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones.anatomy import Encoder, ImageFacts, first_floating
from ..backbones.projection import join
from ..backbones.transformers_vit import takes_images
from ..errors import SpecError, UnsupportedArchitectureError, VPTError, VPTWarning
from ..prompts import Place, Prompts
from ..rehearsal import rehearse
from ..spec import PromptSpec, xavier_bound
from .attach import ForwardPatch, attached
from .prepend import token_forms
from .trial import ENTRANCES, Trial, Trials

At = TypeVar("At", bound="ConvPlace")
# How far from a length that breaks the grid another one is looked for.
_REACH = 32


@dataclass(frozen=True, kw_only=True)
class PixelPlace(Place):
    """Where prompts that are pixels meet a model.

    "xavier" is U(0, 1) normalised as the model's images, "normal" is N(0, 1).

    Args:
        image: `(channels, height, width)` of the images that the user gives.
        facts: What the model says about its images.
    """

    image: tuple[int, int, int] = (0, 0, 0)
    facts: ImageFacts

    def draw(
        self, name: str, blank: Tensor, patch: tuple[int, int], generator: torch.Generator | None
    ) -> Tensor:
        """Fill the zeros of a stored prompt with first values."""
        if self.spec.init == "xavier":
            # Channels come first in borders, second in patches; two spatial dimensions follow.
            both = (self.facts.mean, self.facts.std)
            mean, std = (torch.tensor(x).view(-1, 1, 1).to(blank) for x in both)
            return self.normalised(blank.uniform_(generator=generator), mean, std)
        return blank.normal_(generator=generator) if self.spec.init == "normal" else blank

    def normalised(self, values: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Bring pixels from 0 to 1 to what the model sees."""
        return (values - mean) / std

    def check_image(self, image: Any) -> None:
        """Raise unless images have the channels and the size that the prompts were made for.

        Raises:
            VPTError: They have not; the message names both and what to do.
        """
        channels, *size = self.image
        if not isinstance(image, Tensor) or image.dim() != 4:
            got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            problem, advice = f"needs images (batch, channels, height, width), got {got}", ""
        elif image.shape[1] != channels:
            problem = f"got images of {image.shape[1]} channels, needs {channels}"
            advice = "convert them to RGB"
        elif list(image.shape[2:]) != size:
            problem = f"got images of {_by(image.shape[2:])}, needs {_by(size)}{self.grows()}"
            advice = (
                f"Resize the images to {_by(size)}, or remove_prompts and inject again into a "
                "model built for another image size"
            )
        else:
            return
        raise VPTError("", f"`location={self.spec.location!r}`: {problem}", advice)

    def grows(self) -> str:
        """Say what becomes of an image's size, if anything."""
        return ""


@dataclass(frozen=True, kw_only=True)
class Border(PixelPlace):
    """Location "pad": a border of `length` pixels around the image.

    Args:
        sees: `(height, width)` that the model works on.
        module: Path in the host of the module that takes the image.
        entrances: Methods of it that take an image.

    Source: Jia et al. 2022, section 4.4 "prompting ConvNets" and Table 5.
    """

    sees: tuple[int, int]
    module: str
    entrances: tuple[str, ...]

    @classmethod
    def survey(
        cls, host: nn.Module, encoder: Encoder, spec: PromptSpec, at: torch.device
    ) -> Border:
        """Find the size of the images: the default one, or, where that is fixed, smaller by 2p."""
        trials = Trials(host, encoder, spec, at)
        facts, p = trials.facts, spec.length
        if facts.channels != 3:
            raise trials.refusal(
                SpecError,
                f"a border needs a model for images of 3 channels, {trials.name} takes "
                f"{facts.channels}",
                "build it for 3",
            )
        trial, (height, width) = None if facts.fixed else _grown(trials), facts.sizes[0]
        if trial is None:
            trial = trials.first()
            height, width = (side - 2 * p for side in trial.size)
            if min(height, width) < 1:
                raise trials.refusal(
                    SpecError,
                    f"{trials.name} takes images of {_by(trial.size)} only, and a border of {p} "
                    "leaves nothing of them",
                    f"length can be up to {(min(trial.size) - 1) // 2}",
                )
        _check_seen(trials, trial)
        entrances = [name for name in ENTRANCES if hasattr(trials.module, name)]
        return cls(
            spec,
            encoder,
            image=(3, height, width),
            facts=facts,
            sees=trial.size,
            module=trials.path,
            entrances=tuple(entrances) if trial.entered == 1 else ("forward",),
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the border's rows above and below, and of its columns."""
        p, (channels, height, width) = self.spec.length, self.image
        return {
            "pixel.tb": (channels, 2 * p, width + 2 * p),
            "pixel.lr": (channels, height, 2 * p),
        }

    def forms(self, prompts: Prompts, host: nn.Module) -> list[Any]:
        """Return one form per method that takes an image."""
        module = host.get_submodule(self.module)
        return [BorderForm(prompts, self, module, method) for method in self.entrances]

    def check_host(self, prompts: Prompts, host: nn.Module) -> None:
        """Run a host around the encoder once: its other parts may count on the image size.

        Raises:
            UnsupportedArchitectureError: They do.
        """
        if not self.module or not takes_images(host):
            return
        like = first_floating(host)
        image = torch.zeros(1, *self.image).to(like)
        error = rehearse(host, [image], within=partial(attached, self.forms(prompts, host))).error
        if error is not None:
            raise UnsupportedArchitectureError(
                "inject_prompts",
                f"other parts of {type(host).__name__} count on the size of the image that the "
                f"user gives ({error})",
                f"Pass the encoder alone: `inject_prompts(model.{self.module}, location='pad')`",
                given={"location": "pad"},
            ) from error

    def grows(self) -> str:
        """Say what becomes of an image's size."""
        return f", which the border makes the {_by(self.sees)} that the model sees"


@dataclass(frozen=True, kw_only=True)
class ConvPlace(PixelPlace):
    """A place at the one convolution that meets the image.

    Args:
        conv: Its path in the host.
        kernel: Its kernel.
        width: Its output channels.
    """

    conv: str
    kernel: tuple[int, int]
    width: int

    @classmethod
    def found(cls: type[At], trials: Trials, trial: Trial) -> At:
        """Return the place in a model.

        Raises:
            UnsupportedArchitectureError: Another number of convolutions, or no plain one, meets it.
        """
        facts, convs = trials.facts, [trials.module.get_submodule(path) for path in trial.convs]
        if len(convs) != 1 or not _is_plain_conv(convs[0]):
            raise trials.refusal(
                UnsupportedArchitectureError,
                f"needs exactly one plain torch.nn.Conv2d over the image, in {trials.name} "
                f"{len(convs)} meet it",
                "use `location='prepend'`",
            )
        conv: Any = convs[0]
        return cls(
            trials.spec,
            trials.encoder,
            image=(facts.channels, *trial.size),
            facts=facts,
            conv=join(trials.path, trial.convs[0]),
            kernel=tuple(conv.kernel_size),
            width=int(conv.out_channels),
        )


@dataclass(frozen=True, kw_only=True)
class Channels(ConvPlace):
    """Location "concat-channel": further image channels with a convolution of their own.

    Source: Jia et al. 2022, section 4.3, prompt location "Concat-channel".
    """

    @classmethod
    def survey(
        cls, host: nn.Module, encoder: Encoder, spec: PromptSpec, at: torch.device
    ) -> Channels:
        """Find the convolution."""
        trials = Trials(host, encoder, spec, at)
        return cls.found(trials, trials.first())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the channels and of their convolution."""
        p = self.spec.length
        return {
            "pixel.channels": (p, *self.image[1:]),
            "pixel.weight": (self.width, p, *self.kernel),
        }

    def draw(
        self, name: str, blank: Tensor, patch: tuple[int, int], generator: torch.Generator | None
    ) -> Tensor:
        """Fill the zeros; the convolution is uniform within `xavier_bound` under every name."""
        if name != "pixel.weight":
            return super().draw(name, blank, patch, generator)
        bound = xavier_bound(self.kernel, self.width)
        return blank.uniform_(-bound, bound, generator=generator)

    def normalised(self, values: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Take the average normalisation, for channels beyond the image's."""
        return (values - mean.mean()) / std.mean()

    def forms(self, prompts: Prompts, host: nn.Module) -> list[Any]:
        """Return the form of the convolution."""
        return [ChannelForm(prompts, self, host.get_submodule(self.conv))]


@dataclass(frozen=True, kw_only=True)
class Patches(ConvPlace):
    """Location "prepend-pixel": patches of pixels that the frozen projection makes tokens of.

    Source: Jia et al. 2022, section 4.3, prompt location "Prepend-pixel".
    """

    @classmethod
    def survey(
        cls, host: nn.Module, encoder: Encoder, spec: PromptSpec, at: torch.device
    ) -> Patches:
        """Find the patch projection."""
        trials = Trials(host, encoder, spec, at)
        if not encoder.plain:
            raise trials.refusal(
                UnsupportedArchitectureError,
                f"the blocks of {trials.name} do not work on one sequence of tokens, through "
                "which patches could be carried",
                "use `location='prepend'`",
            )
        place = cls.found(trials, trials.first(small=True))
        conv: Any = host.get_submodule(place.conv)
        spread = any(_padding(conv)) or any(d > 1 for d in conv.dilation)
        if place.width != encoder.blocks[0].width or spread:
            raise trials.refusal(
                UnsupportedArchitectureError,
                f"the convolution that meets the image in {trials.name} ({place.conv}) does not "
                "turn one patch into one token",
                "use `location='prepend'`",
            )
        return place

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of the patches."""
        return {"pixel.patches": (self.spec.length, self.image[0], *self.kernel)}

    def tokens(self, prompts: Prompts, entry: int) -> Tensor:
        """Put the patches through the frozen patch projection: `(length, dim)`."""
        conv: Any = prompts.host.get_submodule(self.conv)
        tokens: Tensor = conv(prompts.pixels("patches").to(conv.weight.dtype)).flatten(1)
        return tokens

    def forms(self, prompts: Prompts, host: nn.Module) -> list[Any]:
        """Return the forms of the tokens."""
        return token_forms(prompts, host)


class BorderForm(ForwardPatch):
    """A learnable border around the image, put on where the encoder takes it."""

    def __init__(self, prompts: Prompts, place: Border, module: nn.Module, method: str) -> None:
        super().__init__(module)
        self._links = (prompts,)
        self.place = place
        self.method = method
        self._argument = list(inspect.signature(getattr(type(module), method)).parameters)[1]

    def extra_repr(self) -> str:
        """Name the method and the form."""
        return f"{self.method}, form=pad"

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the encoder's method; the image comes first or under its name."""
        prompts = self._links[0]
        image = args[0] if args else kwargs.get(self._argument)
        if prompts.disabled() or image is None:
            return self.original(*args, **kwargs)
        image = self._bordered(prompts, image)
        if args:
            return self.original(image, *args[1:], **kwargs)
        return self.original(**(kwargs | {self._argument: image}))

    def _bordered(self, prompts: Prompts, image: Any) -> Tensor:
        self.place.check_image(image)
        p, batch = prompts.spec.length, (image.shape[0], -1, -1, -1)
        edges: list[Any] = [prompts.pixels(name).to(image).expand(batch) for name in ("tb", "lr")]
        (top, bottom), (left, right) = edges[0].split(p, 2), edges[1].split(p, 3)
        return torch.cat([top, torch.cat([left, image, right], dim=3), bottom], dim=2)


class ChannelForm(ForwardPatch):
    """Further channels, whose convolution is added to the output of the image's frozen one.

    Equal to a convolution of the concatenated channels.
    """

    def __init__(self, prompts: Prompts, place: Channels, conv: nn.Module) -> None:
        super().__init__(conv)
        self._links = (prompts,)
        self.place = place

    def extra_repr(self) -> str:
        """Name the form."""
        return "form=concat-channel"

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the frozen convolution's `forward`."""
        prompts = self._links[0]
        out = self.original(*args, **kwargs)
        if prompts.disabled():
            return out
        self.place.check_image(args[0] if args else next(iter(kwargs.values())))
        conv: Any = self.target
        channels, weight = (prompts.pixels(name).to(out) for name in ("channels", "weight"))
        geometry = (conv.stride, conv.padding, conv.dilation)
        return out + F.conv2d(channels.unsqueeze(0), weight, None, *geometry).to(out.dtype)


def _grown(trials: Trials) -> Trial | None:
    """Try the default image with a border; None where that shows that the size is fixed."""
    p, image = trials.spec.length, trials.facts.sizes[0]
    trial = trials.run((image[0] + 2 * p, image[1] + 2 * p))
    error = trial.shown.error
    if error is None:
        return trial
    if trials.facts.fixed is None:
        return None
    raise trials.refusal(
        SpecError,
        f"the border makes an image of {_by(image)} one of {_by(trial.size)}, which "
        f"{trials.name} cannot take ({str(error) or type(error).__name__})",
        _advice(trials),
    ) from error


def _check_seen(trials: Trials, trial: Trial) -> None:
    """Refuse a border of which the patch grid leaves one side out; warn of a part of it."""
    lost, p = _unseen(trials, trial), trials.spec.length
    what = (
        f"the patches of {trials.name} leave out the last {lost} pixels of an image of "
        f"{_by(trial.size)}"
    )
    if lost >= p:
        problem = f"{what}, and with them the whole border on that side"
        raise trials.refusal(SpecError, problem, _advice(trials))
    if lost:
        part = f"{what}, so as many of the border's {p} rows or columns there do nothing"
        warnings.warn(VPTWarning(trials.refusal(SpecError, part)), stacklevel=6)


def _unseen(trials: Trials, trial: Trial) -> int:
    """Return how many pixels at the end of a side no window of the first convolution reaches."""
    conv: Any = trials.module.get_submodule(trial.convs[0]) if trial.convs else None
    if conv is None or not _is_plain_conv(conv):
        return 0
    sides = zip(
        trial.size, conv.kernel_size, conv.stride, _padding(conv), conv.dilation, strict=True
    )
    lost = 0
    for size, kernel, stride, padding, dilation in sides:
        reach = dilation * (kernel - 1) + 1
        steps = math.floor((size + 2 * padding - reach) / stride)
        lost = max(lost, size - (steps * stride + reach - padding))
    return lost


def _advice(trials: Trials) -> str:
    """Name the nearest lengths at which the model sees the whole border."""
    if trials.facts.fixed:
        return "Use a larger length, or a model whose image size its patches divide"
    (height, width), length = trials.facts.sizes[0], trials.spec.length
    good: list[int] = []
    for side in (-1, 1):
        for other in range(length + side, length + side * (_REACH + 1), side):
            trial = None if other < 1 else trials.run((height + 2 * other, width + 2 * other))
            if trial is not None and trial.shown.passed and not _unseen(trials, trial):
                good.append(other)
                break
    if not good:
        return f"No length up to {length + _REACH} does; build the model for another image size"
    return f"Lengths that do: {', '.join(str(x) for x in good)}"


def _is_plain_conv(conv: Any) -> bool:
    plain = type(conv).forward is nn.Conv2d.forward and conv.padding_mode == "zeros"
    return plain and conv.groups == 1 and conv.padding != "same"


def _padding(conv: Any) -> tuple[int, int]:
    return (0, 0) if conv.padding == "valid" else conv.padding


def _by(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]}"
