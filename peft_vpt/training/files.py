"""What training writes: files that are there as a whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..whole_file import replace_file


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write plain values as one indented JSON object."""
    replace_file(path, (json.dumps(plain(values), indent=2) + "\n").encode())


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write plain values as JSON lines."""
    replace_file(path, "".join(json.dumps(plain(row)) + "\n" for row in rows).encode())


def plain(value: Any) -> Any:
    """Return a value as JSON takes it: tuples as lists, NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
