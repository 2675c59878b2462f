"""Preprocessing of images: from a backbone's own description to a transform, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import AdapterError

_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def from_processor(processor: Any) -> dict[str, Any]:
    """Describe a transformers image processor in the words of the adapter file.

    Returns:
        `size` (height, width), `mean`, `std`, `interpolation`, and `crop`: the share of the resized
        image that a centre crop keeps; None: the image is squeezed to the size.

    Raises:
        AdapterError: It resizes in a way that these words cannot say.
    """
    size, crop = _plain(processor.size), _plain(getattr(processor, "crop_size", None))
    cropped = bool(getattr(processor, "do_center_crop", False)) and crop is not None
    if cropped and "shortest_edge" in size:
        edges = [crop["height"], crop["width"]]
        # A hair less, so that dividing and rounding down gives the same edge again.
        share: float | None = math.nextafter(min(edges) / size["shortest_edge"], 0.0)
    elif "height" in size and not cropped:
        edges, share = [size["height"], size["width"]], None
    else:
        raise AdapterError(
            f"preprocessing: {type(processor).__name__} resizes to {size} and crops to {crop}, "
            "which the file cannot say; give a dict with size, mean, std, interpolation, crop."
        )
    return {
        "size": [int(edge) for edge in edges],
        "mean": [float(x) for x in processor.image_mean],
        "std": [float(x) for x in processor.image_std],
        "interpolation": _RESAMPLE[int(processor.resample)],
        "crop": share,
    }


def describe_preprocessing(preprocessing: Any) -> dict[str, Any]:
    """Return plain values of a mapping (ours, or a timm data config) or an image processor."""
    if not isinstance(preprocessing, Mapping):
        if hasattr(preprocessing, "image_mean"):
            return from_processor(preprocessing)
        raise AdapterError(
            f"save_task_adapter(preprocessing={type(preprocessing).__name__}): give a dict with "
            "size, mean, std, interpolation and crop, a timm data config, or a transformers image "
            "processor."
        )
    values = dict(preprocessing)
    if "input_size" in values:
        return {
            "size": list(values["input_size"][1:]),
            "mean": list(values["mean"]),
            "std": list(values["std"]),
            "interpolation": values["interpolation"],
            "crop": values["crop_pct"],
        }
    return values


def timm_transform(values: Mapping[str, Any]) -> Any:
    """Return timm's evaluation transform: PIL image to tensor `(3, height, width)`."""
    import timm.data

    data: Any = timm.data
    share = values.get("crop")
    return data.create_transform(
        (3, *values["size"]),
        is_training=False,
        interpolation=values["interpolation"],
        mean=tuple(values["mean"]),
        std=tuple(values["std"]),
        crop_pct=1.0 if share is None else share,
        crop_mode="squash" if share is None else "center",
    )


def image_processor(values: Mapping[str, Any]) -> Any:
    """Return a transformers image processor that does what a file's `preprocessing` says."""
    import transformers

    height, width = values["size"]
    numbers = {name: key for key, name in _RESAMPLE.items()}
    common: dict[str, Any] = {
        "image_mean": list(values["mean"]),
        "image_std": list(values["std"]),
        "resample": numbers[values["interpolation"]],
    }
    share = values.get("crop")
    if share is None:
        size = {"height": height, "width": width}
        return transformers.ViTImageProcessor(size=size, **common)
    return transformers.CLIPImageProcessor(
        size={"shortest_edge": math.floor(min(height, width) / share)},
        crop_size={"height": height, "width": width},
        **common,
    )


def load_image(path: str | Path) -> Any:
    """Read an image file as an 8-bit RGB PIL image, turned as its EXIF tag says.

    16-bit values are scaled to 8 bits, where PIL's own conversion would clip them. Transparency is
    dropped, as in timm and torchvision.

    Raises:
        OSError: The file cannot be read as an image.
    """
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        file.load()
        return to_rgb(ImageOps.exif_transpose(file))


def to_rgb(image: Any) -> Any:
    """Convert a PIL image of any mode to 8-bit RGB."""
    import numpy as np
    from PIL import Image

    if image.mode in _SIXTEEN_BITS or image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        top = float(values.max(initial=0.0))
        peak = next(p for p in (1.0, 255.0, math.inf) if top <= p) if image.mode == "F" else 65535.0
        peak = top if math.isinf(peak) else peak
        scaled = np.clip(values / peak * 255.0, 0, 255).round().astype(np.uint8)
        return Image.fromarray(scaled).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def to_batch(preprocess: Any, images: Sequence[Any]) -> Tensor:
    """Return PIL images as pixels `(batch, 3, height, width)`, by a transform or a processor."""
    if hasattr(preprocess, "image_mean"):
        pixels: Tensor = preprocess(images=list(images), return_tensors="pt")["pixel_values"]
        return pixels
    return torch.stack([preprocess(image) for image in images])


def output_logits(output: Any) -> Tensor:
    """Return logits `(batch, classes)` of what a timm or transformers classifier returned."""
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = output[0] if isinstance(output, tuple | list) else output
    assert isinstance(logits, Tensor)
    return logits


def _plain(size: Any) -> dict[str, int]:
    return {k: v for k, v in dict(size or {}).items() if v is not None}
