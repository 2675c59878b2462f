"""A safetensors file opened without trust: nothing huge is read, no pickle is opened."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from .errors import AdapterError

METADATA_KEY = "peft_vpt"
# A name, a shape and two offsets take some hundred bytes, a list of 100,000 labels a megabyte.
_LARGEST_HEADER = 10_000_000
# What safetensors and torch raise over bytes that make no sense; MemoryError is not among them.
_UNREADABLE = (
    SafetensorError,
    OSError,
    ValueError,
    RuntimeError,
    TypeError,
    AttributeError,
    LookupError,
    OverflowError,
)
_PICKLE = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))
STATE_DICT = (
    "a plain state dict does not say how its prompts are put in: call inject_prompts(model, ...) "
    "with the options it was trained with, then model.load_state_dict(...), with strict=False if "
    "it holds only what trains (trainable_parameters, a Trainer checkpoint), and "
    "save_task_adapter to get a task adapter"
)


def open_container(path: Path, where: str) -> tuple[str, dict[str, Tensor]]:
    """Return the metadata text and the tensors of a file that says it is ours.

    Args:
        path: The file.
        where: The call and the file, for messages.

    Raises:
        AdapterError: It is no readable safetensors file, or another library's.
    """
    try:
        if not path.is_file():
            raise ValueError("it is not a file")
        # Through one handle: safe_open opens a file twice, and a writer may replace it in between.
        with path.open("rb") as file:
            start = _read_header(file)
            raw, ends = _parse_header(start[8:])
            if set(raw) != {METADATA_KEY}:
                raise _foreign(raw, list(ends), where)
            _check_size(file, len(start), max(ends.values(), default=0))
            tensors = load(start + file.read())
        if not isinstance(raw[METADATA_KEY], str):
            raise ValueError("its metadata is not a string")
        return raw[METADATA_KEY], tensors
    except AdapterError:
        raise
    except _UNREADABLE as error:
        # The first line: torch adds its C++ stack.
        reason = str(error).partition("\n")[0]
        reason = f"unknown dtype {reason}" if isinstance(error, LookupError) else reason
        hint = f" It looks like a pickle, which is never opened; {STATE_DICT}."
        raise AdapterError(
            f"{where}: not a readable safetensors file: {reason}.{hint if _pickled(path) else ''}"
        ) from error


def _read_header(file: BinaryIO) -> bytes:
    """Return the length and the header alone: a file of another library may be huge."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 0 < length <= min(size - 8, _LARGEST_HEADER):
        raise ValueError(f"it has {size} bytes and says that {length} of them are its header")
    return start + file.read(length)


def _parse_header(header: bytes) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the metadata, and where each tensor ends; `load` checks the rest."""
    values = json.loads(header)
    if not isinstance(values, dict):
        raise ValueError("its header is not a JSON object")
    metadata = values.pop("__metadata__", {})
    ends = {name: int(about["data_offsets"][1]) for name, about in values.items()}
    return metadata if isinstance(metadata, dict) else {}, ends


def _check_size(file: BinaryIO, header: int, end: int) -> None:
    """Raise where a file is not as long as its header says, before the rest of it is read."""
    size = os.fstat(file.fileno()).st_size
    if size != header + end:
        raise ValueError(f"it has {size} bytes, its header calls for {header + end}")


def _foreign(raw: Mapping[str, Any], names: list[str], where: str) -> AdapterError:
    prompted = any("prompts." in name for name in names)
    hint = f" It looks like the weights of a prompted model; {STATE_DICT}." if prompted else ""
    return AdapterError(
        f"{where}: not a peft_vpt task adapter: its metadata must hold exactly the key "
        f"{METADATA_KEY!r}, it holds {sorted(raw)[:20]!s:.400}.{hint}"
    )


def _pickled(path: Path) -> bool:
    try:
        # A pipe would wait for a writer for ever.
        with path.open("rb") if path.is_file() else BytesIO() as file:
            return file.read(4).startswith(_PICKLE)
    except (OSError, ValueError):
        return False
