"""Fused attention turned off: the same numbers, or an error; never prompts without effect."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matrix.walk import output
from test_families import QUICK, TIMM, TRANSFORMERS, build

from peft_vpt import inject_prompts
from peft_vpt.errors import UnsupportedArchitectureError


@pytest.fixture
def unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = pytest.importorskip("timm.layers.config")
    monkeypatch.setattr(config, "_USE_FUSED_ATTN", 0)


def prompted(name: str, **call: Any) -> torch.Tensor:
    model, inputs = build(name)
    if call:
        model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(0)
    inject_prompts(model, 3, dropout=0.0, generator=generator)
    with torch.no_grad():
        return output(model, inputs)


def few(names: list[str]) -> list[Any]:
    slow = pytest.mark.slow
    return [n if any(q in n for q in QUICK) else pytest.param(n, marks=slow) for n in names]


@pytest.mark.parametrize("name", few(TIMM))
def test_timm_without_fused_attention(name: str, unfused: None) -> None:
    model, _ = build(f"timm/{name}")
    assert not any(getattr(module, "fused_attn", False) for module in model.modules())
    explicit = prompted(f"timm/{name}")
    config = pytest.importorskip("timm.layers.config")
    # 2 also fuses what timm calls experimental: Swin and others.
    config._USE_FUSED_ATTN = 2
    # Rotations and norms in float32 see their input rounded in another place.
    torch.testing.assert_close(explicit, prompted(f"timm/{name}"), rtol=1e-6, atol=1e-8)


# The wrapper of timm models has no choice of attention.
@pytest.mark.parametrize("name", few([n for n in TRANSFORMERS if "Timm" not in n]))
def test_transformers_eager_attention(name: str) -> None:
    if "Sam2" in name:
        # It computes scores twice; which of the two counts cannot be told without SDPA.
        with pytest.raises(UnsupportedArchitectureError, match="set_attn_implementation"):
            prompted(f"transformers/{name}", eager=True)
        return
    # The softmax of eager attention is float32.
    torch.testing.assert_close(
        prompted(f"transformers/{name}", eager=True),
        prompted(f"transformers/{name}"),
        rtol=1e-4,
        atol=1e-5,
    )
