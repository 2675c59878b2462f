"""Building the pretrained backbone that an adapter names, from the Hub or its cache."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapter.file import Adapter
from ..adapter.head import kind_of
from ..adapter.source import download, hub_errors
from ..backbones.anatomy import Encoder
from ..backbones.find import encoder_for
from ..checks import one_of
from ..errors import AdapterError, UnsupportedArchitectureError, shown
from ..preprocessing import describe_preprocessing, timm_transform

_CALL = "load_backbone_with_adapter"
# In the order of preference. A pickle, which may run code, is not among them.
_TIMM_WEIGHTS = ("model.safetensors", "open_clip_model.safetensors")
_INDEX = "model.safetensors.index.json"
_WEIGHTS = ("model.safetensors", _INDEX)
_BUILD = "build the model yourself and call `load_task_adapter(model, ...)`"


def build_backbone(
    library: str | None,
    name: str,
    *,
    architecture: str | None = None,
    revision: str | None = None,
    weights: bool | str | Path = True,
    image_size: int | tuple[int, int] | None = None,
    classes: int | None = None,
    options: Mapping[str, Any] | None = None,
    otherwise: str = _BUILD,
    **hub: Any,
) -> nn.Module:
    """Build a timm or transformers model by its name, in eval mode.

    Args:
        library: "timm" or "transformers"; None: the one that the name is of, as `library_of` says.
        name: Hub id `owner/name`; for timm also an entry point name, `vit_tiny_patch16_224.augreg`.
        architecture: Class name of a transformers model; None: an image classification model.
        revision: Branch, tag or commit of the backbone's repository.
        weights: True: those of the Hub. False: random ones, which need no network for timm entry
            points. Otherwise a safetensors file of a timm model.
        image_size: Edge, or height and width, of the images, where it is not the pretraining's.
        classes: Outputs of a transformers model, whose head then has random weights where the
            repository's has another number.
        options: Further ones of `timm.create_model`.
        otherwise: What to do with a model of the other library, for the message.
        hub: `token`, `cache_dir`, `local_files_only` of huggingface_hub.

    Raises:
        AdapterError: The library is unknown or not installed, or the model cannot be had.
    """
    check_name(name)
    library = library or library_of(name)
    one_of("timm", "transformers").check(_CALL, "library", library, AdapterError)
    if not isinstance(weights, bool):
        _check_file(library, name, Path(weights))
    try:
        if library == "timm":
            size = (image_size, image_size) if isinstance(image_size, int) else image_size
            given = {**(options or {}), **({} if size is None else {"img_size": size})}
            return _timm(name, revision, weights, given, otherwise, hub).eval()
        pretrained = weights is True
        return _transformers(
            name, architecture, revision, pretrained, classes, otherwise, hub
        ).eval()
    except ModuleNotFoundError as error:
        problem = f"the backbone {name} needs {library}"
        raise AdapterError(_CALL, problem, f"pip install peft-vpt[{library}]") from error


def library_of(name: str) -> str:
    """Return the library whose model a name stands for: timm's own names have no other owner."""
    known = "/" not in name or name.startswith(("timm/", "hf-hub:", "hf_hub:"))
    return "timm" if known else "transformers"


def check_name(name: Any) -> None:
    """Refuse what cannot be the name of a backbone.

    Raises:
        AdapterError: It is no text, or empty.
    """
    if not isinstance(name, str) or not name:
        problem = "give the Hub id of the backbone, 'owner/name'"
        raise AdapterError(_CALL, problem, given={"backbone": name})


def _check_file(library: str, name: str, weights: Path) -> None:
    advice = "give the safetensors file of a timm model's weights"
    if library != "timm":
        raise AdapterError(_CALL, f"{name} is no timm model", advice, given={"weights": ...})
    if not weights.is_file():
        raise AdapterError(_CALL, f"{weights} is no file", advice, given={"weights": ...})


def default_processor(
    library: str, model: nn.Module, name: str, revision: str | None, **hub: Any
) -> Any:
    """Return the preprocessing that the backbone itself was made with.

    A timm transform, or the image processor of a transformers repository.
    """
    if library == "timm":
        import timm.data

        data: Any = timm.data
        return timm_transform(describe_preprocessing(data.resolve_data_config({}, model=model)))
    import transformers

    auto: Any = transformers.AutoImageProcessor
    with hub_errors(_CALL, f"{name}, its image processor", hub.get("token")):
        # Code out of a repository is never run, and nobody is asked whether it may.
        return auto.from_pretrained(name, revision=revision, trust_remote_code=False, **hub)


