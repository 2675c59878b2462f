"""What adaptation costs: latency, memory and FLOPs of training and inference, on CPU or GPU.

Times are interleaved: every round runs all models, forwards and backwards through the list in
turn, and medians over rounds are reported, so that a drift of the machine meets all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ..checks import integer
from ..errors import SpecError, VPTError
from ..inject import count_parameters
from ..preprocessing import output_logits

Batch = tuple[Tensor, Tensor]
# `forward` or `step`.
Pass = Callable[[nn.Module, Batch], None]


def measure(
    models: Mapping[str, nn.Module], batch: Batch, *, rounds: int = 5
) -> list[dict[str, Any]]:
    """Measure models side by side.

    Inference is in eval mode without gradients; prompts' keys and values are cached then. A
    training step is forward and backward of the cross-entropy, without an optimizer.

    Args:
        models: By name, all on one device, each training what its protocol trains.
        batch: Pixels and labels on that device.
        rounds: Number of timed rounds; the first call of each model is not timed.

    Returns:
        One row per model: `name`, `device`, `batch`, `trainable`, `total`, `inference_ms` and
        `train_ms` (per batch: GPU time between events, or CPU time of this process, summed over
        threads), `inference_flops`, `train_flops` (matrix products and convolutions),
        `inference_bytes`, `train_bytes`. Bytes on a GPU: peak of the allocator, without the other
        models and the batch. On a CPU: parameters and buffers for `inference_bytes`, to which
        `train_bytes` adds what autograd keeps for backward; activations that are freed meanwhile
        and gradients are not seen there.

    Raises:
        SpecError: No models, or fewer than one round.
        VPTError: A model is on another device than the batch.

    Source: Jia et al. 2022, appendix, Table 12 and Figures 18 and 19.
    """
    integer(1).check("measure", "rounds", rounds)
    if not models:
        raise SpecError("measure", "there are no models", "give one or more")
    device = batch[0].device
    for name, model in models.items():
        there = next(model.parameters()).device
        if there != device:
            told = f"{name} is on {there}, the batch on {device}"
            raise VPTError("measure", told, "move one")
    modes = {name: model.training for name, model in models.items()}
    rows: list[dict[str, Any]] = []
    for name, model in models.items():
        count = count_parameters(model)
        rows.append(
            {"name": name, "device": device.type, "batch": len(batch[1])}
            | {"trainable": count.trainable, "total": count.total}
        )
    try:
        for key, run, training in (("inference", forward, False), ("train", step, True)):
            for model in models.values():
                model.train(training)
            seconds = times(run, models, batch, rounds)
            for row in rows:
                model = models[row["name"]]
                row[f"{key}_ms"] = 1000 * statistics.median(seconds[row["name"]])
                row[f"{key}_flops"] = flops(run, model, batch)
                row[f"{key}_bytes"] = used_bytes(run, model, batch)
    finally:
        for name, model in models.items():
            model.zero_grad(set_to_none=True)
            model.train(modes[name])
    return rows


def against_length(
    make: Callable[[str, int], nn.Module],
    kinds: Sequence[str],
    lengths: Sequence[int],
    batch: Batch,
    *,
    others: Mapping[str, nn.Module] | None = None,
    rounds: int = 5,
) -> list[dict[str, Any]]:
    """Measure prompts of several lengths beside other protocols, all interleaved.

    Args:
        make: Returns a new model for a kind and a length.
        kinds: Of prompts, "vpt-deep" say.
        lengths: The paper's p.
        batch: Pixels and labels.
        others: Models without a length, by name.
        rounds: As in `measure`.

    Returns:
        Rows of `measure` with `protocol` and `length` (0 for the others).

    Source: Jia et al. 2022, appendix, Figures 18 and 19.
    """
    models = dict(others or {})
    told = {name: (name, 0) for name in models}
    for kind, length in product(kinds, lengths):
        name = f"{kind} p={length}"
        models[name], told[name] = make(kind, length), (kind, length)
    return [
        row | dict(zip(("protocol", "length"), told[row["name"]], strict=True))
        for row in measure(models, batch, rounds=rounds)
    ]


def forward(model: nn.Module, batch: Batch) -> None:
    """Predict without gradients."""
    with torch.no_grad():
        model(batch[0])


def step(model: nn.Module, batch: Batch) -> None:
    """Compute the gradients of one training step."""
    model.zero_grad(set_to_none=True)
    _loss(model, batch).backward()  # type: ignore[no-untyped-call]


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(output_logits(model(batch[0]), "cost"), batch[1])


def times(
    run: Pass, models: Mapping[str, nn.Module], batch: Batch, rounds: int
) -> dict[str, list[float]]:
    """Return the seconds of each round by model, interleaved; every model runs once before."""
    clock = _gpu_seconds if batch[0].is_cuda else _cpu_seconds
    for model in models.values():
        run(model, batch)
    found: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds):
        for name in list(models)[:: -1 if number % 2 else 1]:
            found[name].append(clock(run, models[name], batch))
    return found


def flops(run: Pass, model: nn.Module, batch: Batch) -> int:
    """Count floating point operations of matrix products and convolutions."""
    with FlopCounterMode(display=False, custom_mapping=_attentions()) as counter:
        run(model, batch)
    return int(counter.get_total_flops())


def used_bytes(run: Pass, model: nn.Module, batch: Batch) -> int:
    """Return the memory of a run: see `measure`."""
    own = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    model.zero_grad(set_to_none=True)
    if not batch[0].is_cuda:
        return own + (kept_bytes(model, batch) if run is step else 0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(model, batch)
    torch.cuda.synchronize()
    return own + torch.cuda.max_memory_allocated() - before


def kept_bytes(model: nn.Module, batch: Batch) -> int:
    """Return the bytes that autograd keeps for backward; what exists anyway is left out."""
    there = (*model.parameters(), *model.buffers(), *batch)
    outside = {tensor.untyped_storage().data_ptr() for tensor in there}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in outside:
            kept[storage.data_ptr()] = storage.nbytes()
        # With its graph, an output that its own node saves would never be freed.
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = _loss(model, batch)
    # The loss is alive until here, so that no address was given out twice.
    del loss
    return sum(kept.values())


def _cpu_seconds(run: Pass, model: nn.Module, batch: Batch) -> float:
    start = time.process_time()
    run(model, batch)
    return time.process_time() - start


def _gpu_seconds(run: Pass, model: nn.Module, batch: Batch) -> float:
    event: Any = torch.cuda.Event
    begin, end = event(enable_timing=True), event(enable_timing=True)
    begin.record()
    run(model, batch)
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def _attentions() -> dict[Any, Any]:
    """Return FLOP formulas of the fused attention on a CPU, which torch does not count."""

    def formula(products: int, query: int) -> Callable[..., int]:
        # The key follows the query among the shapes.
        def count(*shapes: tuple[int, ...], **_: object) -> int:
            batch, heads, queries, dim = shapes[query]
            return 2 * products * batch * heads * queries * shapes[query + 1][-2] * dim

        return count

    name = "_scaled_dot_product_flash_attention_for_cpu"
    # Backward makes five products, since it computes the scores again.
    found = {name: formula(2, 0), f"{name}_backward": formula(5, 1)}
    aten: Any = torch.ops.aten
    return {getattr(aten, name): count for name, count in found.items() if hasattr(aten, name)}
