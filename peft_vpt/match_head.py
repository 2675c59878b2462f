"""The head of a backbone that was built by its name, made of the kind that an adapter needs."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn

from .adapter_file import Adapter
from .adapter_head import new_classes
from .backbones.anatomy import Encoder
from .backbones.heads import class_count
from .backbones.image_model import encoder_for
from .backbones.paths import module_at
from .errors import UnsupportedArchitectureError

# What the format calls the tokens that timm's pooling of another name takes.
_POOLS = {"cls": "token", "mean": "avg"}
# How timm's models say no to a pooling that they have not got: most by an assertion, some stumble.
_REFUSALS = (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError)


def match_head(model: nn.Module, adapter: Adapter) -> bool:
    """Bring a timm model's pooling and classifier to what an adapter's head was trained behind.

    Both are the model's own to choose, by `reset_classifier`; weights of the backbone stay.

    Args:
        model: Bare, of either library.
        adapter: The adapter that is going to be loaded.

    Returns:
        Whether the head is of that kind now, so that the adapter's fits into it.
    """
    head = adapter.metadata["head"]
    if head is None:
        return True
    try:
        encoder = encoder_for(model, "pad")
    except UnsupportedArchitectureError:
        # Loading refuses this model and says why.
        return False
    if _takes_head(model, adapter):
        return True
    if hasattr(model, "reset_classifier") and _holds(adapter, model, encoder):
        pool = head["reads"].partition(":")[0]
        kept = _reads(model, adapter) == head["reads"]
        owner: Any = model
        with suppress(*_REFUSALS):
            owner.reset_classifier(
                head["classes"], global_pool=None if kept else _POOLS.get(pool, pool)
            )
    return _takes_head(model, adapter)


def _holds(adapter: Adapter, model: nn.Module, encoder: Encoder) -> bool:
    """Tell whether a file holds a head as large as it says, before one takes that much memory."""
    width = 1 if encoder.head is None else encoder.head.width
    largest = head_elements(adapter) // width
    return (
        any(p.is_meta for p in model.parameters())
        or int(adapter.metadata["head"]["classes"]) <= largest
    )


def head_elements(adapter: Adapter) -> int:
    """Return how many numbers the head in a file has."""
    heads = (tensor for name, tensor in adapter.tensors.items() if name.startswith("head"))
    return sum(tensor.numel() for tensor in heads)


def _takes_head(model: nn.Module, adapter: Adapter) -> bool:
    """Tell whether a model's head reads what the adapter's does, and can take its place."""
    head = adapter.metadata["head"]
    encoder = encoder_for(model, "pad")
    if encoder.head is None or _reads(model, adapter) != head["reads"]:
        return False
    if new_classes(adapter, encoder, with_head=True) is not None:
        return True
    own = module_at(model, encoder.head.paths[0])
    same_class = head.get("class") in (None, type(own).__name__)
    return same_class and class_count(model, encoder.head) == head["classes"]


def _reads(model: nn.Module, adapter: Adapter) -> str | None:
    encoder = encoder_for(model, "pad")
    return None if encoder.head is None else encoder.reads(adapter.spec.pooling)


def loads_by_name(adapter: Adapter) -> bool:
    """Tell whether an adapter's head fits the model that its timm name stands for, as far as known.

    The model is built without weights or memory. False is a promise; True is the lack of a reason.
    """
    made_for, head = adapter.metadata["backbone"], adapter.metadata["head"]
    if made_for["library"] != "timm" or head is None:
        return True
    try:
        import timm

        owner, _, name = (made_for["hub_id"] or "").partition("/")
        with torch.device("meta"):
            model = timm.create_model(name if owner == "timm" else made_for["architecture"])
        # Here, one that is not known tells nothing.
        encoder_for(model, "pad")
        return match_head(model, adapter)
    except Exception:
        # Whatever it is (timm is not there or does not know the name, or the model cannot be built
        # without memory), it does not tell anything of the head, and a hint must stop no push.
        return True
