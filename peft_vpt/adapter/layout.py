"""Which tensors a task adapter holds: by the options and the model, and in a model that trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..hosts import carries, host_and_prompts
from ..prompts import Place, Prompts
from ..protocols.delta import shapes as protocol_shapes
from ..protocols.options import Protocol
from .file import few
from .schema import Fail

Shapes = dict[str, tuple[int, ...]]


def layout(
    host: nn.Module,
    place: Place,
    protocol: Protocol | None,
    head: Shapes,
    apart: Sequence[str] = (),
) -> Shapes:
    """Return the name and shape of every tensor that a file for a model must hold.

    Args:
        host: The model, prompted or not.
        place: Where prompts meet it, with their options.
        protocol: What trains beside or in place of them.
        head: Names and shapes of the head, as its kind says; none where it is not loaded.
        apart: Names of the model's tensors that belong to a decoder, which the head holds.

    Raises:
        SpecError: The protocol asks for more than the model has.
        UnsupportedArchitectureError: The protocol has no place in the model.
    """
    spec, encoder = place.spec, place.encoder
    shapes = {f"prompts.{name}": shape for name, shape in place.shapes().items()}
    entries = [enter for enter, _ in spec.spans(encoder.depth)] if spec.project else []
    for width in encoder.widths_at(entries):
        assert spec.project is not None
        shapes[f"prompts.project.{width}.weight"] = (width, spec.project)
        shapes[f"prompts.project.{width}.bias"] = (width,)
    if protocol is not None:
        present = host_and_prompts(host, "layout")[1].delta if carries(host) else None
        shapes |= protocol_shapes(host, encoder, protocol, present, apart=apart)
    return shapes | head


def check_layout(
    tensors: Mapping[str, Tensor], shapes: Shapes, fail: Fail, advice: str = ""
) -> None:
    """Refuse tensors of other names or shapes than those of a layout.

    Raises:
        AdapterMismatchError: There are some, or some are missing.
    """
    missing, extra = shapes.keys() - tensors.keys(), tensors.keys() - shapes.keys()
    if missing or extra:
        raise fail(f"tensors missing: {few(missing)}; not expected: {few(extra)}", advice)
    for name, shape in shapes.items():
        held = tuple(tensors[name].shape)
        if held != shape:
            raise fail(f"tensor {name} has shape {held}, this model calls for {shape}", advice)


def stored_tensors(
    host: nn.Module, prompts: Prompts, head: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return what a file holds of a prompted model, under the names there.

    Args:
        host: What carries the prompts.
        prompts: Those.
        head: Tensors of the head, as its kind says.
    """
    found: dict[str, Tensor] = {f"prompts.{n}": p for n, p in prompts.own_parameters().items()}
    if prompts.delta is not None:
        found |= prompts.delta.tensors(host)
    return {**found, **head}
