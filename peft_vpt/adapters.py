"""Task adapters: saving prompts and head of a model, and loading them into another.

The file itself, its names, metadata and checksum, is `adapter_file`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from . import __version__
from .adapter_file import FILE_NAME, Adapter, read_adapter, write_adapter
from .adapter_match import HEAD_NAMES, check_fit, head_tensors, new_classes, trains_decoder
from .backbones.anatomy import Encoder, module_at
from .backbones.heads import FormerHead, class_count, head_owner, set_labels
from .backbones.identity import default_preprocessing, describe_backbone, label_names
from .backbones.image_model import encoder_for
from .decoder import claim_decoder, decoder_names, decoder_tensors, describe_decoder, has_decoder
from .errors import AdapterError
from .fingerprint import fingerprint
from .hosts import carries, host_and_prompts, refuse_unfit, unwrap
from .inject import freeze, inject_spec, remove_prompts
from .preprocessing import describe_preprocessing
from .prompts import Prompts
from .protocols import apply_delta
from .protocols.delta import given_features
from .protocols.options import Protocol
from .source import find_adapter
from .spec import NOWHERE, PromptSpec

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
        model: A prompted model; DDP and compile wrappers are looked through.
        path: Folder (made if missing) or file.
        task: Name of the task.
        labels: Class names in the order of the outputs. None: those of a transformers config.
        preprocessing: `size`, `mean`, `std`, `interpolation`, `crop`; a timm data config or a
            transformers image processor. None: what the backbone says.
        metrics: JSON values, `{"accuracy": 0.93}` say.

    Returns:
        Path of the file.

    Raises:
        NotPromptedError: The model carries no prompts.
        AdapterError: A value is not finite or not JSON, or the file cannot be written.
    """
    host, prompts = host_and_prompts(model, "save_task_adapter")
    info = prompts.info
    check_labels(labels, "save_task_adapter")
    names = (
        list(labels)
        if labels is not None
        else info.get("labels") or label_names(host, prompts.encoder)
    )
    metadata = {
        "spec": None if prompts.spec.location == NOWHERE else prompts.spec.to_dict(),
        "backbone": _describe_backbone(host, prompts),
        "head": _describe_head(host, prompts, names),
        "preprocessing": describe_preprocessing(preprocessing)
        if preprocessing
        else info.get("preprocessing") or _preprocessing(host, prompts),
        "task": task if task is not None else info.get("task"),
        "metrics": metrics if metrics is not None else info.get("metrics"),
        "library_version": __version__,
    }
    if prompts.delta is not None:
        metadata["protocol"] = prompts.delta.protocol.to_dict()
    try:
        target = Path(path).expanduser()
    except (RuntimeError, TypeError) as error:
        raise AdapterError(f"save_task_adapter: {path!r}: not a path: {error}") from error
    if target.suffix != ".safetensors":
        target = target / FILE_NAME
    return write_adapter(target, _tensors(host, with_head=True), metadata)


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

    Everything is checked before the model changes. Its head is replaced by the adapter's;
    `requires_grad` is as after injection, and label names go into a transformers config.

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
        AdapterMismatchError: It was made for another backbone or another kind of head.
        UnsupportedArchitectureError: The model cannot take prompts.
    """
    if not isinstance(strict, bool) and strict != "prompts":
        raise AdapterError(
            f"load_task_adapter(strict={strict!r}): must be True, False or 'prompts'."
        )
    path = find_adapter(
        source,
        call="load_task_adapter",
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    adapter, host = read_adapter(path), unwrap(model)
    if carries(host):
        encoder = host_and_prompts(host, "load_task_adapter")[1].encoder
    else:
        refuse_unfit(host)
        any_image_model = adapter.spec.location == NOWHERE
        encoder = encoder_for(host, "pad" if any_image_model else adapter.spec.location)
    with_head = strict != "prompts" and adapter.metadata["head"] is not None
    spec = check_fit(adapter, host, encoder, strict, with_head=with_head)
    decoder = trains_decoder(adapter) or (strict == "prompts" and _carries_decoder(host))
    _install(host, adapter, spec, encoder, with_head=with_head, decoder=decoder)
    return model


def _install(
    host: nn.Module,
    adapter: Adapter,
    spec: PromptSpec,
    encoder: Encoder,
    *,
    with_head: bool,
    decoder: bool,
) -> None:
    """Bring the model to the adapter's structure and copy its tensors; all is checked by now."""
    head = adapter.metadata["head"] if with_head else None
    classes = new_classes(adapter, encoder, with_head=with_head)
    bias = head is None or head.get("bias", True)
    kept: dict[str, Tensor] = {}
    names = head["labels"] if head is not None else None
    decoder = decoder and bool(decoder_names(host, encoder))
    same = _has_structure(host, adapter, spec, encoder, classes, bias)
    if not same or _carries_decoder(host) != decoder:
        former = host_and_prompts(host, "load_task_adapter")[1].delta if carries(host) else None
        if carries(host):
            if not with_head and decoder and _carries_decoder(host):
                present = decoder_tensors(host, encoder)
                kept |= {name: tensor.detach().clone() for name, tensor in present.items()}
            elif head is None and encoder.head is not None:
                kept = {n: t.detach().clone() for n, t in head_tensors(host, encoder).items()}
                names, bias = label_names(host, encoder), "head.bias" in kept
                classes = class_count(host, encoder.head) if _has_task_head(host) else None
            remove_prompts(host)
        # Every value is overwritten below, so the global random state is left alone.
        generator = torch.Generator().manual_seed(0)
        options: Any = {"num_classes": classes, "head_bias": bias, "generator": generator}
        if adapter.protocol is None:
            inject_spec(host, spec, encoder, **options)
        else:
            features = given_features(former)
            apply_delta(host, adapter.protocol, spec, encoder, features=features, **options)
        if decoder:
            claim_decoder(host, host_and_prompts(host, "load_task_adapter")[1])
    prompts = host_and_prompts(host, "load_task_adapter")[1]
    source = adapter.tensors | kept
    targets = _tensors(host, with_head=with_head or bool(kept))
    _copy(host, encoder, {name: (target, source[name]) for name, target in targets.items()})
    freeze(host, encoder)
    prompts.clear_cache()
    prompts.info = {n: adapter.metadata[n] for n in ("task", "preprocessing", "metrics")}
    prompts.info["labels"] = names
    if (with_head or kept) and _has_task_head(host):
        _name_labels(host, encoder, names)


