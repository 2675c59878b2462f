"""Tasks from Hugging Face datasets: a Hub name, a saved dataset or a local image folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import VPTError, listing
from .layouts import Found, number_labels
from .splits import Split, split_names, split_of

PREFIX = "hf:"
_CALL = "open_task"
_PLAIN = ("int", "uint", "string", "large_string")


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
            _CALL, "needs the package datasets", "pip install datasets", path=source
        ) from error
    name = source.removeprefix(PREFIX)
    path = Path(os.path.expanduser(name))
    try:
        loaded: Any = _load(datasets, name, path)
    # What a builder raises is its own affair: connection, parsing, scripts, missing configs.
    except Exception as error:
        problem = f"datasets cannot read it: {type(error).__name__}: {error}"
        raise VPTError(_CALL, problem, path=source) from error
    whole = loaded if hasattr(loaded, "keys") else {"train": loaded}
    # A format that was saved too would give arrays in the place of images and numbers.
    parts = {
        split: whole[name].with_format(None)
        for split, name in split_names(_CALL, source, whole).items()
    }
    if "train" not in parts:
        raise VPTError(_CALL, f"no split 'train'; it has {', '.join(whole)}", path=source)
    image, label = _columns(source, datasets, parts)
    raw, notes = _labels(source, parts, label)
    classes = getattr(parts["train"].features[label], "names", None)
    names, numbers = number_labels(raw, None if classes is None else tuple(classes), source)
    splits = {n: Split((), found, Column(parts[n], image)) for n, found in numbers.items()}
    others = [name for name in whole if split_of(name) is None]
    notes += [f"splits that are not used: {listing(others)}"] if others else []
    return Found("Hugging Face dataset", names, splits, notes)


def _load(datasets: Any, name: str, path: Path) -> Any:
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset("imagefolder", data_dir=str(path))
    owner, _, config = name.partition(":")
    return datasets.load_dataset(owner, config or None)


def _columns(source: str, datasets: Any, parts: Mapping[str, Any]) -> tuple[str, str]:
    """Return the names of the columns of images and labels, which all splits must have."""
    found = {}
    for split, rows in parts.items():
        kinds = rows.features
        images = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
        labels = [name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
        if not labels:
            plain = [n for n, k in kinds.items() if str(getattr(k, "dtype", "")).startswith(_PLAIN)]
            labels = [n for n in plain if n in ("label", "labels")] or plain
        for what, names in (("image", images), ("label", labels)):
            if len(names) != 1:
                raise VPTError(
                    _CALL,
                    f"its split {split!r} needs one {what} column, found "
                    f"{listing(names) if names else 'none'} among {listing(list(kinds))}",
                    "Save a copy with one (remove_columns, save_to_disk) and open "
                    "'hf:<its folder>'",
                    path=source,
                )
        found[split] = (images[0], labels[0])
        if found[split] != found["train"]:
            raise VPTError(
                _CALL,
                f"images and labels are in the columns {' and '.join(found['train'])} of train, "
                f"but {' and '.join(found[split])} of {split}",
                "save a copy with the same ones (rename_column, save_to_disk)",
                path=source,
            )
    return found["train"]


def _labels(
    source: str, parts: Mapping[str, Any], column: str
) -> tuple[dict[str, list[Any]], list[str]]:
    """Return the labels of each split, and notes on splits that have none."""
    found, notes = {}, []
    for split, rows in parts.items():
        values = list(rows[column])
        # The Hub's sign for hidden labels; such a split cannot be measured.
        if values and set(values) <= {-1, None}:
            notes.append(f"{split} has no labels (all -1) and is left out")
            continue
        # By their names, where a split has them: each may number its classes differently.
        names = getattr(rows.features[column], "names", None)
        missing = (None, -1)
        named = values if names is None else [v if v in missing else names[v] for v in values]
        found[split] = named
    if not found.get("train"):
        raise VPTError(_CALL, "its train split has no labelled images", path=source)
    return found, notes
