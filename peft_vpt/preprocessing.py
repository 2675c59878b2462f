"""Preprocessing of images: from a backbone's own description to a transform, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .backbones.identity import describe_timm_config
from .checks import integer, list_of, number, one_of, optional, or_none
from .errors import AdapterError, VPTError, short

INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
# A bound that no adapter reaches: it keeps a small file from asking for gigabytes.
_MOST_PIXELS = 2**12
# The words in which an adapter file says what images went through. Each may be absent.
IMAGE_RULES = {
    "size": optional(
        list_of(integer(1, _MOST_PIXELS), f"[height, width], each from 1 to {_MOST_PIXELS}", 2)
    ),
    "mean": optional(list_of(number(), "a list of numbers")),
    "std": optional(list_of(number(0, above=True), "a list of numbers above 0")),
    "interpolation": optional(one_of(*INTERPOLATIONS)),
    "crop": optional(or_none(number(0.1, 10), "null")),
}
# A tag of TIFF; its value 0 means that 0 is white.
_PHOTOMETRIC = 262
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_USUAL = "bicubic"
# Mean difference of normalised pixels: torchvision and Pillow differ by 0.005, a crop by 0.2.
_ALIKE = 0.05
_GIVE = f"give a dict with {', '.join(IMAGE_RULES)}"
# By the number that Pillow gives to each.
_RESAMPLE = dict(enumerate(INTERPOLATIONS))


def check_images(values: Mapping[str, Any], fail: Callable[..., AdapterError]) -> None:
    """Refuse descriptions that contradict themselves, or ask for images of gigabytes.

    Args:
        values: Fields that fit `IMAGE_RULES`.
        fail: Makes the error from a problem.
    """
    size, crop = values.get("size", [1, 1]), values.get("crop")
    if len(size) != 2:
        raise fail(f"preprocessing: its size {short(size)} is not [height, width]")
    if len(values.get("mean", [])) != len(values.get("std", [])):
        raise fail("preprocessing: it has unlike numbers of means and stds")
    # What an image is resized to before the middle is cut out of it.
    edge = max(size) / (crop or 1)
    if edge > _MOST_PIXELS:
        raise fail(
            f"preprocessing: size {size} and crop {crop} make an edge of {edge:.0f} pixels; it may "
            f"be {_MOST_PIXELS} at most"
        )


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
            "preprocessing",
            f"{type(processor).__name__} resizes to {size} and crops to {crop}, which the file "
            "cannot say",
            _GIVE,
        )
    plain = processor.do_normalize is False
    found = {
        "size": [int(edge) for edge in edges],
        "mean": [0.0] * 3 if plain else [float(x) for x in processor.image_mean],
        "std": [1.0] * 3 if plain else [float(x) for x in processor.image_std],
        "interpolation": _RESAMPLE[int(processor.resample)],
        "crop": share,
    }
    _check_alike(processor, image_processor(found))
    return found


def _check_alike(processor: Any, ours: Any) -> None:
    """Refuse a processor that does more than the words of the file can say."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (45, 60, 3), dtype=np.uint8)
    # Smooth enough that two programs for one way of resampling agree to a few grey levels.
    image = Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC)
    theirs, own = (to_batch(p, [image]).float() for p in (processor, ours))
    if theirs.shape != own.shape or float((theirs - own).abs().mean()) > _ALIKE:
        raise AdapterError(
            "preprocessing",
            f"{type(processor).__name__} does something to images that size, mean, std, "
            "interpolation and crop do not say",
            "give a dict with these, or None",
        )


def describe_preprocessing(preprocessing: Any, call: str = "save_task_adapter") -> dict[str, Any]:
    """Return plain values of a mapping (ours, or a timm data config) or an image processor.

    Raises:
        AdapterError: It is neither, or says what the words of the file cannot.
    """
    try:
        return _describe(preprocessing, call)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(
            call,
            f"{type(preprocessing).__name__} lacks what the file needs "
            f"({type(error).__name__}: {error})",
            _GIVE,
            given={"preprocessing": ...},
        ) from error


def _describe(preprocessing: Any, call: str) -> dict[str, Any]:
    if not isinstance(preprocessing, Mapping):
        if hasattr(preprocessing, "image_processor"):
            return _describe(preprocessing.image_processor, call)
        if hasattr(preprocessing, "image_mean"):
            return from_processor(preprocessing)
        raise AdapterError(
            call,
            f"{_GIVE}, a timm data config, or a transformers image processor",
            given={"preprocessing": preprocessing},
        )
    values = dict(preprocessing)
    if "input_size" not in values:
        unknown = ", ".join(sorted(str(name) for name in values if name not in IMAGE_RULES))
        if unknown:
            raise AdapterError(
                call,
                f"the file has no field for {unknown:.200}",
                _GIVE,
                given={"preprocessing": ...},
            )
        return values
    described = describe_timm_config(values)
    if described is None:
        raise AdapterError(
            call,
            f"timm's crop_mode {values.get('crop_mode')!r} cannot be said in the file",
            _GIVE,
            given={"preprocessing": ...},
        )
    return described


