"""`Segmenter`: a SETR-PUP decoder over a prompted ViT."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones.anatomy import Encoder, first_floating
from ..backbones.find import encoder_for
from ..checks import integer
from ..data.transforms import IGNORE
from ..errors import SpecError, UnsupportedArchitectureError, VPTError
from ..hosts import carries, host_and_prompts, refuse_unfit, unwrap
from ..inject import freeze
from ..protocols.apply import apply_inside
from ..protocols.options import Protocol
from ..spec import LOCATIONS
from ..undo import claim_decoder, unchanged_on_error
from .evaluation import check_classes
from .grid import token_map

_PUP_STEPS, _AUXILIARY_STEPS = 4, 2
_AUXILIARY_WEIGHT = 0.4
# In transformers a class for a task is named after it: ...ForSemanticSegmentation.
_TASK = re.compile("For[A-Z]")


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
    with pixels `(batch, 3, H, W)` of a size that the backbone takes, and get scores `(batch,
    classes, H, W)`. They lie where the tokens do: what the backbone pads is cut off, and a rest
    on the right and below that makes no whole patch gets the nearest scores.

    Everything is checked before the backbone changes, with a dummy forward.

    Args:
        backbone: A plain ViT of timm or transformers, not wrapped; its classifier, if any, is not
            used.
        classes: Number of classes, 2 to 255.
        protocol: "linear" (the decoder alone), "bias", "vpt-deep", "vpt-shallow", "vpt+bias",
            "full" and so on, as in `apply_protocol`, but for "sidetune" and "mlp-k", which are
            about the classifier; None: the backbone stays as it is.
        channels: Of the decoder's maps, 1 or more.
        auxiliary: Blocks behind which a smaller head adds to the loss in training. The paper's
            recipe has three, at 10, 15 and 20 of ViT-L's 24.
        options: Of the protocol, but for location="pad", `pooling` and `num_classes`.

    Raises:
        UnsupportedArchitectureError: The backbone has no one sequence of image tokens, or they are
            no map that lies over the image.
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
        _check_options(encoder, classes, channels, auxiliary)
        _check_protocol(protocol, options)
        self._map = token_map(backbone, encoder)
        if protocol is not None:
            with unchanged_on_error(backbone, ()):
                apply_inside(backbone, protocol, **options)
        self.backbone = backbone
        width = encoder.blocks[-1].width
        self.decoder = PupHead(width, classes, channels)
        self.auxiliary = nn.ModuleDict(
            {str(i): PupHead(width, classes, channels, _AUXILIARY_STEPS) for i in auxiliary}
        )
        self.classes = classes
        self.labels: list[str] | None = None
        like = first_floating(backbone)
        for head in (self.decoder, self.auxiliary):
            head.to(like.device, like.dtype)
        self._freeze_classifier(encoder)

    def forward(self, pixels: Tensor, masks: Tensor | None = None) -> Tensor:
        """Return scores `(batch, classes, H, W)`; with masks, what `loss` does.

        DDP and other wrappers see no other call than this one.

        Args:
            pixels: `(batch, 3, H, W)`.
            masks: As in `loss`, or None.

        Raises:
            SpecError: The tokens do not lie over images of this size.
            VPTError: Masks that `loss` refuses.
        """
        return self._scores(pixels)[0] if masks is None else self.loss(pixels, masks)

    def loss(self, pixels: Tensor, masks: Tensor) -> Tensor:
        """Return the mean cross-entropy over pixels that are not 255, with that of auxiliary heads.

        It is 0 where nothing is known of any pixel.

        Args:
            pixels: `(batch, 3, H, W)`.
            masks: Class indices `(batch, H, W)`, 255 where nothing is known.

        Raises:
            VPTError: Masks that are no integers, of another size, or with what is no class.
        """
        masks = _checked(masks, (len(pixels), *pixels.shape[-2:]), self.classes)
        known = (masks != IGNORE).sum().clamp(min=1)
        terms = [_entropy(scores, masks) / known for scores in self._scores(pixels)]
        return terms[0] + _AUXILIARY_WEIGHT * sum(terms[1:], torch.zeros_like(terms[0]))

    def _scores(self, pixels: Tensor) -> list[Tensor]:
        encoder = plain_encoder(self.backbone)
        heads = [self.decoder, *(self.auxiliary.values() if self.training else ())]
        paths = [encoder.final_norm or encoder.blocks[-1].path]
        paths += [encoder.blocks[int(i)].path for i in self.auxiliary][: len(heads) - 1]
        with _recorded(self.backbone, [self._map.conv, *paths]) as seen:
            self.backbone(pixels)
        # Only the first map is the image's: patches made of prompts go through the same layer.
        rows, columns = seen[0][0].shape[-2:]
        size, first = (pixels.shape[-2], pixels.shape[-1]), encoder.prefix_tokens
        scores = []
        for head, outputs in zip(heads, seen[1:], strict=True):
            # Prompts, where a block has them as tokens, stand behind the image's.
            tokens = outputs[-1][:, first : first + rows * columns]
            if tokens.shape[1] != rows * columns:
                came = f"{rows} x {columns} patches come out of a block as {tokens.shape[1]} tokens"
                raise SpecError("Segmenter", came, "switch off what drops or merges them")
            scores.append(self._map.lay(head(tokens, (rows, columns)), (rows, columns), size))
        return scores

    def _freeze_classifier(self, encoder: Encoder) -> None:
        for path in encoder.head_paths:
            self.backbone.get_submodule(path).requires_grad_(False)


def _checked(masks: Tensor, wanted: tuple[int, ...], classes: int) -> Tensor:
    """Return masks as int64."""
    fail = partial(VPTError, "Segmenter.loss", given={"masks": ...})
    if masks.shape != wanted or masks.is_floating_point() or masks.dtype == torch.bool:
        raise fail(
            f"{tuple(masks.shape)} of {masks.dtype}",
            f"they must be class numbers, integers of shape {wanted}",
        )
    masks = masks.long()
    wrong = (masks != IGNORE) & ((masks < 0) | (masks >= classes))
    if bool(wrong.any()):
        raise fail(
            f"the label {int(masks[wrong][0])} is none of {classes} classes, 0 to {classes - 1}",
            f"write {IGNORE} where nothing is known",
        )
    return masks


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
        options: Its options, but for location="pad", which moves the image.

    Returns:
        `model`.

    Raises:
        SpecError: The model is an encoder without a decoder, or a wrong option.
        AlreadyPromptedError: A protocol or prompts are in place.
        UnsupportedArchitectureError: The protocol has no place in this model, or nothing says which
            part of it is the encoder.
    """
    call = "apply_to_encoder"
    refuse_unfit(model, call)
    refuse_unread(call, None, options.get("location"))
    encoder = encoder_for(model, "pad")
    if not encoder.path:
        _refuse_whole(model, encoder)
    if options.get("num_classes") is not None:
        raise SpecError(
            call,
            "the decoder is the model's own",
            "build the model for that many classes",
            given={"num_classes": options["num_classes"]},
        )
    with unchanged_on_error(model, ()):
        apply_inside(model, protocol, **options)
        prompts = host_and_prompts(model, call)[1]
        claim_decoder(model, prompts)
        freeze(model, prompts.encoder)
    return model


