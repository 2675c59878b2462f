"""Task adapters: saving prompts and head of a model, and loading them into another.

The file itself, its names, metadata and checksum, is `adapter_file`'s business.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from . import __version__
from .adapter_file import FILE_NAME, Adapter, read_adapter, resolve_path, write_adapter
from .backbones import find_encoder
from .backbones.anatomy import Encoder, module_at
from .backbones.heads import FormerHead, class_count, set_labels
from .backbones.identity import default_preprocessing, describe_backbone, label_names
from .errors import AdapterError, AdapterMismatchError, SpecError
from .fingerprint import fingerprint, largest_difference
from .hosts import host_and_prompts, refuse_unfit, unwrap
from .inject import inject_spec, is_prompted, remove_prompts
from .prompts import Prompts, prompt_shapes
from .spec import PromptSpec

Model = TypeVar("Model", bound=nn.Module)
_HEAD_NAMES = ("head", "head_dist")


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
        preprocessing: `size`, `mean`, `std`, `interpolation`, `crop`. None: what the backbone says.
        metrics: JSON values, `{"accuracy": 0.93}` say.

    Returns:
        Path of the file.

    Raises:
        NotPromptedError: The model carries no prompts.
        AdapterError: A value is not finite or not JSON, or the file cannot be written.
    """
    host, prompts = host_and_prompts(model, "save_task_adapter")
    info = prompts.info
    names = (
        list(labels)
        if labels is not None
        else info.get("labels") or label_names(host, prompts.encoder)
    )
    metadata = {
        "spec": prompts.spec.to_dict(),
        "backbone": describe_backbone(host, prompts.encoder)
        | {"fingerprint": fingerprint(host, prompts.encoder)},
        "head": _describe_head(host, prompts, names),
        "preprocessing": preprocessing
        or info.get("preprocessing")
        or default_preprocessing(host, prompts.encoder),
        "task": task if task is not None else info.get("task"),
        "metrics": metrics if metrics is not None else info.get("metrics"),
        "library_version": __version__,
    }
    target = Path(path).expanduser()
    if target.suffix != ".safetensors":
        target = target / FILE_NAME
    tensors = {f"prompts.{name}": p for name, p in prompts.named_parameters()}
    return write_adapter(target, tensors | _head_tensors(host, prompts.encoder), metadata)


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
    if strict not in (True, False, "prompts"):
        raise AdapterError(
            f"load_task_adapter(strict={strict!r}): must be True, False or 'prompts'."
        )
    path = resolve_path(
        source,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    adapter, host = read_adapter(path), unwrap(model)
    if is_prompted(host):
        encoder = host_and_prompts(host, "load_task_adapter")[1].encoder
    else:
        refuse_unfit(host)
        encoder = find_encoder(host)
    spec = _check(adapter, host, encoder, strict)
    with_head = strict != "prompts" and adapter.metadata["head"] is not None
    _install(host, adapter, spec, encoder, with_head=with_head)
    return model


def _check(adapter: Adapter, host: nn.Module, encoder: Encoder, strict: bool | str) -> PromptSpec:
    """Compare an adapter with a model; return its spec, or raise before anything changes."""
    made_for, where = adapter.metadata["backbone"], f"load_task_adapter: {adapter.path}"
    own = describe_backbone(host, encoder)
    for name in ("depth", "dims"):
        if made_for[name] != own[name]:
            raise AdapterMismatchError(
                f"{where}: made for {_title(made_for)} with {name} {made_for[name]}, "
                f"this model is {_title(own)} with {name} {own[name]}."
            )
    try:
        spec = adapter.spec.resolve(encoder.depth)
    except SpecError as error:
        raise AdapterError(f"{where}: its prompt options are wrong: {error}") from error
    expected: dict[str, tuple[int, ...]] = {
        f"prompts.{name}": shape for name, shape in prompt_shapes(spec, encoder).items()
    }
    if spec.project:
        for width in set(encoder.widths.values()):
            expected[f"prompts.project.{width}.weight"] = (width, spec.project)
            expected[f"prompts.project.{width}.bias"] = (width,)
    adapter.expect(expected, prefix="prompts.")
    if strict != "prompts":
        _check_head(adapter, host, encoder, spec, where)
    _check_fingerprint(adapter, host, encoder, own, strict=strict is not False)
    return spec


def _check_head(
    adapter: Adapter, host: nn.Module, encoder: Encoder, spec: PromptSpec, where: str
) -> None:
    head = adapter.metadata["head"]
    if head is None:
        adapter.expect({}, prefix="head")
        return
    hint = "strict='prompts' loads the prompts alone."
    reads = None if encoder.head is None else encoder.reads(spec.pooling)
    if reads != head["reads"]:
        has = "has no classifier" if reads is None else f"has a head that reads {reads!r}"
        raise AdapterMismatchError(
            f"{where}: its head reads {head['reads']!r}, this model {has}; {hint}"
        )
    assert encoder.head is not None
    width = encoder.head.width if spec.pooling == "default" else encoder.blocks[-1].width
    if head["in_features"] != width:
        raise AdapterMismatchError(
            f"{where}: its head takes {head['in_features']} features, this model gives "
            f"{width}; {hint}"
        )
    if head.get("class") is not None:
        own = module_at(host, encoder.head.paths[0])
        if type(own).__name__ != head["class"]:
            raise AdapterMismatchError(
                f"{where}: its head is a {head['class']}, which only the same class can take, "
                f"this model's is a {type(own).__name__}; {hint}"
            )
        own_tensors = _head_tensors(host, encoder)
        adapter.expect({n: tuple(t.shape) for n, t in own_tensors.items()}, prefix="head")
        return
    shapes: dict[str, tuple[int, ...]] = {}
    for name in _HEAD_NAMES[: len(encoder.head.paths)]:
        shapes |= {f"{name}.weight": (head["classes"], width), f"{name}.bias": (head["classes"],)}
    adapter.expect(shapes, prefix="head")


def _check_fingerprint(
    adapter: Adapter, host: nn.Module, encoder: Encoder, own: dict[str, Any], *, strict: bool
) -> None:
    made_for = adapter.metadata["backbone"]
    weights, saved = fingerprint(host, encoder), made_for["fingerprint"]
    if weights is None or saved is None:
        side = (
            "this model's weights are on the meta device"
            if weights is None
            else "the file has none"
        )
        problem = f"the backbone's weights cannot be compared, since {side}"
    else:
        difference, allowed = largest_difference(saved, weights)
        if difference <= allowed:
            return
        problem = (
            f"it was made for the weights of {_title(made_for)}, and this {_title(own)} has others "
            f"(fingerprints differ by {difference:.1e}, allowed {allowed:.0e})"
        )
    message = f"load_task_adapter: {adapter.path}: {problem}."
    if strict:
        raise AdapterMismatchError(message + " strict=False loads it all the same.")
    warnings.warn(message, stacklevel=4)


def _install(
    host: nn.Module, adapter: Adapter, spec: PromptSpec, encoder: Encoder, *, with_head: bool
) -> None:
    """Bring the model to the adapter's structure and copy its tensors; all is checked by now."""
    head = adapter.metadata["head"]
    classes = head["classes"] if with_head and head.get("class") is None else None
    kept: dict[str, Tensor] = {}
    if not _has_structure(host, spec, encoder, classes):
        if is_prompted(host):
            own_head = encoder.head if _has_task_head(host) else None
            if classes is None and own_head is not None:
                kept, classes = _head_tensors(host, encoder), class_count(host, own_head)
            remove_prompts(host)
        inject_spec(host, spec, encoder, num_classes=classes)
    prompts = host_and_prompts(host, "load_task_adapter")[1]
    source = adapter.tensors | kept
    targets: dict[str, Tensor] = {f"prompts.{n}": p for n, p in prompts.named_parameters()}
    if with_head or kept:
        targets |= _head_tensors(host, encoder)
    _copy(host, encoder, {name: (target, source[name]) for name, target in targets.items()})
    prompts.clear_cache()
    metadata = adapter.metadata
    prompts.info = {name: metadata[name] for name in ("task", "preprocessing", "metrics")}
    prompts.info["labels"] = head["labels"] if with_head else None
    if prompts.info["labels"]:
        _name_labels(host, encoder, prompts.info["labels"])


@torch.no_grad()
def _copy(host: nn.Module, encoder: Encoder, pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Copy values into parameters; into ones on `meta`, which hold nothing, put the values."""
    meta = {}
    for name, (target, value) in pairs.items():
        if target.is_meta:
            meta[_host_name(encoder, name)] = value.to(target.dtype)
        else:
            target.copy_(value)
    if meta:
        host.load_state_dict(meta, strict=False, assign=True)


def _host_name(encoder: Encoder, name: str) -> str:
    """Turn a tensor's name in the file into its name in the host."""
    kind, _, rest = name.partition(".")
    if encoder.head is None or kind not in _HEAD_NAMES:
        return name
    return f"{encoder.head.paths[_HEAD_NAMES.index(kind)]}.{rest.removeprefix('module.')}"


def _has_structure(
    host: nn.Module, spec: PromptSpec, encoder: Encoder, classes: int | None
) -> bool:
    """Tell whether a model already carries such prompts and a task head of that size."""
    if not is_prompted(host) or host_and_prompts(host, "load_task_adapter")[1].spec != spec:
        return False
    if classes is None or encoder.head is None:
        return True
    return _has_task_head(host) and class_count(host, encoder.head) == classes


def _has_task_head(host: nn.Module) -> bool:
    return isinstance(host_and_prompts(host, "load_task_adapter")[1].undo["head"], FormerHead)


def _describe_head(
    host: nn.Module, prompts: Prompts, labels: list[str] | None
) -> dict[str, Any] | None:
    head = prompts.encoder.head
    if head is None or not _head_tensors(host, prompts.encoder):
        return None
    module = module_at(host, head.paths[0])
    classes = class_count(host, head)
    if labels is not None and len(labels) != classes:
        raise AdapterError(
            f"save_task_adapter(labels=...): {len(labels)} names for a head of {classes} classes."
        )
    plain = isinstance(module, nn.Linear)
    return {
        "classes": classes,
        "labels": labels,
        "in_features": int(getattr(module, "in_features", head.width)),
        "reads": prompts.encoder.reads(prompts.spec.pooling),
    } | ({} if plain else {"class": type(module).__name__})


def _head_tensors(host: nn.Module, encoder: Encoder) -> dict[str, Tensor]:
    """Return the head's parameters under their names in the file."""
    tensors: dict[str, Tensor] = {}
    for path, name in zip(encoder.head.paths if encoder.head else (), _HEAD_NAMES, strict=False):
        module = module_at(host, path)
        prefix = name if isinstance(module, nn.Linear) else f"{name}.module"
        state = module.state_dict(keep_vars=True)
        tensors |= {f"{prefix}.{key}": t for key, t in state.items() if t.is_floating_point()}
    return tensors


def _name_labels(host: nn.Module, encoder: Encoder, labels: list[str]) -> None:
    assert encoder.head is not None
    owner = module_at(host, encoder.head.paths[0].rpartition(".")[0])
    config = vars(owner).get("config")
    if config is not None and hasattr(config, "id2label"):
        set_labels(config, labels)


def _title(backbone: Mapping[str, Any]) -> str:
    name = backbone["hub_id"] or backbone["architecture"]
    return f"{backbone['library']} {name}"
