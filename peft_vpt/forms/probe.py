"""Dummy forwards of a bare encoder: what meets the image, what blocks take, which sizes work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.anatomy import Encoder, first_argument
from ..backbones.image_model import ImageFacts, image_facts, image_path
from ..backbones.paths import module_at
from .selfcheck import undisturbed

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
        self.module: Any = module_at(host, self.path)
        self.facts: ImageFacts = image_facts(self.module, encoder.library)
        self._device = device

    @property
    def name(self) -> str:
        """Name of the class of the module that takes the image, for messages."""
        return type(self.module).__name__

    def run(self, size: tuple[int, int], entries: tuple[int, ...] = ()) -> Trial:
        """Run one image of a size through the encoder: eval, no gradients, no hooks of others."""
        trial = Trial(size)
        like = next(p for p in self.module.parameters() if p.is_floating_point())
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
            block = module_at(self.host, self.encoder.blocks[index].path)
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