def _refuse_whole(model: nn.Module, encoder: Encoder) -> NoReturn:
    """Say why a model that is described as a whole has no encoder to put a protocol into."""
    name = type(model).__name__
    if encoder.library != "transformers" or encoder.head is not None or not _TASK.search(name):
        raise SpecError(
            "apply_to_encoder",
            f"{name} is an encoder without a decoder around it",
            "use `apply_protocol`",
        )
    why = "its encoder has no attention that prompts could join"
    why = "its blocks serve as decoder too" if encoder.blocks else why
    raise UnsupportedArchitectureError(
        "apply_to_encoder",
        f"in {name} encoder and decoder cannot be told apart ({why})",
        "take a model whose encoder is a vision transformer of its own, UperNet over Swin say",
    )


@contextmanager
def _recorded(backbone: nn.Module, paths: Sequence[str]) -> Iterator[list[list[Tensor]]]:
    """Keep what comes out of some modules, every time that they are called."""
    seen: list[list[Tensor]] = [[] for _ in paths]

    def keep(into: list[Tensor], module: nn.Module, args: Any, output: Any) -> None:
        into.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as stack:
        for path, outputs in zip(paths, seen, strict=True):
            hook = backbone.get_submodule(path).register_forward_hook(partial(keep, outputs))
            stack.callback(hook.remove)
        yield seen


