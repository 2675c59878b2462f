"""What a comparison trains: variants of protocols, and the facts of a backbone they follow from."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.image_model import encoder_for
from ..data import Task
from ..data.drawing import stratified
from ..errors import SpecError, VPTError
from ..forms.probe import Probe
from ..from_tokens import MOST_IMAGES, fewest_tokens
from ..protocols import apply_protocol
from ..protocols.options import PROMPTED, Protocol
from .records import config_hash

Options = Mapping[str, Any]
FINAL = ("trainval", "train")
# First values of prompts that take images to make.
FROM_IMAGES = ("prototypes", "tokens")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of a comparison: a protocol with its settings.

    Args:
        label: Its name, the `protocol` of its records.
        protocol: As in `apply_protocol`.
        options: Of the protocol, plain values. `init` of prompts may be "prototypes": the mean
            features of each class (paper, Figure 13), or "tokens": `prompts_from_tokens`.
        changes: Fields of the recipe to set.
        choices: Further options, one mapping each, among which val chooses.
        fraction: Share of the training images.
        size: Edge of the images; None: the comparison's.
        final: What the final runs train on: "trainval", or "train", as the paper does on FGVC.

    Raises:
        SpecError: An unknown protocol, or a value out of range.
    """

    label: str
    protocol: str
    options: Options = dataclasses.field(default_factory=dict)
    changes: Options = dataclasses.field(default_factory=dict)
    choices: Sequence[Options] = ({},)
    fraction: float = 1.0
    size: int | None = None
    final: str = "trainval"

    def __post_init__(self) -> None:
        Protocol(self.protocol)
        if not self.label or not self.choices:
            raise SpecError(f"Variant({self.label!r}): needs a label, and a choice at least.")
        if not 0 < self.fraction <= 1:
            raise SpecError(
                f"Variant({self.label!r}, fraction={self.fraction!r}): must be above 0, at most 1."
            )
        if self.final not in FINAL:
            raise SpecError(f"Variant(final={self.final!r}): must be one of {', '.join(FINAL)}.")

    @property
    def prompted(self) -> bool:
        """Whether the protocol has prompts."""
        return Protocol(self.protocol).kind in PROMPTED


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the variants of an ablation follow from.

    Args:
        kind: "tokens" (blocks on one sequence of one width), "windows" (other transformers) or
            "convolutions" (no blocks).
        depth: Number of blocks.
        tokens: In front of the first block, prefix tokens included; None where they are a map.
        prefix: Number of prefix tokens.
        has_cls: Whether there is a CLS token.
        size: Edge of the images.
        classes: Of the task.
    """

    kind: str
    depth: int
    tokens: int | None
    prefix: int
    has_cls: bool
    size: int
    classes: int

    def tokens_at(self, size: int) -> int:
        """Return the number of tokens of images of another size.

        Raises:
            VPTError: Tokens are no square grid of the images.
        """
        patches = 0 if self.tokens is None else self.tokens - self.prefix
        grid = math.isqrt(patches)
        if not patches or grid**2 != patches or size * grid % self.size:
            raise VPTError(
                f"an image of {size} x {size} is no whole number of the patches into which this "
                f"backbone cuts {self.size} x {self.size}; choose another size."
            )
        return self.prefix + (size * grid // self.size) ** 2


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
    hidden: Any = None
    kind = "convolutions"
    if encoder.blocks:
        device = next(model.parameters()).device
        trial = Probe(model, encoder, device).run((size, size), (0,))
        if trial.error is not None:
            raise VPTError(
                f"{type(model).__name__} does not take images of {size} x {size}: {trial.error}"
            ) from trial.error
        hidden = trial.hidden.get(0)
        sequence = isinstance(hidden, Tensor) and hidden.dim() == 3 and encoder.known
        kind = "tokens" if sequence and encoder.plain and len(encoder.widths) == 1 else "windows"
    return Facts(
        kind=kind,
        depth=encoder.depth,
        tokens=int(hidden.shape[1]) if kind == "tokens" else None,
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
    images: int = MOST_IMAGES,
) -> str:
    """Return why a backbone refuses a variant, "" where it takes it; the model is used up.

    Args:
        variant: The row.
        model: The backbone, bare.
        classes: Of the task.
        size: Height and width of the images, one of which goes through the model.
        images: Number of training images.
    """
    chosen = {**variant.options, **variant.choices[0]}
    options = {name: x for name, x in chosen.items() if x not in FROM_IMAGES}
    try:
        with warnings.catch_warnings():
            # What is only warned of is warned of again when the variant is trained.
            warnings.simplefilter("ignore")
            apply_protocol(model, variant.protocol, num_classes=classes, **options)
            if chosen.get("init") == "tokens":
                found = fewest_tokens(model, torch.rand(1, 3, *size))
                _need_tokens(variant, int(found * min(images, MOST_IMAGES)))
    except VPTError as error:
        return str(error)
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, *size))
    # Layers refuse an image that is too small for them by whatever exception they like.
    except Exception as error:
        return f"no forward of an image of {size[0]}x{size[1]} pixels: {error}"
    return ""


def _need_tokens(variant: Variant, tokens: int) -> None:
    """Raise where images give fewer tokens than the longest choice has prompts.

    Raises:
        SpecError: They do.
    """
    lengths = [{**variant.options, **choice}.get("length", 1) for choice in variant.choices]
    if tokens < max(lengths):
        raise SpecError(
            f"the training images give a block {tokens} tokens, fewer than {max(lengths)} prompts"
        )


def plain(protocols: Iterable[str], options: Mapping[str, Options]) -> tuple[Variant, ...]:
    """Return protocols as they are, each under its own name."""
    return tuple(Variant(name, name, options.get(name, {})) for name in protocols)


def is_name(label: str) -> bool:
    """Tell whether a label is the name of a protocol, as `plain` gives it."""
    try:
        return bool(Protocol(label))
    except SpecError:
        return False


def with_tokens(variant: Variant) -> Variant:
    """Let prompts that train, and have no first values of their own, begin as tokens."""
    if not Protocol(variant.protocol).trains_prompts or "init" in variant.options:
        return variant
    return dataclasses.replace(variant, options={**variant.options, "init": "tokens"})


def with_lengths(variants: Iterable[Variant], lengths: Sequence[int]) -> tuple[Variant, ...]:
    """Give prompts that have no length one; of several, val chooses.

    Raises:
        SpecError: No lengths.
    """
    if not lengths:
        raise SpecError("with_lengths: there are no lengths; give one at least.")
    return tuple(_with_length(variant, lengths) for variant in variants)


def _with_length(variant: Variant, lengths: Sequence[int]) -> Variant:
    if not variant.prompted or "length" in variant.options:
        return variant
    if len(lengths) == 1:
        options = {**variant.options, "length": lengths[0]}
        return dataclasses.replace(variant, options=options)
    choices = [{**c, "length": n} for c in variant.choices for n in lengths]
    return dataclasses.replace(variant, choices=tuple(choices))


def with_fraction(variants: Iterable[Variant], fraction: float) -> tuple[Variant, ...]:
    """Let variants train on a share of the training images, and their labels say so.

    Final runs train on the share of `train` alone: `val` would outweigh it, and the paper does so.
    """
    if fraction == 1:
        return tuple(variants)
    return tuple(
        dataclasses.replace(
            v, label=f"{v.label} {percent(fraction)}", fraction=fraction, final="train"
        )
        for v in variants
    )


def percent(fraction: float) -> str:
    """Return a share in words, "10 %"."""
    return f"{100 * fraction:g} %"


def reduced(task: Task, fraction: float, seed: int = 0) -> Task:
    """Return a task with a stratified share of its training images, as `open_task` draws it."""
    if fraction == 1:
        return task
    drawn, _ = stratified(task.split("train").labels, fraction, seed, least=1)
    splits = {**task.splits, "train": task.split("train").subset(drawn)}
    return dataclasses.replace(task, splits=splits)


def file_name(text: str) -> str:
    """Return a text as the name of a file or folder."""
    return re.sub(r"[^A-Za-z0-9.+_=-]+", "-", text).strip("-")


def adapter_folder(task: str, label: str, backbone: str, seed: int, config: Options) -> str:
    """Return the folder of a run's adapter, below that of all runs; every run has another one."""
    told = config_hash({**config, "backbone": backbone})
    return f"{file_name(task)}/{file_name(label)}-{seed}-{told}"


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
    plain_vit = all(hasattr(model, n) for n in ("norm", "fc_norm", "global_pool", "cls_token"))
    encoder = encoder_for(model, "pad")
    if not (plain_vit and encoder.has_cls and encoder.library == "timm" and _has_norm(model)):
        raise VPTError(
            f"pool={pool!r}: {type(model).__name__} is no timm ViT with a CLS token and a norm in "
            "front of its pooling; leave pool out, or build the model with the pooling you want."
        )
    if pool not in ("token", "avg"):
        raise SpecError(f"pool={pool!r}: must be 'token' or 'avg'.")
    model.reset_classifier(0, global_pool=pool)  # type: ignore[operator]
    return model


def usual_pool(name: str) -> str | None:
    """Return how a pretraining means its tokens to be pooled, where timm's default is another.

    Masked autoencoders are fine-tuned on the mean of the patch tokens; their CLS token has seen no
    loss. Contrastive pretraining (MoCo-v3, DINO) has trained the CLS token, timm's default.

    Source: Jia et al. 2022, Table 4; He et al. 2022 (MAE), section A.1.
    """
    return "avg" if re.search(r"vit_[a-z]+_patch\d+_\d+\.mae$", name) else None


def _has_norm(model: Any) -> bool:
    return isinstance(model.fc_norm, nn.Identity) and not isinstance(model.norm, nn.Identity)


def device() -> torch.device:
    """Return where comparisons run: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