def _timm(
    name: str,
    revision: str | None,
    weights: bool | str | Path,
    options: dict[str, Any],
    otherwise: str,
    hub: dict[str, Any],
) -> nn.Module:
    import timm

    name = name.removeprefix("hf-hub:").removeprefix("hf_hub:")
    base, _, pinned = name.partition("@")
    revision = revision or pinned or None
    if not isinstance(weights, bool):
        entry = base.removeprefix("timm/")
        _check_known(entry)
        return _create(entry, options, pretrained=True, overlay={"file": str(weights)})
    if "/" not in base:
        _check_known(base)
        if not weights:
            return _create(base, options, pretrained=False)
        try:
            config = timm.get_pretrained_cfg(base)
        except RuntimeError:
            # The model is known, and has no weights of that tag.
            config = None
        if config is None or not config.hf_hub_id:
            near = _near(base, timm.list_pretrained())
            raise AdapterError(_CALL, f"timm knows no pretrained weights called {base!r}", near)
        owner = config.hf_hub_id
        base = f"{owner}{config.architecture}.{config.tag}" if owner.endswith("/") else owner
    folder = download(base, "config.json", call=_CALL, revision=revision, **hub).parent
    _check_config(folder / "config.json", base, otherwise)
    # The folder is named by the commit, so that a branch that moves meanwhile does not matter.
    revision = folder.name
    # This very file: a pickle beside it in the cache would come first in timm's own search.
    source: dict[str, Any] = {}
    if weights:
        file = str(_weights(base, revision, _TIMM_WEIGHTS, hub))
        source = {"file": file, "source": "", "state_dict": None}
    model = _create(f"local-dir:{folder}", options, pretrained=weights, overlay=source)
    cfg: Any = model.pretrained_cfg
    # As if timm had loaded it by its Hub id: the folder is a fact about one machine.
    cfg.pop("file", None)
    cfg.update(source="hf-hub", hf_hub_id=f"{base}@{revision}")
    return model


def _check_known(name: str) -> None:
    import timm

    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        tagged = timm.list_pretrained() if "." in name else timm.list_models()
        raise AdapterError(
            _CALL,
            f"timm knows no model {name!r}, and a repository of the Hub is 'owner/name'",
            _near(name, tagged),
        )


