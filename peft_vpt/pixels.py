"""Prompts that are pixels: what they need to know of a model, their tensors and first values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .spec import PromptSpec, xavier_bound


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
