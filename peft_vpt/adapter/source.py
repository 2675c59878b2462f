"""Where an adapter goes and comes from: a local file or folder, or a repository of the Hub."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import AdapterError, VPTError, VPTWarning, cut, listing, shown
from .file import FILE_NAME, STATE_DICT

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Visible ASCII: what an HTTP header takes.
_TOKEN = re.compile("[!-~]+")
_BEARER = re.compile(r"(?i)\bbearer\s[^'\"]*")
# Files of a whole model, as transformers, timm and torch write them.
_WHOLE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_LOG_IN = "log in with `hf auth login`, or `pass token=`"
_UNREACHED = (
    "the Hub was not reached: check the network, and HF_ENDPOINT if it is set, then try again"
)
# What a user can do, by the exception's name, most special first.
_ADVICE = {
    "GatedRepoError": "access must be granted first: ask for it on its page, then `pass token=`",
    "LocalTokenNotFoundError": _LOG_IN,
    "RepositoryNotFoundError": "there is no such repository, or it is private: check the name, "
    f"{_LOG_IN}",
    "RevisionNotFoundError": "it has no such branch, tag or commit: check `revision=`",
    "RemoteEntryNotFoundError": "the repository lacks this file; is it one of another library?",
    "OfflineModeIsEnabled": "unset HF_HUB_OFFLINE to go online",
    "LocalEntryNotFoundError": "the Hub was not reached and the file is not in the cache: go "
    "online once, or give a local folder",
    "EntryNotFoundError": "the repository lacks this file; is it one of another library?",
    "HFValidationError": "a repository is named 'owner/name'",
    "TransportError": _UNREACHED,
    "ConnectionError": _UNREACHED,
}
# By the status of the answer, where the name says nothing.
_STATUS = {
    401: f"the token is not valid, or not any more: {_LOG_IN}",
    403: "the token does not allow it: use one that does, and check whose repository it is",
    412: "somebody committed in between: push again",
    429: "these are too many requests: wait a while, then try again",
}
_NO_ANSWER = "the Hub has a problem of its own: try again later"
# On a push, where a repository that is missing would have been made.
_PUSH = {
    401: f"nobody is logged in, or the token is not valid: {_LOG_IN}",
    403: "the token may not write there: use one with write access, and push to your own "
    "'owner/name' or to an organisation that lets you write",
}
_BAD_CARD = "mend what it names: license=, datasets=, metrics=, or README.md in the repository"


def file_at(path: str | Path, call: str) -> Path:
    """Return the file that an adapter is written to: `path` itself, or one in that folder.

    Raises:
        AdapterError: It is not a path.
    """
    try:
        target = Path(path).expanduser()
    except (RuntimeError, TypeError) as error:
        raise AdapterError(call, f"{shown(path)}: not a path: {error}") from error
    return target if target.suffix == ".safetensors" else target / FILE_NAME


def is_hub_id(source: str | Path) -> bool:
    """Tell whether a source names a Hub repository: `owner/name`, and nothing local.

    Local is what exists, starts with `.`, `/` or `~`, or ends in `.safetensors`.
    """
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source):
        return False
    return not (source.startswith(".") or source.endswith(".safetensors") or Path(source).exists())


def find_adapter(
    source: str | Path,
    *,
    call: str,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the local file behind a source, downloading that one file from the Hub if need be.

    Raises:
        AdapterError: There is no such file, the source is neither a path nor a Hub id, or the Hub
            refuses; huggingface_hub's own exception is its `__cause__`.
    """
    if not isinstance(source, str | Path):
        raise AdapterError(call, *_no_source(source))
    check_hub_options(call, revision, token)
    try:
        if is_hub_id(source):
            return download(
                str(source),
                FILE_NAME,
                call=call,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        path = Path(source).expanduser()
        file = path / FILE_NAME if path.is_dir() else path
        found = file.is_file()
    except (RuntimeError, ValueError, OSError) as error:
        if isinstance(error, VPTError):
            raise
        problem = f"cannot be looked up: {cut(str(error), 80)}"
        raise AdapterError(call, problem, path=_whole(source)) from error
    if not found:
        raise AdapterError(
            call,
            "no such adapter",
            f"give a folder that holds {FILE_NAME}, the file itself, or a Hub id "
            f"'owner/name'.{_held(path)}",
            path=_whole(source),
        )
    if revision is not None:
        told = AdapterError(
            call,
            f"`revision={revision!r}` is of no use: {_whole(source)} is a local file, and only a "
            "repository of the Hub has revisions",
        )
        warnings.warn(VPTWarning(told), stacklevel=3)
    return file


def check_hub_options(call: str, revision: Any = None, token: Any = None) -> None:
    """Refuse a revision or a token that no Hub takes.

    Raises:
        AdapterError: One is of the wrong type, or the token could not be sent. It is not quoted.
    """
    if revision is not None and not (isinstance(revision, str) and revision):
        problem = "give the name of a branch or tag, or a commit"
        raise AdapterError(call, problem, given={"revision": revision})
    if token is not None and not isinstance(token, bool | str):
        raise AdapterError(
            call,
            f"got a {type(token).__name__}",
            "give the token as text, True for the one that is logged in, or False for none",
            given={"token": ...},
        )
    if isinstance(token, str) and not _TOKEN.fullmatch(token):
        raise AdapterError(
            call,
            "it is empty, or holds white space or characters that no token has, a line break at "
            "its end perhaps",
            "pass `token.strip()`",
            given={"token": ...},
        )


def _whole(source: str | Path) -> str:
    """Return a path for a message: without its end it would be of no use."""
    return cut(repr(str(source)))


def _no_source(source: Any) -> tuple[str, str]:
    """Say what was given in the place of a source, and what to do."""
    kind = type(source).__name__
    if isinstance(source, nn.Module):
        return (
            f"source is a model ({kind}); are the arguments swapped?",
            "The model comes first, then the adapter: `load_task_adapter(model, source)`",
        )
    problem = f"source must be a path or a Hub id 'owner/name', not of type {kind}"
    return problem, STATE_DICT if isinstance(source, Mapping) else ""


def _held(path: Path) -> str:
    """Say what a folder without an adapter holds, and what to do if it is a whole model."""
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except (OSError, ValueError):
        # It is no folder, or no path at all.
        return ""
    # Those that tell most first.
    names.sort(key=lambda name: name not in _WHOLE)
    listed = listing(names, most=5)
    hint = f" {names[0]} is a model's weights: {STATE_DICT}." if set(names) & set(_WHOLE) else ""
    return f" This folder holds {cut(listed) or 'nothing'}.{hint}"


def download(
    repo_id: str,
    name: str,
    *,
    call: str,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return one file of a Hub repository, from the cache where it holds the newest.

    Raises:
        AdapterError: The Hub refuses or is not reached.
    """
    from huggingface_hub import hf_hub_download

    with hub_errors(call, f"{repo_id}, file {name}", token):
        path = hf_hub_download(
            repo_id,
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    return Path(path)


def cached_revision(repo_id: str) -> str | None:
    """Return the commit of a Hub repository in the local cache, if it holds exactly one.

    A model does not say which commit its weights came from; with several there is no telling.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    try:
        folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model")
        commits = [path.name for path in (folder / "snapshots").iterdir()]
    except (OSError, ValueError):
        return None
    return commits[0] if len(commits) == 1 else None


@contextmanager
def hub_errors(
    call: str, what: str, token: str | bool | None = None, *, pushing: bool = False
) -> Iterator[None]:
    """Turn exceptions of huggingface_hub and its HTTP client into `AdapterError`, chained.

    Args:
        call: The verb, for the message.
        what: Repository and file.
        token: What no message may hold. Where its traceback would, the exception is not chained.
        pushing: Whether this is about writing, for the advice.
    """
    try:
        yield
    except (VPTError, MemoryError):
        raise
    except Exception as error:
        # The client's exceptions have no common base class below Exception.
        advice = _advice(error, pushing=pushing)
        trace = "".join(traceback.format_exception(error))
        raise AdapterError(
            call,
            f"{what}: {type(error).__name__}: {cut(_without(str(error), token))}",
            f"What to do: {advice}" if advice else "",
            reason=type(error).__name__,
        ) from (error if _without(trace, token) == trace else None)


def _without(text: str, token: str | bool | None) -> str:
    """Return a text without the token that it may hold."""
    text = _BEARER.sub("Bearer ***", text)
    return text.replace(token, "***") if isinstance(token, str) and token else text


def _advice(error: BaseException | None, *, pushing: bool) -> str | None:
    """Return what a user can do about an exception, or about the one that it came from."""
    while error is not None:
        names = {kind.__name__ for kind in type(error).__mro__}
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if pushing and status in _PUSH:
            return _PUSH[status]
        by_name = next((text for name, text in _ADVICE.items() if name in names), None)
        if by_name or status in _STATUS:
            return by_name or _STATUS[status]
        if status >= 500:
            return _NO_ANSWER
        if pushing and "README.md" in str(error):
            return _BAD_CARD
        error = error.__cause__
    return None
