"""What a loopback Hub holds: repositories, commits, files, and the check of a model card."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)(?:^|\n)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_RELATIONS = ("adapter", "finetune", "quantized", "merge")
_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_count = itertools.count()


class HubError(Exception):
    """An answer that is no success: status, X-Error-Code, message, further headers."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


@dataclass(frozen=True)
class File:
    """Content of one path, and whether it is kept in LFS."""

    data: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n"
        return f"{text}size {len(self.data)}\n".encode()

    @property
    def oid(self) -> str:
        blob = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        """What preupload and download name the content by."""
        return self.sha256 if self.lfs else self.oid

    def item(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = {"type": "file", "oid": self.oid, "path": path}
        found["size"] = len(self.data)
        if self.lfs:
            lfs = {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
            found["lfs"] = lfs
        return found


@dataclass(frozen=True)
class Commit:
    """One commit: its id, its title and the whole tree."""

    oid: str
    title: str
    date: str
    files: Mapping[str, File]
    parent: Commit | None = None


@dataclass
class Repo:
    """A repository. `granted` is None, or the tokens that a gated one lets in."""

    id: str
    private: bool = False
    granted: set[str] | None = None
    heads: dict[str, Commit] = field(default_factory=dict)
    known: dict[str, Commit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.add("main", "initial commit", {".gitattributes": File(ATTRIBUTES)})

    def at(self, revision: str) -> Commit:
        """Return a commit by branch, pull request or full id."""
        found = self.heads.get(revision) or self.known.get(revision)
        if found is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def add(self, branch: str, title: str, files: Mapping[str, File]) -> Commit:
        """Put a commit with this tree on a branch."""
        now = datetime.now(timezone.utc)
        date = now.strftime("%Y-%m-%dT%H:%M:%S.") + f"{now.microsecond // 1000:03d}Z"
        oid = hashlib.sha1(f"{self.id} {next(_count)}".encode()).hexdigest()
        commit = Commit(oid, title, date, dict(files), self.heads.get(branch))
        self.heads[branch] = self.known[oid] = commit
        return commit

    def log(self, revision: str) -> Iterator[Commit]:
        """Walk from a commit to the first one."""
        commit: Commit | None = self.at(revision)
        while commit is not None:
            yield commit
            commit = commit.parent

    def info(self, commit: Commit) -> dict[str, Any]:
        first = list(self.log(commit.oid))[-1]
        readme = commit.files.get("README.md", File(b"")).data.decode(errors="replace")
        card = front_matter(readme)
        card = card if isinstance(card, dict) else {}
        known = {k: card[k] for k in ("library_name", "pipeline_tag") if k in card}
        return known | {
            "_id": hashlib.sha1(self.id.encode()).hexdigest()[:24],
            "id": self.id,
            "modelId": self.id,
            "author": self.id.partition("/")[0],
            "sha": commit.oid,
            "private": self.private,
            "gated": False if self.granted is None else "manual",
            "disabled": False,
            "lastModified": commit.date,
            "createdAt": first.date,
            "downloads": 0,
            "likes": 0,
            "tags": list(card.get("tags") or ()),
            "cardData": card,
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }


def front_matter(text: str) -> Any:
    """Return what the YAML block of a card says: None without one, an exception if not YAML."""
    import yaml

    found = _FRONT.match(text)
    if found is None:
        return None
    try:
        return yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return error


def card_faults(text: str) -> tuple[list[str], list[str]]:
    """Return errors and warnings about the metadata of a card."""
    data = front_matter(text)
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return [f"the metadata must be a YAML mapping: {data}"], []
    errors = [f'"{key}" must be text' for key in _TEXT if not _is_text(data.get(key, "-"))]
    errors += [
        f'"{key}" must be text or a list of texts'
        for key in _TEXTS
        if not all(_is_text(value) for value in _listed(data.get(key, "-")))
    ]
    if not isinstance(data.get("tags", []), list):
        errors.append('"tags" must be an array')
    if data.get("base_model_relation", "adapter") not in _RELATIONS:
        errors.append(f'"base_model_relation" must be one of {_RELATIONS}')
    if not _LICENSE.fullmatch(str(data.get("license", "other"))):
        errors.append(f'"license" {data["license"]!r} is not a licence id')
    for key in ("base_model", "datasets"):
        for name in _listed(data.get(key, "-")):
            if not _REPO_ID.fullmatch(str(name)):
                errors.append(f'"{key}" with value {name!r} is not valid: use an id of the Hub')
    return errors + list(_index_faults(data.get("model-index", []))), []


_TEXT = ("library_name", "pipeline_tag", "license", "license_name", "license_link")
_TEXTS = ("base_model", "datasets", "metrics", "language", "tags")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _index_faults(index: Any) -> Iterator[str]:
    if not isinstance(index, list):
        yield '"model-index" must be an array'
        return
    for i, model in enumerate(index):
        where = f"model-index[{i}]"
        if not isinstance(model, dict) or not _is_text(model.get("name")):
            yield f'"{where}.name" is required'
        elif not isinstance(model.get("results"), list):
            yield f'"{where}.results" must be an array'
        else:
            for j, result in enumerate(model["results"]):
                yield from _result_faults(f"{where}.results[{j}]", result)


def _result_faults(where: str, result: Any) -> Iterator[str]:
    if not isinstance(result, dict):
        yield f'"{where}" must be a mapping'
        return
    for key, names in (("task", ("type",)), ("dataset", ("type", "name"))):
        part = result.get(key)
        for name in names:
            if not isinstance(part, dict) or not _is_text(part.get(name)):
                yield f'"{where}.{key}.{name}" is required'
    metrics = result.get("metrics")
    if not isinstance(metrics, list) or not metrics:
        yield f'"{where}.metrics" must be a non-empty array'
        return
    for metric in metrics:
        if not isinstance(metric, dict) or not _is_text(metric.get("type")):
            yield f'"{where}.metrics.type" is required'
        elif metric.get("value") is None:
            yield f'"{where}.metrics.value" is required'
