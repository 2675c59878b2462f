"""The task adapter file, format version 1: bytes, checksum, atomic writes.

`docs/adapter-format.md` describes every byte. Which tensors a file must hold for a model is
decided in `layout`; here their prefixes count, and the lengths of prompts that are pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..errors import AdapterError, cut, listing
from ..files import replace_file
from ..protocols.options import Protocol
from ..spec import PromptSpec
from .schema import FORMAT_VERSION, Content, Fail, check_metadata

FILE_NAME = "adapter.safetensors"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


@dataclass(frozen=True)
class Adapter:
    """A file that was read and found sound in itself."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    spec: PromptSpec
    # What it was made by, None where it holds prompts and head alone.
    protocol: Protocol | None

    def size_of_head(self) -> int:
        """Return how many numbers the head in the file has."""
        return sum(t.numel() for name, t in self.tensors.items() if name.startswith("head"))


def read_adapter(path: Path, call: str = "load_task_adapter") -> Adapter:
    """Read a file and check everything that can be checked without a model.

    Args:
        path: The file.
        call: The verb that reads it, for messages.

    Raises:
        AdapterError: Not a safetensors file, another format, damaged, or not finite.
    """
    fail = partial(AdapterError, call, path=path)
    text, tensors = _open_container(path, fail)
    try:
        values = json.loads(text)
        if canonical(values) != text:
            raise ValueError("it is not in canonical form")
    except (ValueError, RecursionError) as error:
        raise fail(f"its metadata is not canonical JSON: {error}") from error
    content = check_metadata(values, fail)
    _check_tensors(tensors, content, fail)
    if values["checksum"] != checksum(tensors, values):
        raise fail("the checksum does not fit; the file was damaged or edited")
    return Adapter(path, tensors, *content)


def write_adapter(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: dict[str, Any],
    call: str = "save_task_adapter",
) -> Path:
    """Write a file atomically: temporary file beside it, fsync, rename.

    Raises:
        AdapterError: Values are not finite, metadata is not JSON, or the folder cannot be written.
    """
    fail = partial(AdapterError, call, path=path)
    full = {**metadata, "format_version": FORMAT_VERSION, "checksum": "0" * 64}
    try:
        # Through JSON once, so that the checksum is over what a reader will parse.
        full = json.loads(canonical(full))
    except (TypeError, ValueError, RecursionError) as error:
        raise fail(f"metadata must be plain, finite JSON values: {error}") from error
    _check_tensors(tensors, check_metadata(full, fail), fail)
    cpu = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    full["checksum"] = checksum(cpu, full)
    try:
        data = save(cpu, {METADATA_KEY: canonical(full)})
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)
    except (OSError, ValueError) as error:
        raise fail(f"cannot be written: {error}") from error
    return path


def canonical(metadata: Mapping[str, Any]) -> str:
    """Return canonical JSON: sorted keys, no spaces, no NaN."""
    return json.dumps(metadata, sort_keys=True, separators=(",", ":"), allow_nan=False)


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """Return SHA-256 over the metadata without its checksum, then every tensor in name order."""
    rest = {key: value for key, value in metadata.items() if key != "checksum"}
    digest = hashlib.sha256(canonical(rest).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        shape = ",".join(str(size) for size in tensor.shape)
        digest.update(f"\n{name} {_DTYPES[tensor.dtype]} [{shape}]\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_tensors(tensors: Mapping[str, Tensor], content: Content, fail: Fail) -> None:
    """Refuse tensors of a part that the metadata does not name, or without sound values."""
    if not tensors:
        raise fail("it holds no tensors")
    parts = {
        "prompts.": content.metadata["spec"],
        "delta.": content.protocol,
        "head.": content.metadata["head"],
        "head_dist.": content.metadata["head"],
    }
    named = tuple(prefix for prefix, part in parts.items() if part is not None)
    stray = {name for name in tensors if not name.startswith(named)}
    if stray:
        raise fail(f"tensors not expected: {few(stray)}")
    # An image with a border of that size would go through the model before shapes are compared.
    for name, (axis, times) in content.spec.where.tensors.items():
        shape = tuple(tensors[f"prompts.{name}"].shape) if f"prompts.{name}" in tensors else ()
        if shape[axis : axis + 1] != (times * content.spec.length,):
            raise fail(
                f"tensor prompts.{name} of shape {shape} is not of {content.spec.length} prompts, "
                "as its metadata says"
            )
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise fail(f"tensor {cut(name, 80)} is of type {tensor.dtype}, not floating point")
        if tensor.is_meta:
            raise fail(
                f"tensor {name} is on the meta device, where it has no values",
                "materialise the model first",
            )
        if not bool(torch.isfinite(tensor).all()):
            raise fail(f"tensor {cut(name, 80)} holds values that are not finite (NaN, inf)")


def few(names: Iterable[str]) -> str:
    """Return some names in words, however many and long they are."""
    return listing([cut(name, 80) for name in sorted(names)], most=5) or "none"


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
    "a plain state dict does not say how its prompts are put in: call `inject_prompts(model, ...)` "
    "with the options it was trained with, then `model.load_state_dict(...)`, with `strict=False` "
    "if it holds only what trains (`trainable_parameters`, a Trainer checkpoint), and "
    "`save_task_adapter` to get a task adapter"
)


def _open_container(path: Path, fail: Fail) -> tuple[str, dict[str, Tensor]]:
    """Return the metadata text and the tensors of a file that says it is ours."""
    try:
        if not path.is_file():
            raise ValueError("it is not a file")
        # Through one handle: safe_open opens a file twice, and a writer may replace it in between.
        with path.open("rb") as file:
            start = _read_header(file)
            raw, ends = _parse_header(start[8:])
            if set(raw) != {METADATA_KEY}:
                raise _foreign(raw, list(ends), fail)
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
        hint = f"It looks like a pickle, which is never opened; {STATE_DICT}"
        raise fail(
            f"not a readable safetensors file: {reason}", hint if _pickled(path) else ""
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


def _foreign(raw: Mapping[str, Any], names: list[str], fail: Fail) -> AdapterError:
    prompted = any("prompts." in name for name in names)
    return fail(
        "not a peft_vpt task adapter: its metadata must hold exactly the key "
        f"{METADATA_KEY!r}, it holds {sorted(raw)[:20]!s:.400}",
        f"It looks like the weights of a prompted model; {STATE_DICT}" if prompted else "",
    )


def _pickled(path: Path) -> bool:
    try:
        # A pipe would wait for a writer for ever.
        with path.open("rb") if path.is_file() else BytesIO() as file:
            return file.read(4).startswith(_PICKLE)
    except (OSError, ValueError):
        return False
