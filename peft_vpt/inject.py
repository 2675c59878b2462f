"""The verbs: inject, remove, disable, ask, count."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .backbones.anatomy import Encoder, first_floating
from .backbones.checkpointing import outermost_checkpoint
from .backbones.find import encoder_for
from .backbones.heads import replace_head
from .checks import instance, or_none
from .errors import SpecError, VPTError
from .forms.attach import Form, ForwardPatch
from .forms.kv import KeyValueForm
from .forms.pooling import Pooling
from .forms.selfcheck import check_carried, self_check
from .forms.token import OutputCut, TokenForm
from .hosts import check_blocks, check_head, device_of, host_and_prompts, refuse_unfit, unwrap
from .prompts import Place, Prompts, check_values, initialise
from .spec import NOWHERE, PromptSpec
from .undo import checkpoint_what_moves, remember, restore, unchanged_on_error

Model = TypeVar("Model", bound=nn.Module)
_INIT = instance(
    (str, Tensor, list, tuple),
    "a name, a tensor (entries, length, dim) or a list of tensors (length, dim)",
)
_GENERATOR = or_none(instance(torch.Generator, "a torch.Generator"))


class ParameterCount(NamedTuple):
    """Numbers of parameters."""

    trainable: int
    total: int


def inject_prompts(
    model: Model,
    length: int = 50,
    *,
    deep: bool = True,
    layers: Sequence[int] | None = None,
    location: str = "prepend",
    sharing: str = "none",
    init: str | Tensor | Sequence[Tensor] = "xavier",
    dropout: float | None = None,
    project: int | None = None,
    pooling: str = "default",
    train_prompts: bool = True,
    form: str = "auto",
    num_classes: int | None = None,
    generator: torch.Generator | None = None,
) -> Model:
    """Put learnable prompts into a vision model, in place, and freeze the rest.

    The same object comes back: class, `forward` signature and the backbone's `state_dict` keys are
    unchanged. Prompts and head train, nothing else does. All new state lives in `model.prompts`.
    Everything is checked first; a failed call leaves the model as it was.

    Args:
        model: A timm or transformers vision transformer, or a model that holds one; for
            location="pad" any image model of theirs, ConvNets included.
        length: Prompts per entry, the paper's p.
        deep: True: own prompts in front of every entry block, dropped behind it (VPT-deep).
            False: carried up to the next entry or the end of the encoder (VPT-shallow).
        layers: Strictly ascending block indices in front of which prompts enter. None: all blocks
            if `deep`, the first one if not.
        location: "prepend"; "add" (to the tokens of each entry block; length is 1 or the number of
            tokens); pixels, which are shallow: "prepend-pixel" (patches through the frozen patch
            projection), "concat-channel" (further channels with a convolution of their own), "pad"
            (a border of `length` pixels; for any model that takes an image).
        sharing: "none"; "inter" (one set for all layers); "intra" (one vector repeated);
            "all" (one vector).
        init: "xavier" (uniform, bound sqrt(6 / (3 ph pw + dim))), "normal" (std 0.02), "zeros", or
            values: a tensor `(entries, length, dim)` or a list of `(length, dim)`. Pixels:
            U(0, 1) normalised as the model's images, N(0, 1), zeros, a list of the tensors.
        dropout: Rate on prompts, one mask per sample. None: 0.1 if `deep`, 0.0 if not.
        project: Width of the prompts in front of a learned projection that the layers share.
        pooling: What the head receives: "default", "cls", "image", "prompt" or "global".
        train_prompts: False keeps prompts fixed, so that only the head trains.
        form: "auto"; "kv" (extra keys and values, for prompts that stay in one block); "token".
        num_classes: None trains the head that the model has; n replaces it; 0 removes it.
        generator: Seeds prompts and head.

    Returns:
        `model`.

    Raises:
        SpecError: A wrong option or pair of options.
        AlreadyPromptedError: The model carries prompts.
        UnsupportedArchitectureError: Prompts would not be exact in this model.

    Example:
        >>> import timm
        >>> from peft_vpt import count_parameters, inject_prompts
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=2)
        >>> model = inject_prompts(vit, length=5, num_classes=10)
        >>> model is vit, count_parameters(model).trainable
        (True, 3850)

    Source: Jia et al., "Visual Prompt Tuning", ECCV 2022.
    """
    _INIT.check("inject_prompts", "init", init)
    _GENERATOR.check("inject_prompts", "generator", generator)
    if isinstance(init, str) and init == "tensor":
        raise SpecError("inject_prompts", "give the tensor itself", given={"init": init})
    options = dict(
        length=length,
        deep=deep,
        layers=layers,
        location=location,
        sharing=sharing,
        init=init if isinstance(init, str) else "tensor",
        dropout=dropout,
        project=project,
        pooling=pooling,
        train_prompts=train_prompts,
        form=form,
    )
    spec = PromptSpec.from_dict(options)
    refuse_unfit(model)
    return inject_spec(
        model,
        spec,
        encoder_for(model, spec.location),
        values=None if isinstance(init, str) else init,
        num_classes=num_classes,
        generator=generator,
    )


def inject_spec(
    model: Model,
    spec: PromptSpec,
    encoder: Encoder,
    *,
    values: Any = None,
    num_classes: int | None = None,
    head_bias: bool = True,
    generator: torch.Generator | None = None,
) -> Model:
    """Do the work of `inject_prompts` for a spec and an anatomy that are at hand."""
    prompts, width = prepare(model, spec, encoder, num_classes=num_classes)
    device = device_of(model, encoder)
    if values is not None:
        values = check_values(values, prompts.place.shapes())
        if device.type == "meta":
            raise SpecError(
                "inject_prompts",
                "the model is on the meta device, where values are lost",
                "materialise it first",
                given={"init": ...},
            )
    start = model.get_submodule(encoder.start)
    prompts.to(device=device, dtype=first_floating(start).dtype)
    if not _on_meta(model):
        prompts.place.check_host(prompts, model)
    if prompts.checked or not (encoder.known and encoder.plain):
        check_carried(prompts, model)
    if device.type != "meta":
        initialise(prompts, values, generator)

    # From here on the model changes.
    with unchanged_on_error(model, ()):
        remember(prompts, model)
        if num_classes is not None and encoder.head is not None:
            prompts.undo["head"] = replace_head(
                model,
                encoder.head,
                int(num_classes),
                width=width,
                device=device,
                generator=generator,
                bias=head_bias,
            )
        model.prompts = prompts
        freeze(model, encoder)
        _attach(prompts, model)
        prompts.train(model.training)
    return model


def survey(host: nn.Module, encoder: Encoder, spec: PromptSpec) -> Place:
    """Find where prompts meet a model, which is left as it was.

    Args:
        host: The bare model, or a prompted one while its prompts are disabled.
        encoder: Its anatomy.
        spec: Resolved options.

    Raises:
        SpecError: A length that the model cannot take at this location.
        UnsupportedArchitectureError: The model offers no place for it.
    """
    module, _, name = spec.where.home.partition(".")
    kind = getattr(import_module(f"{__package__}.forms.{module}"), name)
    place: Place = kind.survey(host, encoder, spec, device_of(host, encoder))
    return place


def prepare(
    model: nn.Module, spec: PromptSpec, encoder: Encoder, *, num_classes: int | None
) -> tuple[Prompts, int]:
    """Do every check that injection makes, self-check included, and build the prompts.

    The model is left alone.

    Returns:
        Unattached prompts, and the number of features of a new head.
    """
    spec = spec.resolve(encoder.depth)
    width = check_head(model, encoder, spec, num_classes)
    check_blocks(encoder, spec)
    prompts = Prompts(survey(model, encoder, spec), model)
    _build_forms(prompts, model)
    if spec.where.tokens:
        prompts.checked = not _on_meta(model) and self_check(prompts, model)
    return prompts, width


def _build_forms(prompts: Prompts, model: nn.Module) -> None:
    """Append to `prompts.forms` what brings prompts in, pools, and cuts what is recorded."""
    spec, encoder, forms = prompts.spec, prompts.encoder, prompts.forms
    forms.extend(prompts.place.forms(prompts, model))
    tokens = [form for form in forms if isinstance(form, TokenForm)]
    if spec.pooling != "default":
        forms.append(Pooling(prompts, model, encoder))
    # Attention maps of transformers show prompts as queries even where they stay in one block.
    if any(not form.leaves for form in tokens) or (tokens and encoder.library == "transformers"):
        forms.append(OutputCut(prompts, model, encoder))


def remove_prompts(model: Model) -> Model:
    """Take prompts and task head out again: outputs, hooks, flags, head are as before injection.

    A head that was trained in place gets its former values back.

    Raises:
        NotPromptedError: The model carries no prompts.
        VPTError: Another library has wrapped a `forward` since; take that wrapper off first.
    """
    host, prompts = host_and_prompts(model, "remove_prompts")
    if prompts.delta is not None:
        prompts.delta.check_restorable("remove_prompts")
    patches = [form for form in prompts.forms if isinstance(form, ForwardPatch)]
    outermost = {(id(form.target), form.method): form for form in patches}
    for form in outermost.values():
        form.check_on_top()
    heads = [host.get_submodule(path) for path in prompts.encoder.head_paths]
    changing = [t for head in heads for t in (*head.parameters(), *head.buffers())]
    changing += prompts.delta.touched(host) if prompts.delta is not None else []
    with unchanged_on_error(host, changing):
        for part in reversed(_parts(prompts)):
            part.detach()
        for handle in prompts.undo["handles"]:
            handle.remove()
        if prompts.delta is not None:
            prompts.delta.detach(host)
        del host.prompts
        restore(host, prompts)
    return model


def disable_prompts(model: nn.Module) -> AbstractContextManager[None]:
    """Let the model run without prompts inside a `with` block; the task head stays.

    The choice belongs to the current thread or task, so others may go on with prompts.

    Raises:
        NotPromptedError: The model carries no prompts.
        VPTError: A protocol has trained the backbone itself.
    """
    prompts = host_and_prompts(model, "disable_prompts")[1]
    if prompts.delta is not None and prompts.delta.protocol.moves:
        raise VPTError(
            "disable_prompts",
            f"under the protocol {prompts.delta.protocol.name!r} weights of the backbone itself "
            "have trained",
            "use a copy of the bare model, or remove_prompts",
        )
    return prompts.disable()


def is_prompted(model: nn.Module) -> bool:
    """Tell whether a model, or what a wrapper holds, carries prompts."""
    prompts = getattr(unwrap(model), "prompts", None)
    return isinstance(prompts, Prompts) and prompts.spec.location != NOWHERE


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what trains, in the order of `named_parameters`: the head's and `prompts.*`."""
    return {name: p for name, p in unwrap(model).named_parameters() if p.requires_grad}


