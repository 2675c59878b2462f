"""What a bare encoder does with images of some sizes: for locations that hang on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.anatomy import Encoder, ImageFacts, first_argument
from ..backbones.find import image_facts, image_path
from ..errors import UnsupportedArchitectureError, VPTError
from ..rehearsal import Rehearsal, dummy_image, rehearse
from ..spec import PromptSpec

ENTRANCES = ("forward_features", "forward_intermediates")


@dataclass
class Trial:
    """What one image showed.

    Args:
        size: `(height, width)` of the image.
        shown: Calls of the encoder's convolutions and blocks.
        convs: Paths from the module that takes the image of the convolutions that met it itself.
        entered: How often it passed `forward_features`.
    """

    size: tuple[int, int]
    shown: Rehearsal
    convs: list[str]
    entered: int


class Trials:
    """Dummy forwards of the bare encoder of a host, for options of prompts."""

    def __init__(
        self, host: nn.Module, encoder: Encoder, spec: PromptSpec, at: torch.device
    ) -> None:
        self.encoder = encoder
        self.spec = spec
        self.path = image_path(host, encoder)
        self.module: Any = host.get_submodule(self.path)
        self.facts: ImageFacts = image_facts(self.module, encoder.library)
        self._device = at
        modules = self.module.named_modules()
        self._convs = {path: module for path, module in modules if isinstance(module, nn.Conv2d)}
        self._blocks = {block.path: host.get_submodule(block.path) for block in encoder.blocks}

    @property
    def name(self) -> str:
        """Name of the class of the module that takes the image, for messages."""
        return type(self.module).__name__

    def refusal(self, kind: type[VPTError], problem: str, advice: str = "") -> VPTError:
        """Return an error about the location and the length that are tried."""
        given = {"location": self.spec.location, "length": self.spec.length}
        return kind("inject_prompts", problem, advice, given=given)

    def run(self, size: tuple[int, int]) -> Trial:
        """Run one image of a size through the encoder."""
        shape, passed = (1, self.facts.channels, *size), list[bool]()
        shown = rehearse(
            self.module,
            [dummy_image(self.module, shape, self._device)],
            self._convs | self._blocks,
            within=partial(self._counting, size, passed),
        )
        met = [c.path for c in shown.calls if c.path in self._convs and c.given == shape]
        return Trial(size, shown, met, sum(passed))

    @contextmanager
    def _counting(self, size: tuple[int, int], passed: list[bool]) -> Iterator[None]:
        """Note the calls of `forward_features`; the rehearsal takes the counter off."""
        name = ENTRANCES[0]
        bound: Any = getattr(self.module, name, None)

        def count(*args: Any, **kwargs: Any) -> Any:
            value = first_argument(args, kwargs)
            passed.append(isinstance(value, Tensor) and value.shape[2:] == size)
            return bound(*args, **kwargs)

        if bound is not None:
            setattr(self.module, name, count)
        yield

    def first(self, *, small: bool = False) -> Trial:
        """Run the first of the model's sizes that works.

        Args:
            small: Whether a smaller image than the default one will do.

        Raises:
            UnsupportedArchitectureError: None does.
        """
        sizes = (self.encoder.input_size[1:],) if small else ()
        failed: Trial | None = None
        for size in (*sizes, *self.facts.sizes):
            trial = self.run(size)
            if trial.shown.passed:
                return trial
            failed = failed or trial
        assert failed is not None
        error = failed.shown.error
        raise self.refusal(
            UnsupportedArchitectureError,
            f"a forward of {self.name} on an image of {failed.size[0]} x {failed.size[1]} failed, "
            f"so the location cannot be checked: {error}",
        ) from error

    def any_size(self) -> bool:
        """Tell whether the encoder takes images of several sizes; try where it does not say."""
        if self.facts.fixed is not None:
            return not self.facts.fixed
        height, width = self.facts.sizes[0]
        return self.run((2 * height, 2 * width)).shown.passed
