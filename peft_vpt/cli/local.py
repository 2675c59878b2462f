"""A backbone that an adapter was made for, from its name or from a file of weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .sources import build, preprocessing_of

if TYPE_CHECKING:
    from torch import nn

    from ..adapter_file import Adapter
    from ..data import Transform


def need_name(call: str, adapter: Adapter, name: str | None) -> None:
    """Raise where nobody says which backbone it is.

    Raises:
        AdapterError: Neither the adapter nor the caller does.
    """
    from ..errors import AdapterError

    made_for = adapter.metadata["backbone"]
    if name is None and made_for["hub_id"] is None:
        raise AdapterError(
            f"{call}: {adapter.path}: does not say where its backbone ({made_for['library']} "
            f"{made_for['architecture']}) comes from; give --model NAME, and --weights FILE for "
            "weights of a timm model that are in a file."
        )


def from_weights(
    call: str, adapter: Adapter, name: str | None, weights: Path
) -> tuple[nn.Module, Transform]:
    """Return a timm backbone with an adapter, its weights from a file, and its transform of images.

    Raises:
        VPTError: The adapter is of another library, or does not fit.
    """
    from ..adapters import load_task_adapter
    from ..backbones.image_model import says_its_size
    from ..data import Transform, eval_transform
    from ..errors import AdapterError
    from ..match_head import match_head

    made_for, images = adapter.metadata["backbone"], adapter.metadata["preprocessing"] or {}
    if made_for["library"] != "timm":
        raise AdapterError(
            f"{call}: {adapter.path}: was made for a {made_for['library']} model, and --weights "
            "is a file of a timm model's weights; give --model NAME alone."
        )
    # The name on the Hub says more than the architecture: the size of images, say.
    named = made_for["hub_id"] or ""
    known = named if named.startswith("timm/") else made_for["architecture"]
    size = images.get("size")
    padded = adapter.spec.location == "pad"
    edges = None if size is None or padded else (size[0], size[1])
    network = build(name or known, weights, edges, True)
    match_head(network, adapter)
    network = says_its_size(network, size) if size else network
    load_task_adapter(network, adapter.path)
    if images:
        return network, Transform(images, "timm", train=False)
    return network, eval_transform(preprocessing_of(network), kind="timm")