def count_parameters(model: nn.Module) -> ParameterCount:
    """Return the numbers of trainable and of all parameters, as `(trainable, total)`."""
    parameters = list(unwrap(model).parameters())
    return ParameterCount(
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters),
    )


def _parts(prompts: Prompts) -> list[Form]:
    return [form for form in prompts.forms if isinstance(form, Form)]


def _on_meta(model: nn.Module) -> bool:
    return any(p.is_meta for p in model.parameters())


def freeze(model: nn.Module, encoder: Encoder) -> None:
    """Let nothing train but head, a decoder that was claimed, prompts and protocol as specified.

    A transformers checkpoint then holds what trains.
    """
    model.requires_grad_(False)
    for path in encoder.head_paths:
        model.get_submodule(path).requires_grad_(True)
    prompts = host_and_prompts(model, "freeze")[1]
    for name, parameter in model.named_parameters():
        if name in prompts.undo.get("decoder", ()) and parameter.is_floating_point():
            parameter.requires_grad_(True)
    prompts.requires_grad_(prompts.spec.train_prompts)
    if prompts.delta is not None:
        prompts.delta.unfreeze(model)
    checkpoint_what_moves(prompts, model)


def _attach(prompts: Prompts, model: nn.Module) -> None:
    for part in _parts(prompts):
        part.attach()
        if isinstance(part, KeyValueForm) and not prompts.checked:
            part.check_at_first_forward()
    prompts.undo["handles"] = [model.register_forward_pre_hook(prompts.check_forward)]
    watch_input(prompts, model)


def watch_input(prompts: Prompts, model: nn.Module) -> None:
    """Let the input of the first block in which something trains require grad where it must."""
    if prompts.first_block is None:
        return
    first = prompts.encoder.blocks[prompts.first_block].path
    gate = model.get_submodule(prompts.encoder.gate or outermost_checkpoint(model, first))
    prompts.undo["handles"].append(
        gate.register_forward_pre_hook(prompts.require_input_grad, with_kwargs=True)
    )
