"""Exactness: every family, form and option against the naive loop of `reference.py`, in float64."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import reference
import torch
from support.pairs import pairwise
from torch import Tensor, nn
from zoo import NAMES, build, image, logits

from peft_vpt import PromptSpec, inject_prompts, trainable_parameters
from peft_vpt.errors import SpecError

LENGTH = 3
DEPTH = 3
# Same numbers in another order of summation: a few thousand roundings of 1e-16 each.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}
# Options of a schedule as (deep, layers), and the spans that they mean.
SCHEDULES = {
    (True, None): [(0, 0), (1, 1), (2, 2)],
    (False, None): [(0, 2)],
    (False, (0, 1, 2)): [(0, 0), (1, 1), (2, 2)],
    (False, (0, 2)): [(0, 1), (2, 2)],
    (True, (0, 1)): [(0, 0), (1, 1)],
    (True, (2,)): [(2, 2)],
    (False, (1,)): [(1, 2)],
}
DEEP = SCHEDULES[True, None]
POOLINGS = ("cls", "image", "prompt", "global")
# Without a single classifier every pooling is refused, see test_bad_input.py.
HEADLESS = [n for n in NAMES if "distilled" in n or "model" in n]
REFUSED = {
    (name, pooling): "no CLS token"
    if pooling == "cls" and "dinov2" not in name
    else "set num_classes"
    for name, pooling in product(NAMES, POOLINGS)
    if "dinov2" in name
    or (
        pooling == "cls"
        and name in ("timm/gap", "timm/gap-norm-before", "timm/map", "transformers/siglip")
    )
}


def possible(name: str, schedule: tuple[bool, Any], pooling: str) -> bool:
    if pooling in ("prompt", "global") and SCHEDULES[schedule][-1][1] != DEPTH - 1:
        return False
    return pooling == "default" or (name not in HEADLESS and (name, pooling) not in REFUSED)


def run(model: nn.Module, pixels: Tensor) -> Tensor:
    if type(model).__name__ == "ViTMAEModel":
        return logits(model(pixels, noise=reference.mae_noise(pixels)))
    return logits(model(pixels))


def expand(stored: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        stored = stored @ weight.T + bias
    return stored.expand(LENGTH, -1)


def oracle(
    bare: nn.Module,
    model: nn.Module,
    spans: list[tuple[int, int]],
    spec: PromptSpec,
    pixels: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the naive loop with leaf copies of the model's prompts and head."""
    leaves = {
        n: p.detach().clone().requires_grad_() for n, p in trainable_parameters(model).items()
    }
    reference.put_head(bare, leaves)
    weight = leaves.get("prompts.project.32.weight")
    bias = leaves.get("prompts.project.32.bias")
    shared = spec.sharing in ("inter", "all")
    prompts = {
        enter: expand(leaves["prompts.shared.0" if shared else f"prompts.{enter}"], weight, bias)
        for enter, _ in spans
    }
    out = reference.predict(
        bare, pixels, prompts, spans, pooling=spec.pooling, dropout=spec.dropout or 0.0
    )
    return out, leaves


def compare(
    name: str,
    spans: list[tuple[int, int]],
    *,
    training: bool = False,
    tolerance: dict[str, float] = TOLERANCE,
    attention: str | None = None,
    **options: Any,
) -> nn.Module:
    """Inject, run, and compare logits and every gradient with the oracle."""
    bare = build(name)
    if attention is not None:
        bare.set_attn_implementation(attention)
    model = copy.deepcopy(bare)
    pixels = image()
    plain = run(model, pixels)
    options = {"dropout": 0.0} | options
    inject_prompts(model, LENGTH, generator=torch.Generator().manual_seed(1), **options)
    model.train(training)
    torch.manual_seed(5)
    ours = run(model, pixels)
    torch.manual_seed(5)
    theirs, leaves = oracle(bare, model, spans, model.prompts.spec, pixels)
    torch.testing.assert_close(ours, theirs, **tolerance)
    assert (ours - plain).abs().max() > 1e-4 * plain.abs().max(), "prompts have no effect"
    rtol = tolerance["rtol"]
    reference.same_gradients(ours, theirs, trainable_parameters(model), leaves, rtol, rtol)
    return model


@pytest.mark.parametrize(
    ("name", "schedule", "form", "dropout", "pooling"),
    pairwise(
        case
        for case in product(NAMES, SCHEDULES, ("auto", "token"), (0.0, 0.4), ("default", *POOLINGS))
        if possible(case[0], case[1], case[4])
    ),
)
def test_every_family_and_schedule(
    name: str, schedule: tuple[bool, Any], form: str, dropout: float, pooling: str
) -> None:
    """In training the masks of dropout are the same."""
    deep, layers = schedule
    compare(
        name,
        SCHEDULES[schedule],
        training=dropout > 0,
        deep=deep,
        layers=layers,
        form=form,
        dropout=dropout,
        pooling=pooling,
    )


@pytest.mark.parametrize(("name", "pooling"), REFUSED)
def test_a_pooling_that_a_head_cannot_read_is_refused(name: str, pooling: str) -> None:
    with pytest.raises(SpecError, match=REFUSED[name, pooling]):
        compare(name, DEEP, pooling=pooling)


@pytest.mark.parametrize(
    ("name", "form", "sharing", "project"),
    pairwise(
        product(
            ("timm/cls", "timm/map", "transformers/dinov2"),
            ("kv", "token"),
            ("none", "inter", "intra", "all"),
            (None, 7),
        )
    ),
)
def test_sharing_and_projection(name: str, form: str, sharing: str, project: int | None) -> None:
    compare(name, DEEP, form=form, sharing=sharing, project=project)


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("transformers/")])
def test_eager_attention(name: str) -> None:
    # The softmax of transformers' eager attention is float32 inside.
    compare(name, DEEP, attention="eager", tolerance={"rtol": 1e-5, "atol": 1e-5})


@pytest.mark.parametrize(
    "name", ["timm/cls", "timm/qk-norm", "timm/parallel-scaling", "timm/parallel-things"]
)
def test_unfused_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = pytest.importorskip("timm.layers.config")
    monkeypatch.setattr(config, "_USE_FUSED_ATTN", 0)
    model = compare(name, DEEP)
    assert not any(m.fused_attn for m in model.modules() if hasattr(m, "fused_attn"))
