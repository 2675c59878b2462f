"""One dummy forward of a model before it changes: what is called, when, and on what shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..backbones.anatomy import Encoder, first_argument
from ..backbones.inputs import call, dummy_inputs
from ..backbones.paths import module_at
from ..errors import UnsupportedArchitectureError
from ..forms.selfcheck import undisturbed
from ..hosts import carries, host_and_prompts
from .options import Protocol

Shape = tuple[int, ...]


@dataclass
class Calls:
    """What a dummy forward showed of the modules at some paths.

    Args:
        order: Place in the order of first calls, by path.
        inputs: Shape of the first argument of the first call, `()` where it is no tensor.
        outputs: Likewise of what came out.
    """

    order: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, Shape] = field(default_factory=dict)
    outputs: dict[str, Shape] = field(default_factory=dict)


def dummy_calls(host: nn.Module, encoder: Encoder, paths: Iterable[str]) -> Calls | None:
    """Run a model without its prompts on a dummy image, or its encoder where the whole takes more.

    Args:
        host: The model; it is left as it was.
        encoder: Its anatomy.
        paths: Of the modules to watch.

    Returns:
        None where no input is known that passes.
    """
    if any(p.is_meta for p in host.parameters()):
        return None
    watched = {path: module_at(host, path) for path in paths}
    inner = module_at(host, encoder.path)
    bare = host_and_prompts(host, "apply_protocol")[1].disable() if carries(host) else nullcontext()
    with undisturbed(host), bare:
        calls = Calls()
        for path, module in watched.items():
            module.register_forward_pre_hook(_entering(calls, path), with_kwargs=True)
            module.register_forward_hook(_leaving(calls, path))
        for module in dict.fromkeys((host, inner)):
            for inputs in dummy_inputs(inner, encoder):
                for seen in (calls.order, calls.inputs, calls.outputs):
                    seen.clear()
                try:
                    call(module, inputs)
                except Exception:  # Another size, or the encoder alone, may pass.
                    continue
                return calls
    return None


def check_head_input(host: nn.Module, encoder: Encoder, protocol: Protocol) -> None:
    """Raise where the classifier is called with anything but one vector per image.

    Raises:
        UnsupportedArchitectureError: It is.
    """
    if encoder.head is None:
        return
    path = encoder.head.paths[0]
    calls = dummy_calls(host, encoder, [path])
    shape = () if calls is None else calls.inputs.get(path, ())
    if shape and not (len(shape) == 2 or (len(shape) == 4 and shape[2:] == (1, 1))):
        raise UnsupportedArchitectureError(
            f"apply_protocol({protocol.name!r}): the classifier {path} of {type(host).__name__} "
            f"is called with {shape}, where one vector per image, (batch, features), is needed."
        )


def _entering(calls: Calls, path: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if path not in calls.order:
            calls.order[path] = len(calls.order)
            calls.inputs[path] = _shape(first_argument(args, kwargs) if args or kwargs else None)

    return hook


def _leaving(calls: Calls, path: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls.outputs.setdefault(path, _shape(output))

    return hook


def _shape(value: Any) -> Shape:
    value = value[0] if isinstance(value, tuple) and value else value
    return tuple(value.shape) if isinstance(value, Tensor) else ()
