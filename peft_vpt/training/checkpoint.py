"""Checkpoints of a training run: only what trains, in one file, written as a whole."""

from __future__ import annotations

import json
import platform
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SpecError, VPTError, cut
from ..files import __version__, replace_file, write_json, write_lines
from ..hosts import unwrap
from ..inject import count_parameters
from .optim import owner_of

CHECKPOINT = "checkpoint.pt"
_FORMAT = 1


@dataclass
class Position:
    """How far a run has come; plain values.

    Args:
        step: Optimizer steps done, over all epochs; with the steps of an epoch also the position
            in the order of images.
        loss_sum: Sum of the losses of the steps of the current epoch.
        seconds: Time spent, over all sessions.
        history: A row per finished epoch.
        watch: State of the `LossWatch`.
    """

    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    watch: dict[str, Any] | None = None


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the live tensors that training changes, of a model in train mode.

    These are the parameters that require gradients, and the statistics of modules that train.
    """
    host = unwrap(model)
    found: dict[str, Tensor] = {n: p for n, p in host.named_parameters() if p.requires_grad}
    stored = host.state_dict(keep_vars=True)
    for path, module in host.named_modules():
        if module.training:
            names = (f"{path}.{n}" if path else n for n, _ in module.named_buffers(recurse=False))
            found |= {name: stored[name] for name in names if name in stored}
    return found


def begin_folder(
    folder: Path, config: Mapping[str, Any], history: list[dict[str, Any]], resumed: bool
) -> None:
    """Write the configuration, and take away the checkpoint of another run.

    What a process left that was killed while it wrote goes too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for rest in folder.glob(f".{CHECKPOINT}.*.tmp"):
        rest.unlink(missing_ok=True)
    if not resumed:
        (folder / CHECKPOINT).unlink(missing_ok=True)
    write_json(folder / "config.json", config)
    write_lines(folder / "history.jsonl", history)


def save_checkpoint(
    folder: Path,
    position: Position,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    optimizer: Any,
    scaler: Any,
) -> None:
    """Write the state of a run over the former one."""
    content = {
        "format": _FORMAT,
        "about": json.dumps({"config": config, "position": asdict(position)}),
        "tensors": {name: t.detach().cpu().clone() for name, t in tensors.items()},
        "optimizer": optimizer.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
    }
    buffer = BytesIO()
    torch.save(content, buffer)
    replace_file(folder / CHECKPOINT, buffer.getvalue())


def read_checkpoint(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read a checkpoint of this configuration; None where there is none.

    Raises:
        VPTError: The file is damaged.
        SpecError: It is of another run.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    # From memory: of a path, torch raises OSError for damage too.
    whole = BytesIO(path.read_bytes())
    try:
        content: dict[str, Any] = torch.load(whole, map_location="cpu", weights_only=True)
        about = json.loads(content["about"])
        kept, position = about["config"], Position(**about["position"])
        known = content["format"] == _FORMAT
    except Exception as error:
        problem = f"cannot be read as a checkpoint ({cut(str(error), 200)})"
        advice = "remove it, or use `resume=False` to start over"
        raise VPTError("fit", problem, advice, path=path) from error
    if not known:
        problem = f"has format {content['format']}; this version reads {_FORMAT}"
        raise VPTError("fit", problem, path=path)
    _refuse_other(kept, config, path)
    return content | {"position": position}


@torch.no_grad()
def load_checkpoint(
    content: Mapping[str, Any], tensors: Mapping[str, Tensor], optimizer: Any, scaler: Any
) -> Position:
    """Put a state that was read into model, optimizer and scaler, and return the position."""
    for name, live in tensors.items():
        live.copy_(content["tensors"][name])
    optimizer.load_state_dict(content["optimizer"])
    if scaler is not None and content["scaler"] is not None:
        scaler.load_state_dict(content["scaler"])
    position: Position = content["position"]
    return position


_LIBRARIES = ("torch", "timm", "transformers", "accelerate")
# What a run may be resumed under although it has changed: the machine, not the run.
_FREE = ("versions", "machine")


def _refuse_other(kept: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Raise unless a checkpoint is of this configuration and data; name what differs."""
    old, new = _flat(kept), _flat(now)
    other = [
        f"{name}: {old.get(name, 'absent')!r} there, {new.get(name, 'absent')!r} here"
        for name in sorted(old | new)
        if name.split(".")[0] not in _FREE and old.get(name) != new.get(name)
    ]
    if other:
        problem = f"is of another run ({'; '.join(other)})"
        advice = "Use another folder, or `resume=False` to start over there"
        raise SpecError("fit", problem, advice, path=path)


def describe_model(
    model: nn.Module, trained: Mapping[str, Tensor], weights: bool
) -> dict[str, Any]:
    """Return what a run depends on of its model.

    Args:
        model: The model, not wrapped.
        trained: The tensors that change.
        weights: Whether to take a checksum of the backbone, which reads all of it.
    """
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
        **({"backbone": _sum(host, trained)} if weights else {}),
    }


def _sum(host: nn.Module, trained: Mapping[str, Tensor]) -> str:
    """Return a checksum of the backbone as a run finds it: weights and statistics.

    What is new for every task is left out, since its first values may differ and a checkpoint has
    later ones: prompts and head; in a model without prompts all that trains.
    """
    total, prompted = 0, hasattr(host, "prompts")
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


def describe_machine(accelerator: Any) -> dict[str, Any]:
    """Return where a run takes place; it may be resumed elsewhere."""
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
