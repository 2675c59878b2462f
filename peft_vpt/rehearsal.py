"""Rehearsals: dummy forwards of a model, for what they show, that leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .backbones.anatomy import Encoder, first_argument, first_floating
from .hosts import bare
from .undo import Snapshot

Inputs = Tensor | dict[str, Any]
Shape = tuple[int, ...]

# Tried in turn where a model does not say which size it was built for.
_SIZES = (64, 32, 224, 256, 128, 384, 96, 192, 240, 288, 320, 448, 512)
# transformers hooks its layers when states are first recorded, and notes here that it has.
_HOOKED = "_output_capturing_hooks_installed"


@dataclass
class Call:
    """One call of a watched module.

    Args:
        path: Of the module, as it was given.
        given: Shape of the first argument, `()` where it is no tensor.
        gave: Likewise of the first thing that came out.
    """

    path: str
    given: Shape
    gave: Shape = ()


@dataclass
class Rehearsal:
    """What a dummy forward showed.

    Args:
        inputs: That passed; where none did, those that were tried first; None: none are known.
        error: What was raised where none passed.
        calls: Of watched modules, in the order in which they began.
    """

    inputs: Inputs | None = None
    error: Exception | None = None
    calls: list[Call] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether the model took some inputs."""
        return self.inputs is not None and self.error is None

    @property
    def order(self) -> dict[str, int]:
        """Place in the order of first calls, by path."""
        return {path: i for i, path in enumerate(dict.fromkeys(c.path for c in self.calls))}

    def first(self, path: str) -> Call | None:
        """Return the first call of a module, None where it was not called."""
        return next((call for call in self.calls if call.path == path), None)


def rehearse(
    module: nn.Module,
    inputs: Iterable[Inputs],
    watch: Mapping[str, nn.Module] | None = None,
    *,
    see: Callable[[str, Any], None] | None = None,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    hooks: bool = False,
) -> Rehearsal:
    """Call a module with the first of some inputs that it takes, and leave it as it was.

    It runs in eval mode and without gradients.

    Args:
        module: The model, or an encoder inside it.
        inputs: Tried in turn; a dict is a call by names.
        watch: Modules whose calls are written down, by path.
        see: Is told the path and the first argument itself as a watched module is called.
        within: Makes a context for every try.
        hooks: Whether the model's hooks run, its prompts' among them; they may be a user's.
    """
    failed: Rehearsal | None = None
    with undisturbed(module, hooks=hooks):
        for given in inputs:
            shown = Rehearsal(given)
            try:
                with within(), _watching(shown, watch or {}, see):
                    module(**given) if isinstance(given, dict) else module(given)
            except Exception as error:  # Models refuse a size by whatever exception they like.
                shown.error = error
                failed = failed or shown
            else:
                return shown
    return failed or Rehearsal()


def rehearse_host(host: nn.Module, encoder: Encoder, paths: Iterable[str]) -> Rehearsal | None:
    """Rehearse a model without its prompts, or its encoder where the whole takes more than images.

    Args:
        host: The model.
        encoder: Its anatomy.
        paths: In the host, of the modules to watch.

    Returns:
        None where no input is known that passes.
    """
    if any(p.is_meta for p in host.parameters()):
        return None
    watch, inner = (
        {path: host.get_submodule(path) for path in paths},
        host.get_submodule(encoder.path),
    )
    for module in dict.fromkeys((host, inner)):
        shown = rehearse(module, dummy_inputs(inner, encoder), watch, within=partial(bare, host))
        if shown.passed:
            return shown
    return None


@contextmanager
def _watching(
    shown: Rehearsal, watch: Mapping[str, nn.Module], see: Callable[[str, Any], None] | None
) -> Iterator[None]:
    """Write the calls of modules down for as long as the `with` block lasts."""

    def entered(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        first = first_argument(args, kwargs) if args or kwargs else None
        shown.calls.append(Call(path, _shape(first)))
        if see is not None:
            see(path, first)

    def left(path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = next(call for call in reversed(shown.calls) if call.path == path)
        call.gave = _shape(output)

    with ExitStack() as stack:
        for path, module in watch.items():
            before = module.register_forward_pre_hook(partial(entered, path), with_kwargs=True)
            stack.callback(before.remove)
            stack.callback(module.register_forward_hook(partial(left, path)).remove)
        yield


def _shape(value: Any) -> Shape:
    value = value[0] if isinstance(value, tuple) and value else value
    return tuple(value.shape) if isinstance(value, Tensor) else ()


@contextmanager
def undisturbed(module: nn.Module, *, hooks: bool = False) -> Iterator[None]:
    """Eval mode, no gradients, no hooks but on demand; afterwards everything is as it was.

    Models write down what they see (a window size clamped to a small image, a table of biases), so
    the attributes of all modules are put back, and the random state.
    """
    before = Snapshot(module)
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    try:
        for part in module.modules():
            part.training = False
            if not hooks:
                vars(part).pop(_HOOKED, None)
                part._forward_hooks = type(part._forward_hooks)()
                part._forward_pre_hooks = type(part._forward_pre_hooks)()
        with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
            yield
    finally:
        before.put_back()


def dummy_inputs(module: nn.Module, encoder: Encoder) -> Iterator[Inputs]:
    """Yield batches of two to call an encoder with, the likeliest first; none if unknown."""
    if encoder.inputs == "patches":
        yield _patches(module)
        return
    if encoder.inputs == "none":
        return
    channels, height, width = encoder.input_size
    frames: tuple[int, ...] = ()
    if encoder.inputs == "video":
        config: Any = module.config
        frames = (int(getattr(config, "num_frames", 0) or config.frames_per_clip),)
    yield dummy_image(module, (2, *frames, channels, height, width))
    if encoder.inputs != "image":
        for size in _SIZES:
            if (size, size) != (height, width):
                yield dummy_image(module, (2, *frames, channels, size, size))


def dummy_image(module: nn.Module, shape: Shape, device: torch.device | None = None) -> Tensor:
    """Return random pixels of a shape, always the same, where and as a module's parameters are."""
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    like = first_floating(module)
    return image.to(device=device or like.device, dtype=like.dtype)


def _patches(module: nn.Module) -> dict[str, Any]:
    """Return two images cut into patches, the second with padding behind them."""
    config: Any = module.config
    pixels = dummy_image(module, (2, 16, config.num_channels * config.patch_size**2))
    mask = torch.ones(2, 16, dtype=torch.int64, device=pixels.device)
    mask[1, 12:] = 0
    return {
        "pixel_values": pixels,
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[4, 4], [3, 4]], device=pixels.device),
    }
