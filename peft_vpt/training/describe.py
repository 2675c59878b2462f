"""The full configuration of a run, as it is written beside its results."""

from __future__ import annotations

import platform
import zlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..errors import SpecError
from ..hosts import unwrap
from ..inject import count_parameters
from .files import plain
from .groups import owner_of
from .recipes import Recipe

_LIBRARIES = ("torch", "timm", "transformers", "accelerate")
# What a run may be resumed under although it has changed: the machine, not the run.
_FREE = ("versions", "machine")


def describe_run(
    model: nn.Module,
    recipe: Recipe,
    accelerator: Any,
    *,
    trained: Mapping[str, Tensor],
    loader: Mapping[str, Any],
    data: Mapping[str, Any] | None,
    weights: bool,
) -> dict[str, Any]:
    """Return the resolved configuration of a run as plain JSON values.

    Args:
        model: The model, not wrapped.
        recipe: Its recipe.
        accelerator: accelerate's.
        trained: The tensors that change.
        loader: Facts about the batches.
        data: The caller's own description.
        weights: Whether to take a checksum of the backbone, which reads all of it.
    """
    found: dict[str, Any] = {
        "recipe": recipe.to_dict(),
        "model": _model(model, trained) | ({"backbone": _sum(model, trained)} if weights else {}),
        "data": dict(data or {}),
        "loader": dict(loader),
        "mixed_precision": str(accelerator.mixed_precision),
        "versions": library_versions(),
        "machine": _machine(accelerator),
    }
    result: dict[str, Any] = plain(found)
    return result


def refuse_other(kept: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Raise unless a checkpoint is of this configuration and data.

    Raises:
        SpecError: It is of another one; the message names what differs.
    """
    old, new = _flat(kept), _flat(now)
    names = sorted(set(old) | set(new))
    other = [
        f"{name}: {old.get(name, 'absent')!r} there, {new.get(name, 'absent')!r} here"
        for name in names
        if name.split(".")[0] not in _FREE and old.get(name) != new.get(name)
    ]
    if other:
        raise SpecError(
            f"fit: {where} is of another run ({'; '.join(other)}). Use another folder, or "
            "resume=False to start over there."
        )


def _model(model: nn.Module, trained: Mapping[str, Tensor]) -> dict[str, Any]:
    host = unwrap(model)
    prompts = getattr(host, "prompts", None)
    spec = getattr(prompts, "spec", None)
    protocol = getattr(getattr(prompts, "delta", None), "protocol", None)
    count = count_parameters(host)
    return {
        "class": type(host).__name__,
        "spec": spec.to_dict() if spec is not None else None,
        "protocol": protocol.to_dict() if protocol is not None else None,
        "trainable": count.trainable,
        "total": count.total,
        "tensors": {name: list(tensor.shape) for name, tensor in trained.items()},
    }


def _sum(model: nn.Module, trained: Mapping[str, Tensor]) -> str:
    """Return a checksum of the backbone as a run finds it: weights and statistics.

    What is new for every task is left out, since its first values may differ and a checkpoint has
    later ones: prompts and head; in a model without prompts all that trains.
    """
    host, total = unwrap(model), 0
    prompted = hasattr(host, "prompts")
    for name, tensor in host.state_dict().items():
        if owner_of(host, name) == "backbone" if prompted else name not in trained:
            raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            total = zlib.crc32(raw.numpy().data, zlib.crc32(name.encode(), total))
    return f"{total:08x}"


def library_versions() -> dict[str, Any]:
    """Return the versions that a result depends on."""
    found: dict[str, Any] = {"peft_vpt": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _machine(accelerator: Any) -> dict[str, Any]:
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": device.type,
        "name": name,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found
