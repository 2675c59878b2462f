"""Where the image tokens of a plain ViT lie on its image."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones.anatomy import Encoder, first_argument
from ..backbones.projection import join
from ..errors import SpecError, UnsupportedArchitectureError
from ..hosts import carries, host_and_prompts
from ..rehearsal import dummy_inputs, undisturbed

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
                f"Segmenter: {_by(size)} pixels make {_by(grid)} tokens of {_by(self.step)} "
                "pixels, which do not lie over them; give images whose height and width are "
                "multiples of these."
            )
        (height, width), (rows, columns) = size, grid
        seen = (rows * self.step[0], columns * self.step[1])
        maps = F.interpolate(scores, seen, mode="bilinear", align_corners=False)
        rest = (0, max(width - seen[1], 0), 0, max(height - seen[0], 0))
        maps = F.pad(maps, rest, mode="replicate") if any(rest) else maps
        return maps[..., :height, :width]


@dataclass
class _Trial:
    """What a dummy forward showed in front of the first block."""

    size: Pair = (0, 0)
    # Path, convolution, and the sizes of the maps that it took and gave.
    maps: list[tuple[str, nn.Conv2d, Pair, Pair]] = field(default_factory=list)
    tokens: Tensor | None = None


def token_map(backbone: nn.Module, encoder: Encoder) -> TokenMap:
    """Find how the image tokens of a backbone lie over its image, by a dummy forward.

    Raises:
        UnsupportedArchitectureError: They are no map that lies over the image.
    """
    module = backbone.get_submodule(encoder.path)
    name, trial = type(module).__name__, _try(module, backbone, encoder)
    tokens = trial.tokens
    if tokens is None or tokens.dim() != 3:
        raise UnsupportedArchitectureError(
            f"Segmenter: {name} does not take one image {encoder.input_size} to one sequence of "
            "tokens, so nothing says where they lie; take a plain ViT for images."
        )
    if not tokens.is_meta and (tokens[0] - tokens[1]).norm() > _SAME * tokens[0].norm():
        raise UnsupportedArchitectureError(
            f"Segmenter: {name} drops and shuffles its tokens, so they are no map of the image; "
            "load the weights into the class without masking (ViTModel for ViTMAEModel)."
        )
    count = tokens.shape[1] - encoder.prefix_tokens
    maps = [found for found in trial.maps if found[3][0] * found[3][1] == count]
    if not maps:
        raise UnsupportedArchitectureError(
            f"Segmenter: no convolution makes the patches of {name}, so nothing says where its "
            f"{count} image tokens lie; take a ViT whose patches are made by one."
        )
    path, conv, taken, grid = maps[0]
    found = _layout(join(encoder.path, path), conv, taken, trial.size)
    if not found.apart and any(
        getattr(part, "dynamic_img_pad", False) for part in module.modules()
    ):
        raise UnsupportedArchitectureError(
            f"Segmenter: {name} pads maps behind a stem of convolutions (dynamic_img_pad), so "
            "nothing says how large its tokens are; build it with dynamic_img_pad=False."
        )
    if not found.fits(grid, trial.size):
        raise UnsupportedArchitectureError(
            f"Segmenter: in {name}, {_by(trial.size)} pixels make {_by(grid)} tokens of "
            f"{_by(found.step)} pixels, which do not lie over them; take a ViT whose patches "
            "divide its image."
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


def _try(module: nn.Module, backbone: nn.Module, encoder: Encoder) -> _Trial:
    """Run two equal images through the encoder; return an empty trial where it takes none."""
    prompts = host_and_prompts(backbone, "Segmenter")[1] if carries(backbone) else None
    with undisturbed(module), nullcontext() if prompts is None else prompts.disable():
        for image in dummy_inputs(module, encoder):
            if not isinstance(image, Tensor) or image.dim() != 4:
                continue
            trial = _Trial((image.shape[2], image.shape[3]))
            handles = _watch(trial, module, backbone.get_submodule(encoder.start))
            try:
                module(image[:1].repeat(2, 1, 1, 1))
            except Exception:  # the next size may do
                continue
            else:
                return trial
            finally:
                for handle in handles:
                    handle.remove()
    return _Trial()


def _watch(trial: _Trial, module: nn.Module, start: nn.Module) -> list[Any]:
    """Write down the maps of convolutions up to the first block, and the tokens that it takes."""

    def maps(path: str) -> Callable[..., None]:
        def hook(conv: Any, args: tuple[Any, ...], output: Any) -> None:
            if trial.tokens is None and output.dim() == 4:
                taken = tuple(args[0].shape[-2:])
                trial.maps.append((path, conv, taken, tuple(output.shape[-2:])))

        return hook

    def enters(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if trial.tokens is None:
            trial.tokens = first_argument(args, kwargs)

    convs = [(path, part) for path, part in module.named_modules() if isinstance(part, nn.Conv2d)]
    return [
        start.register_forward_pre_hook(enters, with_kwargs=True),
        *(conv.register_forward_hook(maps(path)) for path, conv in convs),
    ]


def _by(pair: Pair) -> str:
    return f"{pair[0]} x {pair[1]}"
