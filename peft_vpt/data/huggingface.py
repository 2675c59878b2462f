"""Tasks from Hugging Face datasets: a Hub name, a saved dataset or a local image folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import VPTError, listing
from .splits import Found, Label, Split, absence_note, number_labels, split_names, split_of

PREFIX = "hf:"


class Column(Sequence[Any]):
    """A column of a dataset, read row by row."""

    def __init__(self, rows: Any, name: str) -> None:
        self._rows, self._name = rows.select_columns([name]), name

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index][self._name]


def open_dataset(source: str) -> Found:
    """Read a dataset by its Hub name ("hf:owner/name" or "hf:owner/name:config") or local path.

    The image column is the one of type Image; the label column the one of type ClassLabel or,
    without any, the one column of whole numbers or text that is called `label` or stands alone.
    Where a split numbers its classes otherwise than train, its labels are taken by their names.

    Raises:
        VPTError: The package `datasets` is absent, the dataset cannot be read, its columns or
            splits are not clear or differ, or labels are missing.
    """
    try:
        import datasets
    except ImportError as error:
        raise VPTError(
            f"open_task({source!r}): needs the package datasets; pip install datasets."
        ) from error
    name = source.removeprefix(PREFIX)
    try:
        loaded: Any = _load(datasets, name)
    # What a builder raises is its own affair: connection, parsing, scripts, missing configs.
    except Exception as error:
        raise VPTError(
            f"open_task({source!r}): datasets cannot read it: {type(error).__name__}: {error}"
            f"{_empty_splits(_path(name))}"
        ) from error
    parts = _parts(source, loaded)
    image, label = _common_columns(source, datasets, parts)
    found = _found(source, parts, image, label)
    others = [name for name in loaded if split_of(name) is None] if hasattr(loaded, "keys") else []
    if others:
        found.notes.append(f"splits that are not used: {listing(others)}")
    return found


def _path(name: str) -> Path:
    return Path(os.path.expanduser(name))


def _load(datasets: Any, name: str) -> Any:
    path = _path(name)
    if path.is_dir():
        saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
        if saved:
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset("imagefolder", data_dir=str(path))
    owner, _, config = name.partition(":")
    return datasets.load_dataset(owner, config or None)


def _empty_splits(path: Path) -> str:
    """Return what to do about saved splits without rows, over which datasets stumbles."""
    found = []
    for file in sorted([*path.glob("state.json"), *path.glob("*/state.json")]):
        try:
            if json.loads(file.read_text("utf-8"))["_data_files"] == []:
                found.append(str(file.parent))
        except (OSError, ValueError, LookupError, TypeError):
            continue
    advice = "has no rows; save the dataset with some, or without that split"
    return f". What is saved in {listing(found)} {advice}." if found else ""


def _parts(source: str, loaded: Any) -> dict[str, Any]:
    if not hasattr(loaded, "keys"):
        return {"train": loaded.with_format(None)}
    names = split_names(loaded, f"open_task({source!r})")
    # A format that was saved too would give arrays in the place of images and numbers.
    parts = {split: loaded[name].with_format(None) for split, name in names.items()}
    if "train" not in parts:
        raise VPTError(f"open_task({source!r}): no split 'train'; it has {', '.join(loaded)}.")
    return parts


def _common_columns(source: str, datasets: Any, parts: dict[str, Any]) -> tuple[str, str]:
    call = f"open_task({source!r})"
    columns = {
        name: _columns(f"{call}: its split {name!r}", datasets, rows.features)
        for name, rows in parts.items()
    }
    for name, found in columns.items():
        if found != columns["train"]:
            raise VPTError(
                f"{call}: images and labels are in the columns "
                f"{' and '.join(columns['train'])} of train, but {' and '.join(found)} of {name}; "
                "save a copy with the same ones (rename_column, save_to_disk)."
            )
    return columns["train"]


def _columns(where: str, datasets: Any, features: Any) -> tuple[str, str]:
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if not labels:
        plain = [n for n, k in features.items() if str(getattr(k, "dtype", "")).startswith(_PLAIN)]
        labels = [n for n in plain if n in ("label", "labels")] or plain
    for what, names in (("image", images), ("label", labels)):
        if len(names) != 1:
            raise VPTError(
                f"{where} needs one {what} column, found "
                f"{listing(names) if names else 'none'} among {listing(list(features))}. Save a "
                "copy with one (remove_columns, save_to_disk) and open 'hf:<its folder>'."
            )
    return images[0], labels[0]


_PLAIN = ("int", "uint", "string", "large_string")


def _found(source: str, parts: dict[str, Any], image: str, label: str) -> Found:
    raw: dict[str, list[Any]] = {name: list(rows[label]) for name, rows in parts.items()}
    classes = getattr(parts["train"].features[label], "names", None)
    notes = []
    # The Hub's sign for hidden labels; such a split cannot be measured.
    for name in [n for n, values in raw.items() if values and set(values) <= {-1, None}]:
        notes.append(f"{name} has no labels (all -1) and is left out")
        del raw[name]
    if "train" not in raw or not raw["train"]:
        raise VPTError(f"open_task({source!r}): its train split has no labelled images.")
    call = f"open_task({source!r})"
    _refuse_unlabelled(call, raw)
    labels = {name: _named(values, parts[name].features[label]) for name, values in raw.items()}
    _refuse_other_kinds(call, labels)
    names, numbers = number_labels(labels, None if classes is None else tuple(classes), call)
    splits = {n: Split((), found, Column(parts[n], image)) for n, found in numbers.items()}
    notes += absence_note(names, splits["train"])
    if set(splits) == {"train", "val"}:
        notes.append("no test split: only val can be measured")
    cut = len(splits) == 1
    return Found("Hugging Face dataset", names, splits, cut_test=cut, notes=notes)


def _refuse_unlabelled(call: str, labels: Mapping[str, Sequence[Any]]) -> None:
    for name, values in labels.items():
        missing = sum(v is None or (isinstance(v, int) and v < 0) for v in values)
        if missing:
            raise VPTError(
                f"{call}: {missing} of {len(values)} images of {name!r} have no label (None, or "
                "below 0); save a copy without them (filter, save_to_disk) and open 'hf:<folder>'."
            )


def _named(values: Sequence[Any], feature: Any) -> list[Label]:
    """Return labels as names where a split has them: each may number its classes differently."""
    names = getattr(feature, "names", None)
    return list(values) if names is None else [names[value] for value in values]


def _refuse_other_kinds(call: str, labels: Mapping[str, Sequence[Label]]) -> None:
    kinds = {n: "numbers" if isinstance(v[0], int) else "names" for n, v in labels.items() if v}
    if len(set(kinds.values())) > 1:
        raise VPTError(
            f"{call}: labels are {', '.join(f'{kind} in {name}' for name, kind in kinds.items())}; "
            "save a copy whose splits have one kind (cast_column, save_to_disk)."
        )
