"""Metrics of a classifier over batches, exact over several processes."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ..backbones.anatomy import first_floating
from ..errors import SpecError, VPTError
from ..preprocessing import output_logits
from .batches import check_classes, pair_of, whole_labels
from .health import DivergedError


def evaluate(model: nn.Module, batches: Iterable[Any], accelerator: Any = None) -> dict[str, float]:
    """Measure a classifier in eval mode; its mode is put back.

    Args:
        model: Returns logits `(batch, classes)`, or a transformers output that holds them.
        batches: Of `(pixels, labels)`, or of mappings with `pixel_values` and `labels`. With an
            accelerator of several processes: a DataLoader, which is shared out among them, every
            image counted once.
        accelerator: accelerate's; None: this process alone, on the model's device.

    Returns:
        `top1`, `top5` (of 5 classes, or of all where there are fewer), `mean_class` (mean of the
        per-class accuracies), `loss` (mean cross-entropy), and for two classes `roc_auc` (absent
        where all images are of one class). Shares, not percent.

    Raises:
        VPTError: No images, batches of another form, or a label that is no class of the model.
        DivergedError: Logits that are not finite.
    """
    if accelerator is not None:
        batches = _shared_out(batches, accelerator)
    was_training = model.training
    model.eval()
    try:
        logits, labels = _collect(model, batches, accelerator)
    finally:
        model.train(was_training)
    return classification_metrics(logits, labels)


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the metrics of `evaluate` for logits `(images, classes)` and labels `(images,)`.

    Raises:
        VPTError: Labels that are no classes, or not one per image.
    """
    classes = logits.shape[1]
    labels = whole_labels(labels, len(logits), "classification_metrics")
    check_classes(labels, classes, "classification_metrics")
    hits = logits.topk(min(5, classes), dim=1).indices == labels[:, None]
    # Of equal logits the first counts, which topk does not promise.
    correct = (logits.argmax(dim=1) == labels).double()
    counts = torch.bincount(labels, minlength=classes)
    per_class = torch.bincount(labels, weights=correct, minlength=classes)[counts > 0]
    found = {
        "top1": correct.mean().item(),
        "top5": hits.any(dim=1).double().mean().item(),
        "mean_class": (per_class / counts[counts > 0]).mean().item(),
        "loss": F.cross_entropy(logits.double(), labels).item(),
    }
    if classes == 2 and bool((counts > 0).all()):
        from sklearn.metrics import roc_auc_score

        scores = logits[:, 1].double() - logits[:, 0].double()
        found["roc_auc"] = float(roc_auc_score(labels.cpu().numpy(), scores.cpu().numpy()))
    return found


def forward_logits(
    model: nn.Module, pixels: Tensor, accelerator: Any = None, *, call: str = "evaluate"
) -> Tensor:
    """Return a model's logits in single precision or better, in the accelerator's autocast."""
    with nullcontext() if accelerator is None else accelerator.autocast():
        logits = output_logits(model(pixels), call)
    return logits if logits.dtype == torch.float64 else logits.float()


@torch.no_grad()
def _collect(model: nn.Module, batches: Iterable[Any], accelerator: Any) -> tuple[Tensor, Tensor]:
    like = first_floating(model)
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in batches:
        pixels, target = pair_of(batch, "evaluate")
        if not len(target):
            continue
        found = forward_logits(model, pixels.to(like), accelerator)
        target = target.to(like.device)
        check_classes(target, found.shape[1], "evaluate")
        if accelerator is not None and accelerator.num_processes > 1:
            found, target = accelerator.gather_for_metrics((found, target))
        logits.append(found.cpu())
        labels.append(target.cpu())
    if not logits:
        raise VPTError("evaluate", "there are no images", "give batches that hold some")
    found, target = torch.cat(logits), torch.cat(labels)
    wrong = int((~found.isfinite()).any(dim=1).sum())
    if wrong:
        raise DivergedError(
            "evaluate",
            f"the model's logits are not finite on {wrong} of {len(found)} images: its weights "
            "have diverged, or the images hold values that are not finite",
        )
    return found, target


def _shared_out(batches: Iterable[Any], accelerator: Any) -> Any:
    if accelerator.num_processes == 1 or batches in accelerator._dataloaders:
        return batches
    if not isinstance(batches, DataLoader):
        raise SpecError(
            "evaluate",
            f"with {accelerator.num_processes} processes it must be a DataLoader, so that the "
            "images can be shared out",
            given={"batches": batches},
        )
    return accelerator.prepare_data_loader(batches)
