"""Task adapters on the Hugging Face Hub: pushing them, and building the backbone they name."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from . import __version__
from .adapter_file import FILE_NAME, Adapter, read_adapter, write_adapter
from .adapters import check_labels, load_task_adapter, save_task_adapter
from .backbones.identity import is_hub_name
from .backbones.image_model import says_its_size
from .card import LIBRARY, write_card
from .errors import AdapterError
from .hosts import host_and_prompts
from .inject import count_parameters
from .preprocessing import describe_preprocessing, image_processor, timm_transform
from .pretrained import build_backbone, default_processor
from .source import cached_revision, find_adapter, hub_errors

_CALL = "push_task_adapter"


def push_task_adapter(
    model: nn.Module | str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    endpoint: str | None = None,
    create_pr: bool = False,
    license: str | None = None,
    datasets: str | Sequence[str] | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    task: str | None = None,
    labels: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> str:
    """Push a task adapter to the Hugging Face Hub: file, config.json and card in one commit.

    The repository and the branch are made if missing. A card that somebody edited keeps its text.

    Args:
        model: A prompted model, or a saved adapter (file or folder).
        repo_id: `owner/name`.
        private: Make a new repository private. None: the owner's default.
        token: Access token; None: the one that is logged in.
        revision: Branch to push to. None: `main`.
        commit_message: Title of the commit.
        endpoint: Address of another Hub.
        create_pr: Open a pull request in place of a commit.
        license: Licence id for the card.
        datasets: Dataset ids for the card.
        base_model: Hub id of the backbone, where the model does not know it.
        base_revision: Commit of the backbone's repository.
        task: As in `save_task_adapter`; so are `labels`, `preprocessing` and `metrics`.
        labels: Class names.
        preprocessing: What images went through.
        metrics: JSON values.

    Returns:
        URL of the commit, or of the pull request.

    Raises:
        NotPromptedError: The model carries no prompts.
        AdapterError: The adapter cannot be saved, or the Hub refuses; the Hub is then unchanged but
            for an empty new repository.
    """
    from huggingface_hub import HfApi

    if not isinstance(repo_id, str) or not is_hub_name(repo_id):
        raise AdapterError(f"{_CALL}(repo_id={repo_id!r}): a repository is named 'owner/name'.")
    given = {"task": task, "labels": labels, "preprocessing": preprocessing, "metrics": metrics}
    with tempfile.TemporaryDirectory() as folder:
        adapter = _local(model, Path(folder), given)
        adapter = _named(adapter, Path(folder), base_model, base_revision)
        data = adapter.path.read_bytes()
    total = count_parameters(model).total if isinstance(model, nn.Module) else None
    names = [datasets] if isinstance(datasets, str) else list(datasets or ())
    api = HfApi(endpoint, token, library_name=LIBRARY, library_version=__version__)
    write: Any = partial(write_card, adapter, repo_id, license=license, datasets=names, total=total)
    # Once in vain, so that what is wrong here leaves no repository behind.
    _operations(data, adapter, write())
    with hub_errors(_CALL, repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit, former = _former_card(api, repo_id, revision, create_pr)
    card = write(former=former)
    with hub_errors(_CALL, repo_id):
        done = api.create_commit(
            repo_id,
            _operations(data, adapter, card),
            commit_message=commit_message or _title(adapter),
            revision=revision,
            create_pr=create_pr,
            parent_commit=commit,
        )
    return str(done.pr_url or done.commit_url)


def load_backbone_with_adapter(
    source: str | Path,
    *,
    backbone: str | None = None,
    strict: bool | Literal["prompts"] = True,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> tuple[nn.Module, Any]:
    """Build the backbone that an adapter names, load the adapter, and return both ready for use.

    Args:
        source: As in `load_task_adapter`; so are `strict`, `token`, `cache_dir`.
        backbone: Hub id of the backbone, in place of the one in the file.
        strict: Whether the backbone's weights must be those of the file.
        revision: Revision of the adapter's repository. The backbone's stands in the file.
        token: Access token, for adapter and backbone.
        cache_dir: Folder of the Hub cache, for both.
        local_files_only: Take both from the cache.

    Returns:
        The model in eval mode, and its preprocessing: for timm a transform (PIL image to tensor
        `(3, H, W)`), for transformers an image processor.

    Raises:
        AdapterError: The file names no backbone, or one of both cannot be had.
        AdapterMismatchError: The backbone's weights are others.
    """
    call = "load_backbone_with_adapter"
    hub: dict[str, Any] = {
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    path = find_adapter(source, call=call, revision=revision, **hub)
    adapter = read_adapter(path, call)
    made_for, images = adapter.metadata["backbone"], adapter.metadata["preprocessing"]
    name = backbone or made_for["hub_id"]
    if name is None:
        raise AdapterError(
            f"{call}: {path}: it does not say which repository its backbone "
            f"({made_for['library']} {made_for['architecture']}) comes from; pass backbone=, or "
            "build the model yourself and call load_task_adapter(model, ...)."
        )
    at = made_for["revision"] if name == made_for["hub_id"] else None
    fixed = images is None or adapter.spec.location == "pad" or "size" not in images
    size = None if fixed else tuple(images["size"])
    model = build_backbone(
        made_for["library"],
        name,
        architecture=made_for["architecture"],
        revision=at,
        image_size=size,
        **hub,
    )
    if adapter.spec.location == "pad" and images and "size" in images:
        model = says_its_size(model, images["size"])
    load_task_adapter(model, path, strict=strict)
    if images is None:
        processor = default_processor(made_for["library"], model, name, at, **hub)
        return model.eval(), _sized(processor, model)
    make = timm_transform if made_for["library"] == "timm" else image_processor
    return model.eval(), make(images)


def _sized(processor: Any, model: nn.Module) -> Any:
    """Let a transformers processor make images of the size that pixel prompts call for."""
    place = host_and_prompts(model, "load_backbone_with_adapter")[1].place
    if place is not None and hasattr(processor, "image_mean"):
        height, width = place.image[1:]
        processor.size = {"height": height, "width": width}
        processor.do_center_crop = False
    return processor


def _local(model: nn.Module | str | Path, folder: Path, given: dict[str, Any]) -> Adapter:
    """Return the adapter to push: saved just now, or read, with what the call says of it."""
    if isinstance(model, nn.Module):
        return read_adapter(save_task_adapter(model, folder, **given), _CALL)
    check_labels(given["labels"], _CALL)
    if given["preprocessing"] is not None:
        given = given | {"preprocessing": describe_preprocessing(given["preprocessing"])}
    adapter = read_adapter(find_adapter(Path(model), call=_CALL), _CALL)
    new = {k: v for k, v in given.items() if v is not None}
    if not new:
        return adapter
    metadata = dict(adapter.metadata)
    labels = new.pop("labels", None)
    if labels is not None:
        if metadata["head"] is None:
            raise AdapterError(f"{_CALL}(labels=...): {adapter.path} has no head to label.")
        metadata["head"] = metadata["head"] | {"labels": list(labels)}
    return _rewritten(adapter, folder, metadata | new)


def _named(adapter: Adapter, folder: Path, base: str | None, revision: str | None) -> Adapter:
    """Put the backbone's Hub name, where the call gives one, into the file; warn if none."""
    known = adapter.metadata["backbone"]
    if base is None and known["hub_id"] is None:
        warnings.warn(
            f"{_CALL}: the backbone's Hub name is not known, so the card cannot link it and nobody "
            "can load it by name; pass base_model='owner/name'.",
            stacklevel=3,
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


def _title(adapter: Adapter) -> str:
    return f"Task adapter {adapter.metadata['task'] or ''}".strip()


def _rewritten(adapter: Adapter, folder: Path, metadata: dict[str, Any]) -> Adapter:
    drop = ("checksum", "format_version")
    kept = {name: value for name, value in metadata.items() if name not in drop}
    return read_adapter(write_adapter(folder / FILE_NAME, adapter.tensors, kept), _CALL)


def _former_card(
    api: Any, repo_id: str, revision: str | None, create_pr: bool
) -> tuple[str, str | None]:
    """Return the last commit of a branch, and its README or None.

    The branch is made if missing, but not for a pull request, whose target it is.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )

    with tempfile.TemporaryDirectory() as folder:
        for attempt in (0, 1):
            try:
                commit = str(api.repo_info(repo_id, revision=revision).sha)
                path = api.hf_hub_download(repo_id, "README.md", revision=commit, cache_dir=folder)
                return commit, Path(path).read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise AdapterError(
                    f"{_CALL}: {repo_id}/README.md is not UTF-8: {error}. Mend it first."
                ) from error
            except LocalEntryNotFoundError:
                # The Hub was not reached, which says nothing of what stands there.
                raise
            except EntryNotFoundError:
                return commit, None
            except RevisionNotFoundError:
                if attempt or revision is None or create_pr:
                    raise
                api.create_branch(repo_id, branch=revision, exist_ok=True)
    raise AssertionError("the loop above returns or raises")


def _operations(data: bytes, adapter: Adapter, card: str) -> list[Any]:
    from huggingface_hub import CommitOperationAdd

    rendered = json.dumps(adapter.metadata, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    try:
        files = {FILE_NAME: data, "config.json": rendered.encode(), "README.md": card.encode()}
    except UnicodeEncodeError as error:
        raise AdapterError(
            f"{_CALL}: task, labels or metrics hold a character that no file can: {error}."
        ) from error
    return [CommitOperationAdd(name, content) for name, content in files.items()]
