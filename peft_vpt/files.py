"""What training writes: files that are there as a whole or not at all."""

from __future__ import annotations

import json
import math
import os
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from numbers import Integral, Real
from pathlib import Path
from typing import Any

# Of this library, as every file that it writes says.
__version__ = "0.1.0"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write plain values as one indented JSON object."""
    replace_file(path, (json.dumps(plain(values), indent=2) + "\n").encode())


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write plain values as JSON lines."""
    replace_file(path, "".join(json.dumps(plain(row)) + "\n" for row in rows).encode())


def plain(value: Any) -> Any:
    """Return a value as JSON takes it: tuples as lists, numpy's numbers as plain, NaN as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Integral):
        return value if isinstance(value, int) else int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return value


def replace_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: temporary file beside it, fsync, rename.

    A file that is there keeps its permissions; a new one gets those that the user's umask gives.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    mode = stat.S_IMODE(path.stat().st_mode) if path.is_file() else None
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            temporary.chmod(mode)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):
        # The new file is in place; some file systems know no fsync of a folder.
        with suppress(OSError):
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
