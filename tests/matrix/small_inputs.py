"""Inputs of two images for the small transformers models, in the form that each class takes."""

from __future__ import annotations

import importlib
import inspect
import math
from typing import Any

import torch

# Shapes of random tensors as tuples, integers as lists; `first` is the first argument of `forward`.
_GRID = [[1, 8, 8], [1, 4, 8]]
_STRIP = dict(first=(1, 3, 16, 16 * 96), target_sizes=[[8, 8], [4, 8]])
_PAIRS = dict(first=(2, 2, 3, 64, 64))
_MASK = [[1] * 16, [1] * 8 + [0] * 8]
_FULL = [[column, row] for row in range(6) for column in range(6)]
_PLACES = [_FULL, _FULL[:18] + [[-1, -1]] * 18]
_INPUTS: dict[str, dict[str, Any]] = {
    "DepthProModel": dict(first=(2, 3, 256, 256)),
    "EfficientLoFTRModel": dict(first=(2, 2, 3, 128, 128)),
    "Gemma4VisionModel": dict(first=(2, 36, 768), pixel_position_ids=_PLACES),
    "Inkling2VisionModel": dict(first=(24, 40, 40, 3), image_grid_thw=[[1, 4, 4], [1, 2, 4]]),
    "InklingVisionModel": dict(first=(4, 2, 40, 40, 3)),
    "Kimi_K25VisionModel": dict(first=(96, 3, 14, 14), grid_thw=_GRID),
    "LightGlueForKeypointMatching": _PAIRS,
    "MiniCPMOcrVisionModel": _STRIP,
    "MiniCPMV4_6VisionModel": _STRIP,
    "MiniCPMV4_7VisionModel": _STRIP,
    "MllamaVisionModel": dict(
        first=(2, 1, 4, 3, 56, 56),
        aspect_ratio_ids=[[6], [2]],
        aspect_ratio_mask=[[[1, 1, 1, 1]], [[1, 1, 0, 0]]],
    ),
    "Molmo2VisionModel": dict(first=(2, 16, 588)),
    "OneFormerModel": dict(first=(2, 3, 128, 128), task_inputs=(2, 77)),
    "PPOCRV5MobileRecModel": dict(first=(2, 3, 96, 96)),
    "PaddleOCRVisionModel": dict(first=(1, 96, 3, 14, 14), grid_thw=_GRID),
    "PeVideoEncoder": dict(first=(2, 2, 3, 64, 64)),
    "PerceiverForImageClassificationLearned": dict(first=(2, 3, 64, 64)),
    "SegGptModel": dict.fromkeys(("first", "prompt_pixel_values", "prompt_masks"), (2, 3, 64, 64)),
    "Siglip2ForImageClassification": dict(
        first=(2, 16, 768), spatial_shapes=[[4, 4], [2, 4]], pixel_attention_mask=_MASK
    ),
    "SuperGlueForKeypointMatching": _PAIRS,
    "ViTMAEModel": dict(first=(2, 3, 64, 64), noise=(2, 16)),
    "VideoLlama3VisionModel": dict(first=(96, 768), grid_thw=_GRID, merge_sizes=[1, 2]),
    "VideomtForUniversalSegmentation": dict(first=(2, 2, 3, 64, 64)),
    "XCLIPVisionModel": dict(first=(8, 3, 128, 128)),
}


def inputs(cls: Any, config: Any) -> dict[str, Any]:
    """Return keyword arguments of two images for a model of a class.

    Args:
        cls: Of transformers.
        config: Of the model.
    """
    parameters = parameters_of(cls)
    wanted = _INPUTS.get(cls.__name__)
    if wanted is None and parameters[0] == "flattened_patches":
        wanted = _flattened()
    if wanted is None and "grid_thw" in parameters:
        wanted = _packed(config)
    if wanted is None:
        size = _first(config, "image_size") or 64
        frames = _first(config, "num_frames", "frames_per_clip")
        channels = _first(config, "num_channels", "in_channels") or 3
        sides = (size, size) if isinstance(size, int) else tuple(size)
        wanted = {"first": (2, *((frames,) if frames else ()), channels, *sides)}
    return {
        parameters[0] if name == "first" else name: _tensor(value) for name, value in wanted.items()
    }


def _packed(config: Any) -> dict[str, Any]:
    patch = _first(config, "patch_size")
    frames = _first(config, "temporal_patch_size", "patch_temporal") or 1
    channels = _first(config, "in_channels", "num_channels") or 3
    return {"first": (sum(map(math.prod, _GRID)), channels * frames * patch**2), "grid_thw": _GRID}


def _flattened() -> dict[str, Any]:
    """Flatten 4x4 and 2x4 patches as Pix2Struct does: row, column, pixels; padding is zero."""
    places = torch.cartesian_prod(torch.arange(1.0, 5), torch.arange(1.0, 5))
    patches = torch.cat([places.expand(2, -1, -1), torch.randn(2, 16, 768)], dim=-1)
    patches[1, 8:] = 0
    return {"first": patches}


def _tensor(value: Any) -> Any:
    if isinstance(value, tuple):
        return torch.randn(value)
    return torch.tensor(value) if isinstance(value, list) else value


def _first(config: Any, *wanted: str) -> Any:
    """Find a value in a config or in the configs inside it."""
    values = [getattr(config, name, None) for name in wanted]
    values += [_first(part, *wanted) for part in vars(config).values() if is_config(part)]
    return next((value for value in values if value is not None), None)


def parameters_of(cls: Any) -> list[str]:
    """Return the names of the arguments of a class's `forward`."""
    return list(inspect.signature(cls.forward).parameters)[1:]


def is_config(value: Any) -> bool:
    """Tell whether a value is a config of transformers."""
    return isinstance(value, _base_config())


def _base_config() -> Any:
    t = importlib.import_module("transformers")
    return getattr(t, "PreTrainedConfig", None) or t.PretrainedConfig
