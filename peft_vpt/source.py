"""Where an adapter goes and comes from: a local file or folder, or a repository of the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .adapter_file import FILE_NAME
from .errors import AdapterError, VPTError

_LONGEST = 600
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Exceptions of huggingface_hub by name, most special first: what a user can do.
_ADVICE = {
    "GatedRepoError": "access must be granted first: ask for it on its page, then pass token=",
    "LocalTokenNotFoundError": "log in with `hf auth login`, or pass token=",
    "RepositoryNotFoundError": "there is no such repository, or it is private: check the name, log "
    "in with `hf auth login`, or pass token=",
    "RevisionNotFoundError": "it has no such branch, tag or commit: check revision=",
    "RemoteEntryNotFoundError": "the repository lacks this file; is it one of another library?",
    "OfflineModeIsEnabled": "unset HF_HUB_OFFLINE to go online",
    "LocalEntryNotFoundError": "the Hub was not reached and the file is not in the cache: go "
    "online once, or give a local folder",
    "EntryNotFoundError": "the repository lacks this file; is it one of another library?",
    "HFValidationError": "a repository is named 'owner/name'",
}


def file_at(path: str | Path, call: str) -> Path:
    """Return the file that an adapter is written to: `path` itself, or one in that folder.

    Raises:
        AdapterError: It is not a path.
    """
    try:
        target = Path(path).expanduser()
    except (RuntimeError, TypeError) as error:
        raise AdapterError(f"{call}: {path!r}: not a path: {error}") from error
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
        raise AdapterError(f"{call}: source must be a path or a Hub id, got {source!r}.")
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
        raise AdapterError(f"{call}: {str(source)!r}: cannot be looked up: {error}") from error
    if not found:
        raise AdapterError(
            f"{call}: {str(source)!r}: no such adapter; give a folder that holds {FILE_NAME}, "
            "the file itself, or a Hub id 'owner/name'."
        )
    return file


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

    with hub_errors(call, f"{repo_id}, file {name}"):
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
def hub_errors(call: str, what: str) -> Iterator[None]:
    """Turn exceptions of huggingface_hub and its HTTP client into `AdapterError`, chained.

    Args:
        call: The verb, for the message.
        what: Repository and file.
    """
    try:
        yield
    except (VPTError, MemoryError):
        raise
    except Exception as error:
        # The client's exceptions have no common base class below Exception.
        names = {kind.__name__ for kind in type(error).__mro__}
        advice = next((text for name, text in _ADVICE.items() if name in names), None)
        reason = f"{type(error).__name__}: {_lines(error)}"
        hint = f" What to do: {advice}." if advice else ""
        raise AdapterError(f"{call}: {what}: {reason}{hint}") from error


def _lines(error: Exception) -> str:
    """Return a message without its line breaks, for which some fill a page."""
    text = " ".join(str(error).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
