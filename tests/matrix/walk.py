"""Walking the architectures: build a small one, prompt it, look at what happens."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peft_vpt.backbones.anatomy import Encoder
from peft_vpt.errors import VPTError
from peft_vpt.inject import inject_prompts, remove_prompts
from peft_vpt.spec import LOCATIONS

from . import small_timm, small_transformers

# An effect of prompts below this is none; float64 arithmetic leaves about 1e-13.
_EFFECT = 1e-11
# Their own code knows no float64.
_FLOAT32 = ("Dots3NoteVisionModel",)


@dataclass
class Result:
    """What became of one architecture.

    Args:
        library: "timm" or "transformers".
        name: Of the entry point or class.
        family: Class of the encoder, as `Encoder.family`.
        status: "supported", "submodule" (its encoders one by one), "refused" or "error".
        reason: Of a refusal or error.
        checked: "forward" (self-check at injection), "first" (with the first real input), or
            "shape" where keys are pooled behind their projection and only shapes can be compared.
        carried: Whether prompts can be carried through blocks (VPT-shallow).
        pad: Whether `location="pad"` works.
        skipped: Parts without prompts.
    """

    library: str
    name: str
    family: str = ""
    status: str = "error"
    reason: str = ""
    checked: str = ""
    carried: bool = False
    pad: bool = False
    skipped: tuple[str, ...] = field(default_factory=tuple)


def walk(library: str, names: list[str] | None = None) -> Iterator[Result]:
    """Yield the result of every architecture of a library, or of those named."""
    build = Build(library)
    known = small_timm.names() if library == "timm" else small_transformers.names()
    seen: dict[int, Result] = {}
    for name in known if names is None else names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield try_one(library, name, build, seen)


def try_one(
    library: str,
    name: str,
    build: Callable[[str], tuple[nn.Module, Any]],
    seen: dict[int, Result] | None = None,
) -> Result:
    """Build one architecture and prompt it: deep, shallow, and by a border of pixels.

    Args:
        library: "timm" or "transformers".
        name: Of the architecture.
        build: Makes a model and its inputs.
        seen: Results by structure. Names that differ in width, depth or weights only come out equal
            when built small, and are not run again; a border is tried once per class.
    """
    result = Result(library, name)
    seen = {} if seen is None else seen
    try:
        model, inputs = build(name)
        structure = _structure(model)
        if structure in seen:
            return dataclasses.replace(seen[structure], name=name)
        seen[structure] = result
        result.family = type(model).__name__
        _try_deep(model, inputs, result)
        if result.status == "supported":
            result.carried = _accepts(model, deep=False)
        # A border has to fit the patch grid of a model that does not resize it.
        kind = hash(type(model))
        if kind not in seen:
            fits = any(_accepts(model, length, location="pad") for length in LOCATIONS["pad"].tries)
            seen[kind] = Result(library, name, pad=fits)
        result.pad = seen[kind].pad
    except Exception as error:
        result.status, result.reason = "error", f"{type(error).__name__}: {error}"
    return result


def _structure(model: nn.Module) -> int:
    """Return a hash of everything about a model but the values of its tensors."""
    parts = []
    for path, module in model.named_modules():
        plain = [(k, v) for k, v in vars(module).items() if isinstance(v, int | float | str)]
        shapes = [(n, tuple(p.shape)) for n, p in module.named_parameters(recurse=False)]
        parts.append((path, type(module).__qualname__, sorted(plain), shapes))
    return hash(str(parts))


def _try_deep(model: nn.Module, inputs: Any, result: Result) -> None:
    try:
        inject_prompts(model, 2, dropout=0.0)
    except VPTError as refusal:
        result.status, result.reason = "refused", refusal.problem or str(refusal)
        # Of several encoders each may be prompted alone.
        paths = refusal.facts.get("paths")
        if paths and all(_accepts(model.get_submodule(path)) for path in paths):
            result.status = "submodule"
        return
    encoder: Encoder = model.prompts.encoder  # type: ignore[assignment, union-attr]
    result.family, result.skipped = encoder.family, encoder.skipped
    remove_prompts(model)
    with torch.no_grad():
        bare = output(model, inputs)
    inject_prompts(model, 2, dropout=0.0)
    prompted = output(model, inputs)
    effect = float((prompted.detach() - bare).abs().max() / bare.abs().max().clamp_min(1e-9))
    torch.autograd.backward(prompted.square().sum())
    silent = [n for n, p in model.named_parameters() if n.startswith("prompts.") and _is_silent(p)]
    if effect < _EFFECT or silent:
        raise AssertionError(f"prompts have no effect ({effect:.1e}) or gradient ({silent})")
    result.status = "supported"
    result.checked = _evidence(model)
    remove_prompts(model)
    with torch.no_grad():
        if not torch.equal(output(model, inputs), bare):
            raise AssertionError("remove_prompts leaves a trace")


def _is_silent(parameter: nn.Parameter) -> bool:
    return parameter.grad is None or not bool(parameter.grad.abs().max() > 0)


def _evidence(model: Any) -> str:
    attentions = [a for block in model.prompts.encoder.blocks for a in block.attentions]
    if any(a.reduces == "output" for a in attentions):
        return "shape"
    return "forward" if model.prompts.checked else "first"


def _accepts(model: nn.Module, length: int = 2, **options: Any) -> bool:
    try:
        remove_prompts(inject_prompts(model, length, **options))
    except VPTError:
        return False
    return True


def output(model: nn.Module, inputs: Any) -> Tensor:
    """Call a model and return the first floating tensor of its output, in float64."""
    found = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    tensor = _first_tensor(found)
    assert tensor is not None
    return tensor.double()


def _first_tensor(found: Any) -> Tensor | None:
    if isinstance(found, Tensor):
        return found if found.is_floating_point() else None
    for name in ("logits", "last_hidden_state", "predicted_depth", "feature_maps"):
        if getattr(found, name, None) is not None:
            return _first_tensor(getattr(found, name))
    # Of several maps the last one has passed all blocks.
    values = list(found.values()) if hasattr(found, "values") else list(reversed(found))
    return next((t for t in map(_first_tensor, values) if t is not None), None)


@dataclass(frozen=True)
class Build:
    """Builds small models of a library, perturbed and in float64, with inputs to call them."""

    library: str

    def __call__(self, name: str) -> tuple[nn.Module, Any]:
        """Return a model in eval mode, and an image batch or keyword arguments."""
        torch.manual_seed(0)
        if self.library == "timm":
            model, size = small_timm.build(name)
            generator = torch.Generator().manual_seed(0)
            return _perturbed(model), torch.rand(2, *size, generator=generator).double()
        model, inputs = small_transformers.build(name)
        if name in _FLOAT32:
            return _perturbed(model).float(), inputs
        return _perturbed(model), {
            key: value.double()
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for key, value in inputs.items()
        }


@torch.no_grad()
def _perturbed(model: nn.Module) -> nn.Module:
    """Add noise to every parameter: some start at zero, where nothing has an effect."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.double().eval()