def _tensors(host: nn.Module, *, with_head: bool) -> dict[str, Tensor]:
    """Return what a file holds of a model, under the names there."""
    prompts = host_and_prompts(host, "save_task_adapter")[1]
    found: dict[str, Tensor] = {f"prompts.{n}": p for n, p in prompts.own_parameters().items()}
    if prompts.delta is not None:
        found |= prompts.delta.tensors(host)
    find = decoder_tensors if has_decoder(prompts) else head_tensors
    return found | (find(host, prompts.encoder) if with_head else {})


def _carries_decoder(host: nn.Module) -> bool:
    return carries(host) and has_decoder(host_and_prompts(host, "load_task_adapter")[1])


@torch.no_grad()
def _copy(host: nn.Module, encoder: Encoder, pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Copy values into parameters; into ones on `meta`, which hold nothing, put the values."""
    meta = {}
    for name, (target, value) in pairs.items():
        if target.is_meta:
            meta[_host_name(encoder, name, _carries_decoder(host))] = value.to(target.dtype)
        else:
            target.copy_(value)
    if meta:
        host.load_state_dict(meta, strict=False, assign=True)


def _host_name(encoder: Encoder, name: str, decoder: bool) -> str:
    """Turn a tensor's name in the file into its name in the host."""
    kind, _, rest = name.partition(".")
    if decoder and kind == "head":
        return rest.removeprefix("module.")
    if encoder.head is None or kind not in HEAD_NAMES:
        return name
    return f"{encoder.head.paths[HEAD_NAMES.index(kind)]}.{rest.removeprefix('module.')}"


def check_labels(labels: Any, call: str) -> None:
    """Refuse label names that are no list of strings."""
    if labels is None:
        return
    listed = isinstance(labels, Sequence) and not isinstance(labels, str | bytes)
    if not listed or not all(isinstance(label, str) for label in labels):
        raise AdapterError(f"{call}(labels={labels!r}): give a list of names.")


def _has_structure(
    host: nn.Module,
    adapter: Adapter,
    spec: PromptSpec,
    encoder: Encoder,
    classes: int | None,
    bias: bool,
) -> bool:
    """Tell whether a model already carries such prompts and a task head of that size."""
    if not carries(host):
        return False
    prompts = host_and_prompts(host, "load_task_adapter")[1]
    protocol = adapter.protocol
    same = prompts.delta is None if protocol is None else protocol.same(_protocol(prompts))
    if prompts.spec != spec or not same:
        return False
    if classes is None or encoder.head is None:
        return True
    head: Any = module_at(host, encoder.head.paths[0])
    has_bias = getattr(head, "bias", None) is not None or not isinstance(head, nn.Linear)
    same = class_count(host, encoder.head) == classes and has_bias == bias
    return _has_task_head(host) and same


def _protocol(prompts: Prompts) -> Protocol | None:
    found: Protocol | None = None if prompts.delta is None else prompts.delta.protocol
    return found


def _has_task_head(host: nn.Module) -> bool:
    return isinstance(host_and_prompts(host, "load_task_adapter")[1].undo["head"], FormerHead)


def _describe_backbone(host: nn.Module, prompts: Prompts) -> dict[str, Any]:
    values = describe_backbone(host, prompts.encoder)
    moved = prompts.delta is not None and prompts.delta.protocol.moves
    found = prompts.delta.fingerprint if moved else fingerprint(host, prompts.encoder)
    return values | {"fingerprint": found}


def _preprocessing(host: nn.Module, prompts: Prompts) -> dict[str, Any] | None:
    """Return what the backbone says, with the size of the images that the prompts call for."""
    found = default_preprocessing(host, prompts.encoder)
    if found is None or prompts.spec.location != "pad" or prompts.place is None:
        return found
    return found | {"size": list(prompts.place.image[1:])}


def _describe_head(
    host: nn.Module, prompts: Prompts, labels: list[str] | None
) -> dict[str, Any] | None:
    head = prompts.encoder.head
    if has_decoder(prompts):
        described = describe_decoder(host, prompts.encoder)
        _check_count(labels, described["classes"])
        return described | {"labels": labels}
    if head is None or not head_tensors(host, prompts.encoder):
        return None
    module = module_at(host, head.paths[0])
    classes = class_count(host, head)
    _check_count(labels, classes)
    extra: dict[str, Any] = {}
    if not isinstance(module, nn.Linear):
        extra["class"] = type(module).__name__
    elif module.bias is None:
        extra["bias"] = False
    return {
        "classes": classes,
        "labels": labels,
        "in_features": int(getattr(module, "in_features", head.width)),
        "reads": prompts.encoder.reads(prompts.spec.pooling),
        **extra,
    }


def _check_count(labels: list[str] | None, classes: int) -> None:
    if labels is not None and len(labels) != classes:
        raise AdapterError(
            f"save_task_adapter(labels=...): {len(labels)} names for a head of {classes} classes."
        )


def _name_labels(host: nn.Module, encoder: Encoder, labels: list[str] | None) -> None:
    """Write label names, or numbers where there are none, into a transformers config."""
    assert encoder.head is not None
    owner = module_at(host, head_owner(host, encoder.head.paths[0]))
    config = vars(owner).get("config")
    if config is not None and hasattr(config, "id2label"):
        count = class_count(host, encoder.head)
        set_labels(config, labels or [f"LABEL_{i}" for i in range(count)])
