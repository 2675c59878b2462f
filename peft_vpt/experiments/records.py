"""Records of runs: one JSON object per line, appended whole, read although a line is torn."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checks import Rule, instance, integer, misfits, number, optional, or_none
from ..errors import VPTError, VPTWarning, shown
from ..files import plain

Record = dict[str, Any]
# (task, protocol, backbone, seed, split, hash of the configuration)
Key = tuple[str, str, str, int, str, str]
_OF_A_RUN = ("task", "protocol", "backbone", "seed", "split")
_OPTIONAL = dict.fromkeys(("group", "trainable", "total", "stored_bytes", "seconds"))
_TEXT = instance(str, "text")
_METRIC = or_none(number())
_RULES = {
    **dict.fromkeys(("task", "protocol", "backbone", "split"), _TEXT),
    "seed": integer(),
    "metrics": Rule(
        "numbers by name",
        lambda found: isinstance(found, dict) and all(map(_METRIC.fits, found.values())),
    ),
    "config": optional(or_none(instance(dict, "an object"))),
}
# Facts about the machine, which do not make another run.
_NOT_THE_RUN = ("versions", "machine")


def make_record(**fields: Any) -> Record:
    """Return a checked record with every field present and plain JSON values.

    Args:
        fields: `task`, `protocol`, `backbone`, `seed`, `split` ("train", "val", "test") and
            `metrics` (numbers by name, shares, not percent); `group`, `trainable`, `total`,
            `stored_bytes`, `seconds`, `config`, `versions` and any others.

    Raises:
        VPTError: A field is missing or of the wrong kind.
    """
    record: Record = plain({**_OPTIONAL, "config": {}, "versions": {}, **fields})
    if reason := _fault(record):
        raise VPTError("make_record", reason)
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
    task, protocol, backbone, seed, split = (record[name] for name in _OF_A_RUN)
    return task, protocol, backbone, seed, split, config_hash(record.get("config") or {})


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
        told = f"cannot be read ({error.strerror})"
        raise VPTError("read_records", told, path=source) from error
    records, broken = parse_records(text)
    if broken:
        advice = "Delete such lines; their runs are run again"
        fault = VPTError("read_records", "; ".join(broken), advice, path=source)
        if strict:
            raise fault
        warnings.warn(VPTWarning(fault), stacklevel=2)
    return records


def same_run(path: str | Path, record: Record) -> Record | None:
    """Return the record in a file that is of the same run as another one, None if there is none."""
    key = record_key(record)
    return next((known for known in read_records(path) if record_key(known) == key), None)


def parse_records(text: str) -> tuple[list[Record], list[str]]:
    """Split JSON lines into records, and what is wrong with lines that are none, from 1 on."""
    records: list[Record] = []
    broken: list[str] = []
    for place, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        # Numbers may be too long to read, and lists nested too deep.
        except (ValueError, RecursionError) as error:
            broken.append(f"line {place}: not JSON ({getattr(error, 'msg', error)})")
            continue
        if reason := _fault(value):
            broken.append(f"line {place}: {reason}")
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


def values_of(
    call: str, records: Iterable[Record], metric: str, split: str
) -> list[tuple[Record, float]]:
    """Return the records of a split that have a metric, each with its value.

    Raises:
        VPTError: There are none.
    """
    found = [(r, r["metrics"].get(metric)) for r in records if r["split"] == split]
    found = [(record, value) for record, value in found if value is not None]
    if not found:
        raise VPTError(call, f"no record of split {split!r} has the metric {metric!r}")
    return found


def missing(records: Iterable[Record], wanted: Iterable[Record]) -> list[Record]:
    """Return the planned runs (records without results) that are not among the records."""
    there = {record_key(record) for record in records}
    return [record for record in wanted if record_key(record) not in there]


def file_name(text: str) -> str:
    """Return a text as the name of a file or folder."""
    return re.sub(r"[^A-Za-z0-9.+_=-]+", "-", text).strip("-")


def is_ensemble(record: Record) -> bool:
    """Tell whether a record is one of several adapters together."""
    return "members" in record["config"]


def adapter_of(record: Record, folder: Path) -> Path:
    """Return the folder of the adapter that a record is about.

    Args:
        record: Of a final run.
        folder: Of all runs.
    """
    # Older records do not name it.
    old = f"{record['task']}/{file_name(record['protocol'])}-{record['seed']}"
    return folder / (record.get("adapter") or old)


def figure_name(record: Record) -> str:
    """Return the name of the figure of a run's embeddings, without suffix; no other run has it."""
    return file_name(f"tsne-{record['task']}-{Path(adapter_of(record, Path())).name}")


def _fault(value: Any) -> str:
    """Say why a value is no record, or return ""."""
    if not isinstance(value, dict):
        return f"a record is an object, this is {type(value).__name__}"
    wrong = misfits(value, _RULES)
    absent = [name for name in wrong if name not in value]
    if absent:
        return f"{', '.join(absent)} missing"
    return f"{wrong[0]}={shown(value[wrong[0]])} must be {_RULES[wrong[0]].what}" if wrong else ""


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
