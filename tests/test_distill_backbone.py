"""The script that makes small backbones of other families, on a handful of images."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.images import draw_task

timm = pytest.importorskip("timm")
pytest.importorskip("torchvision")

from peft_vpt.hub.backbone import build_backbone  # noqa: E402

script: Any = importlib.import_module("examples.distill_backbone")
TEACHER = "test_vit.r160_in1k"
SMALL: dict[str, dict[str, Any]] = {
    "dinov2": {"embed_dim": 32, "depth": 1, "num_heads": 2, "init_values": 0.1},
    "swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return draw_task(tmp_path / "pets", (4, 1, 1), {"bird": 0, "cat": 0}, (40, 50), 256)


@pytest.mark.parametrize("student", SMALL)
def test_what_is_written_loads(
    student: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = script.STUDENTS[student]._replace(args=SMALL[student])
    monkeypatch.setitem(script.STUDENTS, student, chosen)
    teacher = timm.create_model(TEACHER)
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    out = tmp_path / "student.safetensors"
    options = {
        "--student": student, "--data": folder, "--teacher": TEACHER, "--out": out,
        "--weights": tmp_path / "teacher.safetensors", "--size": 112, "--steps": 2, "--batch": 4,
    }  # fmt: skip
    script.main([str(part) for pair in options.items() for part in pair])
    with safe_open(out, "pt") as file:
        assert file.metadata()["model"] == chosen.name
        written = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    loaded = build_backbone(
        "timm",
        chosen.name,
        weights=out,
        image_size=112,
        options={"num_classes": 0, **SMALL[student]},
    ).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in written.items())


def test_training_images_alone_are_read_and_each_once(folder: Path) -> None:
    found = script.read_images([folder, folder])
    assert found.shape == (8, 3, script.STORED, script.STORED)
    assert found.dtype == torch.uint8


def test_a_student_learns_what_its_teacher_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain(size: int) -> Any:
        return script.v2.Compose(
            [script.v2.Resize((size, size)), script.v2.ToDtype(torch.float32, scale=True)]
        )

    # Without crops the eight images can be learnt by heart.
    monkeypatch.setattr(script, "augment", plain)
    torch.manual_seed(0)
    student = timm.create_model(TEACHER, img_size=64, num_classes=0).train()
    teacher = timm.create_model(TEACHER, img_size=64).eval()
    args = script.argparse.Namespace(size=64, steps=150, batch=8, lr=1e-3)
    # The mean over the last fifty steps or so; 0 is what the teacher's mean alone explains.
    assert script.distill(student, teacher, script.read_images([folder]), args) > 0.5
