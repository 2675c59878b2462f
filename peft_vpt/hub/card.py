"""The model card of a task adapter, written from the file itself, for the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..adapter.file import FILE_NAME, Adapter
from ..adapter.head import Kind, kind_of
from ..errors import AdapterError, listing

LIBRARY = "peft-vpt"
_TOTAL = re.compile(r"^\| trained parameters \| ([\d,]+) of ([\d,]+) ", re.MULTILINE)
_MARK = re.compile(r"\n<!-- written by peft_vpt, text ([0-9a-f]{16}) -->\n*$")


def write_card(
    adapter: Adapter,
    repo_id: str,
    *,
    former: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    total: int | None = None,
) -> str:
    """Return the README of an adapter's repository.

    Args:
        adapter: The adapter that is pushed.
        repo_id: `owner/name`.
        former: The README that is there. Its metadata is merged; its text is kept where somebody
            edited it, and written anew where it is still ours.
        license: Licence id of the Hub, `apache-2.0` say.
        datasets: Dataset ids of the Hub.
        total: Number of parameters of backbone, prompts and head; None where it is not known.

    Raises:
        AdapterError: The metadata of `former` is not YAML.
    """
    old = _read(former, repo_id)
    known = dict(vars(old.data)) if old is not None else {}
    # Without a dataset in this call, results belong to the one that the card names.
    own = _metadata(adapter, repo_id, license, datasets or _list(known.get("datasets")))
    if total is None and old is not None and not _edited(old.text):
        total = _former_total(adapter, known, old.text)
    text = _text(adapter, repo_id, total)
    if old is not None:
        own = _merge(known, own)
        if _edited(old.text):
            text = old.text.lstrip("\n")
    return f"---\n{_yaml(own)}---\n\n{text}"


def _read(former: str | None, repo_id: str) -> Any:
    from huggingface_hub import RepoCard

    try:
        return RepoCard(former.removeprefix("\ufeff")) if former else None
    except Exception as error:
        # A YAML error of one of two libraries, or a ValueError.
        problem = f"the metadata of {repo_id}/README.md cannot be read: {error}"
        raise AdapterError(
            "push_task_adapter", problem, "Mend or delete that file first"
        ) from error


def _yaml(values: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))


def _metadata(
    adapter: Adapter, repo_id: str, license: str | None, datasets: Sequence[str]
) -> dict[str, Any]:
    """Return the card's metadata, in the words of the Hub."""
    from huggingface_hub import EvalResult, ModelCardData

    meta = adapter.metadata
    task = kind_of(adapter).task(meta["head"])
    name = meta["task"] or "task"
    numbers = _numbers(meta["metrics"])
    results = [
        EvalResult(
            task_type=task or "other",
            dataset_type=datasets[0] if datasets else re.sub(r"[^\w./-]+", "-", name),
            dataset_name=name,
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in numbers.items()
    ]
    base = meta["backbone"]["hub_id"]
    relation: dict[str, Any] = (
        {"base_model": base, "base_model_relation": "adapter"} if base else {}
    )
    data: Any = ModelCardData(
        library_name=LIBRARY,
        license=license,
        datasets=list(datasets) or None,
        metrics=list(numbers) or None,
        pipeline_tag=task,
        tags=[LIBRARY, "visual-prompt-tuning", meta["backbone"]["library"]],
        eval_results=results or None,
        **(relation | ({"model_name": repo_id.split("/")[-1]} if results else {})),
    )
    return dict(data.to_dict())


def _numbers(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    found = (metrics or {}).items()
    return {k: v for k, v in found if isinstance(v, int | float) and not isinstance(v, bool)}


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Lay new metadata over what is there: lists are united, what we do not know is kept."""
    merged = old | new
    for name in ("tags", "datasets", "metrics"):
        both = [*_list(old.get(name)), *_list(new.get(name))]
        if both:
            merged[name] = [value for i, value in enumerate(both) if value not in both[:i]]
    kept = ["pipeline_tag"]
    if new.get("base_model") in _list(old.get("base_model")):
        kept += ["base_model", "base_model_relation"]
    merged |= {name: old[name] for name in kept if name in old}
    index = _united(_entries(old), _entries(new))
    if index:
        merged["model-index"] = index
    return merged


def _united(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return results under their models; of the same metric on the same data the new one stays."""
    united = [dict(entry) for entry in old]
    for entry in new:
        same = next((e for e in united if e.get("name") == entry["name"]), None)
        if same is None:
            united.append(entry)
            continue
        measured = {pair for result in entry["results"] for pair in _measured(result)}
        before = [_without(result, measured) for result in _list(same.get("results"))]
        same["results"] = [*(r for r in before if r is not None), *entry["results"]]
    return united


def _measured(result: Any) -> list[tuple[Any, Any]]:
    """Return what tells the numbers of a result from others: data and metric of each."""
    if not isinstance(result, dict):
        return []
    data = result.get("dataset")
    name = data.get("name") if isinstance(data, dict) else data
    metrics = _list(result.get("metrics"))
    return [(str(name), str(m.get("type"))) for m in metrics if isinstance(m, dict)]


def _without(result: Any, measured: set[tuple[Any, Any]]) -> Any:
    """Return a result without the numbers that were measured anew, None where none is left."""
    pairs = _measured(result)
    if measured.isdisjoint(pairs):
        return result
    metrics = [m for m in _list(result["metrics"]) if isinstance(m, dict)]
    kept = [m for m, pair in zip(metrics, pairs, strict=True) if pair not in measured]
    return {**result, "metrics": kept} if kept else None


def _former_total(adapter: Adapter, known: Mapping[str, Any], text: str) -> int | None:
    """Return the number of all parameters in a card of ours about the same backbone."""
    base, found = adapter.metadata["backbone"]["hub_id"], _TOTAL.search(text)
    if found is None or _list(known.get("base_model")) != _list(base):
        return None
    trained, total = (int(number.replace(",", "")) for number in found.groups())
    return total if trained == _trained(adapter) else None


def _trained(adapter: Adapter) -> int:
    return sum(tensor.numel() for tensor in adapter.tensors.values())


def _entries(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in _list(data.get("model-index")) if isinstance(entry, dict)]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _edited(text: str) -> bool:
    """Tell whether a card's text is somebody's own, by the digest that ends ours."""
    mark = _MARK.search(text)
    if mark is None:
        return bool(text.strip())
    return _digest(text[: mark.start()]) != mark.group(1)


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def _text(adapter: Adapter, repo_id: str, total: int | None) -> str:
    parts = [
        _introduction(adapter, repo_id),
        "## Use\n\n" + code_block(adapter, repo_id),
        "## What is in it\n\n" + _facts(adapter, total),
        _labels(adapter),
        "## How it was made\n\nVisual Prompt Tuning ([Jia et al., ECCV 2022]"
        "(https://arxiv.org/abs/2203.12119)) with the Python library `peft_vpt`, version "
        f"{adapter.metadata['library_version']}. {_backbone_weights(adapter)}",
    ]
    text = "\n\n".join(part for part in parts if part)
    return f"{text}\n\n<!-- written by peft_vpt, text {_digest(text)} -->\n"


def _backbone_weights(adapter: Adapter) -> str:
    protocol = adapter.protocol
    if protocol is not None and protocol.moves:
        return f"The weights of the backbone that `{protocol.name}` trained are in the file too."
    return "The backbone's own weights were not changed and are not in this repository."


def _introduction(adapter: Adapter, repo_id: str) -> str:
    meta = adapter.metadata
    base = meta["backbone"]["hub_id"]
    where = f"[{base}](https://huggingface.co/{base})" if base else "a backbone without a Hub name"
    task = f" for the task *{_plain(meta['task'])}*" if meta["task"] else ""
    what = "learnable prompts" if meta["spec"] is not None else "what a protocol trains"
    words = kind_of(adapter).words
    head = f" and a {words}" if words else ""
    return (
        f"# {repo_id.split('/')[-1]}\n\nA task adapter{task}: {what}{head} "
        f"for {where} (`{meta['backbone']['architecture']}`, "
        f"{meta['backbone']['library']})."
    )


def _facts(adapter: Adapter, total: int | None) -> str:
    meta, spec = adapter.metadata, adapter.spec
    trained = _trained(adapter)
    share = f" of {total:,} ({100 * trained / total:.2f} %)" if total else ""
    prompted = meta["spec"] is not None
    options = {k: v for k, v in spec.to_dict().items() if k != "layers"} if prompted else {}
    if "protocol" in meta:
        options = {"protocol": meta["protocol"]["name"]} | options
    head = meta["head"]
    rows = {
        "file": f"`{FILE_NAME}`, task adapter format {meta['format_version']}",
        "trained parameters": f"{trained:,}{share}",
        "prompts": ", ".join(f"`{k}={v!r}`" for k, v in options.items()),
        "blocks where prompts enter": _blocks(spec.layers) if prompted else None,
        "classes": None if head is None else head["classes"],
        "preprocessing": _inline(meta["preprocessing"]),
        "backbone revision": meta["backbone"]["revision"],
        "measured": _inline(meta["metrics"]),
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines])


def _blocks(layers: Any) -> str:
    return "" if layers is None else ", ".join(str(index) for index in layers)


def _inline(values: Mapping[str, Any] | None) -> str | None:
    if not values:
        return None
    return ", ".join(
        f"{_plain(k)} {_plain(json.dumps(v, ensure_ascii=False))}" for k, v in values.items()
    )


def _labels(adapter: Adapter) -> str:
    head = adapter.metadata["head"]
    if head is None or not head["labels"]:
        return ""
    return f"## Labels\n\n{listing([_plain(label) for label in head['labels']], most=50)}"


def _plain(text: str) -> str:
    """Take from a text what would break a table or start markup."""
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~&=$-])", r"\\\1", " ".join(text.split()))


