"""`cost`: latency and memory of training and inference, against the number of prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UnsupportedArchitectureError, VPTError
from .options import Model, Size, counts, need_folder
from .output import CALL, Json, complain, in_the_shell, write_json
from .predict import find_device

if TYPE_CHECKING:
    from torch import nn


# Prompts by kind: protocol and options. Tokens are what the paper calls VPT, keys and values what
# it calls VPT-prefix; both give one result.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "vpt-shallow": ("vpt-shallow", {}),
    "vpt-deep": ("vpt-deep", {}),
    "vpt-deep-token": ("vpt-deep", {"form": "token"}),
    "vpt-deep-kv": ("vpt-deep", {"form": "kv"}),
}
COLUMNS = {
    "name": "protocol",
    "train_ms": "training (ms)",
    "train_mb": "training (MB)",
    "inference_ms": "inference (ms)",
    "inference_mb": "inference (MB)",
    "train_gflops": "training (GFLOP)",
    "inference_gflops": "inference (GFLOP)",
    "trained": "trained (%)",
}


def cost(
    model: Model,
    lengths: Annotated[str, typer.Option(help="Numbers of prompts.")] = "1,50,100,200",
    kinds: Annotated[str, typer.Option(help=f"Of prompts: {', '.join(KINDS)}.")] = (
        "vpt-shallow,vpt-deep"
    ),
    protocols: Annotated[
        str, typer.Option(help="Beside them; '' for none.")
    ] = "full,linear,partial-1,bias,adapter",
    batch: Annotated[int, typer.Option(min=1, help="Images per step.")] = 8,
    size: Size = None,
    classes: Annotated[int, typer.Option(min=1)] = 100,
    rounds: Annotated[int, typer.Option(min=1, help="Timed; the median counts.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU.")] = None,
    device: Annotated[str | None, typer.Option(help="Default: a GPU if there is one.")] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="For cost.md, cost.json and figures.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure what prompts cost in time and memory, beside other protocols.

    Weights are random, costs do not depend on them. Every round runs all models in turn, so that a
    drift of the machine meets all alike. All of them are in memory at once.
    """
    import torch

    from ..experiments.report import rows_table

    if output is not None:
        need_folder(output)
    if threads is not None:
        torch.set_num_threads(threads)
    at = find_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = _known(kinds)
    numbers = counts(lengths, "--lengths")
    setting = _Setting(model, size, classes, at)
    pixels = torch.randn(batch, 3, *setting.size, device=at)
    labels = torch.randint(classes, (batch,), device=at)
    rows = _measure(setting, chosen, numbers, _split(protocols), (pixels, labels), rounds)
    told = f"{model}, batch {batch} of {setting.size[0]} x {setting.size[1]} pixels, {at.type}, "
    told += f"torch {torch.__version__}, median of {rounds} rounds, interleaved."
    if as_json:
        write_json({"about": told, "rows": rows})
    else:
        print(f"{told}\n\n{rows_table([_shown(row) for row in rows], COLUMNS)}")
    if output is not None:
        complain(f"written: {_write(output, told, rows)}")


class _Setting:
    """The backbone that is measured."""

    def __init__(self, model: str, size: int | None, classes: int, device: Any) -> None:
        self.model, self.edge, self.classes, self.device = model, size, classes, device
        from ..backbones.find import image_facts

        bare: Any = self.bare()
        library = "timm" if hasattr(bare, "pretrained_cfg") else "transformers"
        own: tuple[int, int] = image_facts(bare, library).sizes[0]
        self.size = own if size is None else (size, size)

    def bare(self) -> nn.Module:
        """Build the backbone with random weights."""
        from ..hub.backbone import build_backbone, library_of

        library = library_of(self.model)
        name = self.model.removeprefix("timm/") if library == "timm" else self.model
        return build_backbone(library, name, weights=False, image_size=self.edge)

    def under(self, protocol: str, **options: Any) -> nn.Module:
        """Return a new model under a protocol."""
        import torch

        from ..backbones.find import says_its_size
        from ..protocols.apply import apply_protocol

        torch.manual_seed(0)
        model = says_its_size(self.bare(), self.size)
        apply_protocol(model, protocol, num_classes=self.classes, **options)
        return model.to(self.device)


def _known(kinds: str) -> list[str]:
    """Return kinds of prompts that are separated by commas."""
    found = _split(kinds)
    wrong = [kind for kind in found if kind not in KINDS]
    if wrong:
        reason = f"{wrong[0]!r}: must be of {', '.join(KINDS)}"
        raise typer.BadParameter(reason, param_hint="--kinds")
    return found


def _split(names: str) -> list[str]:
    return [name for name in names.split(",") if name]


def _measure(
    setting: _Setting,
    kinds: list[str],
    lengths: list[int],
    protocols: list[str],
    batch: Any,
    rounds: int,
) -> list[dict[str, Any]]:
    from ..experiments.cost import against_length

    def make(kind: str, length: int) -> nn.Module:
        protocol, options = KINDS[kind]
        return setting.under(protocol, length=length, **options)

    kinds = [kind for kind in kinds if _taken(kind, lambda kind: make(kind, lengths[0]))]
    protocols = [name for name in protocols if _taken(name, setting.under)]
    if not kinds and not protocols:
        raise VPTError(CALL, "this backbone takes none of the rows")
    others = {name: setting.under(name) for name in protocols}
    return against_length(make, kinds, lengths, batch, others=others, rounds=rounds)


def _taken(name: str, make: Callable[[str], nn.Module]) -> bool:
    """Tell whether a backbone takes a row, and say so where it does not."""
    try:
        make(name)
    except UnsupportedArchitectureError as error:
        complain(f"left out: {name}: {in_the_shell(error)}")
        return False
    return True


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row in the units of the table."""
    sizes = {f"{key}_mb": row[f"{key}_bytes"] / 1e6 for key in ("train", "inference")}
    flops = {f"{key}_gflops": row[f"{key}_flops"] / 1e9 for key in ("train", "inference")}
    return {**row, **sizes, **flops, "trained": 100 * row["trainable"] / row["total"]}


def _write(folder: Path, about: str, rows: list[dict[str, Any]]) -> Path:
    """Write page, data and figures; return the page's path."""
    from ..experiments.plots import curve
    from ..experiments.report import rows_table

    folder.mkdir(parents=True, exist_ok=True)
    data = json.dumps({"about": about, "rows": rows}, indent=1)
    (folder / "cost.json").write_text(data, encoding="utf-8")
    # A figure is drawn from records; these have numbers with a unit in the place of shares.
    prompts = [row for row in map(_shown, rows) if row["length"]]
    records = [{"split": "cost", "metrics": row, **row} for row in prompts]
    figures = []
    for key, title in COLUMNS.items():
        if records and key.endswith(("_ms", "_mb")):
            drawn = curve(
                records, folder / key, x="length", metric=key, split="cost", scale=1.0, unit=title,
                label="prompts p", title=title,
            )  # fmt: skip
            figures.append(f"![{title}]({drawn.svg.name})")
    page = folder / "cost.md"
    parts = [
        "# Cost",
        about,
        rows_table([_shown(row) for row in rows], COLUMNS),
        _NOTE,
        *figures,
    ]
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


_NOTE = (
    "Times are per batch: GPU time between events, or CPU time of the process, summed over "
    "threads. Memory on a GPU is the peak of the allocator; on a CPU it is parameters and buffers, "
    "and for training also what autograd keeps for the backward pass."
)
