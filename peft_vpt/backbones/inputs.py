"""What to call an encoder with when nothing but its keys and values is of interest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .anatomy import Encoder

# Tried in turn where a model does not say which size it was built for.
_SIZES = (64, 32, 224, 256, 128, 384, 96, 192, 240, 288, 320, 448, 512)


def dummy_inputs(module: nn.Module, encoder: Encoder) -> Iterator[dict[str, Any] | Tensor]:
    """Yield batches of two to call an encoder with, the likeliest first; none if unknown."""
    if encoder.inputs == "patches":
        yield _patches(module)
        return
    if encoder.inputs == "none":
        return
    channels, height, width = encoder.input_size
    frames: tuple[int, ...] = ()
    if encoder.inputs == "video":
        config: Any = module.config
        frames = (int(getattr(config, "num_frames", 0) or config.frames_per_clip),)
    yield _random(module, (2, *frames, channels, height, width))
    if encoder.inputs != "image":
        for size in _SIZES:
            if (size, size) != (height, width):
                yield _random(module, (2, *frames, channels, size, size))


def call(module: nn.Module, inputs: dict[str, Any] | Tensor) -> Any:
    """Call a module with dummy inputs."""
    return module(**inputs) if isinstance(inputs, dict) else module(inputs)


def _patches(module: nn.Module) -> dict[str, Any]:
    """Return two images cut into patches, the second with padding behind them."""
    config: Any = module.config
    pixels = _random(module, (2, 16, config.num_channels * config.patch_size**2))
    mask = torch.ones(2, 16, dtype=torch.int64, device=pixels.device)
    mask[1, 12:] = 0
    return {
        "pixel_values": pixels,
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[4, 4], [3, 4]], device=pixels.device),
    }


def _random(module: nn.Module, shape: tuple[int, ...]) -> Tensor:
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    like = next(p for p in module.parameters() if p.is_floating_point())
    return image.to(device=like.device, dtype=like.dtype)
