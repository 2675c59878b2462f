"""An adapter meets the models that people really have: wrapped, inside others, saved by hand."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_adapters import out, trained
from torch import nn
from zoo import build, image, logits

from peft_vpt import (
    inject_prompts,
    is_prompted,
    load_task_adapter,
    remove_prompts,
    save_task_adapter,
    trainable_parameters,
)
from peft_vpt.errors import AdapterMismatchError

NAMES = ("timm/cls", "transformers/vit", "transformers/dinov2")


class Detector(nn.Module):
    """A larger model with a head of its own over a backbone."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.boxes = nn.Linear(5, 4, dtype=torch.float64)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.boxes(logits(self.backbone(pixels)))


@pytest.mark.parametrize("name", NAMES)
def test_a_submodule_of_a_larger_model(name: str, tmp_path: Path) -> None:
    save_task_adapter(trained(name, classes=None), tmp_path)
    model = Detector(build(name))
    before = model(image())
    load_task_adapter(model.backbone, tmp_path)
    alone = load_task_adapter(build(name), tmp_path)
    assert torch.equal(model(image()), model.boxes(out(alone)))
    remove_prompts(model.backbone)
    assert torch.equal(model(image()), before)
    assert set(dict(model.named_parameters())) == set(
        dict(Detector(build(name)).named_parameters())
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("classes", [1, 9])
def test_another_class_count_gives_way(name: str, classes: int, tmp_path: Path) -> None:
    source = trained(name)
    save_task_adapter(source, tmp_path, labels=["a", "b", "c", "d"])
    changes = {"num_classes" if name.startswith("timm") else "num_labels": classes}
    model = build(name, **changes)
    body = build(name).state_dict().items()
    model.load_state_dict(
        {n: t for n, t in body if not n.startswith(("head", "classifier"))}, strict=False
    )
    load_task_adapter(model, tmp_path)
    assert torch.equal(out(model), out(source))
    if name.startswith("transformers"):
        assert model.config.num_labels == 4
        assert model.config.label2id == {"a": 0, "b": 1, "c": 2, "d": 3}
    remove_prompts(model)
    assert out(model).shape[-1] == classes


@pytest.mark.parametrize("name", NAMES)
def test_over_another_task_with_other_options(name: str, tmp_path: Path) -> None:
    source = trained(name, classes=3, deep=False)
    save_task_adapter(source, tmp_path)
    model = trained(name, classes=6, layers=(1, 2), sharing="inter")
    load_task_adapter(model, tmp_path)
    assert torch.equal(out(model), out(source))
    assert set(trainable_parameters(model)) == set(trainable_parameters(source))


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_saved_by_hand(name: str, tmp_path: Path) -> None:
    source = trained(name)
    torch.save(source.state_dict(), tmp_path / "whole.pt")
    torch.save(trainable_parameters(source), tmp_path / "task.pt")
    for file, strict in (("whole.pt", True), ("task.pt", False)):
        model = inject_prompts(build(name), 3, num_classes=4)
        state = torch.load(tmp_path / file, weights_only=True)
        assert not model.load_state_dict(state, strict=strict).unexpected_keys
        assert torch.equal(out(model.eval()), out(source))
    # From there it becomes an adapter as any other.
    save_task_adapter(model, tmp_path)
    assert torch.equal(out(load_task_adapter(build(name), tmp_path)), out(source))


@pytest.mark.parametrize("name", NAMES)
def test_the_state_dict_of_a_prompted_model_does_not_fit_a_bare_one(name: str) -> None:
    model = build(name)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*prompts\."):
        model.load_state_dict(trained(name, classes=None).state_dict())


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrapped_models_save_what_the_bare_one_saves(wrap: Any, tmp_path: Path) -> None:
    model = trained("timm/cls")
    bare = save_task_adapter(model, tmp_path / "bare").read_bytes()
    assert save_task_adapter(wrap(model), tmp_path / "wrapped").read_bytes() == bare


def test_a_user_who_moved_one_block_to_meta_is_told(tmp_path: Path) -> None:
    save_task_adapter(trained("timm/cls"), tmp_path)
    model = build("timm/cls")
    model.blocks[2].to("meta")
    with pytest.raises(AdapterMismatchError, match="meta device"):
        load_task_adapter(model, tmp_path)
    assert not is_prompted(model)


def test_label_names_and_preprocessing_come_back_for_a_pipeline(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from PIL import Image

    from peft_vpt.preprocessing import image_processor

    labels = ["ant", "bee", "cat", "dog"]
    size = {"size": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear",
            "crop": None}  # fmt: skip
    source = trained("transformers/vit").float()
    save_task_adapter(source, tmp_path, labels=labels, preprocessing=size)
    model = load_task_adapter(build("transformers/vit", torch.float32), tmp_path)
    info = model.prompts.info
    assert info["labels"] == labels
    assert info["preprocessing"] == size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = transformers.pipeline(
            "image-classification", model=model, image_processor=image_processor(size), top_k=4
        )
    picture = Image.effect_noise((50, 40), 80).convert("RGB")
    found = {row["label"]: row["score"] for row in task(picture)}
    pixels = image_processor(size)(picture, return_tensors="pt")["pixel_values"]
    wanted = logits(source(pixels)).softmax(-1)[0]
    assert found == pytest.approx(dict(zip(labels, wanted.tolist(), strict=True)), rel=1e-5)
