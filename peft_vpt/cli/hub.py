"""`push` and `pull`: adapters to and from the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import Offline, Revision, quiet_stdout

HubId = Annotated[
    str, typer.Argument(metavar="HUB_ID", help="owner/name on the Hub.", show_default=False)
]


def push(
    source: Annotated[
        str,
        typer.Argument(metavar="FILE|FOLDER", help="A saved task adapter.", show_default=False),
    ],
    hub_id: HubId,
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="For a new repository.", show_default=False),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request in place of a commit.")
    ] = False,
    license: Annotated[
        str | None, typer.Option(help="Licence id for the card, such as apache-2.0.")
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="Dataset id for the card; may be repeated.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the backbone, where the file does not name it.")
    ] = None,
) -> None:
    """Push an adapter to the Hub with its card, and print the URL."""
    from ..hub import push_task_adapter

    with quiet_stdout():
        url = push_task_adapter(
            Path(source),
            hub_id,
            private=private,
            revision=revision,
            commit_message=message,
            create_pr=create_pr,
            license=license,
            datasets=dataset,
            base_model=base_model,
        )
    print(url)


def pull(
    hub_id: HubId,
    to: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER|FILE", help="Default: a folder called as the repository, here."
        ),
    ] = None,
    revision: Revision = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    offline: Offline = False,
) -> None:
    """Copy an adapter from the Hub into a folder, whole or not at all, and print its path."""
    from ..adapter_file import FILE_NAME, read_adapter
    from ..errors import AdapterError
    from ..source import download
    from ..whole_file import replace_file

    call = "peft-vpt pull"
    target = (Path(hub_id.rpartition("/")[2]) if to is None else to).expanduser()
    if target.suffix != ".safetensors":
        target = target / FILE_NAME
    if target.exists() and not force:
        raise AdapterError(f"{call}: {target} is there already; --force replaces it.")
    with quiet_stdout():
        path = download(hub_id, FILE_NAME, call=call, revision=revision, local_files_only=offline)
    read_adapter(path, call)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, path.read_bytes())
    except OSError as error:
        raise AdapterError(f"{call}: {target}: cannot be written: {error}") from error
    print(target)
