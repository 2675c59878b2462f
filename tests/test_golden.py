"""Adapters that earlier releases wrote load for ever, and give their logits."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_vpt import load_task_adapter
from peft_vpt.adapter.file import read_adapter

OWN = Path(__file__).parent / "golden"
# All files of all releases, where somebody keeps them; a few are in the repository.
FOLDER = Path(os.environ.get("PEFT_VPT_GOLDEN", OWN))


def recipes() -> Any:
    """Return the module that rebuilds hosts; it imports nothing of the package."""
    described = importlib.util.spec_from_file_location("golden_recipes", OWN / "recipe.py")
    assert described is not None
    assert described.loader is not None
    module = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.safetensors")), ids=lambda f: f.stem)
def test_a_file_of_an_earlier_release_gives_its_answer(file: Path) -> None:
    recipe = json.loads(file.with_suffix(".json").read_text())
    pytest.importorskip(recipe["host"]["library"])
    make = recipes()
    model = load_task_adapter(make.build(recipe), file).eval()
    answer, expected = make.answer(model, recipe), torch.tensor(recipe["expected"])
    assert (answer - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert read_adapter(file).metadata["task"] == file.stem


def test_a_few_files_are_always_there() -> None:
    assert len(list(OWN.glob("*.safetensors"))) >= 8
    assert sum(file.stat().st_size for file in OWN.iterdir()) < 1_500_000
