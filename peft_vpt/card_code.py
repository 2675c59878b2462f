"""The code block of a model card: it runs as it stands where the backbone has a name on the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .adapter_file import Adapter
from .adapter_metadata import is_segmenter
from .decoder import READS

_IMPORTS = ["import torch", "from PIL import Image"]


def code_block(adapter: Adapter, repo_id: str) -> str:
    """Return Markdown: from the adapter's repository to what it says of one image.

    Args:
        adapter: The adapter that is pushed.
        repo_id: `owner/name`.
    """
    meta = adapter.metadata
    if meta["backbone"]["hub_id"] is None:
        lines = _unnamed(meta["backbone"], repo_id)
    elif is_segmenter(meta["head"]):
        lines = [*_segmenter(meta, repo_id), *_image(meta), *_pixels_by_class(meta)]
    elif meta["head"] is None:
        lines = [*_named(repo_id), *_image(meta), f"    output = {_output(meta)}"]
    elif meta["head"]["reads"] != READS:
        lines = [*_named(repo_id), *_image(meta), *_best_class(meta)]
    elif str(meta["head"].get("class")).endswith("ForSemanticSegmentation"):
        lines = [*_named(repo_id), *_image(meta), *_pixels_by_class(meta)]
    else:
        lines = [*_named(repo_id), *_image(meta), "    output = model(pixels)"]
    return "\n".join(["```python", *lines, "```"])


def _unnamed(made_for: Mapping[str, Any], repo_id: str) -> list[str]:
    """Return lines for a backbone that only its owner has: where its weights are is left open."""
    architecture = made_for["architecture"]
    if made_for["library"] == "timm":
        libraries, make = "timm", f'timm.create_model("{architecture}", checkpoint_path=weights)'
    else:
        libraries, make = "transformers", f"transformers.{architecture}.from_pretrained(weights)"
    return [
        f"import {libraries}",
        "from peft_vpt import load_task_adapter",
        "",
        'weights = "..."  # of the backbone that this adapter was made for; the file names none',
        f"model = {make}",
        f'load_task_adapter(model, "{repo_id}")',
    ]


def _named(repo_id: str) -> list[str]:
    return [
        *_IMPORTS,
        "from peft_vpt.hub import load_backbone_with_adapter",
        "",
        f'model, preprocess = load_backbone_with_adapter("{repo_id}")',
    ]


def _segmenter(meta: Mapping[str, Any], repo_id: str) -> list[str]:
    made_for, images = meta["backbone"], meta["preprocessing"] or {}
    library, name, at = made_for["library"], made_for["hub_id"], made_for["revision"]
    options = f'"{library}", "{name}"' + (f', revision="{at}"' if at else "")
    if library == "transformers":
        options += f', architecture="{made_for["architecture"]}"'
    elif "size" in images:
        options += f", image_size={tuple(images['size'])}"
    if {"size", "mean", "std"} <= set(images):
        make = "timm_transform" if library == "timm" else "image_processor"
        source, preprocess = f"preprocessing import {make}", f"{make}({dict(images)})"
    else:
        source = "pretrained import default_processor"
        preprocess = f'default_processor("{library}", backbone, "{name}", {at!r})'
    return [
        *_IMPORTS,
        f"from peft_vpt.{source}",
        "from peft_vpt.pretrained import build_backbone",
        "from peft_vpt.segmentation import load_segmenter",
        "",
        f"backbone = build_backbone({options})",
        f'model = load_segmenter(backbone, "{repo_id}")',
        f"preprocess = {preprocess}",
    ]


def _image(meta: Mapping[str, Any]) -> list[str]:
    height, width = (meta["preprocessing"] or {}).get("size", (224, 224))
    pixels = "preprocess(image).unsqueeze(0)"
    if meta["backbone"]["library"] == "transformers":
        pixels = 'preprocess(images=image, return_tensors="pt")["pixel_values"]'
    return [
        f'image = Image.new("RGB", ({width}, {height}))  # Image.open("image.jpg").convert("RGB")',
        f"pixels = {pixels}",
        "with torch.inference_mode():",
    ]


def _output(meta: Mapping[str, Any]) -> str:
    """Return an expression for the logits, or for what a model without a head gives."""
    plain = meta["backbone"]["library"] == "timm" or is_segmenter(meta["head"])
    return "model(pixels)" if plain or meta["head"] is None else "model(pixels).logits"


def _best_class(meta: Mapping[str, Any]) -> list[str]:
    return [
        f"    scores = {_output(meta)}.softmax(-1)[0]",
        "best = int(scores.argmax())",
        f"print({_label(meta, 'best')}, float(scores[best]))",
    ]


def _pixels_by_class(meta: Mapping[str, Any]) -> list[str]:
    return [
        f"    scores = {_output(meta)}[0]  # (classes, height, width)",
        "best = scores.argmax(0)",
        "for index in best.unique().tolist():",
        f"    print({_label(meta, 'index')}, float((best == index).float().mean()))",
    ]


def _label(meta: Mapping[str, Any], index: str) -> str:
    if meta["head"]["labels"] is None:
        return index
    labels = "model.labels" if is_segmenter(meta["head"]) else 'model.prompts.info["labels"]'
    return f"{labels}[{index}]"
