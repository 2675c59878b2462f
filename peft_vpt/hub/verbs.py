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

from ..adapter.file import FILE_NAME, Adapter, read_adapter, write_adapter
from ..adapter.head import kind_of
from ..adapter.schema import REVISION, plain_metrics
from ..adapter.source import cached_revision, check_hub_options, find_adapter, hub_errors
from ..adapter.verbs import check_labels, check_strict, load_task_adapter, save_task_adapter
from ..backbones.find import says_its_size
from ..backbones.identity import is_hub_name
from ..checks import Rule, instance, or_none
from ..errors import AdapterError, AdapterMismatchError, VPTWarning, renamed
from ..files import __version__
from ..hosts import host_and_prompts
from ..inject import count_parameters
from ..preprocessing import describe_preprocessing, image_processor, per_channel, timm_transform
from .backbone import (
    build_backbone,
    check_name,
    default_processor,
    loads_by_name,
    match_head,
)
from .card import LIBRARY, write_card

_CALL = "push_task_adapter"
_LOAD = "load_backbone_with_adapter"
_HUB_IDS = Rule(
    "a Hub id 'owner/name', or a list of them",
    lambda v: isinstance(v, Sequence) and all(isinstance(name, str) for name in v),
)
_HUB_NAME = Rule(
    "the name of a repository, 'owner/name'", lambda v: isinstance(v, str) and is_hub_name(v)
)


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
            for an empty new repository, or a new branch without a new commit.
    """
    from huggingface_hub import HfApi

    _check_names(model, repo_id, base_model, base_revision)
    check_hub_options(_CALL, revision, token)
    said = _said(task, labels, preprocessing, metrics)
    names: Any = [datasets] if isinstance(datasets, str) else datasets or []
    _HUB_IDS.check(_CALL, "datasets", names, AdapterError)
    with tempfile.TemporaryDirectory() as folder:
        adapter = _adapter_to_push(model, Path(folder), said, base_model, base_revision)
        data = adapter.path.read_bytes()
    _warn_if_lost(adapter)
    total = count_parameters(model).total if isinstance(model, nn.Module) else None
    api = HfApi(endpoint, token, library_name=LIBRARY, library_version=__version__)
    write: Any = partial(write_card, adapter, repo_id, license=license, datasets=names, total=total)
    # Once in vain, so that what is wrong here leaves no repository behind.
    _operations(data, adapter, write())
    errors = partial(hub_errors, _CALL, repo_id, token, pushing=True)
    with errors():
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit, former = _former_card(api, repo_id, revision, create_pr)
    card = write(former=former)
    with errors():
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
    check_strict(strict, _LOAD)
    if backbone is not None:
        check_name(backbone)
    hub: dict[str, Any] = {
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    path = find_adapter(source, call=_LOAD, revision=revision, **hub)
    adapter = read_adapter(path, _LOAD)
    made_for, images = adapter.metadata["backbone"], adapter.metadata["preprocessing"]
    name = made_for["hub_id"] if backbone is None else backbone
    _check_named(adapter, name, strict)
    at = made_for["revision"] if name == made_for["hub_id"] else None
    if images is not None:
        # Before anything large is downloaded.
        per_channel(images)
    model = backbone_for(adapter, name, revision=at, with_head=strict != "prompts", **hub)
    load_task_adapter(model, path, strict=strict)
    if images is None:
        processor = default_processor(made_for["library"], model, name, at, **hub)
        return model.eval(), _sized(processor, model)
    make = timm_transform if made_for["library"] == "timm" else image_processor
    return model.eval(), make(images)


def backbone_for(
    adapter: Adapter,
    name: str,
    *,
    library: str | None = None,
    with_head: bool = True,
    **options: Any,
) -> nn.Module:
    """Build a backbone by its name, for the images and with the head that an adapter calls for.

    Args:
        adapter: The adapter that is going to be loaded.
        name: Hub id, or timm's own name.
        library: "timm" or "transformers"; None: the adapter's.
        with_head: Whether its head is going to be loaded too.
        options: Of `build_backbone`.

    Raises:
        AdapterError: The model cannot be had.
    """
    made_for, images = adapter.metadata["backbone"], adapter.metadata["preprocessing"]
    own = library in (None, made_for["library"])
    sized = images is not None and "size" in images
    padded = adapter.spec.where.moves_image
    model = build_backbone(
        library or made_for["library"],
        name,
        architecture=made_for["architecture"] if own else None,
        image_size=tuple(images["size"]) if sized and not padded else None,
        classes=_classes(adapter) if with_head else None,
        **options,
    )
    if padded and sized:
        model = says_its_size(model, images["size"])
    if with_head:
        match_head(model, adapter)
    return model


def _check_named(adapter: Adapter, name: str | None, strict: bool | str) -> None:
    """Refuse an adapter whose backbone nobody names, and one that makes no model of one backbone.

    Raises:
        AdapterError: It is of the one kind.
        AdapterMismatchError: It is of the other.
    """
    made_for = adapter.metadata["backbone"]
    if name is None:
        raise AdapterError(
            _LOAD,
            f"it does not say which repository its backbone ({made_for['library']} "
            f"{made_for['architecture']}) comes from",
            "pass `backbone=`, or build the model yourself and call `load_task_adapter(model, "
            "...)`",
            path=adapter.path,
        )
    if kind_of(adapter).wraps and strict != "prompts":
        raise AdapterMismatchError(
            _LOAD,
            "it holds the decoder of a Segmenter, which a backbone has no place for",
            "build the backbone, and call `peft_vpt.segmentation.load_segmenter(backbone, source)`",
            path=adapter.path,
        )


def _classes(adapter: Adapter) -> int | None:
    """Return the number of outputs to build a model with, None where its head is replaced later."""
    classes = adapter.metadata["head"]["classes"] if kind_of(adapter).fixed else 0
    # More than the file holds is refused when it is loaded, so that no memory need go to it.
    return int(classes) if 0 < classes <= adapter.size_of_head() else None


def _sized(processor: Any, model: nn.Module) -> Any:
    """Let a transformers processor make images of the size that pixel prompts call for."""
    place = host_and_prompts(model, _LOAD)[1].place
    if place.image is not None and hasattr(processor, "image_mean"):
        height, width = place.image[1:]
        processor.size = {"height": height, "width": width}
        processor.do_center_crop = False
    return processor


def _warn_if_lost(adapter: Adapter) -> None:
    """Warn where nobody could load the adapter by its name, since a backbone's head is another."""
    head = adapter.metadata["head"]
    if adapter.metadata["backbone"]["hub_id"] is None or kind_of(adapter).wraps:
        return
    if not loads_by_name(adapter):
        kind = head.get("class") or "linear layer"
        told = AdapterError(
            _CALL,
            f"its head ({kind}, which reads {head['reads']!r}) is none that the backbone of that "
            "name can have, so `load_backbone_with_adapter`, and the card's code, will refuse it",
            "who builds such a model can call `load_task_adapter(model, ...)`",
        )
        warnings.warn(VPTWarning(told), stacklevel=3)


