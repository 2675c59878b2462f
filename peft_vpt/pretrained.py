"""Building the pretrained backbone that an adapter names, from the Hub or its cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from .errors import AdapterError, VPTError
from .preprocessing import describe_preprocessing, timm_transform
from .source import download, hub_errors

_CALL = "load_backbone_with_adapter"
# In the order in which timm itself looks for them. A pickle, which may run code, is not among them.
_WEIGHTS = ("model.safetensors", "open_clip_model.safetensors")


def build_backbone(
    library: str,
    name: str,
    *,
    architecture: str | None = None,
    revision: str | None = None,
    pretrained: bool = True,
    image_size: tuple[int, int] | None = None,
    **hub: Any,
) -> nn.Module:
    """Build a timm or transformers model by its Hub id, in eval mode.

    Args:
        library: "timm" or "transformers".
        name: Hub id `owner/name`; for timm also an entry point name, `vit_tiny_patch16_224.augreg`.
        architecture: Class name of a transformers model; None: an image classification model.
        revision: Branch, tag or commit of the backbone's repository.
        pretrained: Whether weights are loaded. False needs no network for timm entry points.
        image_size: Height and width of the images, where they are not the pretraining's.
        hub: `token`, `cache_dir`, `local_files_only` of huggingface_hub.

    Raises:
        AdapterError: The library is unknown or not installed, or the model cannot be had.
    """
    if library not in ("timm", "transformers"):
        raise AdapterError(f"{_CALL}: backbone library {library!r}: must be timm or transformers.")
    try:
        if library == "timm":
            return _timm(name, revision, pretrained, image_size, hub).eval()
        return _transformers(name, architecture, revision, pretrained, hub).eval()
    except ModuleNotFoundError as error:
        raise AdapterError(
            f"{_CALL}: the backbone {name} needs {library}: pip install peft-vpt[{library}]."
        ) from error


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
    with hub_errors(_CALL, f"{name}, its image processor"):
        # Code out of a repository is never run, and nobody is asked whether it may.
        return auto.from_pretrained(name, revision=revision, trust_remote_code=False, **hub)


def _timm(
    name: str,
    revision: str | None,
    pretrained: bool,
    size: tuple[int, int] | None,
    hub: dict[str, Any],
) -> nn.Module:
    import timm

    name = name.removeprefix("hf-hub:").removeprefix("hf_hub:")
    base, _, pinned = name.partition("@")
    revision = revision or pinned or None
    if "/" not in base:
        if not pretrained:
            return _create(base, size, pretrained=False)
        config = timm.get_pretrained_cfg(base)
        if config is None or not config.hf_hub_id:
            raise AdapterError(f"{_CALL}: timm knows no pretrained weights called {base!r}.")
        owner = config.hf_hub_id
        base = f"{owner}{config.architecture}.{config.tag}" if owner.endswith("/") else owner
    folder = download(base, "config.json", call=_CALL, revision=revision, **hub).parent
    _check_config(folder / "config.json", base)
    # The folder is named by the commit, so that a branch that moves meanwhile does not matter.
    revision = folder.name
    if pretrained:
        _weights(base, revision, hub)
    model = _create(f"local-dir:{folder}", size, pretrained=pretrained)
    cfg: Any = model.pretrained_cfg
    # As if timm had loaded it by its Hub id: the folder is a fact about one machine.
    cfg.pop("file", None)
    cfg.update(source="hf-hub", hf_hub_id=f"{base}@{revision}")
    return model


def _offline(hub: dict[str, Any]) -> bool:
    from huggingface_hub import constants

    return bool(hub.get("local_files_only") or constants.HF_HUB_OFFLINE)


def _check_config(path: Path, name: str) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("architecture"), str):
        raise AdapterError(
            f"{_CALL}: {name}: its config.json names no timm architecture; is it a model of "
            "another library?"
        )


def _create(name: str, size: tuple[int, int] | None, *, pretrained: bool) -> nn.Module:
    """Create a timm model for an image size, where its kind has one."""
    import timm

    with hub_errors(_CALL, f"timm.create_model({name!r})"):
        if size is not None:
            try:
                sized: nn.Module = timm.create_model(name, pretrained=pretrained, img_size=size)
                return sized
            except TypeError:
                # Convolutional models take images of any size and no such argument.
                pass
        model: nn.Module = timm.create_model(name, pretrained=pretrained)
        return model


def _weights(name: str, revision: str | None, hub: dict[str, Any]) -> Path:
    missing: VPTError | None = None
    for file in _WEIGHTS:
        try:
            return download(name, file, call=_CALL, revision=revision, **hub)
        except VPTError as error:
            if type(error.__cause__).__name__ == "LocalEntryNotFoundError" and not _offline(hub):
                raise
            if "EntryNotFound" not in type(error.__cause__).__name__:
                raise
            missing = missing or error
    assert missing is not None
    raise missing


def _transformers(
    name: str,
    architecture: str | None,
    revision: str | None,
    pretrained: bool,
    hub: dict[str, Any],
) -> nn.Module:
    import transformers

    kind: Any = getattr(transformers, architecture or "AutoModelForImageClassification", None)
    auto = architecture is None
    # The name comes out of a file: nothing but a model class of the library is ever called.
    if not auto and not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise AdapterError(
            f"{_CALL}: the installed transformers has no model class {architecture!r}; update it, "
            "or build the model yourself and call load_task_adapter(model, ...)."
        )
    with hub_errors(_CALL, f"{name}, {architecture or 'image classification model'}"):
        hub = {**hub, "revision": revision, "trust_remote_code": False}
        config = transformers.AutoConfig.from_pretrained(name, **hub)
        if not auto:
            _check_kind(kind, config, name)
        if pretrained:
            model: nn.Module = kind.from_pretrained(name, **hub)
            return model
        made: nn.Module = kind.from_config(config) if auto else kind(config)
        return made


def _check_kind(kind: Any, config: Any, name: str) -> None:
    """Refuse a class that is not of this repository: building it may take any time and memory."""
    parts = [type(config), *(getattr(config, "sub_configs", None) or {}).values()]
    if kind.config_class not in parts:
        raise AdapterError(
            f"{_CALL}: the adapter names the class {kind.__name__}, and {name} holds a "
            f"{type(config).__name__}; pass backbone= for another repository."
        )
