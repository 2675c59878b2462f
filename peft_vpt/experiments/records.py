"""Records of runs: one JSON object per line, appended whole, read although a line is torn."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import VPTError

Record = dict[str, Any]
# (task, protocol, backbone, seed, split, hash of the configuration)
Key = tuple[str, str, str, int, str, str]
_NEEDED = ("task", "protocol", "backbone", "seed", "split", "metrics")
_OPTIONAL: dict[str, Any] = {
    "group": None,
    "trainable": None,
    "total": None,
    "stored_bytes": None,
    "seconds": None,
}
# Facts about the machine, which do not make another run.
_NOT_THE_RUN = ("versions", "machine")


class Broken(NamedTuple):
    """A line of a record file that cannot be used."""

    line: int
    reason: str


def make_record(**fields: Any) -> Record:
    """Return a checked record with every field present and plain JSON values.

    Args:
        fields: `task`, `protocol`, `backbone`, `seed`, `split` ("train", "val", "test") and
            `metrics` (numbers by name, shares, not percent); `group`, `trainable`, `total`,
            `stored_bytes`, `seconds`, `config`, `versions` and any others.

    Raises:
        VPTError: A field is missing or of the wrong kind.
    """
    from ..files import plain

    record: Record = plain({**_OPTIONAL, "config": {}, "versions": {}, **fields})
    reason = _fault(record)
    if reason:
        raise VPTError(f"make_record: {reason}.")
    return record


def config_hash(config: Mapping[str, Any]) -> str:
    """Return 12 hexadecimal digits that tell configurations apart.

    The order of the entries, and what describes only machine and versions, makes no difference.
    """
    kept = {name: value for name, value in config.items() if name not in _NOT_THE_RUN}
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def record_key(record: Mapping[str, Any]) -> Key:
    """Return what makes a run this run and no other."""
    return (
        record["task"],
        record["protocol"],
        record["backbone"],
        record["seed"],
        record["split"],
        config_hash(record.get("config") or {}),
    )


def append_record(path: str | Path, record: Mapping[str, Any]) -> bool:
    """Append a record unless its run is there already.

    One write under a lock, then fsync: several workers may append to one file. A line that a
    killed writer has left unfinished is closed first.

    Args:
        path: Of the JSON lines file; its folder is made if missing.
        record: As `make_record` returns it.

    Returns:
        Whether it was written.

    Raises:
        VPTError: The record is none; nothing is written then.
    """
    record = make_record(**record)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target) as file:
        file.seek(0)
        data = file.read()
        there, _ = parse_records(data.decode(errors="replace"))
        key = record_key(record)
        if any(record_key(other) == key for other in there):
            return False
        torn = b"\n" if data and not data.endswith(b"\n") else b""
        file.write(torn + (json.dumps(record) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
    return True


def read_records(path: str | Path, *, strict: bool = False) -> list[Record]:
    """Return the records of a file, in its order; an absent file holds none.

    Args:
        path: Of the JSON lines file.
        strict: Raise where a line is broken, instead of a warning.

    Raises:
        VPTError: The file cannot be read; with `strict`, also for a broken line.
    """
    source = Path(path)
    if not source.exists():
        return []
    try:
        text = source.read_bytes().decode(errors="replace")
    except OSError as error:
        raise VPTError(f"read_records: {source}: cannot be read ({error.strerror}).") from error
    records, broken = parse_records(text)
    if broken:
        told = "; ".join(f"line {line}: {reason}" for line, reason in broken)
        message = f"read_records: {source}: {told}. Delete such lines; their runs are run again."
        if strict:
            raise VPTError(message)
        warnings.warn(message, stacklevel=2)
    return records


def parse_records(text: str) -> tuple[list[Record], list[Broken]]:
    """Split JSON lines into records and lines that are none, numbered from 1."""
    records: list[Record] = []
    broken: list[Broken] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        # Numbers may be too long to read, and lists nested too deep.
        except (ValueError, RecursionError) as error:
            broken.append(Broken(number, f"not JSON ({getattr(error, 'msg', error)})"))
            continue
        reason = _fault(value)
        if reason:
            broken.append(Broken(number, reason))
        else:
            records.append(value)
    return records, broken


def merge_records(*sources: Iterable[Record]) -> list[Record]:
    """Join records; of several of the same run the first stays."""
    found: dict[Key, Record] = {}
    for source in sources:
        for record in source:
            found.setdefault(record_key(record), record)
    return list(found.values())


def select(
    records: Iterable[Record], where: Callable[[Record], bool] | None = None, **values: Any
) -> list[Record]:
    """Return the records whose fields have the values given, in their order.

    Args:
        records: To choose from.
        where: A further condition.
        values: By field; a list, tuple or set means "one of these". Inner fields are written with
            two underscores: `config__length=5`.
    """
    wanted = {name.replace("__", "."): value for name, value in values.items()}

    def fits(record: Record) -> bool:
        for name, value in wanted.items():
            several = isinstance(value, list | tuple | set | frozenset)
            if field(record, name) not in (value if several else (value,)):
                return False
        return where is None or where(record)

    return [record for record in records if fits(record)]


def field(record: Mapping[str, Any], name: str) -> Any:
    """Return a field by its dotted name, `config.recipe.base_lr` say; None where there is none."""
    value: Any = record
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def missing(records: Iterable[Record], wanted: Iterable[Record]) -> list[Record]:
    """Return the planned runs (records without results) that are not among the records."""
    there = {record_key(record) for record in records}
    return [record for record in wanted if record_key(record) not in there]


def _fault(value: Any) -> str:
    """Say why a value is no record, or return ""."""
    if not isinstance(value, dict):
        return f"a record is an object, this is {type(value).__name__}"
    absent = [name for name in _NEEDED if name not in value]
    if absent:
        return f"{', '.join(absent)} missing"
    texts = ("task", "protocol", "backbone", "split")
    wrong = [name for name in texts if not isinstance(value[name], str)]
    if wrong:
        return f"{wrong[0]}={value[wrong[0]]!r} must be text"
    if isinstance(value["seed"], bool) or not isinstance(value["seed"], int):
        return f"seed={value['seed']!r} must be an integer"
    metrics = value["metrics"]
    if not isinstance(metrics, dict) or not all(map(_is_number, metrics.values())):
        return f"metrics={metrics!r} must be numbers by name"
    if not isinstance(value.get("config", {}), dict | None):
        return "config must be an object"
    return ""


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


@contextmanager
def _locked(path: Path) -> Iterator[Any]:
    """Open a file for reading and appending; other processes that append wait."""
    with path.open("a+b", buffering=0) as file:
        try:
            import fcntl
        except ImportError:  # pragma: no cover - not on this system
            yield file
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield file
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