def _title(adapter: Adapter) -> str:
    return f"Task adapter {adapter.metadata['task'] or ''}".strip()


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
                problem = f"{repo_id}/README.md is not UTF-8: {error}"
                raise AdapterError(_CALL, problem, "Mend it first") from error
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
        problem = f"task, labels or metrics hold a character that no file can: {error}"
        raise AdapterError(_CALL, problem) from error
    return [CommitOperationAdd(name, content) for name, content in files.items()]


def _check_names(model: Any, repo_id: Any, base: Any, base_revision: Any) -> None:
    """Refuse arguments of a push that name nothing."""
    if isinstance(repo_id, nn.Module):
        raise AdapterError(
            _CALL,
            f"repo_id is a model ({type(repo_id).__name__}); are the arguments swapped?",
            "The model comes first: `push_task_adapter(model, 'owner/name')`",
        )
    _HUB_NAME.check(_CALL, "repo_id", repo_id, AdapterError)
    if not isinstance(model, nn.Module | str | Path):
        raise AdapterError(
            _CALL,
            "model must be a prompted model, or the path of a saved adapter, not of type "
            f"{type(model).__name__}",
        )
    or_none(_HUB_NAME).check(_CALL, "base_model", base, AdapterError)
    or_none(REVISION).check(_CALL, "base_revision", base_revision, AdapterError)


def _said(task: Any, labels: Any, preprocessing: Any, metrics: Any) -> dict[str, Any]:
    """Return what a push says of an adapter as plain values, without what it leaves out."""
    or_none(instance(str, "the name of the task as text")).check(_CALL, "task", task, AdapterError)
    check_labels(labels, _CALL)
    values = {
        "task": task,
        "labels": None if labels is None else list(labels),
        "preprocessing": describe_preprocessing(preprocessing, _CALL) if preprocessing else None,
        "metrics": None if metrics is None else plain_metrics(metrics, _CALL),
    }
    return {name: value for name, value in values.items() if value is not None}


def _adapter_to_push(
    model: nn.Module | str | Path,
    folder: Path,
    said: dict[str, Any],
    base: str | None,
    revision: str | None,
) -> Adapter:
    """Return the adapter as it goes up; a saved one is left as it is.

    Args:
        model: A prompted model, or a saved adapter.
        folder: An empty one, for files in between.
        said: From `_said`.
        base: Hub id of the backbone, or None.
        revision: Commit of its repository, or None.
    """
    if isinstance(model, nn.Module):
        # A file in between says nothing to anybody.
        with renamed(_CALL, path=None):
            path = save_task_adapter(model, folder)
    else:
        path = find_adapter(Path(model), call=_CALL)
    adapter = read_adapter(path, _CALL)
    metadata, head = adapter.metadata | said, adapter.metadata["head"]
    labels = metadata.pop("labels", None)
    if labels is not None:
        count = "no head to label" if head is None else f"{head['classes']} classes"
        if head is None or len(labels) != head["classes"]:
            problem = f"{len(labels)} names, and the adapter has {count}"
            raise AdapterError(_CALL, problem, given={"labels": ...})
        metadata["head"] = head | {"labels": labels}
    metadata["backbone"] = _named(metadata["backbone"], base, revision)
    if metadata == adapter.metadata:
        return adapter
    with renamed(_CALL, path=None):
        return read_adapter(write_adapter(folder / FILE_NAME, adapter.tensors, metadata), _CALL)


def _named(known: dict[str, Any], base: str | None, revision: str | None) -> dict[str, Any]:
    """Put the backbone's Hub name, where the call gives one, into its description."""
    if base is None and known["hub_id"] is None:
        problem = "the backbone's Hub name is not known, so the card cannot link it and nobody can "
        told = AdapterError(_CALL, f"{problem}load it by name", "give `base_model='owner/name'`")
        warnings.warn(VPTWarning(told), stacklevel=4)
    other = base is not None and base != known["hub_id"]
    at = revision or (None if other else known["revision"])
    if at is None and known["hub_id"] and not other:
        # A guess that a local save, the same bytes for the same adapter, does not make.
        at = cached_revision(known["hub_id"])
    return known | {"hub_id": base or known["hub_id"], "revision": at}
