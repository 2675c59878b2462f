"""Which way an image with an EXIF orientation lies under its mask."""

from __future__ import annotations

from typing import Any

from ..errors import VPTError
from ..preprocessing import to_rgb, upright_rgb

_TAG = 0x0112


def image_under(image_path: str, mask_path: str, size: tuple[int, int]) -> Any:
    """Return an RGB image as its mask lies over it: as it is shown, or as it is stored.

    Annotation tools differ in whether they turn an image by its tag, so the size of the mask
    decides. It says nothing of a square image, one upside down or a mirrored one.

    Args:
        image_path: The image.
        mask_path: Its mask.
        size: Width and height of the mask.

    Raises:
        OSError: A file cannot be read as an image.
        VPTError: Nothing says which way it is.
    """
    from PIL import Image

    with Image.open(mask_path) as file:
        own = _orientation(file)
    with Image.open(image_path) as file:
        tag = _orientation(file)
        file.load()
        # The decoder of TIFF turns an image by itself.
        turned = tag != _orientation(file)
        if tag == own and not turned:
            return to_rgb(file)
        shown = file.size[::-1] if tag > 4 and not turned else file.size
        stored = shown[::-1] if tag > 4 else shown
        if own != 1 or size == stored == shown:
            raise _unknown(image_path, mask_path, image_path if own == 1 else mask_path)
        if size == stored and not turned:
            return to_rgb(file)
        return upright_rgb(file)


def _orientation(file: Any) -> int:
    """Return the EXIF orientation of an open image, 1 (as stored) where it says none."""
    found = file.getexif().get(_TAG, 1)
    return int(found) if found in range(2, 9) else 1


def _unknown(image_path: str, mask_path: str, which: str) -> VPTError:
    return VPTError(
        f"{image_path} with {mask_path}: an EXIF orientation turns {which} when it is shown, and "
        "nothing says whether the mask lies over the image as shown or as stored. Save the file "
        "turned and without the tag (PIL.ImageOps.exif_transpose), or remove the tag."
    )
