"""Where the image tokens of a plain ViT lie on its image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones.anatomy import Encoder
from ..backbones.projection import join
from ..errors import SpecError, UnsupportedArchitectureError
from ..hosts import bare
from ..rehearsal import Rehearsal, dummy_inputs, rehearse

Pair = tuple[int, int]
# Two runs of one image in a batch differ by rounding, of half precision too; shuffled ones by 1.
_SAME = 0.05


@dataclass(frozen=True)
class TokenMap:
    """How image tokens lie over the pixels, from the top left on.

    Args:
        conv: Path in the backbone of the convolution whose output is the map of tokens.
        step: Height and width of a token in pixels.
        apart: Whether it cuts the image itself into patches side by side. A rest on the right and
            below that makes no whole patch is then left out, or padded by the model.
    """

    conv: str
    step: Pair
    apart: bool

    def fits(self, grid: Pair, size: Pair) -> bool:
        """Tell whether a grid of tokens lies over an image of a size in pixels."""
        rests = [s - g * p for s, g, p in zip(size, grid, self.step, strict=True)]
        most = self.step if self.apart else (1, 1)
        return all(abs(rest) < p for rest, p in zip(rests, most, strict=True))

    def lay(self, scores: Tensor, grid: Pair, size: Pair) -> Tensor:
        """Bring scores `(batch, classes, h, w)` of a grid to the pixels of an image.

        What lies under the model's own padding is dropped; a rest that it leaves out gets the
        nearest scores.

        Raises:
            SpecError: The tokens do not lie over such an image.
        """
        if not self.fits(grid, size):
            raise SpecError(
                "Segmenter",
                f"{_by(size)} pixels make {_by(grid)} tokens of {_by(self.step)} pixels, which do "
                "not lie over them",
                "give images whose height and width are multiples of these",
            )
        (height, width), (rows, columns) = size, grid
        seen = (rows * self.step[0], columns * self.step[1])
        maps = F.interpolate(scores, seen, mode="bilinear", align_corners=False)
        rest = (0, max(width - seen[1], 0), 0, max(height - seen[0], 0))
        maps = F.pad(maps, rest, mode="replicate") if any(rest) else maps
        return maps[..., :height, :width]


def token_map(backbone: nn.Module, encoder: Encoder) -> TokenMap:
    """Find how the image tokens of a backbone lie over its image, by a dummy forward.

    Raises:
        UnsupportedArchitectureError: They are no map that lies over the image.
    """
    module = backbone.get_submodule(encoder.path)
    fail = partial(UnsupportedArchitectureError, "Segmenter")
    name, (shown, tokens) = type(module).__name__, _rehearse(module, backbone, encoder)
    if tokens is None or tokens.dim() != 3 or not isinstance(shown.inputs, Tensor):
        raise fail(
            f"{name} does not take one image {encoder.input_size} to one sequence of tokens, so "
            "nothing says where they lie",
            "take a plain ViT for images",
        )
    size = _sides(shown.inputs.shape)
    if not tokens.is_meta and (tokens[0] - tokens[1]).norm() > _SAME * tokens[0].norm():
        raise fail(
            f"{name} drops and shuffles its tokens, so they are no map of the image",
            "load the weights into the class without masking (ViTModel for ViTMAEModel)",
        )
    count = tokens.shape[1] - encoder.prefix_tokens
    maps = (c for c in shown.calls if len(c.gave) == 4 and math.prod(c.gave[2:]) == count)
    first = next(maps, None)
    if first is None:
        raise fail(
            f"no convolution makes the patches of {name}, so nothing says where its {count} image "
            "tokens lie",
            "take a ViT whose patches are made by one",
        )
    conv: Any = module.get_submodule(first.path)
    found = _layout(join(encoder.path, first.path), conv, _sides(first.given), size)
    if not found.apart and any(getattr(m, "dynamic_img_pad", False) for m in module.modules()):
        raise fail(
            f"{name} pads maps behind a stem of convolutions (dynamic_img_pad), so nothing says "
            "how large its tokens are",
            "build it with `dynamic_img_pad=False`",
        )
    grid = _sides(first.gave)
    if not found.fits(grid, size):
        raise fail(
            f"in {name}, {_by(size)} pixels make {_by(grid)} tokens of {_by(found.step)} pixels, "
            "which do not lie over them",
            "take a ViT whose patches divide its image",
        )
    return found


def _layout(path: str, conv: nn.Conv2d, taken: Pair, size: Pair) -> TokenMap:
    """Describe the tokens that a convolution of a map makes of an image of a size."""
    # What stands in front shrinks the image by a whole factor; padding makes it a little larger.
    shrunk = [max(round(s / t), 1) for s, t in zip(size, taken, strict=True)]
    strides = [int(stride) for stride in conv.stride]
    bare = conv.dilation == (1, 1) and conv.padding in ((0, 0), "valid")
    tiles = bare and conv.kernel_size == conv.stride
    padded = [t - s for s, t in zip(size, taken, strict=True)]
    whole = all(0 <= more < stride for more, stride in zip(padded, strides, strict=True))
    return TokenMap(path, (shrunk[0] * strides[0], shrunk[1] * strides[1]), tiles and whole)


def _rehearse(
    module: nn.Module, backbone: nn.Module, encoder: Encoder
) -> tuple[Rehearsal, Tensor | None]:
    """Run two equal images through an encoder.

    Returns:
        The calls of convolutions in front of the first block, and the tokens that it takes.
    """
    images = (x for x in dummy_inputs(module, encoder) if isinstance(x, Tensor) and x.dim() == 4)
    convs = {path: part for path, part in module.named_modules() if isinstance(part, nn.Conv2d)}
    start, tokens = encoder.start, list[Tensor]()
    shown = rehearse(
        module,
        (image[:1].repeat(2, 1, 1, 1) for image in images),
        convs | {start: backbone.get_submodule(start)},
        see=lambda path, given: tokens.append(given) if path == start else None,
        within=partial(bare, backbone),
    )
    paths = [call.path for call in shown.calls]
    if not shown.passed or start not in paths:
        return shown, None
    shown.calls = shown.calls[: paths.index(start)]
    return shown, tokens[-paths.count(start)]


def _sides(shape: Sequence[int]) -> Pair:
    return shape[-2], shape[-1]


def _by(pair: Pair) -> str:
    return f"{pair[0]} x {pair[1]}"
