"""Dummy forwards of a bare encoder: what meets the image, what blocks take, which sizes work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .backbones.anatomy import Encoder, first_argument, first_floating
from .backbones.find import ImageFacts, image_facts, image_path
from .hosts import carries, host_and_prompts

if TYPE_CHECKING:
    pass


ENTRANCES = ("forward_features", "forward_intermediates")


@dataclass
class Trial:
    """What one dummy forward showed.

    Args:
        size: `(height, width)` of its image.
        error: That it raised, or None.
        convs: Paths from the probed module of the convolutions that met the image itself.
        entered: How often the image passed `forward_features`.
        hidden: Last input of each watched block, by its index.
        counts: How often each was called.
    """

    size: tuple[int, int]
    error: Exception | None = None
    convs: list[str] = field(default_factory=list)
    entered: int = 0
    hidden: dict[int, Any] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)


class Probe:
    """Dummy forwards of the bare encoder of a host."""

    def __init__(self, host: nn.Module, encoder: Encoder, device: torch.device) -> None:
        self.host = host
        self.encoder = encoder
        self.path = image_path(host, encoder)
        self.module: Any = host.get_submodule(self.path)
        self.facts: ImageFacts = image_facts(self.module, encoder.library)
        self._device = device

    @property
    def name(self) -> str:
        """Name of the class of the module that takes the image, for messages."""
        return type(self.module).__name__

    def run(self, size: tuple[int, int], entries: tuple[int, ...] = ()) -> Trial:
        """Run one image of a size through the encoder: eval, no gradients, no hooks of others."""
        trial = Trial(size)
        like = first_floating(self.module)
        image = torch.rand(1, self.facts.channels, *size, generator=torch.Generator())
        with undisturbed(self.module):
            self._watch(trial, entries)
            restore = self._watch_entrance(trial)
            try:
                self.module(image.to(self._device, like.dtype))
            except Exception as error:
                trial.error = error
            finally:
                restore()
        return trial

    def _watch(self, trial: Trial, entries: tuple[int, ...]) -> None:
        """Hook convolutions and blocks; `undisturbed` drops the hooks at its end."""
        shape = (self.facts.channels, *trial.size)

        def meets_image(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                if args and isinstance(args[0], Tensor) and tuple(args[0].shape[1:]) == shape:
                    trial.convs.append(path)

            return hook

        def meets_hidden(index: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                trial.hidden[index] = first_argument(args, kwargs)
                trial.counts[index] = trial.counts.get(index, 0) + 1

            return hook

        for path, module in self.module.named_modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(meets_image(path))
        for index in entries:
            block = self.host.get_submodule(self.encoder.blocks[index].path)
            block.register_forward_pre_hook(meets_hidden(index), with_kwargs=True)

    def _watch_entrance(self, trial: Trial) -> Callable[[], None]:
        """Count the images that pass `forward_features`; return what takes the counter off."""
        module, name = self.module, ENTRANCES[0]
        if not hasattr(module, name):
            return lambda: None
        own, bound = vars(module).get(name), getattr(module, name)

        def count(*args: Any, **kwargs: Any) -> Any:
            value = first_argument(args, kwargs)
            trial.entered += isinstance(value, Tensor) and value.shape[2:] == trial.size
            return bound(*args, **kwargs)

        def restore() -> None:
            delattr(module, name)
            if own is not None:
                setattr(module, name, own)

        setattr(module, name, count)
        return restore

    def first(self, entries: tuple[int, ...] = (), *, small: bool = False) -> Trial:
        """Run the first of the model's sizes that works, or return the failure of the likeliest.

        Args:
            entries: Blocks to watch.
            small: Whether a smaller image than the default one will do.
        """
        sizes = (self.encoder.input_size[1:],) if small else ()
        failed: Trial | None = None
        for size in (*sizes, *self.facts.sizes):
            trial = self.run(size, entries)
            if trial.error is None:
                return trial
            failed = failed or trial
        assert failed is not None
        return failed

    def any_size(self) -> bool:
        """Tell whether the encoder takes images of several sizes; try where it does not say."""
        if self.facts.fixed is not None:
            return not self.facts.fixed
        height, width = self.facts.sizes[0]
        return self.run((2 * height, 2 * width)).error is None


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
    watched = {path: host.get_submodule(path) for path in paths}
    inner = host.get_submodule(encoder.path)
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


# Tried in turn where a model does not say which size it was built for.
_SIZES = (64, 32, 224, 256, 128, 384, 96, 192, 240, 288, 320, 448, 512)


def dummy_inputs(module: nn.Module, encoder: Encoder) -> Iterator[dict[str, Any] | Tensor]:
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
    yield _random(module, (2, *frames, channels, height, width))
    if encoder.inputs != "image":
        for size in _SIZES:
            if (size, size) != (height, width):
                yield _random(module, (2, *frames, channels, size, size))


def call(module: nn.Module, inputs: dict[str, Any] | Tensor) -> Any:
    """Call a module with dummy inputs."""
    return module(**inputs) if isinstance(inputs, dict) else module(inputs)


def _patches(module: nn.Module) -> dict[str, Any]:
    """Return two images cut into patches, the second with padding behind them."""
    config: Any = module.config
    pixels = _random(module, (2, 16, config.num_channels * config.patch_size**2))
    mask = torch.ones(2, 16, dtype=torch.int64, device=pixels.device)
    mask[1, 12:] = 0
    return {
        "pixel_values": pixels,
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[4, 4], [3, 4]], device=pixels.device),
    }


def _random(module: nn.Module, shape: tuple[int, ...]) -> Tensor:
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    like = first_floating(module)
    return image.to(device=like.device, dtype=like.dtype)


# transformers hooks its layers when states are first recorded, and notes here that it has.
_HOOKED = "_output_capturing_hooks_installed"


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no hooks of others; afterwards everything is as it was.

    Models write down what they see (a window size clamped to a small image, a table of biases), so
    the attributes of all modules are put back, and the random state.
    """
    parts = list(module.modules())
    saved = [_Saved(part) for part in parts]
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    try:
        for part in parts:
            part.training = False
            vars(part).pop(_HOOKED, None)
            part._forward_hooks, part._forward_pre_hooks = (
                type(part._forward_hooks)(),
                type(part._forward_pre_hooks)(),
            )
        with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
            yield
    finally:
        for state in saved:
            state.restore()


class _Saved:
    """The attributes of a module, with the contents of its dictionaries."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = dict(vars(module))
        self.contents = {k: dict(v) for k, v in vars(module).items() if type(v) is dict}

    def restore(self) -> None:
        """Put them back, in the same dictionary objects."""
        own = vars(self.module)
        own.clear()
        own.update(self.attributes)
        for name, content in self.contents.items():
            own[name].clear()
            own[name].update(content)
