"""Hosts: looking through wrappers, finding prompts, and refusing what can never carry them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import nn

from .backbones.anatomy import Encoder, first_floating
from .checks import integer, or_none
from .errors import AlreadyPromptedError, NotPromptedError, SpecError, UnsupportedArchitectureError
from .prompts import Prompts
from .spec import PromptSpec

_CALL = "inject_prompts"
_CLASSES = or_none(integer(0))
_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DDP, `torch.compile` and similar wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in _WRAPPERS:
            inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def parallel_wrapper(model: nn.Module) -> str | None:
    """Return the class of a wrapper that shares a model out to processes or devices, if any."""
    while isinstance(model, nn.Module):
        if type(model).__name__ in _WRAPPERS:
            return type(model).__name__
        model = getattr(model, "_orig_mod", None)  # type: ignore[assignment]
    return None


def carries(model: nn.Module) -> bool:
    """Tell whether a model carries prompts or a protocol."""
    return isinstance(getattr(unwrap(model), "prompts", None), Prompts)


def host_and_prompts(model: nn.Module, call: str) -> tuple[nn.Module, Prompts]:
    """Return what carries the prompts, and the prompts.

    Raises:
        NotPromptedError: There are none.
    """
    host = unwrap(model)
    prompts = getattr(host, "prompts", None)
    if not isinstance(prompts, Prompts):
        raise NotPromptedError(
            call, f"{type(host).__name__} carries no prompts", "Call `inject_prompts(model)` first"
        )
    return host, prompts


def bare(model: nn.Module) -> AbstractContextManager[None]:
    """Let a model run without the prompts that it may carry, inside a `with` block."""
    prompts = getattr(unwrap(model), "prompts", None)
    return prompts.disable() if isinstance(prompts, Prompts) else nullcontext()


def refuse_unfit(model: nn.Module, call: str = "inject_prompts") -> None:
    """Raise for what can never be a host: a wrapper, a prompted or a parameter-less model."""
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise UnsupportedArchitectureError(call, f"needs a torch.nn.Module, got {name}")
    wrapped = any(cls.__name__ in _WRAPPERS for cls in type(model).__mro__)
    compiled = (
        hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None
    )
    if wrapped or compiled or isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedArchitectureError(
            call,
            f"the model is wrapped or compiled already ({name})",
            "Inject into the bare model first, then wrap, shard or compile it",
        )
    inside = [path for path, module in model.named_modules() if isinstance(module, Prompts)]
    inside += [path for path, module in model.named_modules() if _serves_prompts(module)]
    if inside:
        problem = f"{name} carries prompts already (at {inside[0]!r})"
        raise AlreadyPromptedError(call, problem, "Call `remove_prompts(model)` first")
    if hasattr(model, "prompts"):
        raise UnsupportedArchitectureError(
            call,
            f"{name} has an attribute `prompts` of its own, the name under which prompts are "
            "registered",
            "Pass the encoder inside it, or rename the attribute",
        )
    if next(model.parameters(), None) is None:
        raise UnsupportedArchitectureError(
            call, f"{name} has no parameters, so there is nothing to prompt"
        )


def _serves_prompts(module: nn.Module) -> bool:
    """Tell whether a module meets prompts of its own host, or of a larger model around it."""
    owners = (getattr(value, "__self__", None) for value in vars(module).values())
    return any(isinstance(o, nn.Module) and hasattr(o, "is_prompt_form") for o in owners)


def check_head(
    model: nn.Module, encoder: Encoder, spec: PromptSpec, num_classes: int | None
) -> int:
    """Check `num_classes` and `pooling` against the model; return the new head's input width."""
    _CLASSES.check(_CALL, "num_classes", num_classes)
    if num_classes is not None:
        _check_replaceable(model, encoder, num_classes)
    if spec.pooling == "default":
        return 0 if encoder.head is None else encoder.head.width
    wrong = partial(SpecError, _CALL, given={"pooling": spec.pooling})
    if encoder.head is None or encoder.headless or not encoder.blocks:
        what = encoder.headless if encoder.blocks else "no tokens that are known"
        raise wrong(f"{type(model).__name__} has {what}, so pooling can only be default")
    if not encoder.known:
        raise wrong(
            f"it is not known which tokens of {encoder.family} are image tokens",
            "pooling can only be default",
        )
    if spec.pooling == "cls" and not encoder.has_cls:
        raise wrong("the model has no CLS token", "use 'image', 'prompt' or 'global'")
    end = max((leave for _, leave in spec.spans(encoder.depth)), default=0)
    if spec.pooling in ("prompt", "global") and end < encoder.depth - 1:
        raise wrong(
            f"no prompts are left behind the last block, since the last span ends with block {end}",
            f"let layers reach block {encoder.depth - 1}",
        )
    width = encoder.blocks[-1].width
    present = getattr(model.get_submodule(encoder.head.paths[0]), "in_features", width)
    if num_classes is None and present != width:
        raise wrong(
            f"the model's head takes {present} features and this pooling gives {width}",
            "set num_classes to get a new head",
        )
    return width


def _check_replaceable(model: nn.Module, encoder: Encoder, num_classes: int) -> None:
    """Raise unless the model has one simple classifier of its own."""
    wrong = partial(SpecError, _CALL, given={"num_classes": num_classes})
    head, host = encoder.head, type(model).__name__
    name = type(model.get_submodule(encoder.path)).__name__
    if head is None:
        raise wrong(
            f"{host} has no classifier to replace, so num_classes can only be None",
            "Use the model's image classification class",
        )
    if not head.simple:
        raise wrong(
            f"the classifier of {name} ({', '.join(head.paths)}) is more than one linear layer",
            "call the model's own reset_classifier(n) first, then inject with `num_classes=None`",
        )
    inner = encoder.path and encoder.library == "timm"
    if inner and isinstance(model.get_submodule(head.paths[0]), nn.Identity):
        raise wrong(
            f"{name} at {encoder.path!r} has no classifier of its own inside {host}",
            f"Pass the backbone, `inject_prompts(model.{encoder.path})`, and train the outer head "
            "as you like",
        )


def device_of(model: nn.Module, encoder: Encoder) -> torch.device:
    """Return where prompts go: with the first block, or where its offloaded weights will run."""
    start = model.get_submodule(encoder.start)
    device = first_floating(start).device
    hooks = [getattr(module, "_hf_hook", None) for module in start.modules()]
    targets = [getattr(hook, "execution_device", None) for hook in hooks]
    target = next((t for t in targets if t is not None), device)
    return torch.device(target) if device.type == "meta" else device


def check_blocks(encoder: Encoder, spec: PromptSpec) -> None:
    """Refuse form='kv' with dropout where a block has several attentions."""
    most = max((len(block.attentions) for block in encoder.blocks), default=0)
    if spec.form == "kv" and spec.dropout and most > 1:
        raise SpecError(
            _CALL,
            f"blocks of this model hold {most} attentions that must share one dropout mask, which "
            "the kv form cannot give",
            "use `form='auto'` or `dropout=0`",
            given={"form": "kv", "dropout": spec.dropout},
        )
