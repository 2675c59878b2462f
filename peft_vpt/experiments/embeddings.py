"""What the head receives: features, class prototypes as first prompts, t-SNE."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.anatomy import first_floating
from ..backbones.find import encoder_for
from ..checks import integer
from ..errors import SpecError, UnsupportedArchitectureError, VPTError, listing
from ..hosts import carries, host_and_prompts, unwrap
from .variants import MOST_PROTOTYPES


@torch.no_grad()
def features(model: nn.Module, batches: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Return what the head receives for every image, in eval mode; the mode is put back.

    That is the final embedding behind norm and pooling, whatever the model and its prompts make
    it: the paper's x_N for a ViT that reads its CLS token.

    Args:
        model: A classifier of timm or transformers, prompted or bare.
        batches: Of `(pixels, labels)`.

    Returns:
        Features `(images, width)` in single precision and labels `(images,)`, on the CPU.

    Raises:
        UnsupportedArchitectureError: The model has no classifier, or two.
        VPTError: No images.

    Source: Jia et al. 2022, section 4.3 and Figure 9.
    """
    host = unwrap(model)
    head, kept, labels = _head(host), [], []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        kept.append(args[0].flatten(1).float().cpu())

    like = first_floating(model)
    was_training = model.training
    # Last of the hooks in front of the head, so that pooling by prompts has been done.
    handle = head.register_forward_pre_hook(keep)
    model.eval()
    try:
        for pixels, target in batches:
            if len(target):
                model(pixels.to(like))
                labels.append(target.cpu())
    finally:
        handle.remove()
        model.train(was_training)
    if not labels:
        raise VPTError("features", "there are no images", "give batches that hold some")
    return torch.cat(kept), torch.cat(labels)


def class_prototypes(
    model: nn.Module,
    batches: Iterable[Any],
    classes: int,
    length: int | None = None,
    *,
    seed: int = 0,
) -> Tensor:
    """Return mean features of each class as first values of prompts.

    Args:
        model: The model that will get prompts; bare as a rule.
        batches: Of `(pixels, labels)`, of the training images.
        classes: Number of classes.
        length: Number of prototypes. None: one per class, at most 200. Fewer than classes: the
            centres of k-means over the class means.
        seed: Of k-means.

    Returns:
        `(length, width)`; `prompt_values` makes what `inject_prompts(init=...)` takes.

    Raises:
        SpecError: More prototypes than classes.
        VPTError: A class without images, or a label that is no class.

    Source: Jia et al. 2022, appendix, Figure 13.
    """
    count = min(classes, MOST_PROTOTYPES) if length is None else length
    integer(1, classes).check("class_prototypes", "length", count)
    found, labels = features(model, batches)
    means = class_means(found, labels, classes)
    if count == classes:
        return means
    from sklearn.cluster import KMeans

    centres = KMeans(count, n_init=10, random_state=seed).fit(means.numpy()).cluster_centers_
    return torch.from_numpy(centres).float()


def class_means(found: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the mean of the features of each class: `(classes, width)`.

    Raises:
        VPTError: A class without images, or a label that is no class.
    """
    low, high = (int(x) for x in labels.aminmax())
    if low < 0 or high >= classes:
        told = f"labels are {low} to {high}, classes 0 to {classes - 1}"
        raise VPTError("class_means", told)
    counts = torch.bincount(labels, minlength=classes)
    if not bool(counts.all()):
        empty = torch.nonzero(counts == 0).flatten().tolist()
        raise VPTError("class_means", f"no images of class {listing(list(map(str, empty)))}")
    sums = torch.zeros(classes, found.shape[1], dtype=torch.float64)
    return (sums.index_add_(0, labels, found.double()) / counts[:, None]).float()


def prompt_values(model: nn.Module, prototypes: Tensor, *, deep: bool = True) -> Tensor:
    """Return prototypes as `init` of prompts in every layer (or the first): the same set in each.

    Args:
        model: The model that will get prompts.
        prototypes: `(length, width)`.
        deep: As in `inject_prompts`.

    Raises:
        SpecError: Blocks of another width, in which these features mean nothing.
    """
    encoder = encoder_for(unwrap(model), "prepend")
    blocks = encoder.blocks if deep else encoder.blocks[:1]
    other = {block.width for block in blocks} - {prototypes.shape[1]}
    if other:
        raise SpecError(
            "prompt_values",
            f"features have the width {prototypes.shape[1]}, but blocks have "
            f"{', '.join(map(str, sorted(other)))}",
            "prototypes need a backbone of one width",
        )
    return prototypes.expand(len(blocks), *prototypes.shape).clone()


def tsne(found: Tensor, *, seed: int = 0, perplexity: float = 30.0) -> Any:
    """Return features as points in the plane, `(images, 2)`, by scikit-learn's t-SNE.

    Args:
        found: `(images, width)`.
        seed: Of t-SNE.
        perplexity: Lowered where there are fewer than three times as many images.

    Raises:
        SpecError: Fewer than four images.

    Source: Jia et al. 2022, Figures 9 and 21.
    """
    if len(found) < 4:
        raise SpecError("tsne", f"{len(found)} images", "give four or more")
    from sklearn.manifold import TSNE

    perplexity = min(perplexity, (len(found) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(
        found.double().numpy()
    )


def _head(host: nn.Module) -> nn.Module:
    prompted = carries(host)
    encoder = host_and_prompts(host, "")[1].encoder if prompted else encoder_for(host, "pad")
    if len(encoder.head_paths) != 1:
        what = "two classifiers (distillation)" if encoder.head else "no classifier"
        told = f"{type(host).__name__} has {what}, so there is no one place in front of it"
        raise UnsupportedArchitectureError("features", told)
    return host.get_submodule(encoder.head_paths[0])
