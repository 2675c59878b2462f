"""First values of prompts and their projection."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .errors import SpecError
from .pixels import initialise_pixels
from .prompts import Prompts
from .spec import xavier_bound


@torch.no_grad()
def initialise(
    prompts: Prompts,
    patch: tuple[int, int],
    values: Tensor | list[Tensor] | None,
    generator: torch.Generator | None,
) -> None:
    """Fill prompts and projection with their first values.

    Draws are made on the generator's device (the CPU without one) in float32, so a seed gives the
    same values on every device.

    Args:
        prompts: On any device.
        patch: Kernel of the patch or stem convolution, for the xavier bound.
        values: One tensor per stored prompt, or a stacked one, for init="tensor".
        generator: Source of randomness; None: torch's global one.

    Source: bound of Jia et al. 2022, section A.1; projection kaiming normal, fan out.
    """
    if prompts.pixel is not None and prompts.place is not None:
        initialise_pixels(prompts.pixel, prompts.spec, prompts.place, values, generator)
        return
    stored = [p for n, p in prompts.own_parameters().items() if not n.startswith("project.")]
    if not stored:
        return
    device = generator.device if generator is not None else torch.device("cpu")
    first_width = prompts.encoder.blocks[0].width
    bound = xavier_bound(patch, prompts.spec.project or first_width)
    for i, parameter in enumerate(stored):
        drawn = torch.zeros(parameter.shape, dtype=torch.float32, device=device)
        if values is not None:
            drawn = values[i].float() if parameter.dtype != torch.float64 else values[i]
        elif prompts.spec.init == "xavier":
            drawn.uniform_(-bound, bound, generator=generator)
        elif prompts.spec.init == "normal":
            drawn.normal_(0.0, 0.02, generator=generator)
        parameter.copy_(drawn)
    for layer in prompts.project.values() if prompts.project is not None else ():
        assert isinstance(layer, nn.Linear)
        std = math.sqrt(2.0 / layer.weight.shape[0])
        drawn = torch.empty(layer.weight.shape, device=device).normal_(0, std, generator=generator)
        layer.weight.copy_(drawn)
        layer.bias.zero_()


def check_values(values: Tensor | list[Tensor], shapes: dict[str, tuple[int, ...]]) -> list[Tensor]:
    """Return initial values as one tensor per stored prompt.

    Raises:
        SpecError: Another number of tensors, a wrong shape or type, or a value that is not finite.
    """
    given = [values] if isinstance(values, Tensor) and not values.dim() else list(values)
    fits = len(given) == len(shapes) and all(
        isinstance(v, Tensor) and tuple(v.shape) == shape and v.is_floating_point()
        for v, shape in zip(given, shapes.values(), strict=False)
    )
    if not fits:
        got = [tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in given]
        raise SpecError(
            f"inject_prompts(init=...): needs {len(shapes)} floating point tensors of the shapes "
            f"{list(shapes.values())} (or one tensor that stacks them), got {got}."
        )
    if not all(bool(torch.isfinite(v).all()) for v in given):
        raise SpecError("inject_prompts(init=...): holds values that are not finite.")
    return given
