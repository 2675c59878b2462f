"""What goes up in a push: an adapter with what the call says of it, and the checks before that."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..adapter.file import FILE_NAME, Adapter, read_adapter, write_adapter
from ..adapter.schema import is_revision, plain_metrics
from ..adapter.source import cached_revision, find_adapter
from ..adapter.verbs import check_labels, save_task_adapter
from ..backbones.identity import is_hub_name
from ..errors import AdapterError, shown
from ..hosts import host_and_prompts
from ..preprocessing import describe_preprocessing

CALL = "push_task_adapter"


def check_names(model: Any, repo_id: Any, base: Any, base_revision: Any) -> None:
    """Refuse arguments of a push that name nothing.

    Raises:
        AdapterError: One is of the wrong type, or no name.
    """
    if isinstance(repo_id, nn.Module):
        raise AdapterError(
            f"{CALL}: repo_id is a model ({type(repo_id).__name__}); are the arguments swapped? "
            "The model comes first: push_task_adapter(model, 'owner/name')."
        )
    if not isinstance(repo_id, str) or not is_hub_name(repo_id):
        raise AdapterError(f"{CALL}(repo_id={shown(repo_id)}): a repository is named 'owner/name'.")
    if not isinstance(model, nn.Module | str | Path):
        raise AdapterError(
            f"{CALL}: model must be a prompted model, or the path of a saved adapter, not of type "
            f"{type(model).__name__}."
        )
    if base is not None and not (isinstance(base, str) and is_hub_name(base)):
        raise AdapterError(
            f"{CALL}(base_model={shown(base)}): give the backbone's Hub id, 'owner/name'."
        )
    if base_revision is not None and not is_revision(base_revision):
        raise AdapterError(
            f"{CALL}(base_revision={shown(base_revision)}): give a commit, or the name of a "
            "branch or tag, of the backbone's repository."
        )


def dataset_names(datasets: Any) -> list[str]:
    """Return the names of datasets as a list.

    Raises:
        AdapterError: It is neither a name nor a list of names.
    """
    names = [datasets] if isinstance(datasets, str) else datasets or ()
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise AdapterError(
            f"{CALL}(datasets={shown(datasets)}): give a Hub id 'owner/name', or a list of them."
        )
    return list(names)


def what_is_said(task: Any, labels: Any, preprocessing: Any, metrics: Any) -> dict[str, Any]:
    """Return what a push says of an adapter as plain values, without what it leaves out.

    Raises:
        AdapterError: One is not of its kind.
    """
    if task is not None and not isinstance(task, str):
        raise AdapterError(f"{CALL}(task={shown(task)}): give the name of the task as text.")
    check_labels(labels, CALL)
    values = {
        "task": task,
        "labels": None if labels is None else list(labels),
        "preprocessing": describe_preprocessing(preprocessing, CALL) if preprocessing else None,
        "metrics": None if metrics is None else plain_metrics(metrics, CALL),
    }
    return {name: value for name, value in values.items() if value is not None}


def adapter_to_push(
    model: nn.Module | str | Path,
    folder: Path,
    said: dict[str, Any],
    base: str | None,
    base_revision: str | None,
) -> Adapter:
    """Return the adapter as it goes up; a saved one is left as it is.

    Args:
        model: A prompted model, or a saved adapter.
        folder: An empty one, for files in between.
        said: From `what_is_said`.
        base: Hub id of the backbone, or None.
        base_revision: Commit of its repository, or None.

    Raises:
        NotPromptedError: The model carries no prompts.
        AdapterError: There is no such file, or the adapter cannot be saved.
    """
    try:
        adapter = _told(_local(model, folder), folder, said)
        return _named(adapter, folder, base, base_revision)
    except AdapterError as error:
        # A file in between says nothing to anybody.
        between = f"save_task_adapter: {folder / FILE_NAME}"
        if between not in str(error):
            raise
        raise type(error)(str(error).replace(between, CALL)) from error


def _local(model: nn.Module | str | Path, folder: Path) -> Adapter:
    """Return an adapter that was saved just now, or read."""
    if isinstance(model, nn.Module):
        host_and_prompts(model, CALL)
        return read_adapter(save_task_adapter(model, folder), CALL)
    return read_adapter(find_adapter(Path(model), call=CALL), CALL)


def _told(adapter: Adapter, folder: Path, given: dict[str, Any]) -> Adapter:
    """Return an adapter with what the call says of it."""
    if not given:
        return adapter
    new, head = dict(given), adapter.metadata["head"]
    labels = new.pop("labels", None)
    if labels is not None:
        count = "no head to label" if head is None else f"{head['classes']} classes"
        if head is None or len(labels) != head["classes"]:
            raise AdapterError(
                f"{CALL}(labels=...): {len(labels)} names, and the adapter has {count}."
            )
        new["head"] = head | {"labels": labels}
    return _rewritten(adapter, folder, adapter.metadata | new)


def _named(adapter: Adapter, folder: Path, base: str | None, revision: str | None) -> Adapter:
    """Put the backbone's Hub name, where the call gives one, into the file; warn if none."""
    known = adapter.metadata["backbone"]
    if base is None and known["hub_id"] is None:
        warnings.warn(
            f"{CALL}: the backbone's Hub name is not known, so the card cannot link it and nobody "
            "can load it by name; pass base_model='owner/name'.",
            stacklevel=4,
        )
    other = base is not None and base != known["hub_id"]
    at = revision or (None if other else known["revision"])
    if at is None and known["hub_id"] and not other:
        # A guess that a local save, the same bytes for the same adapter, does not make.
        at = cached_revision(known["hub_id"])
    if (base or known["hub_id"], at) == (known["hub_id"], known["revision"]):
        return adapter
    named = known | {"hub_id": base or known["hub_id"], "revision": at}
    return _rewritten(adapter, folder, adapter.metadata | {"backbone": named})


def _rewritten(adapter: Adapter, folder: Path, metadata: dict[str, Any]) -> Adapter:
    drop = ("checksum", "format_version")
    kept = {name: value for name, value in metadata.items() if name not in drop}
    return read_adapter(write_adapter(folder / FILE_NAME, adapter.tensors, kept), CALL)