def plain_encoder(backbone: nn.Module) -> Encoder:
    """Return the anatomy of a bare or prompted plain ViT.

    Raises:
        UnsupportedArchitectureError: It is wrapped, or has no one sequence of image tokens.
        SpecError: It carries what a decoder cannot use.
    """
    if unwrap(backbone) is not backbone:
        raise UnsupportedArchitectureError(
            "Segmenter",
            f"the backbone is wrapped ({type(backbone).__name__})",
            "give the bare model, and wrap the Segmenter",
        )
    if not carries(backbone):
        encoder = encoder_for(backbone, "prepend")
    else:
        prompts = host_and_prompts(backbone, "Segmenter")[1]
        protocol = None if prompts.delta is None else prompts.delta.protocol
        refuse_unread("Segmenter", protocol, prompts.spec.location)
        encoder = prompts.encoder
    if not (encoder.plain and encoder.known and encoder.blocks):
        raise UnsupportedArchitectureError(
            "Segmenter",
            f"{encoder.family} has no one sequence of image tokens; SETR-PUP takes plain ViTs",
            "For a model with a decoder of its own, use `apply_to_encoder`",
        )
    return encoder


def refuse_unread(call: str, protocol: Protocol | None, location: Any) -> None:
    """Refuse a protocol that a decoder does not read, and prompts that move the image.

    Raises:
        SpecError: It is one.
    """
    if protocol is not None and protocol.row.classifier:
        raise SpecError(
            call,
            f"of the protocol {protocol.name!r}, {protocol.row.classifier}, which a decoder does "
            "not read",
            "take another protocol",
        )
    if str(location) in LOCATIONS and LOCATIONS[location].moves_image:
        raise SpecError(
            call,
            "with a border around the image (`location='pad'`), tokens no longer lie over its "
            "pixels",
            "take another location",
        )


def _check_options(encoder: Encoder, classes: Any, channels: Any, auxiliary: Any) -> None:
    """Check what is the decoder's own."""
    check_classes("Segmenter", classes)
    integer(1).check("Segmenter", "channels", channels)
    blocks = list(auxiliary) if isinstance(auxiliary, Sequence) else [None]
    known = all(map(integer(0, encoder.depth - 1).fits, blocks))
    if not known or len({*blocks}) < len(blocks):
        problem = f"must be a list of blocks, each once; they are 0 to {encoder.depth - 1}"
        raise SpecError("Segmenter", problem, given={"auxiliary": auxiliary})


def _check_protocol(protocol: str | None, options: Mapping[str, Any]) -> None:
    """Refuse what of a protocol a decoder rules out."""
    refuse_unread("Segmenter", None if protocol is None else Protocol(protocol), None)
    if protocol is None and options:
        raise SpecError(
            "Segmenter",
            "without a protocol there is nothing that takes options",
            "name one, or leave them out",
            given={"protocol": None, **options},
        )
    for name, default in (("num_classes", None), ("pooling", "default")):
        if options.get(name, default) != default:
            raise SpecError(
                "Segmenter",
                "is about the backbone's classifier, which a decoder does not read",
                "leave it out",
                given={name: options[name]},
            )
    refuse_unread("Segmenter", None, options.get("location"))
