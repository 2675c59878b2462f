"""The task adapter file, format version 1: names, metadata, checksum, atomic writes.

`docs/adapter-format.md` describes every byte.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import AdapterError, SpecError
from .spec import PromptSpec

FILE_NAME = "adapter.safetensors"
FORMAT_VERSION = 1
METADATA_KEY = "peft_vpt"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_PREFIXES = ("prompts.", "head.", "head_dist.")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "spec": dict,
    "backbone": dict,
    "head": (dict, type(None)),
    "preprocessing": (dict, type(None)),
    "task": (str, type(None)),
    "metrics": (dict, type(None)),
    "library_version": str,
}
_BACKBONE_FIELDS: dict[str, type | tuple[type, ...]] = {
    "library": str,
    "architecture": str,
    "hub_id": (str, type(None)),
    "revision": (str, type(None)),
    "dims": list,
    "depth": int,
    "fingerprint": (dict, type(None)),
}
_HEAD_FIELDS: dict[str, type | tuple[type, ...]] = {
    "classes": int,
    "labels": (list, type(None)),
    "in_features": int,
    "reads": str,
}


@dataclass(frozen=True)
class Adapter:
    """A file that was read and found sound in itself."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    spec: PromptSpec

    def expect(self, shapes: Mapping[str, tuple[int, ...]], *, prefix: str) -> None:
        """Raise unless the tensors whose names start with `prefix` are exactly these.

        Raises:
            AdapterError: One is missing, left over, or has another shape.
        """
        have = {n: tuple(t.shape) for n, t in self.tensors.items() if n.startswith(prefix)}
        missing, extra = sorted(set(shapes) - set(have)), sorted(set(have) - set(shapes))
        if missing or extra:
            raise AdapterError(
                f"load_task_adapter: {self.path}: tensors missing: {missing or 'none'}; "
                f"not expected: {extra or 'none'}."
            )
        for name, shape in shapes.items():
            if have[name] != shape:
                raise AdapterError(
                    f"load_task_adapter: {self.path}: tensor {name} has shape {have[name]}, "
                    f"its metadata calls for {shape}."
                )


def resolve_path(source: str | Path, **hub: Any) -> Path:
    """Return the local file behind a source, downloading it where it names a Hub repository.

    Raises:
        AdapterError: There is no such file, or the source is neither a path nor a Hub id.
    """
    text = str(source)
    if not isinstance(source, str | Path):
        raise AdapterError(f"load_task_adapter: source must be a path or a Hub id, got {source!r}.")
    try:
        path = Path(source).expanduser()
        local = path.exists() or text.startswith((".", "/", "~")) or text.endswith(".safetensors")
        if not (local or isinstance(source, Path)) and _HUB_ID.fullmatch(text):
            return _download(text, hub)
        file = path / FILE_NAME if path.is_dir() else path
        found = file.is_file()
    except (RuntimeError, ValueError, OSError) as error:
        raise AdapterError(f"load_task_adapter: {text!r}: cannot be looked up: {error}") from error
    if not found:
        raise AdapterError(
            f"load_task_adapter: {text!r}: no such adapter; give a folder that holds {FILE_NAME}, "
            "the file itself, or a Hub id 'owner/name'."
        )
    return file


def _download(hub_id: str, options: dict[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(hub_id, FILE_NAME, **options))


def read_adapter(path: Path) -> Adapter:
    """Read a file and check everything that can be checked without a model.

    Raises:
        AdapterError: Not a safetensors file, another format, damaged, or not finite.
    """
    where = f"load_task_adapter: {path}"
    try:
        with safe_open(path, framework="pt") as file:
            raw = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise AdapterError(f"{where}: not a readable safetensors file: {error}") from error
    if set(raw) != {METADATA_KEY}:
        raise AdapterError(
            f"{where}: not a peft_vpt task adapter: its metadata must hold exactly the key "
            f"{METADATA_KEY!r}, it holds {sorted(raw)}."
        )
    try:
        metadata = json.loads(raw[METADATA_KEY])
        if canonical(metadata) != raw[METADATA_KEY]:
            raise ValueError("it is not in canonical form")
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{where}: its metadata is not canonical JSON: {error}") from error
    spec = _check_metadata(metadata, where)
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise AdapterError(
                f"{where}: tensor {name} is of type {tensor.dtype}, not floating point."
            )
    stray = sorted(name for name in tensors if not name.startswith(_PREFIXES))
    if stray:
        raise AdapterError(f"{where}: tensors missing: none; not expected: {stray}.")
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
    _check_finite(tensors, where)
    cpu = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    full = {"format_version": FORMAT_VERSION, **metadata}
    try:
        # Through JSON once, so that the checksum is over what a reader will parse.
        full = json.loads(canonical(full))
        _check_metadata(full | {"checksum": ""}, where)
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
        _replace(path, data)
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


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        # A plain open, so that the file gets the permissions that the user's umask gives.
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        if tensor.is_meta or not bool(torch.isfinite(tensor).all()):
            raise AdapterError(
                f"{where}: tensor {name} holds values that are not finite (NaN, inf)."
            )


def _check_metadata(metadata: Any, where: str) -> PromptSpec:
    if not isinstance(metadata, dict):
        raise AdapterError(f"{where}: its metadata is not a JSON object.")
    version = metadata.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise AdapterError(
            f"{where}: has format version {version!r}; this release reads version "
            f"{FORMAT_VERSION}. Update peft_vpt."
        )
    _check_fields(metadata, _FIELDS | {"checksum": str}, where)
    _check_fields(metadata["backbone"], _BACKBONE_FIELDS, f"{where}: backbone")
    if metadata["head"] is not None:
        _check_fields(metadata["head"], _HEAD_FIELDS, f"{where}: head")
        _check_labels(metadata["head"], where)
    if metadata["backbone"]["fingerprint"] is not None:
        _check_fingerprint(metadata["backbone"]["fingerprint"], where)
    try:
        return PromptSpec.from_dict(metadata["spec"])
    except SpecError as error:
        raise AdapterError(f"{where}: its prompt options are wrong: {error}") from error


def _check_fields(
    values: Mapping[str, Any], fields: Mapping[str, type | tuple[type, ...]], where: str
) -> None:
    for name, kinds in fields.items():
        value = values.get(name)
        if name not in values or not isinstance(value, kinds) or (isinstance(value, bool)):
            raise AdapterError(f"{where}: metadata field {name!r} is missing or of the wrong type.")


def _check_labels(head: Mapping[str, Any], where: str) -> None:
    labels, classes = head["labels"], head["classes"]
    fits = labels is None or (
        len(labels) == classes and all(isinstance(label, str) for label in labels)
    )
    if classes < 1 or head["in_features"] < 1 or not fits:
        raise AdapterError(f"{where}: its head's classes, features and labels do not fit together.")


def _check_fingerprint(values: Mapping[str, Any], where: str) -> None:
    rows = values.get("blocks")
    lists = [*rows, values.get("norm")] if isinstance(rows, list) else [None]
    numbers = all(
        isinstance(row, list) and all(isinstance(x, float) and math.isfinite(x) for x in row)
        for row in lists
    )
    if not numbers or not isinstance(values.get("dtype"), str):
        raise AdapterError(f"{where}: its backbone fingerprint is not a table of numbers.")