_IMPORTS = ["import torch", "from PIL import Image"]


def code_block(adapter: Adapter, repo_id: str) -> str:
    """Return Markdown: from the adapter's repository to what it says of one image.

    Args:
        adapter: The adapter that is pushed.
        repo_id: `owner/name`.
    """
    meta, kind = adapter.metadata, kind_of(adapter)
    if meta["backbone"]["hub_id"] is None:
        lines = _unnamed(meta["backbone"], repo_id)
    else:
        start = _segmenter(meta, repo_id) if kind.wraps else _named(repo_id)
        lines = [*start, *_image(meta), *_answer(kind, meta)]
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


def _answer(kind: Kind, meta: Mapping[str, Any]) -> list[str]:
    """Return lines that run a model and say what comes out."""
    says = kind.output(meta["head"])
    timm = meta["backbone"]["library"] == "timm" or kind.wraps
    logits = "model(pixels)" if timm else "model(pixels).logits"
    labels = "model.labels" if kind.wraps else 'model.prompts.info["labels"]'
    named = meta["head"] is not None and meta["head"]["labels"] is not None
    if says == "label":
        return [
            f"    scores = {logits}.softmax(-1)[0]",
            "best = int(scores.argmax())",
            f"print({f'{labels}[best]' if named else 'best'}, float(scores[best]))",
        ]
    if says == "classes":
        index = f"{labels}[index]" if named else "index"
        return [
            f"    scores = {logits}[0]  # (classes, height, width)",
            "best = scores.argmax(0)",
            "for index in best.unique().tolist():",
            f"    print({index}, float((best == index).float().mean()))",
        ]
    return ["    output = model(pixels)"]