def timm_transform(values: Mapping[str, Any]) -> Any:
    """Return timm's evaluation transform: PIL image to tensor `(3, height, width)`."""
    import timm.data

    data: Any = timm.data
    share = values.get("crop")
    mean, std = per_channel(values)
    return data.create_transform(
        (3, *values["size"]),
        is_training=False,
        interpolation=values.get("interpolation", _USUAL),
        mean=tuple(mean),
        std=tuple(std),
        crop_pct=1.0 if share is None else share,
        crop_mode="squash" if share is None else "center",
    )


def image_processor(values: Mapping[str, Any]) -> Any:
    """Return a transformers image processor that does what a file's `preprocessing` says."""
    import transformers

    mean, std = per_channel(values)
    height, width = values["size"]
    numbers = {name: key for key, name in _RESAMPLE.items()}
    common: dict[str, Any] = {
        "image_mean": mean,
        "image_std": std,
        "resample": numbers[values.get("interpolation", _USUAL)],
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


def per_channel(values: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of red, green and blue.

    Raises:
        AdapterError: The file does not say enough for a transform of images.
    """
    advice = "build the transform yourself, and use `load_task_adapter`"
    missing = [name for name in ("size", "mean", "std") if name not in values]
    if missing:
        problem = f"the file does not say {', '.join(missing)}"
        raise AdapterError("preprocessing", problem, advice)
    counts = {len(values["mean"]), len(values["std"])}
    if counts not in ({1}, {3}):
        raise AdapterError(
            "preprocessing",
            f"the file says {len(values['mean'])} means and {len(values['std'])} stds, and an "
            "image is read as RGB, with one for each of 3 channels",
            advice,
        )
    # One number is that of every channel.
    times = 3 // counts.pop()
    return [*values["mean"]] * times, [*values["std"]] * times


def load_image(path: str | Path) -> Any:
    """Read an image file as an 8-bit RGB PIL image, turned as its EXIF tag says.

    Wider values are scaled to 8 bits, as `to_rgb` says, where PIL's own conversion would clip them.
    Transparency is dropped, as in timm and torchvision.

    Raises:
        OSError: The file cannot be read as an image.
    """
    from PIL import Image

    with Image.open(path) as file:
        file.load()
        return upright_rgb(file)


def upright_rgb(image: Any) -> Any:
    """Convert a PIL image, as it was opened, to 8-bit RGB, turned as its EXIF orientation says.

    Raises:
        OSError: As `to_rgb`.
    """
    from PIL import ImageOps

    return to_rgb(ImageOps.exif_transpose(image), opened=image)


def to_rgb(image: Any, *, opened: Any = None) -> Any:
    """Convert a PIL image of any mode to 8-bit RGB.

    White is 65535 in a 16-bit image, and in PGM of more than 8 bits, which Pillow scales. Where
    the mode does not say it, the highest value of the image does: in 32-bit integers white is 255,
    65535 or that value, and in floats 1, 255 or that value, the first that is not below it. A
    16-bit TIFF whose header says that white is 0 is inverted, as Pillow does with 8 bits.

    Args:
        image: The image.
        opened: What it was opened as, if it is a copy: copies lose what the header said.

    Raises:
        OSError: A float image has values that are not finite.
    """
    import numpy as np
    from PIL import Image, ImageOps

    opened = image if opened is None else opened
    if image.mode in _SIXTEEN_BITS or image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        top = float(values.max(initial=0.0))
        if not np.isfinite(values).all():
            raise OSError("it has values that are not finite (NaN or infinity)")
        mode = "I;16" if opened.format == "PPM" and image.mode == "I" else image.mode
        whites = {"F": (1.0, 255.0, top), "I": (255.0, 65535.0, top)}.get(mode, (65535.0,))
        peak = next(white for white in whites if top <= white)
        scaled = np.clip(values / peak * 255.0, 0, 255).round().astype(np.uint8)
        grey = Image.fromarray(scaled)
        inverted = image.mode in _SIXTEEN_BITS and _white_is_zero(opened)
        return (ImageOps.invert(grey) if inverted else grey).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _white_is_zero(opened: Any) -> bool:
    return opened.format == "TIFF" and bool(opened.tag_v2.get(_PHOTOMETRIC) == 0)


def to_batch(preprocess: Any, images: Sequence[Any]) -> Tensor:
    """Return PIL images as pixels `(batch, 3, height, width)`, by a transform or a processor."""
    if hasattr(preprocess, "image_mean"):
        pixels: Tensor = preprocess(images=list(images), return_tensors="pt")["pixel_values"]
        return pixels
    return torch.stack([preprocess(image) for image in images])


def output_logits(output: Any, call: str) -> Tensor:
    """Return logits `(batch, classes)` of what a timm or transformers classifier returned.

    Raises:
        VPTError: It holds none.
    """
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else "none"
        raise VPTError(
            call,
            f"the model returns {type(output).__name__}, logits {shape}; it must be (batch, "
            "classes)",
            "give it a head, for transformers a model ...ForImageClassification",
        )
    return logits


def _plain(size: Any) -> dict[str, int]:
    return {k: v for k, v in dict(size or {}).items() if v is not None}
