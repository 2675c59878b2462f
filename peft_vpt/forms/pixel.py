"""Locations "pad" and "concat-channel": prompts in the space of the image.

"prepend-pixel" needs no form of its own: its patches become tokens (`Prompts.forward`).
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones.anatomy import first_floating
from ..backbones.find import takes_images
from ..errors import UnsupportedArchitectureError, VPTError
from ..rehearsal import undisturbed
from .attach import ForwardPatch

if TYPE_CHECKING:
    from ..prompts import PixelPlace, Prompts


def pixel_forms(prompts: Prompts, host: nn.Module) -> list[ForwardPatch]:
    """Return the forms of a pixel location, none for the others."""
    place = prompts.place
    if place is None or prompts.spec.location == "prepend-pixel":
        return []
    if prompts.spec.location == "concat-channel":
        return [ChannelForm(prompts, host.get_submodule(place.conv))]
    module = host.get_submodule(place.module)
    return [BorderForm(prompts, module, method) for method in place.entrances]


def check_host(prompts: Prompts, host: nn.Module) -> None:
    """Run a host around a bordered encoder once: its other parts may count on the image size.

    Raises:
        UnsupportedArchitectureError: They do.
    """
    place = prompts.place
    forms = [form for form in prompts.forms if isinstance(form, BorderForm)]
    if place is None or not forms or not place.module or not takes_images(host):
        return
    like = first_floating(host)
    with undisturbed(host), ExitStack() as stack:
        for form in forms:
            form.attach()
            stack.callback(form.detach)
        try:
            host(torch.zeros(1, *place.image).to(like))
        except Exception as error:
            raise UnsupportedArchitectureError(
                f"inject_prompts(location='pad'): other parts of {type(host).__name__} count on "
                f"the size of the image that the user gives ({error}). Pass the encoder alone: "
                f"inject_prompts(model.{place.module}, location='pad')."
            ) from error


class BorderForm(ForwardPatch):
    """A learnable border around the image, put on where the encoder takes it.

    Source: Jia et al. 2022, section 4.4 "prompting ConvNets" and Table 5.
    """

    def __init__(self, prompts: Prompts, module: nn.Module, method: str) -> None:
        super().__init__(module)
        self._links = (prompts,)
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
        place, p = prompts.place, prompts.spec.length
        assert place is not None
        assert prompts.pixel is not None
        check_image(image, prompts.spec.location, place)
        batch = (image.shape[0], -1, -1, -1)
        edges = [prompts.pixel(name).to(image).expand(batch) for name in ("tb", "lr")]
        (top, bottom), (left, right) = edges[0].split(p, 2), edges[1].split(p, 3)
        return torch.cat([top, torch.cat([left, image, right], dim=3), bottom], dim=2)


class ChannelForm(ForwardPatch):
    """Further image channels with a convolution of their own, added to the frozen one's output.

    Equal to a convolution of the concatenated channels.

    Source: Jia et al. 2022, section 4.3, prompt location "Concat-channel".
    """

    def __init__(self, prompts: Prompts, conv: nn.Module) -> None:
        super().__init__(conv)
        self._links = (prompts,)

    def extra_repr(self) -> str:
        """Name the form."""
        return "form=concat-channel"

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the frozen convolution's `forward`."""
        prompts = self._links[0]
        out = self.original(*args, **kwargs)
        if prompts.disabled():
            return out
        assert prompts.place is not None
        assert prompts.pixel is not None
        image = args[0] if args else next(iter(kwargs.values()))
        check_image(image, prompts.spec.location, prompts.place)
        conv: Any = self.target
        channels, weight = (prompts.pixel(name).to(out) for name in ("channels", "weight"))
        geometry = (conv.stride, conv.padding, conv.dilation)
        return out + F.conv2d(channels.unsqueeze(0), weight, None, *geometry).to(out.dtype)


def check_image(image: Any, location: str, place: PixelPlace) -> None:
    """Raise unless images have the channels and the size that pixel prompts were made for.

    Raises:
        VPTError: They have not; the message names both and what to do.
    """
    channels, height, width = place.image
    where = f"location='{location}'"
    if not isinstance(image, Tensor) or image.dim() != 4:
        shape = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise VPTError(f"{where}: needs images (batch, channels, height, width), got {shape}.")
    if image.shape[1] != channels:
        raise VPTError(
            f"{where}: got images of {image.shape[1]} channels, needs {channels}; "
            "convert them to RGB."
        )
    if image.shape[2] == height and image.shape[3] == width:
        return
    given, sees = f"{image.shape[2]} x {image.shape[3]}", f"{place.sees[0]} x {place.sees[1]}"
    why = f", which the border makes the {sees} that the model sees" if location == "pad" else ""
    raise VPTError(
        f"{where}: got images of {given}, needs {height} x {width}{why}. Resize the images to "
        f"{height} x {width}, or remove_prompts and inject again into a model built for another "
        "image size."
    )
