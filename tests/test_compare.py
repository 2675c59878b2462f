"""The comparison of protocols on a folder of images, by library and by command line."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from zoo import build

from peft_vpt import load_task_adapter
from peft_vpt.cli import main
from peft_vpt.data import eval_transform, open_task
from peft_vpt.errors import SpecError, VPTError
from peft_vpt.experiments import run as runs
from peft_vpt.experiments.compare import Plan, compare
from peft_vpt.experiments.records import read_records
from peft_vpt.experiments.report import write_report

IMAGES = {"size": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear",
          "crop": None}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Bright and dark images in noise, easy to tell apart."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6), ("test", 6)):
        for name, level in (("dark", 60), ("light", 190)):
            place = tmp_path / "task" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(0, 60, (40, 36, 3)) + level
                Image.fromarray(noise.astype(np.uint8)).save(place / f"{i}.png")
    return tmp_path / "task"


PLAN = Plan(
    protocols=("linear", "vpt-deep"),
    options={"vpt-deep": {"length": 2}},
    epochs=2,
    factors=(0.1, 1.0),
    seeds=(0, 1),
    changes={"batch_size": 8},
)


def run(folder: Path, output: Path, plan: Plan = PLAN) -> Any:
    make = partial(build, "timm/cls", torch.float32)
    transform = eval_transform(IMAGES)
    return compare(
        open_task(folder), transform, make, backbone="tiny", folder=output, plan=plan,
        group="Natural", progress=False,
    )  # fmt: skip


def test_rates_are_chosen_on_val_and_test_is_seen_by_the_final_runs_alone(
    folder: Path, tmp_path: Path
) -> None:
    records = run(folder, tmp_path / "out")
    tried = [r for r in records if r["split"] == "val"]
    final = [r for r in records if r["split"] == "test" and r["config"].get("recipe")]
    assert len(tried) == len(final) == 4
    for protocol in ("linear", "vpt-deep"):
        of = {
            r["config"]["recipe"]["base_lr"]: r["metrics"]["top1"]
            for r in tried
            if r["protocol"] == protocol
        }
        best = min(of, key=lambda rate: (-of[rate], rate))
        used = {r["config"]["recipe"]["base_lr"] for r in final if r["protocol"] == protocol}
        assert used == {best}
    assert {r["config"]["train"] for r in tried} == {"train"}
    assert {r["config"]["train"] for r in final} == {"trainval"}
    assert {r["seed"] for r in final} == {0, 1}
    controls = {r["protocol"]: r["metrics"]["top1"] for r in records if not r["trainable"]}
    assert controls == {"majority class": 0.5, "16x16 pixels": 1.0}
    # What was recorded is what the saved adapter does.
    task = open_task(folder)
    transform, split = eval_transform(IMAGES), task.split("test")
    pixels = torch.stack([transform(split.image(i)) for i in range(len(split))])
    for record in final:
        path = tmp_path / "out" / "task" / f"{record['protocol']}-{record['seed']}"
        model = load_task_adapter(build("timm/cls", torch.float32), path).eval()
        right = model(pixels).argmax(1) == torch.tensor(split.labels)
        assert record["metrics"]["top1"] == pytest.approx(float(right.float().mean()))
        assert record["stored_bytes"] == (path / "adapter.safetensors").stat().st_size
        assert model.prompts.info["labels"] == ["dark", "light"]


def test_a_comparison_goes_on_where_it_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    once = runs.run_once

    def counted(pixels: Any, protocol: str, *args: Any, **options: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(protocol)
        return once(pixels, protocol, *args, **options)

    monkeypatch.setattr(runs, "run_once", counted)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "out")
    first = read_records(tmp_path / "out" / "records.jsonl")
    done.clear()
    done.append("spare")
    monkeypatch.setattr(runs, "run_once", once)
    records = run(folder, tmp_path / "out")
    assert records[: len(first)] == first
    assert len(records) == 2 + 8
    monkeypatch.setattr(runs, "run_once", counted)
    done[:] = ["full"] * 3
    assert run(folder, tmp_path / "out") == records


def test_the_report_is_made_from_records_alone(folder: Path, tmp_path: Path) -> None:
    records = run(folder, tmp_path / "out")
    page = write_report(records, tmp_path, title="Here", intro="Words.").read_text()
    assert "| linear" in page
    assert "| majority class" in page
    assert "accuracy.svg" in page
    again = write_report(read_records(tmp_path / "out" / "records.jsonl"), tmp_path, title="Here",
                         intro="Words.").read_text()  # fmt: skip
    assert again == page


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model("test_vit")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    arguments = ["compare", "--data", str(folder), "--model", "test_vit.r160_in1k", "--size", "64",
                 "--weights", str(tmp_path / "w.safetensors"), "--output", str(tmp_path / "out"),
                 "--protocols", "linear,bias", "--epochs", "1", "--factors", "1",
                 "--seeds", "1"]  # fmt: skip
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert "# Comparison on task" in out
    assert "resize to 64x64" in err
    assert {p.suffix for p in (tmp_path / "out").iterdir()} >= {".md", ".svg", ".png", ".jsonl"}
    assert main([*arguments[:-6], "--factors", "a"]) == 2
    assert main([*arguments[:-1], "1", "--protocols", "lora"]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_bad_plans(folder: Path, tmp_path: Path) -> None:
    for plan in (Plan(protocols=()), Plan(factors=()), Plan(seeds=())):
        with pytest.raises(SpecError, match="at least"):
            run(folder, tmp_path / "out", plan)
    assert not (tmp_path / "out").exists()
    with pytest.raises(VPTError):
        run(folder, tmp_path / "out", Plan(protocols=("lora",)))