def _near(name: str, known: Iterable[str]) -> str:
    """Return a question that names what is close to a name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=5)
    return f"Did you mean {', '.join(close)}?" if close else ""


def _offline(hub: dict[str, Any]) -> bool:
    from huggingface_hub import constants

    return bool(hub.get("local_files_only") or constants.HF_HUB_OFFLINE)


def _check_config(path: Path, name: str, otherwise: str) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if isinstance(found, dict) and isinstance(found.get("architecture"), str):
        return
    theirs = isinstance(found, dict) and "model_type" in found
    problem = f"{name}: its config.json names no timm architecture, so it is no timm model"
    if theirs:
        raise AdapterError(_CALL, f"{problem}: it is one of transformers", otherwise)
    raise AdapterError(_CALL, f"{problem}: if it is one, {_BUILD}")


def _create(
    name: str,
    options: dict[str, Any],
    *,
    pretrained: bool,
    overlay: dict[str, Any] | None = None,
) -> nn.Module:
    """Create a timm model, for an image size where its kind has one."""
    import timm

    given: dict[str, Any] = {"pretrained": pretrained, "pretrained_cfg_overlay": overlay, **options}
    with hub_errors(_CALL, f"timm model {name!r}"):
        try:
            model: nn.Module = timm.create_model(name, **given)
        except TypeError:
            # Convolutional models take images of any size and no such argument.
            if given.pop("img_size", None) is None:
                raise
            model = timm.create_model(name, **given)
        return model


def _weights(name: str, revision: str | None, files: tuple[str, ...], hub: dict[str, Any]) -> Path:
    """Return the first of these files that a repository has."""
    missing: AdapterError | None = None
    for file in files:
        try:
            return download(name, file, call=_CALL, revision=revision, **hub)
        except AdapterError as error:
            kind = error.facts.get("reason", "")
            unreached = kind == "LocalEntryNotFoundError" and not _offline(hub)
            if unreached or "EntryNotFound" not in kind:
                raise
            missing = missing or error
    assert missing is not None
    if _offline(hub):
        raise missing
    raise _no_weights(name, files) from missing.__cause__


def _no_weights(name: str, files: tuple[str, ...]) -> AdapterError:
    return AdapterError(
        _CALL,
        f"{name}: it has no weights as safetensors ({', '.join(files)}), and others, such as "
        "pytorch_model.bin, are pickles, which may run code and are never opened",
        _BUILD,
    )


def _transformers(
    name: str,
    architecture: str | None,
    revision: str | None,
    pretrained: bool,
    classes: int | None,
    otherwise: str,
    hub: dict[str, Any],
) -> nn.Module:
    import transformers

    kind: Any = getattr(transformers, architecture or "AutoModelForImageClassification", None)
    auto = architecture is None
    # The name comes out of a file: nothing but a model class of the library is ever called.
    if not auto and not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        problem = f"the installed transformers has no model class {architecture!r}"
        raise AdapterError(_CALL, problem, f"update it, or {_BUILD}")
    what = f"{name}, {architecture or 'image classification model'}"
    with hub_errors(_CALL, what, hub.get("token")):
        options = {**hub, "revision": revision, "trust_remote_code": False}
        config = transformers.AutoConfig.from_pretrained(name, **options)
        if not auto:
            _check_kind(kind, config, name, otherwise)
        if classes is not None:
            config.num_labels = classes
        if pretrained:
            _check_safe(name, revision, config, hub)
            model: nn.Module = kind.from_pretrained(
                name,
                config=config,
                use_safetensors=True,
                ignore_mismatched_sizes=classes is not None,
                **options,
            )
            return model
        made: nn.Module = kind.from_config(config) if auto else kind(config)
        return made


def _check_safe(name: str, revision: str | None, config: Any, hub: dict[str, Any]) -> None:
    """Refuse a repository whose weights, or parts of them, are no safetensors.

    transformers opens a part as a pickle if its name, which the repository chooses, ends otherwise.
    """
    if Path(name).is_dir():
        # transformers prefers a folder to a repository of the same name.
        path = next((p for p in (Path(name) / file for file in _WEIGHTS) if p.is_file()), None)
        if path is None:
            raise _no_weights(name, _WEIGHTS)
    else:
        path = _weights(name, revision, _WEIGHTS, hub)
    parts = [str(getattr(config, "transformers_weights", None) or path.name)]
    if path.name == _INDEX:
        parts += map(str, json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    stray = [part for part in parts if part != _INDEX and not part.endswith(".safetensors")]
    if stray:
        raise AdapterError(
            _CALL,
            f"{name}: its weights are to be read from {shown(stray[0])}, which is no safetensors "
            "file; others may run code and are never opened",
            _BUILD,
        )


def _check_kind(kind: Any, config: Any, name: str, otherwise: str) -> None:
    """Refuse a class that is not of this repository: building it may take any time and memory."""
    parts = [type(config), *(getattr(config, "sub_configs", None) or {}).values()]
    if kind.config_class in parts:
        return
    if type(config).__name__ == "TimmWrapperConfig":
        problem = f"{name} is a model of timm, not of transformers"
        raise AdapterError(_CALL, problem, otherwise)
    raise AdapterError(
        _CALL,
        f"the adapter names the class {kind.__name__}, and {name} holds a {type(config).__name__}",
        "pass `backbone=` for another repository",
    )


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
    try:
        encoder = encoder_for(model, "pad")
    except UnsupportedArchitectureError:
        # Loading refuses this model and says why.
        return False
    if _takes_head(model, adapter):
        return True
    owner, head = model, adapter.metadata["head"]
    if hasattr(owner, "reset_classifier") and _holds(adapter, model, encoder):
        pool, pooling = head["reads"].partition(":")[0], adapter.spec.pooling
        kept = encoder.head is not None and encoder.reads(pooling) == head["reads"]
        with suppress(*_REFUSALS):
            owner.reset_classifier(  # type: ignore[operator]
                head["classes"], global_pool=None if kept else _POOLS.get(pool, pool)
            )
    return _takes_head(model, adapter)


def _holds(adapter: Adapter, model: nn.Module, encoder: Encoder) -> bool:
    """Tell whether a file holds a head as large as it says, before one takes that much memory."""
    width = 1 if encoder.head is None else encoder.head.width
    return (
        any(p.is_meta for p in model.parameters())
        or int(adapter.metadata["head"]["classes"]) <= adapter.size_of_head() // width
    )


def _takes_head(model: nn.Module, adapter: Adapter) -> bool:
    """Tell whether a model's head reads what the adapter's does, and can take its place."""
    about, encoder, fail = adapter.metadata["head"], encoder_for(model, "pad"), AdapterError
    try:
        kind_of(adapter).check(about, model, encoder, adapter.spec.pooling, partial(fail, _CALL))
    except AdapterError:
        return False
    return True


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
