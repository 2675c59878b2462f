"""`info`, `check`, `push`, `pull`: what an adapter is, whether it fits, the way to the Hub."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import AdapterError, AdapterMismatchError, UnsupportedArchitectureError, listing
from .output import (
    CALL,
    Json,
    Offline,
    Revision,
    Source,
    in_the_shell,
    quiet_stdout,
    write_facts,
    write_json,
)

if TYPE_CHECKING:
    from ..adapter.file import Adapter


_OTHER = {"timm": "transformers", "transformers": "timm"}


class Library(str, Enum):
    """Where a backbone comes from."""

    timm = "timm"
    transformers = "transformers"


def info(
    source: Source, as_json: Json = False, revision: Revision = None, offline: Offline = False
) -> None:
    """Say what an adapter is, for which backbone, and how large.

    The JSON is the file's metadata, with its path and sizes.
    """
    adapter = find(source, revision, offline)
    sizes = _sizes(adapter)
    if as_json:
        write_json({**adapter.metadata, "path": str(adapter.path), "sizes": sizes})
    else:
        write_facts(_facts(adapter, sizes))


def check(
    source: Source,
    model: Annotated[str, typer.Option(metavar="NAME", help="timm name or Hub id of a backbone.")],
    library: Annotated[
        Library | None, typer.Option(help="Whose backbone it is; else the adapter's own library.")
    ] = None,
    no_weights: Annotated[
        bool, typer.Option("--no-weights", help="Compare structure only; download no weights.")
    ] = False,
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Say whether an adapter fits a backbone: its structure, and its weights by their fingerprint.

    Without weights, a Hub id still needs its configuration file.
    """
    from ..adapter.head import kind_of
    from ..adapter.verbs import load_task_adapter
    from ..hub.verbs import backbone_for

    adapter = find(source, revision, offline)
    if kind_of(adapter).wraps:
        raise AdapterError(
            CALL,
            "it holds the decoder of a Segmenter, which is made around a backbone",
            "load_segmenter in peft_vpt.segmentation makes all checks",
            path=adapter.path,
        )
    kind = adapter.metadata["backbone"]["library"] if library is None else library.value
    if library is None and (model.startswith(("timm/", "hf-hub:")) or "/" not in model):
        kind = "timm"
    with quiet_stdout(), warnings.catch_warnings():
        backbone = backbone_for(
            adapter,
            model,
            library=kind,
            weights=not no_weights,
            otherwise=f"give --library {_OTHER[kind]}",
            local_files_only=offline,
        )
        if no_weights:
            # All that it has to say is that weights differ.
            warnings.simplefilter("ignore", UserWarning)
        try:
            load_task_adapter(backbone, adapter.path, strict=not no_weights)
            reason = None
        except (AdapterMismatchError, UnsupportedArchitectureError) as error:
            reason = in_the_shell(error)
    if reason is not None:
        write_facts({"does not fit": reason})
        raise typer.Exit(1)
    write_facts({"fits": f"{model} (weights not compared)" if no_weights else model})


def find(source: str, revision: str | None, offline: bool) -> Adapter:
    """Read the adapter behind a path or a Hub id."""
    from ..adapter.file import read_adapter
    from ..adapter.source import find_adapter

    with quiet_stdout():
        path = find_adapter(source, call=CALL, revision=revision, local_files_only=offline)
    return read_adapter(path, CALL)


def need_classes(adapter: Adapter) -> None:
    """Refuse an adapter that does not classify images.

    Raises:
        AdapterError: It has no head, or a decoder.
    """
    from ..adapter.head import kind_of

    if adapter.metadata["head"] is None:
        raise AdapterError(CALL, "holds prompts without a head, so no classes", path=adapter.path)
    if not kind_of(adapter).classifies:
        raise AdapterError(
            CALL,
            "holds a decoder, which labels pixels and not images",
            "peft_vpt.segmentation runs it, as the card of a pushed adapter shows",
            path=adapter.path,
        )


def _sizes(adapter: Adapter) -> dict[str, Any]:
    counts = {name: tensor.numel() for name, tensor in adapter.tensors.items()}
    total = sum(counts.values())
    prompts = sum(count for name, count in counts.items() if name.startswith("prompts."))
    return {
        "file": adapter.path.stat().st_size,
        "parameters": {
            "prompts": prompts,
            "head": sum(n for name, n in counts.items() if name.startswith("head")),
            "total": total,
        },
        "tensors": {
            name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
            for name, tensor in sorted(adapter.tensors.items())
        },
    }


def _facts(adapter: Adapter, sizes: Mapping[str, Any]) -> dict[str, str]:
    from rich.filesize import decimal

    metadata, counts = adapter.metadata, sizes["parameters"]
    dtypes = ", ".join(sorted({tensor["dtype"] for tensor in sizes["tensors"].values()}))
    return {
        "file": f"{adapter.path}, {decimal(sizes['file'])}",
        "task": metadata["task"] or "",
        **_backbone(metadata["backbone"]),
        "protocol": _pairs(metadata.get("protocol")),
        "prompts": "" if metadata["spec"] is None else _prompts(metadata["spec"]),
        **_head(metadata["head"]),
        "preprocessing": _pairs(metadata["preprocessing"]),
        "metrics": _pairs(metadata["metrics"]),
        "parameters": f"{counts['total']:,} ({counts['prompts']:,} of prompts, {counts['head']:,} "
        f"of the head), {dtypes}",
        "format": f"version {metadata['format_version']}, written by peft_vpt "
        f"{metadata['library_version']}",
    }


def _backbone(backbone: Mapping[str, Any]) -> dict[str, str]:
    at = f" at {backbone['revision']}" if backbone["revision"] else ""
    return {
        "backbone": f"{backbone['library']} {backbone['architecture']}, {backbone['depth']} blocks "
        f"of width {', '.join(map(str, backbone['dims']))}",
        "base model": f"{backbone['hub_id']}{at}" if backbone["hub_id"] else "not named",
    }


def _prompts(spec: Mapping[str, Any]) -> str:
    # Blocks are listed as such; what follows are values that say something.
    layers = spec["layers"] or []
    where = f"blocks {', '.join(map(str, layers))}; " if layers else ""
    kind = "deep" if spec["deep"] else "shallow"
    rest = {k: v for k, v in spec.items() if k not in ("length", "deep", "layers")}
    return f"{kind}, length {spec['length']}, {where}{_pairs(rest)}"


def _head(head: Mapping[str, Any] | None) -> dict[str, str]:
    if head is None:
        return {"head": "none"}
    labels = head["labels"] or []
    return {
        "head": f"{head['classes']} classes, {head['in_features']} features, reads {head['reads']}",
        "labels": listing(labels, most=5),
    }


def _pairs(values: Mapping[str, Any] | None) -> str:
    return ", ".join(
        f"{name} {value}" for name, value in (values or {}).items() if value is not None
    )


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
    from ..hub.verbs import push_task_adapter

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
    from ..adapter.file import FILE_NAME, read_adapter
    from ..adapter.source import download
    from ..files import replace_file

    target = (Path(hub_id.rpartition("/")[2]) if to is None else to).expanduser()
    if target.suffix != ".safetensors":
        target = target / FILE_NAME
    if target.exists() and not force:
        raise AdapterError(CALL, f"{target} is there already", "--force replaces it")
    with quiet_stdout():
        path = download(hub_id, FILE_NAME, call=CALL, revision=revision, local_files_only=offline)
    read_adapter(path, CALL)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, path.read_bytes())
    except OSError as error:
        raise AdapterError(CALL, f"cannot be written: {error}", path=target) from error
    print(target)
