"""The task adapter file, format version 1: names, metadata, checksum, atomic writes.

`docs/adapter-format.md` describes every byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
from ..spec import NOWHERE, PromptSpec
from .schema import FORMAT_VERSION, check_metadata

FILE_NAME = "adapter.safetensors"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_NAME = re.compile(
    r"prompts\.([0-9]+|shared\.[0-9]+|project\.[0-9]+\.(weight|bias))"
    r"|prompts\.pixel\.(patches|channels|weight|tb|lr)"
    r"|delta\.[0-9]+\.(q|k|v|proj|norm1|norm2|fc1|fc2)\.[A-Za-z0-9_-]+"
    r"|delta\.[0-9]+\.(bias_table|ls1|ls2|adapter\.(down|up)\.(weight|bias))"
    r"|delta\.((norm|patch)\.[A-Za-z0-9_-]+|cls|pos)"
    r"|delta\.(([0-9]+\.)?path|side)(\.[A-Za-z0-9_-]+)+"
    r"|head(_dist)?\.(weight|bias|module(\.[A-Za-z0-9_-]+)+)"
)


@dataclass(frozen=True)
class Adapter:
    """A file that was read and found sound in itself."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    spec: PromptSpec

    @property
    def protocol(self) -> Protocol | None:
        """The protocol it was made by, None where it holds prompts and head alone."""
        values = self.metadata.get("protocol")
        return None if values is None else Protocol.from_dict(values)

    def expect(self, shapes: Mapping[str, tuple[int, ...]], *, prefix: str) -> None:
        """Raise unless the tensors whose names start with `prefix` are exactly these.

        Raises:
            AdapterError: One is missing, left over, or has another shape.
        """
        have = {n: tuple(t.shape) for n, t in self.tensors.items() if n.startswith(prefix)}
        missing, extra = set(shapes) - set(have), set(have) - set(shapes)
        if missing or extra:
            raise AdapterError(
                f"load_task_adapter: {self.path}: tensors missing: {_few(missing)}; "
                f"not expected: {_few(extra)}."
            )
        for name, shape in shapes.items():
            if have[name] != shape:
                raise AdapterError(
                    f"load_task_adapter: {self.path}: tensor {name} has shape {have[name]}, "
                    f"its metadata calls for {shape}."
                )


def read_adapter(path: Path, call: str = "load_task_adapter") -> Adapter:
    """Read a file and check everything that can be checked without a model.

    Args:
        path: The file.
        call: The verb that reads it, for messages.

    Raises:
        AdapterError: Not a safetensors file, another format, damaged, or not finite.
    """
    where = f"{call}: {path}"
    text, tensors = open_container(path, where)
    try:
        metadata = json.loads(text)
        if canonical(metadata) != text:
            raise ValueError("it is not in canonical form")
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{where}: its metadata is not canonical JSON: {error}") from error
    spec = check_metadata(metadata, where)
    _check_types(tensors, where)
    _check_names(tensors, spec, where, protocol="protocol" in metadata)
    if metadata["checksum"] != checksum(tensors, metadata):
        raise AdapterError(f"{where}: the checksum does not fit; the file was damaged or edited.")
    _check_finite(tensors, where)
    return Adapter(path, tensors, metadata, spec)


def write_adapter(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, Any]) -> Path:
    """Write a file atomically: temporary file beside it, fsync, rename.

    Raises:
        AdapterError: Values are not finite, metadata is not JSON, or the folder cannot be written.
    """
    where = f"save_task_adapter: {path}"
    _check_types(tensors, where)
    _check_finite(tensors, where)
    cpu = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    full = {"format_version": FORMAT_VERSION, **metadata}
    try:
        # Through JSON once, so that the checksum is over what a reader will parse.
        full = json.loads(canonical(full))
        spec = check_metadata(full | {"checksum": "0" * 64}, where)
        _check_names(cpu, spec, where, protocol="protocol" in metadata)
        full["checksum"] = checksum(cpu, full)
        data = save(cpu, {METADATA_KEY: canonical(full)})
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(
            f"{where}: metadata must be plain, finite JSON values: {error}"
        ) from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{where}: cannot be written: {error}") from error
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


def _check_types(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise AdapterError(
                f"{where}: tensor {name} is of type {tensor.dtype}, not floating point."
            )


def _check_names(
    tensors: Mapping[str, Tensor], spec: PromptSpec, where: str, *, protocol: bool
) -> None:
    if not tensors:
        raise AdapterError(f"{where}: it holds no tensors.")
    stray = {name for name in tensors if not _NAME.fullmatch(name)}
    if not protocol:
        stray |= {name for name in tensors if name.startswith("delta.")}
    missing: set[str] = set()
    shared = spec.sharing in ("inter", "all")
    if spec.is_pixel or shared:
        kinds = ["pixel"] if spec.is_pixel else ["shared"]
    else:
        kinds = [str(layer) for layer in spec.layers or ()]
        missing = {f"prompts.{layer}" for layer in kinds} - set(tensors)
    kinds += ["project"] if spec.project else []
    stray |= {n for n in tensors if n.startswith("prompts.") and n.split(".")[1] not in kinds}
    if stray or missing:
        raise AdapterError(
            f"{where}: tensors missing: {_few(missing)}; not expected: {_few(stray)}."
        )
    if spec.location == NOWHERE:
        return
    # A length that the file does not hold would be built before shapes are compared.
    stored = 1 if spec.sharing in ("intra", "all") else spec.length
    numbers = sum(t.numel() for name, t in tensors.items() if name.startswith("prompts."))
    if numbers < stored:
        raise AdapterError(f"{where}: prompts of length {spec.length} in {numbers} numbers.")


def _few(names: Iterable[str]) -> str:
    """Return some names in words, however many and long they are."""
    return listing([cut(name, 80) for name in sorted(names)], most=5) or "none"


def _check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise AdapterError(
                f"{where}: tensor {name} is on the meta device, where it has no values; "
                "materialise the model first."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(
                f"{where}: tensor {name} holds values that are not finite (NaN, inf)."
            )


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
