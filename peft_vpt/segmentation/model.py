"""`Segmenter`: a SETR-PUP decoder over a prompted ViT."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones.anatomy import Encoder, first_conv_kernel, module_at
from ..backbones.image_model import encoder_for
from ..decoder import claim_decoder
from ..errors import SpecError, UnsupportedArchitectureError
from ..hosts import carries, host_and_prompts, refuse_unfit
from ..inject import freeze
from ..protocols import apply_protocol
from .evaluation import IGNORE

_PUP_STEPS, _AUXILIARY_STEPS = 4, 2
_AUXILIARY_WEIGHT = 0.4


class PupHead(nn.Module):
    """Progressive upsampling: convolutions, each followed by doubling the map.

    Args:
        width: Of the tokens.
        classes: Number of outputs.
        channels: Of the maps in between.
        steps: Number of convolutions.

    Source: Zheng et al. 2021 (SETR), section 3.2; used by Jia et al. 2022, section A.
    """

    def __init__(self, width: int, classes: int, channels: int = 256, steps: int = _PUP_STEPS):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        widths = [width] + [channels] * steps
        self.convs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
            )
            for before, after in pairwise(widths)
        )
        self.classify = nn.Conv2d(channels, classes, 1)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map tokens `(batch, h * w, width)` to scores `(batch, classes, 16 h, 16 w)`.

        By `2 ** steps` in height and width, that is.
        """
        maps = self.norm(tokens).transpose(1, 2).unflatten(2, grid)
        for conv in self.convs:
            maps = F.interpolate(conv(maps), scale_factor=2, mode="bilinear", align_corners=False)
        return cast(Tensor, self.classify(maps))


