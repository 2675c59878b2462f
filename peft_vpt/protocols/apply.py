"""Transfer protocols: the paper's rivals of prompts, on the same models and in the same files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import nn

from ..backbones.anatomy import Encoder, first_floating
from ..backbones.find import encoder_for, is_convnet
from ..backbones.heads import class_count
from ..checks import instance, or_none
from ..errors import SpecError
from ..hosts import device_of, host_and_prompts, refuse_unfit
from ..inject import freeze, inject_prompts, inject_spec, watch_input
from ..rehearsal import rehearse_host
from ..spec import PromptSpec
from ..undo import unchanged_on_error
from .delta import Delta
from .modules import MlpHead, fill
from .options import OPTIONS, Protocol

Model = TypeVar("Model", bound=nn.Module)
_GENERATOR = or_none(instance(torch.Generator, "a torch.Generator"))


def apply_protocol(
    model: Model,
    name: str,
    *,
    num_classes: int | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Model:
    """Make a model train by one of the paper's protocols, in place; the same object comes back.

    "linear": the head. "full": everything. "partial-k": the last k blocks (stages of a ConvNet),
    what stands behind them, and the head. "mlp-k": a head of k layers. "bias": all bias terms.
    "adapter": a bottleneck behind every feed-forward layer. "sidetune": a small network beside the
    backbone. "cls": the CLS token. "vpt-shallow", "vpt-deep", "vpt+bias", "prompt-fixed": prompts.
    The head always trains. The backbone stays in eval mode but for what trains as a whole.
    A failed call leaves the model as it was.

    `save_task_adapter`, `load_task_adapter` and `remove_prompts` take the model as they take a
    prompted one.

    Args:
        model: As in `inject_prompts`; ConvNets too, where the protocol has a place in them.
        name: The protocol.
        num_classes: As in `inject_prompts`.
        generator: Seeds what is new.
        options: Of prompts: those of `inject_prompts`; on a ConvNet, `location` is "pad". Of
            "adapter": `reduction` (8). Of "full": `keep_original` (False); without it the model
            cannot be put back. Of "sidetune": `features`, a module from pixels to maps of 256
            channels.

    Returns:
        `model`.

    Raises:
        SpecError: An unknown name, a wrong option, or nothing would train.
        AlreadyPromptedError: A protocol or prompts are in place.
        UnsupportedArchitectureError: The protocol has no place in this model.

    Source: Jia et al. 2022, sections 4.1, A.1 and B.
    """
    refuse_unfit(model, "apply_protocol")
    options |= {"num_classes": num_classes, "generator": generator}
    with unchanged_on_error(model, ()):
        apply_inside(model, name, **options)
        _refuse_idle(model, name, num_classes)
    return model


def apply_inside(model: Model, name: str, **options: Any) -> Model:
    """Do the work of `apply_protocol`; what trains may be outside the model, a decoder say.

    A call that raises may leave the model changed.
    """
    protocol = Protocol(name, **{key: options.pop(key) for key in OPTIONS.keys() & options.keys()})
    refuse_unfit(model, "apply_protocol")
    new = {key: options.pop(key, None) for key in ("num_classes", "generator")}
    _GENERATOR.check("apply_protocol", "generator", new["generator"])
    encoder = encoder_for(model, "pad")
    if protocol.prompted:
        options = _prompt_options(model, encoder, protocol, options)
        return _apply(model, protocol, encoder, partial(inject_prompts, model, **options), **new)
    features = options.pop("features", None) if "features" in protocol.row.options else None
    if options:
        raise _wrong(protocol, f"has no options {', '.join(sorted(options))}")
    return apply_delta(model, protocol, PromptSpec.none(), encoder, features=features, **new)


def apply_delta(
    model: Model,
    protocol: Protocol,
    spec: PromptSpec,
    encoder: Encoder,
    *,
    head_bias: bool = True,
    **new: Any,
) -> Model:
    """Do the work of `apply_protocol` for a protocol and an anatomy that are at hand."""
    inject = partial(inject_spec, model, spec, encoder, head_bias=head_bias)
    return _apply(model, protocol, encoder, inject, **new)


def _apply(
    model: Model,
    protocol: Protocol,
    encoder: Encoder,
    inject: Callable[..., Model],
    *,
    num_classes: int | None = None,
    generator: torch.Generator | None = None,
    features: nn.Module | None = None,
) -> Model:
    """Inject prompts, or the `Prompts` that holds none, and what the protocol adds or moves."""
    delta = None
    if protocol.moves or not protocol.prompted:
        delta = Delta(protocol, model, encoder, features)
    if protocol.row.classifier:
        check_head_input(model, encoder, protocol)
    layers = protocol.head_layers
    if layers:
        num_classes = _classes(model, encoder, protocol, num_classes)
    inject(num_classes=num_classes, generator=generator)
    if layers and encoder.head is not None:
        linear: Any = model.get_submodule(encoder.head.paths[0])
        with torch.device("meta"):
            head = MlpHead(linear.in_features, linear.out_features, layers)
        fill(head, linear.weight.device, linear.weight.dtype, generator)
        model.set_submodule(encoder.head.paths[0], head.train(linear.training))
    return model if delta is None else _put(model, delta, encoder, generator)


def _put(model: Model, delta: Delta, encoder: Encoder, generator: torch.Generator | None) -> Model:
    """Attach the state of a protocol to a model that carries a `Prompts`, empty or not."""
    prompts = host_and_prompts(model, "apply_protocol")[1]
    dtype = first_floating(model.get_submodule(encoder.start)).dtype
    delta.materialise(device_of(model, encoder), dtype, generator)
    delta.attach(model, prompts)
    prompts.delta = delta
    if prompts.first_block is None and encoder.blocks and delta.protocol.row.inside:
        inside = [i for i, b in enumerate(encoder.blocks) if b.path in delta.trained_paths]
        prompts.first_block = min(inside, default=0)
        watch_input(prompts, model)
    freeze(model, encoder)
    prompts.train(model.training)
    return model


def _prompt_options(
    model: nn.Module, encoder: Encoder, protocol: Protocol, options: dict[str, Any]
) -> dict[str, Any]:
    """Return the options of `inject_prompts`: those given, and those that the name fixes."""
    fixed = protocol.row.prompts or {}
    for name in fixed.keys() & options.keys():
        if options[name] != fixed[name]:
            problem = f"the name says {name}={fixed[name]!r}"
            raise _wrong(protocol, problem, **{name: options[name]})
    unknown = sorted(options.keys() - (signature(inject_prompts).parameters.keys() - {"model"}))
    if unknown:
        raise _wrong(protocol, f"prompts have no options {', '.join(unknown)}")
    location = {"location": "pad"} if is_convnet(model, encoder) else {}
    return {**location, **fixed, **options}


def _refuse_idle(model: nn.Module, name: str, num_classes: int | None) -> None:
    """Raise where nothing at all would train."""
    if any(p.requires_grad for p in model.parameters()):
        return
    head = host_and_prompts(model, "apply_protocol")[1].encoder.head
    raise SpecError(
        "apply_protocol",
        f"nothing would train, since {type(model).__name__} has no classifier",
        "Use its image classification class, or a protocol that trains the backbone"
        if head is None
        else "give num_classes",
        given={"name": name, "num_classes": num_classes},
    )


def _classes(
    model: nn.Module, encoder: Encoder, protocol: Protocol, num_classes: int | None
) -> int:
    if encoder.head is None or encoder.headless:
        raise _wrong(protocol, f"{type(model).__name__} has {encoder.headless}")
    classes = class_count(model, encoder.head) if num_classes is None else num_classes
    if classes == 0:
        problem = "the model has no classes of its own"
        raise _wrong(protocol, problem, "give their number", num_classes=num_classes)
    return classes


def _wrong(protocol: Protocol, problem: str, advice: str = "", **given: Any) -> SpecError:
    given = {"name": protocol.name} | given
    return SpecError("apply_protocol", problem, advice, given=given)


def check_head_input(host: nn.Module, encoder: Encoder, protocol: Protocol) -> None:
    """Raise where the classifier is called with anything but one vector per image.

    Raises:
        UnsupportedArchitectureError: It is.
    """
    if encoder.head is None:
        return
    path = encoder.head.paths[0]
    shown = rehearse_host(host, encoder, [path])
    call = None if shown is None else shown.first(path)
    shape = () if call is None else call.given
    if shape and not (len(shape) == 2 or (len(shape) == 4 and shape[2:] == (1, 1))):
        raise protocol.misfit(
            f"the classifier {path} of {type(host).__name__} is called with {shape}, where one "
            "vector per image, (batch, features), is needed"
        )
