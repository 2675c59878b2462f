"""What a backbone says of itself: its names, its preprocessing, its label names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .anatomy import Encoder, ancestors, is_kind
from .heads import head_owner

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def describe_backbone(host: nn.Module, encoder: Encoder) -> dict[str, Any]:
    """Return library, architecture, Hub id, revision, widths per stage and depth."""
    widths = encoder.widths
    if encoder.library == "timm":
        architecture, name = _timm_names(host.get_submodule(encoder.path))
    else:
        architecture, name = _transformers_names(_outermost(host, encoder.path))
    hub_id, _, revision = name.partition("@")
    if not is_hub_name(hub_id):
        hub_id = revision = ""
    return {
        "library": encoder.library,
        "architecture": architecture,
        "hub_id": hub_id or None,
        "revision": revision or None,
        "dims": [widths[stage] for stage in sorted(widths)],
        "depth": encoder.depth,
    }


def is_hub_name(name: str) -> bool:
    """Tell whether a text can be the name of a Hub repository, `owner/name`."""
    return _HUB_NAME.fullmatch(name) is not None and ".." not in name and "--" not in name


def _timm_names(model: nn.Module) -> tuple[str, str]:
    """Return the architecture and the Hub id."""
    config = getattr(model, "pretrained_cfg", None) or {}
    architecture, hub_id = config.get("architecture"), config.get("hf_hub_id") or ""
    if hub_id.endswith("/"):
        hub_id += ".".join(filter(None, [str(architecture), config.get("tag")]))
    return architecture or type(model).__name__, hub_id


def _outermost(host: nn.Module, path: str) -> nn.Module:
    """Return the transformers model that an encoder belongs to: the one with the head, say."""
    around = (module for _, module in ancestors(host, path))
    models = [m for m in around if is_kind(m, "PreTrainedModel", "transformers")]
    return models[-1] if models else host.get_submodule(path)


def _transformers_names(model: nn.Module) -> tuple[str, str]:
    name = getattr(model.config, "_name_or_path", "") or ""
    # A local folder is a fact about one machine, not about the backbone.
    return type(model).__name__, "" if name and Path(name).exists() else name


def default_preprocessing(host: nn.Module, encoder: Encoder) -> dict[str, Any] | None:
    """Return what the backbone's configuration says about its input, or None."""
    model = host.get_submodule(encoder.path)
    config = getattr(model, "pretrained_cfg", None)
    if encoder.library != "timm" or not config:
        return None
    embed = getattr(model, "patch_embed", None)
    return describe_timm_config(config, getattr(embed, "img_size", None))


def describe_timm_config(config: Mapping[str, Any], size: Any = None) -> dict[str, Any] | None:
    """Return a timm data config in the words of the adapter file, None where they cannot say it.

    Args:
        config: `input_size`, `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`.
        size: Height and width, where they are not those of the config.
    """
    mode, share = config.get("crop_mode") or "center", float(config["crop_pct"])
    # Squeezed to more than the size and then cropped, or padded: rare, and without a word here.
    if mode not in ("center", "squash") or (mode == "squash" and share != 1.0):
        return None
    return {
        "size": [int(edge) for edge in size or config["input_size"][1:]],
        "mean": [float(x) for x in config["mean"]],
        "std": [float(x) for x in config["std"]],
        "interpolation": str(config["interpolation"]),
        "crop": None if mode == "squash" else share,
    }


def label_names(host: nn.Module, encoder: Encoder) -> list[str] | None:
    """Return the label names of a transformers config, or None where it only numbers them."""
    if encoder.library != "transformers":
        return None
    # A model with a decoder in place of a classifier names the labels itself.
    path = "" if encoder.head is None else head_owner(host, encoder.head.paths[0])
    owner = host.get_submodule(path)
    names = getattr(getattr(owner, "config", None), "id2label", None) or {}
    labels = [str(names[i]) for i in sorted(names)]
    numbered = all(label == f"LABEL_{i}" for i, label in enumerate(labels))
    return None if numbered else labels
