"""Checkpoints of a training run: only what trains, in one file, written as a whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import VPTError
from ..hosts import unwrap
from ..whole_file import replace_file
from ..wording import cut
from .describe import refuse_other
from .files import write_json, write_lines

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
        raise VPTError(
            f"fit: {path} cannot be read as a checkpoint ({cut(str(error), 200)}); remove it, or "
            "use resume=False to start over."
        ) from error
    if not known:
        raise VPTError(f"fit: {path} has format {content['format']}; this version reads {_FORMAT}.")
    refuse_other(kept, config, str(path))
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
