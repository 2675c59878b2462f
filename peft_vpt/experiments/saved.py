"""What the saved adapters of a comparison still give: ensembles of seeds, and t-SNE."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters import load_task_adapter
from ..data import loader
from ..errors import VPTError
from ..hosts import host_and_prompts
from ..training.metrics import classification_metrics
from .backbones import device
from .embeddings import features, tsne
from .ensemble import combine, ensemble_logits, member
from .plots import Figure, scatter
from .records import Record, make_record
from .run import TEST_BATCH, Build, Pixels
from .variants import file_name

# Enough to see classes apart; t-SNE takes minutes from about ten thousand points on.
_MOST_POINTS = 2000


def ensemble_record(final: Sequence[Record], pixels: Pixels, build: Build, folder: Path) -> Record:
    """Return the record of the adapters of several seeds together, judged on test.

    Probabilities are averaged. Prompts go through the model in one forward; protocols that change
    the backbone, one after the other.

    Args:
        final: Records of one row over its seeds.
        pixels: Images of the task.
        build: Makes the bare backbone.
        folder: Of all runs, below which the adapters lie.

    Raises:
        VPTError: An adapter is not there, or is of another run than its record.

    Source: Jia et al. 2022, appendix, Figure 15.
    """
    members = []
    for record in final:
        model = adapted(record, build, folder)
        members.append(member(model))
    logits, labels = [], []
    for images, target in loader(pixels.split("test"), None, batch_size=TEST_BATCH):
        logits.append(combine(ensemble_logits(model, members, images)).cpu())
        labels.append(target)
    metrics = classification_metrics(torch.cat(logits), torch.cat(labels))
    alone = [record["metrics"]["top1"] for record in final]
    together = {"members_mean_top1": sum(alone) / len(alone), "members_best_top1": max(alone)}
    return ensemble_stub(final) | {"metrics": metrics | together}


def ensemble_stub(final: Sequence[Record]) -> Record:
    """Return the record of an ensemble without its results."""
    first = final[0]
    recipe = {k: v for k, v in first["config"]["recipe"].items() if k != "seed"}
    return make_record(
        task=first["task"],
        group=first["group"],
        protocol=f"{first['protocol']} ensemble",
        backbone=first["backbone"],
        seed=first["seed"],
        split="test",
        preset=first.get("preset"),
        metrics={},
        trainable=sum(record["trainable"] or 0 for record in final),
        total=first["total"],
        stored_bytes=sum(record["stored_bytes"] or 0 for record in final),
        config=first["config"] | {"recipe": recipe, "members": [r["seed"] for r in final]},
        versions=first["versions"],
    )


def is_ensemble(record: Record) -> bool:
    """Tell whether a record is one of several adapters together."""
    return "members" in record["config"]


def adapter_of(record: Record, folder: Path) -> Path:
    """Return the folder of the adapter that a record is about.

    Args:
        record: Of a final run.
        folder: Of all runs.
    """
    # Older records do not name it.
    old = f"{record['task']}/{file_name(record['protocol'])}-{record['seed']}"
    return folder / (record.get("adapter") or old)


def adapted(record: Record, build: Build, folder: Path) -> nn.Module:
    """Return a new model with the adapter that a record is about.

    Args:
        record: Of a final run.
        build: Makes the bare backbone.
        folder: Of all runs.

    Raises:
        VPTError: The adapter is not there, or is of another run.
    """
    path = adapter_of(record, folder)
    what = f"the adapter of {record['protocol']!r}, seed {record['seed']}"
    advice = "Take its line out of the records, and run the comparison again."
    if not path.exists():
        raise VPTError(f"compare: {what} is not at {path}. {advice}")
    model = load_task_adapter(build(), path).to(device())
    found = host_and_prompts(model, "compare")[1].info["metrics"] or {}
    same = all(
        math.isclose(found.get(name, math.nan), record["metrics"][name], rel_tol=1e-9)
        for name in ("top1", "loss")
    )
    if not same:
        raise VPTError(f"compare: {path} is of another run than {what}. {advice}")
    return model


def draw_embeddings(record: Record, pixels: Pixels, build: Build, folder: Path) -> Figure:
    """Draw what the head of one final run receives for test images, in the plane.

    Args:
        record: Of the run.
        pixels: Images of the task.
        build: Makes the bare backbone.
        folder: Of all runs, where the figure goes too.

    Raises:
        VPTError: As `adapted`.

    Source: Jia et al. 2022, Figures 9 and 21.
    """
    model = adapted(record, build, folder)
    split = pixels.split("test")
    if len(split) > _MOST_POINTS:
        split = split.subset(sorted(random.Random(0).sample(range(len(split)), _MOST_POINTS)))
    found, labels = features(model, loader(split, None, batch_size=TEST_BATCH))
    points: Any = tsne(found)
    return scatter(
        points,
        labels.tolist(),
        folder / figure_name(record),
        names=pixels.task.classes,
        title=f"{record['protocol']}, {record['task']}",
    )


def figure_name(record: Record) -> str:
    """Return the name of the figure of a run's embeddings, without suffix; no other run has it."""
    return file_name(f"tsne-{record['task']}-{Path(adapter_of(record, Path())).name}")
