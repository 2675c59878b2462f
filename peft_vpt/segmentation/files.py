"""Task adapters of segmenters: prompts and decoder in one file of the adapter format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.file import Adapter, read_adapter
from ..adapter.head import kind_of
from ..adapter.layout import check_layout
from ..adapter.source import find_adapter
from ..adapter.verbs import load_task_adapter, save_task_adapter
from ..errors import AdapterError, AdapterMismatchError, renamed
from ..hosts import unwrap
from .evaluation import check_classes
from .grid import token_map
from .model import PupHead, Segmenter, plain_encoder, refuse_unread

_PREFIX = "head.module."


def save_segmenter(
    model: nn.Module,
    path: str | Path,
    *,
    task: str | None = None,
    labels: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Path:
    """Save decoder, prompts and what else a protocol trained as one task adapter.

    The decoder is the file's head, of class `PupHead`. Auxiliary heads, which serve training alone,
    and the backbone's classifier are left out.

    Args:
        model: A segmenter whose backbone carries a protocol or prompts; DDP and compile wrappers
            are looked through.
        path: As in `save_task_adapter`; so are the others.
        task: Name of the task.
        labels: Class names in the order of the scores. None: those that were loaded.
        preprocessing: Of the images; `size` is that of a window.
        metrics: JSON values.

    Returns:
        Path of the file.

    Raises:
        NotPromptedError: The backbone carries nothing.
        AdapterError: As in `save_task_adapter`, no segmenter, or not as many labels as classes.
    """
    inner = unwrap(model) if isinstance(model, nn.Module) else model
    if not isinstance(inner, Segmenter):
        raise AdapterError(
            "save_segmenter",
            f"needs a Segmenter, got {type(inner).__name__}",
            "for other models use `save_task_adapter`",
        )
    with renamed("save_segmenter"):
        return save_task_adapter(
            inner, path, task=task, labels=labels, preprocessing=preprocessing, metrics=metrics
        )


def load_segmenter(backbone: nn.Module, source: str | Path, **hub: Any) -> Segmenter:
    """Make a segmenter of a backbone from a task adapter, in eval mode.

    Everything is checked before the backbone changes.

    Args:
        backbone: Bare or prompted, with the weights that the adapter was made for.
        source: As in `load_task_adapter`.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`, as there.

    Raises:
        AdapterError: The file cannot be read, is damaged or incomplete.
        AdapterMismatchError: It was made for another backbone, or holds no such decoder.
        UnsupportedArchitectureError: The backbone cannot take it.
        SpecError: The file or the backbone holds what a decoder cannot use.
    """
    adapter = read_adapter(find_adapter(source, call="load_segmenter", **hub), "load_segmenter")
    encoder = plain_encoder(backbone)
    decoder = _decoder(adapter, encoder.blocks[-1].width)
    refuse_unread(f"load_segmenter: {adapter.path}", adapter.protocol, adapter.spec.location)
    head = adapter.metadata["head"]
    check_classes("load_segmenter", head["classes"])
    token_map(backbone, encoder)
    load_task_adapter(backbone, adapter.path, strict="prompts")
    # Every value is overwritten below, so the global random state is left alone.
    with torch.random.fork_rng(devices=[]):
        model = Segmenter(backbone, head["classes"], None, channels=decoder.classify.in_channels)
    model.labels = head["labels"]
    with torch.no_grad():
        for name, tensor in _tensors(model.decoder).items():
            tensor.copy_(adapter.tensors[name])
    return model.eval()


def _decoder(adapter: Adapter, width: int) -> PupHead:
    """Return a decoder as the file calls for, without values, after all checks."""
    head = adapter.metadata["head"]
    fail = partial(AdapterMismatchError, "load_segmenter", path=adapter.path)
    if not kind_of(adapter).wraps:
        held = "no head" if head is None else "a classifier"
        raise fail(f"it holds {held}, not a decoder", "use `load_task_adapter`")
    if head["in_features"] != width:
        raise fail(f"its decoder takes {head['in_features']} features, this model gives {width}")
    last = adapter.tensors.get(f"{_PREFIX}classify.weight")
    if last is None or last.dim() != 4 or not last.shape[1]:
        raise fail("its decoder has no layer classify")
    with torch.device("meta"):
        decoder = PupHead(width, head["classes"], last.shape[1])
    shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(decoder).items()}
    stored = {n: tensor for n, tensor in adapter.tensors.items() if n.startswith("head")}
    check_layout(stored, shapes, fail)
    return decoder


def _tensors(decoder: PupHead) -> dict[str, Tensor]:
    """Return parameters and running statistics under their names in the file."""
    state = decoder.state_dict(keep_vars=True)
    return {f"{_PREFIX}{n}": t for n, t in state.items() if t.is_floating_point()}
