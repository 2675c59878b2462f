"""The backbone of a comparison: its facts, which rows it takes, what its head reads, its device."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..backbones.find import encoder_for
from ..checks import one_of
from ..errors import VPTError, reason
from ..protocols.apply import apply_protocol
from ..rehearsal import dummy_image, rehearse
from ..training.from_tokens import MOST_IMAGES, fewest_tokens
from .variants import FROM_IMAGES, Facts, Variant


def facts_of(model: nn.Module, size: int, classes: int) -> Facts:
    """Return the facts of a bare backbone, by one forward of a random image.

    Args:
        model: The backbone.
        size: Edge of the images.
        classes: Of the task.

    Raises:
        VPTError: It takes no such images.
    """
    encoder = encoder_for(model, "pad")
    shape: tuple[int, ...] = ()
    kind = "convolutions"
    if encoder.blocks:
        path = encoder.start
        image = dummy_image(model, (1, encoder.input_size[0], size, size))
        shown = rehearse(model, [image], {path: model.get_submodule(path)})
        if shown.error is not None:
            told = f"{type(model).__name__} does not take images of {size} x {size}: {shown.error}"
            raise VPTError("facts_of", told) from shown.error
        call = shown.first(path)
        shape = () if call is None else call.given
        sequence = len(shape) == 3 and encoder.known
        kind = "tokens" if sequence and encoder.plain and len(encoder.widths) == 1 else "windows"
    return Facts(
        kind=kind,
        depth=encoder.depth,
        tokens=shape[1] if kind == "tokens" else None,
        prefix=encoder.prefix_tokens,
        has_cls=encoder.has_cls,
        size=size,
        classes=classes,
    )


def refusal(
    variant: Variant,
    model: nn.Module,
    classes: int,
    size: Sequence[int],
    images: int,
) -> VPTError | None:
    """Return why a backbone refuses a variant, None where it takes it; the model is used up.

    Args:
        variant: The row.
        model: The backbone, bare.
        classes: Of the task.
        size: Height and width of the images, one of which goes through the model.
        images: Number of training images.
    """
    choices = [{**variant.options, **choice} for choice in variant.choices]
    options = {name: x for name, x in choices[0].items() if x not in FROM_IMAGES}
    try:
        with warnings.catch_warnings():
            # What is only warned of is warned of again when the variant is trained.
            warnings.simplefilter("ignore")
            apply_protocol(model, variant.protocol, num_classes=classes, **options)
            if choices[0].get("init") == "tokens":
                each = fewest_tokens(model, torch.rand(1, 3, *size))
                tokens = int(each * min(images, MOST_IMAGES))
                longest = max(choice.get("length", 1) for choice in choices)
                if tokens < longest:
                    told = f"the training images give a block {tokens} tokens"
                    return VPTError("compare", f"{told}, fewer than {longest} prompts")
    except VPTError as error:
        return error
    shown = rehearse(model, [torch.zeros(1, 3, *size)], hooks=True)
    if shown.error is not None:
        return VPTError(
            "compare",
            f"no forward of an image of {size[0]}x{size[1]} pixels: {reason(shown.error)}",
        )
    return None


def pooled(model: nn.Module, pool: str | None) -> nn.Module:
    """Let the head of a timm ViT read other tokens, for every protocol alike.

    The final norm stays where the checkpoint has it, in front of the pooling.

    Args:
        model: Bare; it is changed and loses its classifier.
        pool: "token" (CLS), "avg" (mean of the image tokens), or None: as the model is.

    Raises:
        VPTError: The model is no timm ViT with a CLS token and a norm in front of the pooling.
    """
    if pool is None:
        return model
    host: Any = model
    encoder = encoder_for(model, "pad")
    plain_vit = all(hasattr(host, n) for n in ("norm", "fc_norm", "global_pool", "cls_token"))
    if not (
        plain_vit
        and encoder.has_cls
        and encoder.library == "timm"
        and isinstance(host.fc_norm, nn.Identity)
        and not isinstance(host.norm, nn.Identity)
    ):
        raise VPTError(
            "pooled",
            f"{type(model).__name__} is no timm ViT with a CLS token and a norm in front of its "
            "pooling",
            "leave pool out, or build the model with the pooling you want",
            given={"pool": pool},
        )
    one_of("token", "avg").check("pooled", "pool", pool)
    host.reset_classifier(0, global_pool=pool)
    return model


def usual_pool(name: str) -> str | None:
    """Return how a pretraining means its tokens to be pooled, where timm's default is another.

    Masked autoencoders are fine-tuned on the mean of the patch tokens; their CLS token has seen no
    loss. Contrastive pretraining (MoCo-v3, DINO) has trained the CLS token, timm's default.

    Source: Jia et al. 2022, Table 4; He et al. 2022 (MAE), section A.1.
    """
    return "avg" if re.search(r"vit_[a-z]+_patch\d+_\d+\.mae$", name) else None


def device() -> torch.device:
    """Return where comparisons run: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