class Segmenter(nn.Module):
    """A ViT with a SETR-PUP decoder that sees image tokens only: prompts are left behind.

    The decoder always trains; what of the backbone does is the protocol's business. Call it
    with pixels `(batch, 3, H, W)` of the backbone's size, and get scores `(batch, classes, H, W)`.

    Args:
        backbone: A plain ViT of timm or transformers; its classifier, if any, is not used.
        classes: Number of classes.
        protocol: "linear" (the decoder alone), "bias", "vpt-deep", "vpt-shallow", "vpt+bias",
            "full" and so on, as in `apply_protocol`; None: the backbone stays as it is.
        channels: Of the decoder's maps.
        auxiliary: Blocks behind which a smaller head adds to the loss in training. The paper's
            recipe has three, at 10, 15 and 20 of ViT-L's 24.
        options: Of the protocol.

    Raises:
        UnsupportedArchitectureError: The backbone has no one sequence of image tokens.
        SpecError: A wrong option.

    Source: Jia et al. 2022, section 4.2 and table 3.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classes: int,
        protocol: str | None = "vpt-deep",
        *,
        channels: int = 256,
        auxiliary: Sequence[int] = (),
        **options: Any,
    ) -> None:
        super().__init__()
        encoder = plain_encoder(backbone)
        for index in auxiliary:
            if not 0 <= index < encoder.depth:
                raise SpecError(
                    f"Segmenter(auxiliary={tuple(auxiliary)}): blocks are 0 to {encoder.depth - 1}."
                )
        if protocol is not None:
            apply_protocol(backbone, protocol, **options)
        self.backbone = backbone
        width = encoder.blocks[-1].width
        self.decoder = PupHead(width, classes, channels)
        self.auxiliary = nn.ModuleDict(
            {str(i): PupHead(width, classes, channels, _AUXILIARY_STEPS) for i in auxiliary}
        )
        self.classes = classes
        self.labels: list[str] | None = None
        like = next(p for p in backbone.parameters() if p.is_floating_point())
        for head in (self.decoder, self.auxiliary):
            head.to(like.device, like.dtype)
        self._freeze_classifier(encoder)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return scores `(batch, classes, H, W)`."""
        return self._scores(pixels)[0]

    def loss(self, pixels: Tensor, masks: Tensor) -> Tensor:
        """Return the mean cross-entropy over pixels that are not 255, with that of auxiliary heads.

        It is 0 where nothing is known of any pixel.

        Args:
            pixels: `(batch, 3, H, W)`.
            masks: Class indices `(batch, H, W)`, 255 where nothing is known.
        """
        known = (masks != IGNORE).sum().clamp(min=1)
        terms = [_entropy(scores, masks) / known for scores in self._scores(pixels)]
        return terms[0] + _AUXILIARY_WEIGHT * sum(terms[1:], torch.zeros_like(terms[0]))

    def _scores(self, pixels: Tensor) -> list[Tensor]:
        encoder = plain_encoder(self.backbone)
        height, width = pixels.shape[-2:]
        patch = first_conv_kernel(module_at(self.backbone, encoder.path))
        grid = (height // patch[0], width // patch[1])
        heads = [self.decoder, *(self.auxiliary.values() if self.training else ())]
        wanted = [None, *(int(i) for i in self.auxiliary)][: len(heads)]
        with _recorded(self.backbone, encoder, wanted) as seen:
            self.backbone(pixels)
        scores = []
        for head, index in zip(heads, wanted, strict=True):
            # Prompts, where a block has them as tokens, stand behind the image's.
            first = encoder.prefix_tokens
            tokens = seen[index][:, first : first + grid[0] * grid[1]]
            if tokens.shape[1] != grid[0] * grid[1]:
                raise SpecError(
                    f"Segmenter: {tuple(pixels.shape[-2:])} pixels make {tokens.shape[1]} tokens, "
                    f"not {grid[0]} x {grid[1]}; give images of the backbone's size."
                )
            maps = head(tokens, grid)
            scores.append(F.interpolate(maps, (height, width), mode="bilinear"))
        return scores

    def _freeze_classifier(self, encoder: Encoder) -> None:
        for path in encoder.head.paths if encoder.head is not None else ():
            module_at(self.backbone, path).requires_grad_(False)


def _entropy(scores: Tensor, masks: Tensor) -> Tensor:
    """Return the sum over known pixels, in float32 at least: half precision would overflow."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return F.cross_entropy(wide, masks, ignore_index=IGNORE, reduction="sum")


def apply_to_encoder(model: nn.Module, protocol: str, **options: Any) -> nn.Module:
    """Put a protocol into the encoder of a model with a decoder of its own, which trains whole.

    For the segmentation models of transformers (UperNet over Swin or BEiT, SegFormer, DPT): what is
    outside the encoder trains, what is inside follows the protocol. The decoder is the head of the
    adapter that `save_task_adapter` writes, for a model of the same class, and `remove_prompts`
    puts its former values back.

    Args:
        model: The whole model.
        protocol: As in `apply_protocol`.
        options: Its options.

    Returns:
        `model`.

    Raises:
        SpecError: The model is an encoder without a decoder, or a wrong option.
        AlreadyPromptedError: A protocol or prompts are in place.
        UnsupportedArchitectureError: The protocol has no place in this model.
    """
    refuse_unfit(model, "apply_to_encoder")
    encoder = encoder_for(model, "pad")
    if not encoder.path:
        raise SpecError(
            f"apply_to_encoder: {type(model).__name__} is an encoder without a decoder around it; "
            "use apply_protocol."
        )
    if options.get("num_classes") is not None:
        raise SpecError(
            f"apply_to_encoder(num_classes={options['num_classes']!r}): the decoder is the model's "
            "own; build the model for that many classes."
        )
    apply_protocol(model, protocol, **options)
    prompts = host_and_prompts(model, "apply_to_encoder")[1]
    claim_decoder(model, prompts)
    freeze(model, prompts.encoder)
    return model


def plain_encoder(backbone: nn.Module) -> Encoder:
    """Return the anatomy of a bare or prompted plain ViT.

    Raises:
        UnsupportedArchitectureError: It has no one sequence of image tokens.
    """
    if carries(backbone):
        return host_and_prompts(backbone, "Segmenter")[1].encoder
    encoder = encoder_for(backbone, "prepend")
    if not (encoder.plain and encoder.known):
        raise UnsupportedArchitectureError(
            f"Segmenter: {encoder.family} has no one sequence of image tokens; SETR-PUP takes "
            "plain ViTs. For a model with a decoder of its own, use apply_to_encoder."
        )
    return encoder


@contextmanager
def _recorded(
    backbone: nn.Module, encoder: Encoder, wanted: Sequence[int | None]
) -> Iterator[dict[int | None, Tensor]]:
    """Keep what comes out of some blocks, and for None what the final norm gives."""
    seen: dict[int | None, Tensor] = {}
    handles = []
    for index in wanted:
        last = encoder.final_norm or encoder.blocks[-1].path
        module = module_at(backbone, last if index is None else encoder.blocks[index].path)

        def keep(module: nn.Module, args: Any, output: Any, index: int | None = index) -> None:
            seen[index] = output[0] if isinstance(output, tuple) else output

        handles.append(module.register_forward_hook(keep))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
