"""Weights as plain values, however a layer stores them: whole, quantized, or behind a method."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Names under which quantized layers of several libraries register integers as buffers.
_PACKED_BUFFERS = ("weight", "qweight", "weight_packed")
_INT8_STEPS = 127.0
# Tables of positions, also relative ones inside a block: another input size makes others of them.
_POSITIONS = re.compile(
    r"(relative_position_bias_table|rel_pos_[hw]|rel_pos\w*|attention_biases|(height|width)_rel"
    r"|pos_?embed\w*|position_?embed\w*)"
)


class UnreadableWeightsError(ValueError):
    """A layer does not show its weights; the message is its path and class."""


class Weight(NamedTuple):
    """A weight in the shape and scale it acts with, and whether it is stored in fewer bits."""

    values: Tensor
    quantized: bool


def weights_below(root: nn.Module, apart: tuple[str, ...] = ()) -> list[Weight]:
    """Return every weight below a module once, in the order of `parameters()`, dequantized.

    Tables of positions are left out.

    Args:
        root: The module.
        apart: Paths below it that are left out, with all below them; "" is the module's own.

    Raises:
        UnreadableWeightsError: A layer stores them in a way that is not known.
    """
    found: dict[int, Weight] = {}
    for path, module in root.named_modules():
        if any(f"{path}.".startswith(f"{name}.") for name in apart):
            continue
        for stored, values, quantized in _own_weights(module):
            if values is None:
                raise UnreadableWeightsError(f"{path} ({type(module).__name__})")
            found.setdefault(id(stored), Weight(values, quantized))
    return list(found.values())


def layer_weight(layer: nn.Module) -> Tensor | None:
    """Return what a layer calls its weight, dequantized; None where it has none to show."""
    if is_packed(layer):
        return next(_own_weights(layer))[1]
    weight = getattr(layer, "weight", None)
    return _dequantized(layer, weight)[0] if isinstance(weight, Tensor) else None


def is_packed(module: nn.Module) -> bool:
    """Tell whether a layer is one of PyTorch's own quantized ones: no parameters, but methods."""
    return hasattr(module, "_packed_params") and callable(getattr(module, "weight", None))


def _own_weights(module: Any) -> Iterator[tuple[Any, Tensor | None, bool]]:
    """Yield a module's own weights: what holds them, plain values or None, whether quantized."""
    if is_packed(module):
        yield module, module.weight().dequantize(), True
        if module.bias() is not None:
            yield module._packed_params, module.bias(), False
        return
    for name, parameter in module._parameters.items():
        if parameter is not None and not _POSITIONS.fullmatch(name):
            yield parameter, *_dequantized(module, parameter)
    for name in ("running_mean", "running_var"):
        statistic = module._buffers.get(name)
        if statistic is not None:
            yield statistic, statistic, False
    for name in _PACKED_BUFFERS:
        buffer = module._buffers.get(name)
        if buffer is not None and not buffer.is_floating_point():
            yield buffer, *_dequantized(module, buffer)


def _dequantized(module: Any, tensor: Any) -> tuple[Tensor | None, bool]:
    """Return the values behind a tensor, None where their scale is not known."""
    if getattr(tensor, "quant_state", None) is not None:
        return _four_bits(tensor), True
    if tensor.is_quantized or type(tensor).dequantize is not Tensor.dequantize:
        return tensor.dequantize(), True
    scale = getattr(tensor, "SCB", None)
    if scale is None:
        # bitsandbytes moves the scales of a layer there when it is first called.
        scale = getattr(getattr(module, "state", None), "SCB", None)
    if tensor.dtype == torch.int8 and isinstance(scale, Tensor):
        return tensor.detach().float() * (scale.float()[:, None] / _INT8_STEPS), True
    # One byte without a known scale, float8 say, is not the value that acts.
    return (tensor, False) if tensor.is_floating_point() and tensor.itemsize > 1 else (None, True)


def _four_bits(tensor: Any) -> Tensor | None:
    try:
        from bitsandbytes.functional import dequantize_4bit
    except ImportError:
        return None
    values: Tensor = dequantize_4bit(tensor.data, tensor.quant_state)
    return values
