"""The page of results: its numbers are those of the records, whatever they are."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
pytest.importorskip("torchvision")

from peft_vpt.experiments import append_record, make_record
from peft_vpt.training import preset

script: Any = importlib.import_module("examples.results_page")


def add(file: Path, protocol: str, top1: float, *, split: str = "test", **other: Any) -> None:
    recipe = preset("vpt-deep", epochs=12, seed=other.get("seed", 0), **other.pop("changes", {}))
    options = {"length": 7, **other.pop("options", {})}
    edge = other.pop("size", 112)
    config = {"recipe": recipe.to_dict(), "options": options}
    config["preprocessing"] = {"size": [edge, edge]}
    config |= {"train": "trainval", "images": {"train": "40, sum a", "val": "10, sum b"}}
    fields = {"task": "land", "group": "Specialized", "backbone": "vit", "seed": 0, "trainable": 9,
              "preset": "default", "factor": 1.0}  # fmt: skip
    metrics = {"top1": top1, **other.pop("metrics", {})}
    append_record(
        file,
        make_record(
            **{**fields, "protocol": protocol, "split": split, "config": config, **other},
            metrics=metrics,
        ),
    )


def test_numbers_come_from_the_records(tmp_path: Path) -> None:
    file = tmp_path / "results" / "comparison.jsonl"
    for seed, (deep, linear) in enumerate(((0.9, 0.8), (0.92, 0.81))):
        add(file, "vpt-deep", deep, seed=seed)
        add(file, "linear", linear, seed=seed)
    add(file, "vpt-deep", 0.77, split="val", changes={"base_lr": 0.5})
    first = script.main(["--folder", str(tmp_path)]).read_text()
    assert "91.0** ± 1.4" in first
    assert "- land: vpt-deep beats linear (+10.5 points)." in first
    assert "| land, vpt-deep | 77.0 |" in first
    assert "--size 112 --epochs 12 --length 7 --seeds 2 --factors 1 --init random\n" in first
    assert "`vit` on land (Specialized): 50 training images, 112 px, 12 epochs" in first
    assert "preset default with" in first
    assert "Segmentation" not in first
    assert (tmp_path / "results" / "accuracy.svg").exists()
    assert script.main(["--folder", str(tmp_path)]).read_text() == first


def test_a_loss_is_said(tmp_path: Path) -> None:
    file = tmp_path / "results" / "comparison.jsonl"
    add(file, "vpt-deep", 0.7)
    add(file, "linear", 0.75)
    page = script.write(file.parent)
    assert "- land: vpt-deep does not beat linear (-5.0 points)." in page


def test_rates_and_segmentation_have_their_sections(tmp_path: Path) -> None:
    for name in ("vpt-deep", "linear"):
        add(tmp_path / "comparison.jsonl", name, 0.7)
    own = {kind: preset("vpt-deep", kind=kind) for kind in ("default", "paper")}
    for kind, values in (("default", (0.5, 0.75)), ("paper", (0.25, 0.1))):
        for factor, top1 in zip((1.0, 3.0), values, strict=True):
            changes = {
                "optimizer": own[kind].optimizer,
                "base_lr": own[kind].base_lr * factor,
            }
            add(tmp_path / "rates.jsonl", "vpt-deep", top1, split="val", changes=changes,
                preset=kind, factor=factor)  # fmt: skip
    masks = {"miou": 0.625, "miou_multi": 0.65, "iou nucleus": 0.4}
    add(tmp_path / "segmentation.jsonl", "head", 0.0, metrics=masks)
    page = script.write(tmp_path)
    lines = [" ".join(line.split()) for line in page.splitlines()]
    names = {kind: f"{kind} ({own[kind].optimizer}, {own[kind].base_lr:g})" for kind in own}
    assert f"| vit, land, {names['default']} | 50.0 | 75.0 | 25.0 |" in lines
    assert f"| vit, land, {names['paper']} | 25.0 | 10.0 | 15.0 |" in lines
    assert "| head   | 62.5 |              65.0 |        40.0 |" in page


def test_both_beginnings_of_prompts_stand_beside_each_other(tmp_path: Path) -> None:
    for name in ("vpt-deep", "linear"):
        add(tmp_path / "comparison.jsonl", name, 0.7)
    file = tmp_path / "beginnings.jsonl"
    tokens = {"init": "tokens"}
    for seed in (0, 1):
        add(file, "linear", 0.5, seed=seed)
        add(file, "vpt-deep", 0.55, seed=seed)
        add(file, "vpt-deep", 0.6 + 0.02 * seed, seed=seed, options=tokens)
    add(file, "linear", 0.8, size=224)
    add(file, "vpt-deep", 0.75, size=224, options=tokens)
    add(file, "vpt-deep", 0.9, split="val", options=tokens)
    append_record(file, make_record(task="land", protocol="majority class", backbone="vit", seed=0,
                                    split="test", metrics={"top1": 0.1}))  # fmt: skip
    page = script.write(tmp_path)
    lines = [" ".join(line.split()) for line in page.splitlines()]
    assert "| vpt-deep, tokens | **61.0** ± 1.4 | **61.00** |" in lines
    assert "| vpt-deep | 55.0 ± 0.0 | 55.00 |" in lines
    assert "- land: vpt-deep, tokens beats linear (+11.0 points)." in lines
    assert "- land: vpt-deep, tokens does not beat linear (-5.0 points)." in lines
    assert "`vit` at 224 px, 12 epochs, batch 64, 1 seeds" in page


def test_the_rates_are_those_of_the_records_and_not_of_the_presets_of_now(tmp_path: Path) -> None:
    add(tmp_path / "comparison.jsonl", "vpt-deep", 0.7)
    add(tmp_path / "comparison.jsonl", "linear", 0.7)
    for factor, top1 in ((0.3, 0.6), (1.0, 0.8), (3.0, 0.53), (10.0, 0.1)):
        add(tmp_path / "rates.jsonl", "vpt-deep", top1, split="val", factor=factor,
            changes={"base_lr": 0.077 * factor}, risen=factor == 10)  # fmt: skip
    (tmp_path / "about.md").write_text("Made by hand.")
    page = script.write(tmp_path)
    assert "Made by hand." in page
    lines = [" ".join(line.split()) for line in page.splitlines()]
    row = "| vit, land, default (adamw, 0.077) | 60.0 | 80.0 | 53.0 | 10.0 ! | 27.0 |"
    assert row in lines


def test_runs_without_a_class_do_not_count() -> None:
    records = [{"metrics": {"iou sea": value}} for value in (0.5, None, 0.7)]
    assert script.percent(records, "iou sea").startswith("60.0 ±")
    assert script.percent(records[1:2], "iou sea") == "-"


def test_rates_are_chosen_only_where_there_are_several() -> None:
    def run(protocol: str, rate: float) -> dict[str, Any]:
        return {"protocol": protocol, "split": "val", "config": {"recipe": {"base_lr": rate}}}

    one_each = [run("bias", 0.1), run("full", 0.01), run("bias", 0.1)]
    assert script.chosen(one_each) == "learning rates are the preset's"
    assert script.chosen([*one_each, run("bias", 0.3)]) == "learning rates chosen on val"


def test_no_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--folder", str(tmp_path)])
    assert "comparison.jsonl: no such file" in capsys.readouterr().err


def test_the_committed_page_is_that_of_the_committed_records() -> None:
    docs = Path(__file__).parents[1] / "docs"
    assert (docs / "results.md").read_text(encoding="utf-8") == script.write(docs / "results")
