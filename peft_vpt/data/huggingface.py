"""Tasks from Hugging Face datasets: a Hub name, a saved dataset or a local image folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import VPTError
from .found import Found, Label, absence_note, number_labels, split_names, split_of
from .splits import Split, listing

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

    Raises:
        VPTError: The package `datasets` is absent, the dataset cannot be read, or its columns or
            splits are not clear.
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
        ) from error
    parts = _parts(source, loaded)
    image, label = _columns(source, datasets, parts["train"].features)
    found = _found(source, parts, image, label)
    others = [name for name in loaded if split_of(name) is None] if hasattr(loaded, "keys") else []
    if others:
        found.notes.append(f"splits that are not used: {listing(others)}")
    return found


def _load(datasets: Any, name: str) -> Any:
    path = Path(name).expanduser()
    if path.is_dir():
        saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
        if saved:
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset("imagefolder", data_dir=str(path))
    owner, _, config = name.partition(":")
    return datasets.load_dataset(owner, config or None)


def _parts(source: str, loaded: Any) -> dict[str, Any]:
    if not hasattr(loaded, "keys"):
        return {"train": loaded}
    names = split_names(loaded, f"open_task({source!r})")
    parts = {split: loaded[name] for split, name in names.items()}
    if "train" not in parts:
        raise VPTError(f"open_task({source!r}): no split 'train'; it has {', '.join(loaded)}.")
    return parts


def _columns(source: str, datasets: Any, features: Any) -> tuple[str, str]:
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if not labels:
        plain = [n for n, k in features.items() if str(getattr(k, "dtype", "")).startswith(_PLAIN)]
        labels = [n for n in plain if n in ("label", "labels")] or plain
    for what, names in (("image", images), ("label", labels)):
        if len(names) != 1:
            raise VPTError(
                f"open_task({source!r}): needs one {what} column, found "
                f"{listing(names) if names else 'none'} among {listing(list(features))}. Save a "
                "copy with one (remove_columns, save_to_disk) and open 'hf:<its folder>'."
            )
    return images[0], labels[0]


_PLAIN = ("int", "uint", "string", "large_string")


def _found(source: str, parts: dict[str, Any], image: str, label: str) -> Found:
    labels: dict[str, list[Label]] = {name: list(rows[label]) for name, rows in parts.items()}
    classes = getattr(parts["train"].features[label], "names", None)
    notes = []
    # The Hub's sign for hidden labels; such a split cannot be measured.
    for name in [n for n, values in labels.items() if values and set(values) <= {-1, None}]:
        notes.append(f"{name} has no labels (all -1) and is left out")
        del labels[name]
    if "train" not in labels or not labels["train"]:
        raise VPTError(f"open_task({source!r}): its train split has no labelled images.")
    call = f"open_task({source!r})"
    names, numbers = number_labels(labels, None if classes is None else tuple(classes), call)
    splits = {n: Split((), found, Column(parts[n], image)) for n, found in numbers.items()}
    notes += absence_note(names, splits["train"])
    if set(splits) == {"train", "val"}:
        notes.append("no test split: only val can be measured")
    cut = len(splits) == 1
    return Found("Hugging Face dataset", names, splits, cut_test=cut, notes=notes)
