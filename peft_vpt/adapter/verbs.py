"""Task adapters: saving prompts and head of a model, and loading them into another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import nn

from ..backbones.fingerprint import fingerprint
from ..backbones.identity import default_preprocessing, describe_backbone
from ..errors import AdapterError
from ..files import __version__
from ..hosts import host_and_prompts, parallel_wrapper, unwrap
from ..preprocessing import describe_preprocessing
from ..prompts import Prompts
from ..spec import NOWHERE
from .file import read_adapter, write_adapter
from .head import Kind, is_segmenter, kind_in
from .install import install
from .layout import stored_tensors
from .match import check_fit
from .schema import plain_metrics
from .source import file_at, find_adapter

Model = TypeVar("Model", bound=nn.Module)


def save_task_adapter(
    model: nn.Module,
    path: str | Path,
    *,
    task: str | None = None,
    labels: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Path:
    """Save prompts and head of a prompted model as a task adapter, without touching the network.

    Writes `<path>/adapter.safetensors`, or `path` itself if it ends in `.safetensors`, atomically:
    a reader sees the old file or the new one. The same adapter gives the same bytes.

    Args:
        model: A prompted model, or a `Segmenter` of a prompted backbone; DDP and compile wrappers
            are looked through.
        path: Folder (made if missing) or file.
        task: Name of the task.
        labels: Class names in the order of the outputs. None: those that the model knows.
        preprocessing: `size`, `mean`, `std`, `interpolation`, `crop`; a timm data config or a
            transformers image processor. None: what the backbone says.
        metrics: JSON values, `{"accuracy": 0.93}` say.

    Returns:
        Path of the file.

    Raises:
        NotPromptedError: The model carries no prompts.
        AdapterError: A value is not finite or not JSON, or the file cannot be written.
    """
    call, outer = "save_task_adapter", unwrap(model)
    inner: Any = outer.backbone if is_segmenter(outer) else outer
    host, prompts = host_and_prompts(inner, call)
    check_labels(labels, call)
    info, kind = prompts.info, kind_in(outer, prompts)
    metadata = {
        "spec": None if prompts.spec.location == NOWHERE else prompts.spec.to_dict(),
        "backbone": _describe_backbone(host, prompts),
        "head": _describe_head(outer, prompts, kind, labels),
        "preprocessing": describe_preprocessing(preprocessing)
        if preprocessing
        else info.get("preprocessing") or _preprocessing(host, prompts),
        "task": task if task is not None else info.get("task"),
        "metrics": info.get("metrics") if metrics is None else plain_metrics(metrics),
        "library_version": __version__,
    }
    if prompts.delta is not None:
        metadata["protocol"] = prompts.delta.protocol.to_dict()
    tensors = stored_tensors(host, prompts, kind.tensors(outer, prompts.encoder))
    return write_adapter(file_at(path, call), tensors, metadata)


def load_task_adapter(
    model: Model,
    source: str | Path,
    *,
    strict: bool | Literal["prompts"] = True,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Model:
    """Load a task adapter into a model, in place; a bare model is injected from the file.

    Everything is checked before the model changes. Its head is replaced by the adapter's, or taken
    out where the adapter was made on a model without one; `requires_grad` is as after injection,
    gradients are gone, and label names go into a transformers config.

    Args:
        model: A bare or prompted model; wrappers are looked through.
        source: Local if it exists, starts with `.`, `/` or `~`, or ends in `.safetensors`;
            otherwise `owner/name` on the Hugging Face Hub. A local load makes no network call.
        strict: True: the backbone's weights must be those the adapter was made for. False: another
            fingerprint is a warning. "prompts": load the prompts alone and keep the model's head.
        revision: Branch, tag or commit of a Hub repository.
        token: Access token for the Hub, as in huggingface_hub.
        cache_dir: Folder of the Hub cache.
        local_files_only: Take a Hub adapter from the cache only.

    Returns:
        `model`.

    Raises:
        AdapterError: The file cannot be read, is damaged or incomplete.
        AdapterMismatchError: It was made for another backbone or another kind of head; or the model
            would need other parameters, and is wrapped for data parallelism.
        UnsupportedArchitectureError: The model cannot take prompts.
    """
    check_strict(strict, "load_task_adapter")
    path = find_adapter(
        source,
        call="load_task_adapter",
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    adapter, host = read_adapter(path), unwrap(model)
    fit = check_fit(adapter, host, strict)
    install(host, adapter, fit, parallel_wrapper(model))
    return model


def check_strict(strict: Any, call: str) -> None:
    """Refuse another value of `strict` than the three that there are."""
    if not isinstance(strict, bool) and not (isinstance(strict, str) and strict == "prompts"):
        raise AdapterError(call, "must be True, False or 'prompts'", given={"strict": strict})


def check_labels(labels: Any, call: str) -> None:
    """Refuse label names that are no list of strings."""
    if labels is None:
        return
    listed = isinstance(labels, Sequence) and not isinstance(labels, str | bytes)
    if not listed or not all(isinstance(label, str) for label in labels):
        raise AdapterError(call, "give a list of names", given={"labels": labels})


def _describe_backbone(host: nn.Module, prompts: Prompts) -> dict[str, Any]:
    values = describe_backbone(host, prompts.encoder)
    moved = prompts.delta is not None and prompts.delta.protocol.moves
    found = prompts.delta.fingerprint if moved else fingerprint(host, prompts.encoder)
    return values | {"fingerprint": found}


def _preprocessing(host: nn.Module, prompts: Prompts) -> dict[str, Any] | None:
    """Return what the backbone says, with the size of the images that the prompts call for."""
    found = default_preprocessing(host, prompts.encoder)
    if found is None or not prompts.spec.where.moves_image or prompts.place.image is None:
        return found
    return found | {"size": list(prompts.place.image[1:])}


def _describe_head(
    model: nn.Module, prompts: Prompts, kind: Kind, labels: Sequence[str] | None
) -> dict[str, Any] | None:
    about = kind.describe(model, prompts)
    if about is None:
        return None
    names = kind.labels(model, prompts) if labels is None else list(labels)
    if names is not None and len(names) != about["classes"]:
        raise AdapterError(
            "save_task_adapter",
            f"{len(names)} names for a head of {about['classes']} classes",
            given={"labels": ...},
        )
    return about | {"labels": names}
